"""Scenes on disk, in MGrounding-630k's layout, and the held-out questions that reported numbers are measured on.

    DIR/scenes.json            [{"id", "images": ["images/..."], "conversations": [...], "type": task}, ...]
    DIR/images/TASK_N_K.png    picture K of set N

A conversation is one human turn, `<image>` and a line break for every picture and then the question, and one gpt turn.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ...runtime.files.write import whole_folder
from .layout import Question, Sample
from .stream import HELD_OUT_SEED, check_seed
from .tasks import sample
from .wordings import EASY_TASKS, TASKS

__all__ = ["HeldOut", "held_out", "write_dataset", "write_records"]

_QUESTIONS_PER_SET = 2
_ALL_TASKS = (*TASKS, *EASY_TASKS)


class HeldOut(NamedTuple):
    """A question with the set of pictures it is about."""

    scene: Sample
    question: Question


def _task_index(task: str) -> int:
    if task not in _ALL_TASKS:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(_ALL_TASKS)}")
    return _ALL_TASKS.index(task)


def held_out(task: str, n: int = 100, *, size: tuple[int, int] = (196, 196)) -> list[HeldOut]:
    """Draws the first n held-out questions of a task: difficulty 1, up to 3 pictures, at most two of a set.

    The generator's seed is [1000000, the task's index], which no training seed meets. Fewer questions are the
    beginning of more.
    """
    return _questions(np.random.default_rng([HELD_OUT_SEED, _task_index(task)]), task, n, size, 3, 1)


def _questions(
    rng: np.random.Generator, task: str, n: int, size: tuple[int, int], max_images: int, difficulty: float
) -> list[HeldOut]:
    """n questions of a task, up to two at random from each set."""
    items: list[HeldOut] = []
    while len(items) < n:
        scene = sample(rng, task, size, max_images, difficulty)
        main = [q for q in scene["qas"] if q.meta["task"] == task]
        items += [HeldOut(scene, main[j]) for j in rng.permutation(len(main))[:_QUESTIONS_PER_SET]]
    return items[:n]


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes a list of records as JSON."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(records, file, indent=1)
        file.write("\n")


def write_dataset(
    folder: str | Path,
    per_task: int,
    seed: int,
    *,
    tasks: Sequence[str] = TASKS,
    size: tuple[int, int] = (196, 196),
    max_images: int = 4,
    difficulty: float = 2,
) -> Path:
    """Writes per_task questions of each task with their pictures; returns the path of the JSON file.

    The folder appears complete or not at all; the same arguments write the same bytes (with one Pillow version).
    Raises ValueError on a held-out seed or unknown task, ModelFileError when folder is there and not empty or cannot
    be written.
    """
    check_seed(seed)
    indices = {task: _task_index(task) for task in tasks}
    with whole_folder(folder, parents=True) as partial:
        (partial / "images").mkdir()
        records = []
        for task, index in indices.items():
            # Three words, the last not 0: numpy pads seeds with zeros, and [seed, index] is a batch of a stream
            rng = np.random.default_rng([seed, 0, 1 + index])
            records += _write_task(partial, task, _questions(rng, task, per_task, size, max_images, difficulty))
        write_records(partial / "scenes.json", records)
    return Path(folder) / "scenes.json"


def _write_task(folder: Path, task: str, items: Sequence[HeldOut]) -> list[dict]:
    """Writes the pictures of one task; returns its records."""
    records: list[dict] = []
    last, number = None, -1
    names: list[str] = []
    for i, (scene, question) in enumerate(items):
        if scene is not last:
            last, number = scene, number + 1
            names = [f"images/{task}_{number:05d}_{k}.png" for k in range(1, 1 + len(scene["images"]))]
            for name, picture in zip(names, scene["images"], strict=True):
                Image.fromarray(picture).save(folder / name)
        human = "<image>\n" * len(names) + question.text
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": question.answer}]
        records.append({"id": f"{task}_{i:05d}", "images": names, "conversations": turns, "type": task})
    return records
