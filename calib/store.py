"""The calibration folder: the samples that a quantizer runs through a model, with a manifest that pins every byte.

    DIR/manifest.json    {"format": 1, "source", "licence", "seed", "samples", "counts", "records"}
    DIR/records.jsonl    {"id", "task", "images": ["pictures/..."], "turns": [[question, answer], ...]}, one a line
    DIR/pictures/        the pictures as they were, named after their hash; a picture of two records is there once

counts: {"tasks", "pictures", "resolutions", "skipped"}, each name: number of samples (skipped: of records left out).
records[i] belongs to line i: {"file", "sha256", "task", "images": [{"file", "sha256", "width", "height"}]}, where file
is the source's JSON file, sha256 that of the line without its end, width and height those of the upright picture.
No times and no paths from outside: the same source and seed give the same bytes.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from ..runtime.errors import MigicianError
from ..runtime.files.archive import read_bytes
from ..runtime.files.write import whole_folder
from .scenes import TASKS, sample
from .scenes.stream import check_seed

__all__ = [
    "RESOLUTIONS",
    "Calibration",
    "Sample",
    "check_target",
    "nano_calibration",
    "nano_samples",
    "open_calibration",
    "resolution_of",
    "upright_size",
    "write_calibration",
]

FORMAT = 1
NANO_LICENCE = "MIT"
RESOLUTIONS = {"small": 512, "medium": 1024}  # up to this many pixels on the longest side of all pictures; else large
_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}
_DIFFICULTY, _MAX_PICTURES = 1.5, 3  # half the drawn scenes at level 1, half at level 2

Size: TypeAlias = "tuple[int, int]"  # (width, height) in pixels


@dataclass(frozen=True)
class Sample:
    """One conversation about some pictures.

    images: paths, or u8[H, W, 3] arrays of drawn scenes; all of them stand before the first question.
    turns: (question, answer), the question without picture placeholders.   origin: the source's file it comes from.
    """

    task: str
    images: list[Path | np.ndarray]
    turns: list[tuple[str, str]]
    id: str
    origin: str = ""


@dataclass(frozen=True)
class Calibration:
    """Samples to calibrate with.   sha256: of manifest.json, hex.   counts: as in the manifest."""

    samples: list[Sample]
    source: str
    licence: str
    seed: int
    sha256: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


def resolution_of(sizes: Sequence[Size]) -> str:
    """Names the resolution class of a set of pictures: small, medium or large, by its longest side."""
    side = max(max(size) for size in sizes)
    return next((name for name, limit in RESOLUTIONS.items() if side <= limit), "large")


def upright_size(image: Image.Image) -> Size:
    """Width and height of an opened picture once it is turned upright (EXIF); decodes nothing."""
    width, height = image.size
    try:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # damaged EXIF says nothing about the pixels
        turned = False
    return (height, width) if turned else (width, height)


# ---- writing
def _picture_bytes(image: Path | np.ndarray) -> tuple[bytes, str, Size]:
    """A picture's file content, name suffix and upright size."""
    if isinstance(image, np.ndarray):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        return buffer.getvalue(), ".png", (image.shape[1], image.shape[0])
    data = read_bytes(image)
    with Image.open(io.BytesIO(data)) as opened:
        kind = opened.format or ""
        return data, _SUFFIXES.get(kind, f".{kind.lower()}"), upright_size(opened)


def _entry(one: Sample, keep: Callable[[str, bytes], None]) -> tuple[dict[str, Any], bytes]:
    """The manifest's entry and the line of a sample; hands each picture's name and content to keep."""
    images = []
    for image in one.images:
        data, suffix, (width, height) = _picture_bytes(image)
        digest = hashlib.sha256(data).hexdigest()
        name = f"pictures/{digest[:32]}{suffix}"
        keep(name, data)
        images.append({"file": name, "sha256": digest, "width": width, "height": height})
    record = {"id": one.id, "task": one.task, "images": [i["file"] for i in images], "turns": one.turns}
    line = json.dumps(record, ensure_ascii=False).encode()
    entry = {"file": one.origin, "sha256": hashlib.sha256(line).hexdigest(), "task": one.task, "images": images}
    return entry, line


def _manifest(
    entries: Sequence[dict[str, Any]], *, source: str, licence: str, seed: int, skipped: Mapping[str, int]
) -> tuple[bytes, dict[str, dict[str, int]]]:
    """The bytes of manifest.json, and its counts."""
    pictures = Counter(len(e["images"]) for e in entries)
    classes = Counter(resolution_of([(i["width"], i["height"]) for i in e["images"]]) for e in entries)
    counts = {
        "tasks": dict(sorted(Counter(e["task"] for e in entries).items())),
        "pictures": {str(n): pictures[n] for n in sorted(pictures)},
        "resolutions": {name: classes[name] for name in (*RESOLUTIONS, "large") if classes[name]},
        "skipped": dict(sorted(skipped.items())),
    }
    manifest = {
        "format": FORMAT,
        "source": source,
        "licence": licence,
        "seed": seed,
        "samples": len(entries),
        "counts": counts,
        "records": list(entries),
    }
    return (json.dumps(manifest, ensure_ascii=False, indent=1) + "\n").encode(), counts


def check_target(folder: Path) -> None:
    """Raises MigicianError when folder is there and is not an empty folder, or where it cannot be made."""
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise MigicianError(f"{folder}: already there and not empty; choose another folder or delete it")
    parent = next(parent for parent in folder.absolute().parents if os.path.lexists(parent))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise MigicianError(f"{folder}: {parent} is no folder that can be written to; choose another place")


