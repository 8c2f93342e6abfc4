"""MMIU: multiple choice over up to dozens of pictures, 52 tasks; pictures are brought to a longest side of 800.

A question is right when its letter, `output` in the data, stands in the response. Score: per task, and their mean.
upstream_compat repeats the published script: for the families that it counts twice every question is two, and tasks
without a right answer are left out of the mean.

Source: Migician's eval/MIG_bench_eval.py, mmiubench_eval, and eval/utils.py, calculate and resize; data:
arXiv:2408.02718, an array of {"task", "input_image_path": [paths], "question", "context", "output"}.
"""

from pathlib import Path
from typing import Any

from ..engines import Engine
from .families import Family, find, render
from .mibench import (
    Choice,
    Progress,
    check_pictures,
    fitted,
    is_right,
    pictures,
    records,
    root_of,
    summary,
    text,
    texts,
)

__all__ = ["evaluate", "prompt", "read"]

LONGEST_SIDE = 800


def read(path: Path | str, images_root: Path | str | None = None) -> list[Choice]:
    """Reads MMIU's data file; the one option of a Choice is the context, which lists the choices.

    images_root: the folder that "./" of the records' picture paths stands for; None is the file's own.
    Raises MigicianError for a file that is not of that form, and for pictures that are not there.
    """
    path, root = Path(path), root_of(path, images_root)
    found = []
    for where, record in records(path):
        task, question, context, answer = (
            text(where, record, key) for key in ("task", "question", "context", "output")
        )
        images = pictures(where, texts(where, record, "input_image_path"), root)
        found.append(Choice(task, images, question, (context,), answer))
    check_pictures(path, found)
    return found


def prompt(family: Family, choice: Choice) -> str:
    """Writes a question as the published script does for a family: headers stand behind "Question:"."""
    (context,) = choice.options
    header = render(family, "", len(choice.images)) if family.header else ""
    return f"Question:\n{header}{choice.question}\nSpecifically:\n{context}{family.mmiu_tail}"


def evaluate(
    engine: Engine,
    path: Path | str,
    images_root: Path | str | None = None,
    *,
    upstream_compat: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Asks and scores all questions; what it takes, returns and raises is mibench.evaluate's."""
    family = find(engine.family)
    choices = read(path, images_root)
    counts: dict[str, tuple[int, int]] = {}
    each = 2 if upstream_compat and family.doubled else 1
    for done, choice in enumerate(choices, 1):
        with fitted(choice.images, LONGEST_SIDE) as images:
            response = engine.answer(images, prompt(family, choice), family.new_tokens).text
        asked, right = counts.get(choice.task, (0, 0))
        counts[choice.task] = asked + each, right + is_right(choice.answer, response)
        if progress:
            progress(done, len(choices))
    if upstream_compat:
        counts = {name: (n, right) for name, (n, right) in counts.items() if right}
    return summary("mmiu", engine, counts, upstream_compat)
