"""MIG-Bench's questions as its published file holds them, and answers as JSON lines."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ...calib.pictures import Pictures
from ...runtime.errors import MigicianError
from ...runtime.files.archive import is_file
from ...runtime.files.hub import Dataset, obtain_dataset

__all__ = [
    "Question",
    "fingerprint",
    "missing_pictures",
    "picture_index",
    "picture_order",
    "read_answers",
    "read_lines",
    "read_mig_bench",
    "select",
    "unique_answers",
]

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_NTH = re.compile(r"in the (\d+)th image")
_LAST_TASKS = {"correspondence", "diff", "view_diff", "refer_grounding", "reasoning"}  # two pictures, asked of the 2nd


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    index: its place in the data file, from 0; answers refer to it.   answer: the true box x1, y1, x2, y2, 0..1 of width
    and height, as published: corners may be out of order or out of range.   info: the file's additional_info.
    need_format: the file's flag.   target: the picture the box lies in, from 0, None where the truth is not known.
    """

    index: int
    task: str
    images: tuple[Path, ...]
    question: str
    answer: tuple[float, float, float, float]
    info: str
    need_format: bool
    target: int | None

    @property
    def inverted(self) -> bool:
        """Whether the true box has corners out of order, so that no answer can score."""
        x1, y1, x2, y2 = self.answer
        return x1 > x2 or y1 > y2


def picture_index(text: str) -> int:
    """Finds which picture a text names, from 0, as the published evaluation does; -1 for none.

    A substring test in the order first, second, ... sixth; each has five spellings: "first", "Image-1", "Image1",
    "Image 1", "1th". Source: Migician's eval/MIG_bench_cot.py, get_image_index.
    """
    for i, word in enumerate(_ORDINALS):
        n = i + 1
        if any(name in text for name in (word, f"Image-{n}", f"Image{n}", f"Image {n}", f"{n}th")):
            return i
    return -1


def _target(task: str, question: str, info: str, pictures: int) -> int | None:
    """The picture a question's true box lies in."""
    found: int | None = None
    if task == "region":
        found = 0  # the regions are pictures 2 and up
    elif task in _LAST_TASKS:
        found = 1  # for diff either would do: both pictures have one layout
    elif task in ("common_object", "multi_view", "object_tracking"):
        nth = _NTH.findall(question)
        found = int(nth[-1]) - 1 if nth else None
    elif task == "group_grounding":
        found = picture_index(info.partition("<|box_start|>")[0])
    return found if found is not None and 0 <= found < pictures else None


def read_mig_bench(path: Path | str, images_root: Path | str | None = None) -> list[Question]:
    """Reads a MIG_data.json: an array of {task, images, question, answer, additional_info, need_format}.

    path: or a dataset of the hub, as ORG/NAME, which is downloaded if need be.
    images_root: the folder where the records' picture paths begin; None tries the file's own folder and the places
    where unpacked downloads put them, then the zip files there. Pictures need not exist, see missing_pictures().
    Raises MigicianError for a file that cannot be read or a record that is not a question.
    """
    dataset = obtain_dataset(path)
    path = Path(path) if dataset is None else _data_file(dataset)
    try:
        records = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise MigicianError(f"{path}: {error.strerror or error}; give MIG-Bench's MIG_data.json") from None
    except (ValueError, RecursionError) as error:
        raise MigicianError(f"{path}: not JSON ({error}); give MIG-Bench's MIG_data.json") from None
    if not isinstance(records, list) or not records:
        raise MigicianError(f"{path}: not a JSON array of questions; give MIG-Bench's MIG_data.json")
    names = [_picture_names(path, i, record) for i, record in enumerate(records)]
    locate = _locator(path, None if images_root is None else Path(images_root), names, dataset)
    return [_question(path, i, record, names[i], locate) for i, record in enumerate(records)]


def _data_file(dataset: Dataset) -> Path:
    """The file of a dataset that holds the questions."""
    found = [path for path in dataset.records if path.name == "MIG_data.json"] or dataset.records
    if len(found) > 1:
        names = ", ".join(str(path) for path in found[:4])
        raise MigicianError(f"{dataset.label}: several JSON files; give --data one of them: {names}")
    return found[0]


def _wrong(path: Path, index: int, what: str) -> MigicianError:
    return MigicianError(f"{path}: record {index}: {what}; correct the file or take the published one")


def _picture_names(path: Path, index: int, record: Any) -> list[PurePosixPath]:
    if not isinstance(record, dict):
        raise _wrong(path, index, "not an object")
    images = record.get("images")
    if not isinstance(images, list) or not images or not all(isinstance(i, str) and i for i in images):
        raise _wrong(path, index, "'images' is not a list of paths")
    names = [PurePosixPath(image) for image in images]
    for name in names:
        if name.is_absolute() or ".." in name.parts:
            raise _wrong(path, index, f"picture {str(name)!r} lies outside the pictures' folder")
    return names


class _Locator:
    """Joins picture names to the folder that holds them."""

    def __init__(self, root: Path, skip: int) -> None:
        self.root, self.skip = root, skip

    def __call__(self, name: PurePosixPath) -> Path:
        parts = name.parts[self.skip :] if len(name.parts) > self.skip else name.parts
        return self.root.joinpath(*parts)


