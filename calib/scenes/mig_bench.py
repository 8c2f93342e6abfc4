"""The held-out questions in MIG-Bench's own layout, so that the code that scores the published data scores them too.

    DIR/MIG_data.json          [{"task", "images", "question", "answer", "additional_info", "need_format"}, ...]
    DIR/images/TASK_N_K.png    picture K of set N

They are the questions of held_out, in its order: tasks one after the other, those about the same pictures together.
As in the published data, answer is [x1, y1, x2, y2] in 0..1 with three decimals, additional_info names the picture
(group_grounding) or repeats the bare question (reasoning), and need_format is false where the data has it so.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...runtime.files.write import whole_folder
from .dataset import HeldOut, held_out, write_records
from .layout import Question
from .wordings import TASKS, WORDINGS

__all__ = ["FILE_NAME", "write_mig_bench"]

FILE_NAME = "MIG_data.json"
_WITHOUT_FORMAT = ("group_grounding", "object_tracking")
_TAIL = WORDINGS["reasoning"][0].removeprefix("{question}")


def write_mig_bench(folder: str | os.PathLike[str], per_task: int, *, tasks: Sequence[str] = TASKS) -> Path:
    """Writes the first per_task held-out questions of each task with their pictures; returns the JSON file's path.

    The folder appears complete or not at all; the same arguments write the same bytes (with one Pillow version).
    Raises ValueError on a task that is not one of the ten or fewer than one question, ModelFileError when the folder
    is there and not empty, or cannot be written.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise ValueError(f"{', '.join(map(repr, unknown)) or 'no task'}: choose from {', '.join(TASKS)}")
    if per_task < 1:
        raise ValueError(f"{per_task} questions of each task; ask for at least 1")
    with whole_folder(folder, parents=True) as partial:
        (partial / "images").mkdir()
        records = [record for task in dict.fromkeys(tasks) for record in _task(partial, task, per_task)]
        write_records(partial / FILE_NAME, records)
    return Path(folder) / FILE_NAME


def _task(folder: Path, task: str, count: int) -> Iterator[dict[str, Any]]:
    """Writes the pictures of one task and yields its records."""
    last, number = None, -1
    names: list[str] = []
    for scene, question in held_out(task, count):
        if scene is not last:
            last, number = scene, number + 1
            names = [f"images/{task}_{number:05d}_{k}.png" for k in range(1, 1 + len(scene["images"]))]
            for name, picture in zip(names, scene["images"], strict=True):
                Image.fromarray(picture).save(folder / name)
        yield _record(HeldOut(scene, question), names)


def _record(item: HeldOut, names: Sequence[str]) -> dict[str, Any]:
    task = item.question.meta["task"]
    return {
        "task": task,
        "images": list(names),
        "question": item.question.text,
        "answer": [round(v, 3) for v in item.question.meta["box"]],
        "additional_info": _additional_info(item.question),
        "need_format": task not in _WITHOUT_FORMAT,
    }


def _additional_info(question: Question) -> str:
    task = question.meta["task"]
    if task == "group_grounding":
        return question.answer.partition("<|box_start|>")[0].strip()
    return question.text.removesuffix(_TAIL) if task == "reasoning" else ""
