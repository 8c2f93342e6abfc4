"""MIBench: multiple choice over several pictures, nine tasks of its instruction and knowledge-seeking files.

A question is right when its answer, without a full stop, stands in the response. Score: per task, and their mean.
upstream_compat repeats the published script: families whose response it keeps in a list must match the answer whole,
every task counts as 1000 questions, and all nine tasks count whether or not the file has them.

Source: Migician's eval/MIG_bench_eval.py, mibench_eval; data: arXiv:2407.15272, multi_image_instruction.json and
multimodal_knowledge_seeking.json, arrays of {"id", "image": [paths], "question", "options": [texts], "answer", "task"}.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from ...runtime.errors import MigicianError
from ...runtime.image import open_picture
from ..engines import Engine
from .families import PICTURE, Family, find, render

__all__ = ["TASKS", "Choice", "evaluate", "prompt", "read"]

FILES = ("multi_image_instruction.json", "multimodal_knowledge_seeking.json")
TASKS = (
    "general_comparison",
    "subtle_difference",
    "visual_referring",
    "temporal_reasoning",
    "logical_reasoning",
    "fine_grained_visual_recognition",
    "text_rich_images",
    "vision_linked_textual_knowledge",
    "text_linked_visual_knowledge",
)
REQUEST = "Please only strictly answer from the choice list: "
_PER_TASK = 1000

Progress = Callable[[int, int], None]  # answers there, of how many


@dataclass(frozen=True)
class Choice:
    """One question of a sibling benchmark. text: what is asked, options and all; answer: what is right."""

    task: str
    images: tuple[Path, ...]
    question: str
    options: tuple[str, ...]
    answer: str


def read(path: Path | str, images_root: Path | str | None = None) -> list[Choice]:
    """Reads one of MIBench's files, or a folder with both.

    images_root: the folder where the records' picture paths begin; None is the file's own.
    Raises MigicianError for a file that is not of that form, and for pictures that are not there.
    """
    path, root = Path(path), root_of(path, images_root)
    files = [path]
    if path.is_dir():
        files = [path / name for name in FILES if (path / name).is_file()]
        if not files:
            raise MigicianError(f"{path}: has none of {', '.join(FILES)}; give MIBench's folder or one of its files")
    found = []
    for file in files:
        for where, record in records(file):
            options = texts(where, record, "options")
            task, question, answer = (text(where, record, key) for key in ("task", "question", "answer"))
            images = pictures(where, texts(where, record, "image"), root)
            found.append(Choice(task, images, question, options, answer))
    check_pictures(path, found)
    return found


def prompt(family: Family, choice: Choice) -> str:
    """Writes a question as the published script does for a family."""
    question = choice.question
    if family.placeholders == "name":
        numbers = iter(range(1, question.count(PICTURE) + 1))
        question = re.sub(re.escape(PICTURE), lambda _: f"Image-{next(numbers)}", question)
    elif family.placeholders == "drop" or (family.inline and question.count(PICTURE) != len(choice.images)):
        question = question.replace(PICTURE, "")
    words = question + REQUEST + " | ".join(choice.options) + family.mibench_tail
    # where the question does not say itself where its pictures stand, they come first under their headers
    return words if not family.inline or PICTURE in question else render(family, words, len(choice.images))


def evaluate(
    engine: Engine,
    path: Path | str,
    images_root: Path | str | None = None,
    *,
    upstream_compat: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Asks and scores all questions.

    Returns {"benchmark", "model", "family", "upstream_compat", "questions", "tasks": {name: {"questions", "correct",
    "accuracy"}}, "average"}, accuracies in percent.   progress: called after every answer.
    Raises MigicianError from reading, and what the engine raises.
    """
    family = find(engine.family)
    choices = read(path, images_root)
    if upstream_compat and (unknown := {c.task for c in choices} - set(TASKS)):
        raise MigicianError(f"{path}: the published script has no task {min(unknown)}; leave the compatible mode off")
    right: dict[str, list[bool]] = {}
    for done, choice in enumerate(choices, 1):
        with fitted(choice.images, family.mibench_side) as images:
            response = engine.answer(images, prompt(family, choice), family.mibench_tokens).text
        whole = upstream_compat and family.listed
        right.setdefault(choice.task, []).append(is_right(choice.answer, response, whole=whole))
        if progress:
            progress(done, len(choices))
    names = TASKS if upstream_compat else tuple(right)
    counts = {name: (_PER_TASK if upstream_compat else len(right[name]), sum(right.get(name, []))) for name in names}
    return summary("mibench", engine, counts, upstream_compat)