def _locator(
    path: Path, root: Path | None, names: Sequence[Sequence[PurePosixPath]], dataset: Dataset | None
) -> Callable[[PurePosixPath], Path]:
    """Chooses the reading of the paths under which pictures exist: whole, without "MIG-Bench/", without "images/".

    Where none does, pictures are looked for in the zip files.
    """
    base = path.parent if root is None else root
    readings = [_Locator(base, skip) for skip in (0, 1, 2)]
    if root is None:
        readings.append(_Locator(base.parent, 0))
    probes = [record[0] for record in (names[0], names[len(names) // 2], names[-1])]
    for reading in readings:
        if any(reading(name).is_file() for name in probes):
            return reading
    pictures = Pictures([base], dataset)
    return lambda name: Path(pictures.find(str(name)) or readings[0](name))


def _question(
    path: Path, index: int, record: Any, names: Sequence[PurePosixPath], locate: Callable[[PurePosixPath], Path]
) -> Question:
    task, text, info = record.get("task"), record.get("question"), record.get("additional_info", "")
    if not isinstance(task, str) or not task:
        raise _wrong(path, index, "'task' is not a word")
    if not isinstance(text, str) or not text:
        raise _wrong(path, index, "'question' is not a text")
    if not isinstance(info, str):
        raise _wrong(path, index, "'additional_info' is not a text")
    box = record.get("answer")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(v) for v in box):
        raise _wrong(path, index, "'answer' is not four numbers")
    x1, y1, x2, y2 = (float(v) for v in box)
    target = _target(task, text, info, len(names))
    images = tuple(locate(name) for name in names)
    return Question(index, task, images, text, (x1, y1, x2, y2), info, bool(record.get("need_format")), target)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def fingerprint(questions: Iterable[Question]) -> str:
    """Eight hex digits that tell one set of questions from another, wherever their pictures lie."""
    digest = hashlib.sha256()
    for q in questions:
        digest.update(json.dumps([q.index, q.task, [i.name for i in q.images], q.question, q.answer]).encode())
    return digest.hexdigest()[:8]


def select(questions: Sequence[Question], *, tasks: Sequence[str] = (), limit: int | None = None) -> list[Question]:
    """Takes the questions of the named tasks, the first `limit` of each task.

    Raises MigicianError for a task that no question has.
    """
    present = dict.fromkeys(q.task for q in questions)
    if unknown := [task for task in tasks if task not in present]:
        raise MigicianError(f"no question of {', '.join(unknown)}; choose from {', '.join(present)}")
    taken: dict[str, int] = {}
    chosen = []
    for q in questions:
        if (not tasks or q.task in tasks) and (limit is None or taken.get(q.task, 0) < limit):
            taken[q.task] = taken.get(q.task, 0) + 1
            chosen.append(q)
    return chosen


def picture_order(questions: Iterable[Question]) -> list[list[Question]]:
    """Groups questions about the same pictures, groups by their first question: encoded pictures serve a group."""
    groups: dict[tuple[Path, ...], list[Question]] = {}
    for q in sorted(questions, key=lambda q: q.index):
        groups.setdefault(q.images, []).append(q)
    return list(groups.values())


def missing_pictures(questions: Iterable[Question]) -> dict[Path, list[int]]:
    """Finds pictures that are not there: {path: indices of the questions that need it}."""
    users: dict[Path, list[int]] = {}
    for q in questions:
        for image in dict.fromkeys(q.images):
            users.setdefault(image, []).append(q.index)
    return {image: indices for image, indices in users.items() if not is_file(image)}


def read_lines(path: Path | str, *, torn: bool = False) -> list[dict[str, Any]]:
    """Reads JSON lines {"index": 0, "response": "..."}; other keys are kept, blank lines skipped.

    torn: drop a last line that a killed run left half written, rather than refuse it.
    Raises MigicianError for a line that is not an answer.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise MigicianError(f"{path}: {error.strerror or error}; give JSON lines of answers") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            if torn and number == len(lines):  # every whole line ends with a newline
                break
            raise MigicianError(f"{path}: line {number} is not JSON; give one answer per line") from None
        _check_line(path, number, record)
        found.append(record)
    return found


def _check_line(path: Path, number: int, record: Any) -> None:
    where = f"{path}: line {number}"
    if not isinstance(record, dict):
        raise MigicianError(f'{where} is not an object; write {{"index": 0, "response": "..."}}')
    index = record.get("index")
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise MigicianError(f"{where}: 'index' is not a whole number from 0; give the question's place in the data")
    if not isinstance(record.get("response"), str):
        raise MigicianError(f"{where}: 'response' is not a text; give what the model said")


def read_answers(path: Path | str, questions: Sequence[Question] | None = None) -> dict[int, str]:
    """Reads a file of answers: {index: response}.

    questions: refuse an index that none of them has.
    Raises MigicianError, also for an index answered twice in different words.
    """
    return unique_answers([(path, read_lines(path, torn=True))], questions)


def unique_answers(
    files: Iterable[tuple[Path | str, Iterable[Mapping[str, Any]]]], questions: Sequence[Question] | None = None
) -> dict[int, str]:
    """Joins the answers of several files, as read_answers() does one."""
    known = None if questions is None else {q.index for q in questions}
    answers: dict[int, str] = {}
    for path, lines in files:
        for line in lines:
            if "error" in line:  # a run noted that it could not ask this question
                continue
            index, response = line["index"], line["response"]
            if known is not None and index not in known:
                raise MigicianError(f"{path}: no question has index {index}; give the data file that was asked")
            if answers.setdefault(index, response) != response:
                raise MigicianError(f"{path}: question {index} has two different answers; keep one of them")
    return answers
