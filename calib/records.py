"""Reads MGrounding-630k as it is published, and what is written in its layout: one record at a time, nothing held.

A source is a JSON array, JSON lines, or a folder of such files. A record:

    {"id", "images": ["./MGrounding-630k/TASK/x.jpg", ...], "type": TASK,
     "conversations": [{"from": "human", "value": "<image>\n<image>\nWhere is ...?"}, {"from": "gpt", "value": "..."}]}

id and type may be missing (type is then the file's name); "role" and "content", "user" and "assistant" serve as well.
A picture is looked for from the JSON file's folder, the source's folder and the pictures' root, each with and without
its own name at the front of the path, then inside their zip files (pictures.py). Paths are judged as written: symbolic
links are followed.
The model reads all pictures before the first question, so placeholders are taken out of the text wherever they stand.
"""

import hashlib
import json
import os
import re
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..runtime.boxes import parse_boxes
from ..runtime.errors import ImageError, MigicianError
from ..runtime.files.archive import open_file
from ..runtime.files.hub import obtain_dataset
from ..runtime.image import open_picture, smart_resize
from .pictures import Pictures, word_of
from .scanner import Broken, scan
from .store import Size, upright_size

__all__ = ["REASONS", "BadRecord", "Example", "Place", "Record", "Source", "Tally", "task_name"]

REASONS = {
    "broken_json": "cannot be read as JSON",
    "not_an_object": "not a JSON object",
    "no_images": "no pictures, or not a list of paths",
    "no_conversation": "no conversation, or not a list of turns",
    "bad_turn": "an unknown speaker, or a turn that is no text",
    "turn_order": "turns that do not alternate, or a missing answer",
    "empty_text": "an empty question or answer",
    "placeholders": "not one <image> in the questions for each picture",
    "bad_box": "a box that cannot be read, is inverted or leaves the grid",
    "outside_root": "a picture's path that leaves the root",
    "missing_picture": "a picture that is not there",
    "unreadable_picture": "a picture that cannot be decoded",
    "duplicate_id": "an id that an earlier record of its task has",
}
_SPEAKERS = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}
_PLACEHOLDER = "<image>"
_INNER = re.compile(r"<image>\n?")


class BadRecord(Exception):
    """A record that is left out.   reason: one of REASONS.   detail: what exactly, for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Place(NamedTuple):
    """Where a record stands: index of its file, number in it (from 1), and start and size in bytes."""

    file: int
    number: int
    start: int
    size: int


@dataclass(frozen=True)
class Record:
    """A sound record.   images: paths that exist.   key: 16 bytes made from its content, whatever file it is in."""

    id: str
    task: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    key: bytes


class Example(NamedTuple):
    """The first record left out for a reason."""

    file: str
    number: int
    detail: str


@dataclass
class Tally:
    """What a reading met.

    records: all of them.   tasks: sound records by task, unwanted tasks, whose pictures are not sought, included.
    """

    records: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Example] = field(default_factory=dict)

    def skip(self, reason: str, example: Example) -> None:
        """Counts a record that is left out."""
        self.skipped[reason] += 1
        self.examples.setdefault(reason, example)


class _Seen:
    """A set of 64-bit hashes at 16 bytes each: ids of 630k records in about 16 MB."""

    def __init__(self) -> None:
        self._slots, self._used = array("Q", bytes(8 << 10)), 0

    def add(self, key: bytes) -> bool:
        """Adds the hash of key; False when it was there."""
        value = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") or 1  # 0 marks a free slot
        if not self._put(value):
            return False
        self._used += 1
        if 2 * self._used > len(self._slots):
            old, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
            for kept in old:
                if kept:
                    self._put(kept)
        return True

    def _put(self, value: int) -> bool:
        mask = len(self._slots) - 1
        at = value & mask
        while self._slots[at] not in (0, value):
            at = (at + 1) & mask
        if self._slots[at]:
            return False
        self._slots[at] = value
        return True


def task_name(name: str) -> str:
    """Brings a task's name to one form: "Object-Tracking" becomes object_tracking."""
    return word_of(name) or "unnamed"