def write_calibration(
    folder: str | Path,
    samples: Sequence[Sample],
    *,
    source: str,
    licence: str,
    seed: int,
    skipped: Mapping[str, int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Writes a calibration folder; returns the sha256 of its manifest.

    The folder appears complete or not at all.   progress: called with the number of samples written.
    Raises MigicianError when there are no samples, when folder is there and not empty, or where it cannot be
    written; OSError where a picture cannot be read.
    """
    folder = Path(folder).absolute()
    if not samples:
        raise MigicianError(f"{source}: no samples, so {folder} was not written; give a source with usable records")
    check_target(folder)
    with whole_folder(folder, parents=True) as partial:
        (partial / "pictures").mkdir()

        def keep(name: str, data: bytes) -> None:
            if not (partial / name).exists():
                (partial / name).write_bytes(data)

        entries = []
        with open(partial / "records.jsonl", "wb") as records:
            for done, one in enumerate(samples, 1):
                entry, line = _entry(one, keep)
                entries.append(entry)
                records.write(line + b"\n")
                if progress:
                    progress(done)
        text, _ = _manifest(entries, source=source, licence=licence, seed=seed, skipped=skipped or {})
        (partial / "manifest.json").write_bytes(text)
    return hashlib.sha256(text).hexdigest()


# ---- reading
def open_calibration(folder: str | Path, *, verify: bool = False) -> Calibration:
    """Opens a calibration folder.

    verify: also compares every record and picture with its hash in the manifest.
    Raises MigicianError, which names the file that is missing, damaged or of another format.
    """
    folder = Path(folder)
    data = _read(folder / "manifest.json", folder)
    lines = _read(folder / "records.jsonl", folder).split(b"\n")
    try:
        manifest = json.loads(data)
        if manifest["format"] != FORMAT:
            raise MigicianError(f"{folder}: calibration format {manifest['format']}, this version reads {FORMAT}; "
                                "write it again with migician-calib")  # fmt: skip
        entries, counts = manifest["records"], manifest["counts"]
        head = manifest["source"], manifest["licence"], int(manifest["seed"])
        if len(entries) != manifest["samples"]:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _damaged(folder / "manifest.json") from None
    if lines.pop() or len(lines) != len(entries):
        raise _damaged(folder / "records.jsonl")
    samples = [_read_sample(folder, e, line, i, verify) for i, (e, line) in enumerate(zip(entries, lines, strict=True))]
    return Calibration(samples, *head, hashlib.sha256(data).hexdigest(), counts)


def _read(path: Path, folder: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MigicianError(
            f"{path}: {error.strerror or error}; {folder} is no calibration folder, write one with migician-calib"
        ) from None


def _damaged(path: Path, what: str = "") -> MigicianError:
    return MigicianError(f"{path}: damaged{what and f' ({what})'}; write the folder again with migician-calib")


def _read_sample(folder: Path, entry: Any, line: bytes, index: int, verify: bool) -> Sample:
    """One sample from its line, checked against its entry of the manifest."""
    records, where = folder / "records.jsonl", f"line {index + 1}"
    if verify and hashlib.sha256(line).hexdigest() != (entry.get("sha256") if isinstance(entry, dict) else None):
        raise _damaged(records, where)
    try:
        record = json.loads(line)
        names = [image["file"] for image in entry["images"]]
        turns = [(question, answer) for question, answer in record["turns"]]
        sound = record["images"] == names and record["task"] == entry["task"] and turns and names
        if not sound or not all(isinstance(text, str) for turn in turns for text in turn):
            raise ValueError
        one = Sample(record["task"], [folder / name for name in names], turns, record["id"], entry["file"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _damaged(records, where) from None
    for name, image in zip(names, entry["images"], strict=True):
        path = folder / name
        if Path(name).parent.as_posix() != "pictures" or Path(name).name == "..":
            raise _damaged(folder / "manifest.json", f"a picture outside pictures/: {name}")
        if not path.is_file():
            raise MigicianError(f"{path}: missing; write the folder again with migician-calib")
        if verify and hashlib.sha256(path.read_bytes()).hexdigest() != image.get("sha256"):
            raise _damaged(path)
    return one


# ---- drawn scenes
def nano_samples(samples: int, seed: int, *, tasks: Sequence[str] = TASKS) -> list[Sample]:
    """Draws calibration samples: one question each about a set of its own, the tasks in turn, up to 3 pictures.

    seed: 0..999999; the seeds of reported numbers lie above, so no question of theirs is here. Fewer samples are the
    beginning of more.   Raises ValueError on a held-out seed or an unknown task.
    """
    check_seed(seed)
    # Three words, the middle one 1: training batches have two, write_dataset's sets a 0 there
    rngs = [np.random.default_rng([seed, 1, 1 + TASKS.index(task)]) for task in tasks]
    drawn = []
    for i in range(samples):
        task, rng = tasks[i % len(tasks)], rngs[i % len(tasks)]
        scene = sample(rng, task, (196, 196), _MAX_PICTURES, _DIFFICULTY)
        main = [q for q in scene["qas"] if q.meta["task"] == task]
        question = main[int(rng.integers(len(main)))]
        images: list[Path | np.ndarray] = list(scene["images"])
        drawn.append(Sample(task, images, [(question.text, question.answer)], f"{task}_{i // len(tasks):05d}", "nano"))
    return drawn


def nano_calibration(samples: int, seed: int, *, tasks: Sequence[str] = TASKS) -> Calibration:
    """Draws what `migician-calib nano` writes, without a folder; sha256 is that of the manifest it would have."""
    drawn = nano_samples(samples, seed, tasks=tasks)
    entries = [_entry(one, lambda _name, _data: None)[0] for one in drawn]
    text, counts = _manifest(entries, source="nano", licence=NANO_LICENCE, seed=seed, skipped={})
    return Calibration(drawn, "nano", NANO_LICENCE, seed, hashlib.sha256(text).hexdigest(), counts)