# ---- what MMIU shares
def root_of(path: Path | str, images_root: Path | str | None) -> Path:
    """Where picture paths begin."""
    if images_root is not None:
        return Path(images_root)
    return Path(path) if Path(path).is_dir() else Path(path).parent


def is_right(answer: str, response: str, *, whole: bool = False) -> bool:
    """Whether a response has the answer in it, or with whole is nothing else."""
    truth = answer.strip().strip(".")
    return truth == response if whole else truth in response


def summary(
    benchmark: str, engine: Engine, counts: Mapping[str, tuple[int, int]], upstream_compat: bool
) -> dict[str, Any]:
    """Puts a result together. counts: {task: (questions, correct)}; the average gives every task the same weight."""
    tasks = {
        name: {"questions": n, "correct": correct, "accuracy": round(100 * correct / n, 4)}
        for name, (n, correct) in counts.items()
    }
    return {
        "benchmark": benchmark,
        "model": engine.name,
        "family": engine.family,
        "upstream_compat": upstream_compat,
        "questions": sum(n for n, _ in counts.values()),
        "tasks": tasks,
        "average": round(fmean(100 * correct / n for n, correct in counts.values()), 4) if counts else 0.0,
    }


def records(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """Reads a JSON array of objects, or JSON lines; yields where each is from, for messages, and the object."""
    try:
        raw = path.read_text("utf-8")
        values = json.loads(raw) if raw.lstrip().startswith("[") else [json.loads(s) for s in raw.splitlines() if s]
    except OSError as error:
        raise MigicianError(f"{path}: {error.strerror or error}; give the benchmark's data file") from None
    except (ValueError, RecursionError) as error:
        raise MigicianError(f"{path}: not JSON ({error}); give the benchmark's data file") from None
    if not values:
        raise MigicianError(f"{path}: holds no question; give the benchmark's data file")
    for i, value in enumerate(values):
        where = f"{path}: record {i}"
        if not isinstance(value, dict):
            raise MigicianError(f"{where}: not an object; give the benchmark's data file")
        yield where, value


def text(where: str, record: Mapping[str, Any], key: str) -> str:
    """A field that has to be a text. Raises MigicianError."""
    value = record.get(key)
    if not isinstance(value, str):
        raise MigicianError(f"{where}: {key!r} is not a text; correct the file or take the published one")
    return value


def texts(where: str, record: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A field that has to be a list of texts. Raises MigicianError."""
    value = record.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
        raise MigicianError(f"{where}: {key!r} is not a list of texts; correct the file or take the published one")
    return tuple(value)


def pictures(where: str, names: Iterable[str], root: Path) -> tuple[Path, ...]:
    """Joins picture paths to their folder. Raises MigicianError for one that leads out of it."""
    found = []
    for name in names:
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise MigicianError(f"{where}: picture {name!r} lies outside the pictures' folder; correct the file")
        found.append(root.joinpath(*relative.parts))
    return tuple(found)


def check_pictures(path: Path, choices: Iterable[Choice]) -> None:
    """Raises MigicianError when pictures are missing, before an hour of questions."""
    needed = dict.fromkeys(image for choice in choices for image in choice.images)
    missing = [image for image in needed if not image.is_file()]
    if missing:
        raise MigicianError(
            f"{path}: {len(missing)} of {len(needed)} pictures are not there, the first is {missing[0]}; "
            "give the folder that their paths begin in"
        )


@contextmanager
def fitted(images: Sequence[Path], longest_side: int | None) -> Iterator[Sequence[Path]]:
    """Gives pictures brought to a longest side, larger or smaller, as files that are gone afterwards.

    longest_side: None gives the pictures as they are. Sizes are cut to whole pixels, as the published resize does.
    """
    if longest_side is None:
        yield images
        return
    with TemporaryDirectory(prefix="migician-bench-") as name:
        found = []
        for i, path in enumerate(images):
            image = open_picture(path)
            scale = min(longest_side / image.width, longest_side / image.height)
            size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
            found.append(Path(name) / f"{i}.png")
            image.resize(size, Image.Resampling.BICUBIC).save(found[-1], compress_level=1)
        yield found