# ---- one record
def _turns(value: dict[str, Any]) -> list[str]:
    """The texts of a conversation: question, answer, question, answer, ..."""
    turns = value.get("conversations", value.get("messages"))
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecord("no_conversation", "conversations is no list of turns" if turns else "conversations is missing")
    texts, speakers = [], []
    for i, turn in enumerate(turns, 1):
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise BadRecord("bad_turn", f"turn {i} is from {_short(speaker)}")
        if not isinstance(text, str) or re.search(r"[\ud800-\udfff]", text):
            raise BadRecord("bad_turn", f"turn {i} is {_short(text)}")
        speakers.append(_SPEAKERS[speaker])
        texts.append(text)
    if len(texts) % 2 or speakers != [0, 1] * (len(texts) // 2):
        raise BadRecord("turn_order", "-".join(("question", "answer")[s] for s in speakers[:6]))
    return texts


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _conversation(value: dict[str, Any], pictures: int) -> tuple[tuple[str, str], ...]:
    """The turns of a record without placeholders, checked."""
    texts = _turns(value)
    found, astray = (sum(text.count(_PLACEHOLDER) for text in texts[i::2]) for i in (0, 1))
    if found != pictures or astray:
        where = f"{found} in the questions" + (f", {astray} in the answers" if astray else "")
        raise BadRecord("placeholders", f"{where} for {pictures} pictures")
    questions = [_without_placeholders(text) for text in texts[::2]]
    turns = tuple(zip(questions, texts[1::2], strict=True))
    for i, (question, answer) in enumerate(turns, 1):
        if not question.strip() or not answer.strip():
            raise BadRecord("empty_text", f"{'answer' if question.strip() else 'question'} {i}")
        if "<|box_start|>" in answer or "<|box_end|>" in answer:
            boxes, unparsed = parse_boxes(answer, prompt="", sizes=[(1, 1)])
            if unparsed or not boxes:
                raise BadRecord("bad_box", f"answer {i}: {_short(answer)}")
    return turns


def _without_placeholders(text: str) -> str:
    """A question without placeholders, nor the white space around those at its start and end."""
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    if not text.startswith(_PLACEHOLDER, start):
        start = 0
    if not text.endswith(_PLACEHOLDER, 0, end):
        end = len(text)
    while text.startswith(_PLACEHOLDER, start) or (start and start < end and text[start].isspace()):
        start += len(_PLACEHOLDER) if text.startswith(_PLACEHOLDER, start) else 1
    while start < end < len(text) or text.endswith(_PLACEHOLDER, start, end):
        if text.endswith(_PLACEHOLDER, start, end):
            end -= len(_PLACEHOLDER)
        elif text[end - 1].isspace():
            end -= 1
        else:
            break
    return _INNER.sub("", text[start:end])


def _names(value: Any) -> list[str]:
    if not isinstance(value, dict):
        raise BadRecord("not_an_object", f"it is {_short(value)}")
    names = value.get("images")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise BadRecord("no_images", f"images is {_short(names)}" if "images" in value else "images is missing")
    return names


def _locate(name: str, bases: Sequence[str], pictures: Pictures) -> str:
    """The path of a picture that is a file below one of the folders, or inside a zip file."""
    inside = False
    for base in bases:
        for start in (base, os.path.dirname(base)):
            path = os.path.normpath(os.path.join(start, name))
            if path == base or path.startswith(base.rstrip(os.sep) + os.sep):
                inside = True
                if os.path.isfile(path):  # False, too, for names that no file can have
                    return path
    if inside and (found := pictures.find(name)):
        return found
    raise BadRecord("missing_picture" if inside else "outside_root", name[:120])


def _header(path: str) -> Size:
    """The upright size that a picture's header states."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_file(path) as file, Image.open(file) as image:
                width, height = upright_size(image)
        smart_resize(height, width)  # refuses what no model can take
        return width, height
    except Exception as error:  # Pillow raises whatever a damaged file makes it trip over
        reason = str(error) if isinstance(error, ImageError) else "not a picture that can be read"
        raise BadRecord("unreadable_picture", f"{os.path.basename(path)}: {reason}") from None


class Source:
    """A JSON file or a folder of them, or a dataset of the hub."""

    def __init__(self, path: str | Path, *, images: str | Path | None = None) -> None:
        """images: the pictures' root.   Raises MigicianError when a path is not there or a folder has no JSON file."""
        dataset = obtain_dataset(path)
        path = Path(path) if dataset is None else dataset.folder
        if not path.exists():
            raise MigicianError(
                f"{path}: no such file or folder; give MGrounding's JSON file or folder, hub id, or nano"
            )
        if images is not None and not Path(images).is_dir():
            raise MigicianError(f"--images {images}: no such folder; name the one that holds the pictures")
        folder = path if path.is_dir() else path.parent
        self.name = path.absolute().name if dataset is None else dataset.label
        self.files = dataset.records if dataset else _json_files(path) if path.is_dir() else [path]
        self.bytes = sum(file.stat().st_size for file in self.files)
        self._names = [file.relative_to(folder).as_posix() for file in self.files]
        self._bases = [
            list(dict.fromkeys(os.path.abspath(p) for p in (file.parent, folder, images) if p is not None))
            for file in self.files
        ]
        self._pictures = Pictures(dict.fromkeys(base for bases in self._bases for base in bases), dataset)

    def file_name(self, place: Place) -> str:
        """The name of a record's file, from the source's folder."""
        return self._names[place.file]

    def record(self, value: Any, file: int, tasks: Collection[str] = ()) -> Record:
        """Checks a parsed record of a file; without its pictures where it is of none of the tasks. Raises BadRecord."""
        names = _names(value)
        turns = _conversation(value, len(names))
        stated, given = value.get("type"), value.get("id")
        task = task_name(stated if isinstance(stated, str) and stated.strip() else Path(self._names[file]).stem)
        sought = names if not tasks or task in tasks else []
        images = tuple(_locate(name, self._bases[file], self._pictures) for name in sought)
        id = str(given) if isinstance(given, (str, int)) and not isinstance(given, bool) else ""
        id = id.encode(errors="replace").decode()
        content = json.dumps([task, id, names, turns]).encode()
        return Record(id, task, images, turns, hashlib.blake2b(content, digest_size=16).digest())

    def records(
        self, tally: Tally, *, tasks: Collection[str] = (), progress: Callable[[int], None] | None = None
    ) -> Iterator[tuple[Place, Record, list[Size]]]:
        """Yields the sound records of some tasks (all when empty) with the upright sizes in their pictures' headers.

        Everything else goes into tally.   progress: called with the number of bytes read.
        """
        seen, before = _Seen(), 0
        for index, path in enumerate(self.files):
            with open(path, "rb") as file:
                for item in scan(file):
                    tally.records += 1
                    if progress and tally.records % 64 == 0:
                        progress(before + item.start)
                    try:
                        if isinstance(item, Broken):
                            raise BadRecord("broken_json", item.reason)
                        record = self.record(item.value, index, tasks)
                        if tasks and record.task not in tasks:
                            tally.tasks[record.task] += 1
                            continue
                        sizes = [_header(image) for image in record.images]
                        identity = f"{record.task}\n{record.id}".encode() if record.id else record.key
                        if not seen.add(identity):
                            raise BadRecord("duplicate_id", record.id or "the same record twice")
                    except BadRecord as bad:
                        tally.skip(bad.reason, Example(self._names[index], item.number, bad.detail))
                        continue
                    tally.tasks[record.task] += 1
                    yield Place(index, item.number, item.start, item.size), record, sizes
                before += os.fstat(file.fileno()).st_size
            if progress:
                progress(before)

    def load(self, place: Place) -> Record:
        """Reads one record again and decodes its pictures. Raises BadRecord."""
        with open(self.files[place.file], "rb") as file:
            file.seek(place.start)
            try:
                value = json.loads(file.read(place.size).decode())
            except ValueError:
                raise BadRecord("broken_json", "the file changed while it was read") from None
        record = self.record(value, place.file)
        for image in record.images:
            try:
                open_picture(image, name=os.path.basename(image))
            except ImageError as error:
                raise BadRecord("unreadable_picture", str(error)) from None
        return record


def _json_files(folder: Path) -> list[Path]:
    """The JSON files of a folder by name; those of the folders below it only when it has none itself."""
    suffixes = (".json", ".jsonl")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.is_file())
    if not found:
        below = ((place, name) for place, _, names in os.walk(folder) for name in names)
        found = sorted(Path(place, name) for place, name in below if name.lower().endswith(suffixes))
    if not found:
        raise MigicianError(f"{folder}: no .json or .jsonl file in it; give the folder with MGrounding's JSON files")
    return found
