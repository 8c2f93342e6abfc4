"""Finds a model by what it is called: a .mig file, a Hugging Face folder, a hub id, or "nano"."""

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import ModelFileError, OutOfMemory
from .checkpoint import Checkpoint
from .config import parse_config
from .folder import open_folder
from .hub import obtain_model
from .hub_cache import parse_name, revision_of
from .mig import read_mig
from .tensors import parse_json, shown

__all__ = ["NANO_FILE", "open_checkpoint"]

NANO_FILE = Path(__file__).resolve().parent.parent / "nano.mig"


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Opens a model by path, hub id or the name "nano"; no weight is read.

    A hub id that is no path and not in the local cache is downloaded, where the extra "hub" is installed.

    Raises ModelFileError when something is missing or damaged, UnsupportedError when it is sound but not served,
    OutOfMemory when its files, mapped, find no room.
    """
    try:
        return _open(os.fspath(source))
    except MemoryError:
        raise OutOfMemory(
            f"{shown(os.fspath(source))}: no memory left to open it; free some, or raise the limit (ulimit -v)"
        ) from None
    except (OSError, RuntimeError) as error:  # a folder that may not be entered, a home that does not exist
        raise ModelFileError(
            f"{shown(os.fspath(source))}: cannot be opened ({error}); check the path and its rights"
        ) from None


def _open(word: str) -> Checkpoint:
    if word == "nano":
        if not NANO_FILE.is_file():
            raise ModelFileError(f"{NANO_FILE}: the embedded model is not there; reinstall the package")
        return read_mig(NANO_FILE)
    path = Path(word).expanduser()
    if _probe(path, Path.is_dir):
        return open_folder(path, _folder_name(path))
    if _probe(path, os.path.lexists):
        return read_mig(path)
    name = parse_name(word)
    if name is None:
        raise ModelFileError(
            f"{shown(word)}: no such model; give a .mig file, a checkpoint folder, a hub id (org/name, or "
            f"org/name@revision) or nano"
        )
    found = obtain_model(name, lambda folder: _judge(folder, word))
    return open_folder(found.folder, found.label)


def _judge(folder: Path, name: str) -> None:
    """Refuses another architecture by its config.json alone."""
    path = folder / "config.json"
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return  # opening the folder says so
    parse_config(parse_json(text, path, "configuration"), where=f"{name}/config.json")


def _folder_name(path: Path) -> str:
    """What a model is called by its folder; one in the hub's cache by its hub id and the revision that it is."""
    whole = path.resolve()
    if revision_of(whole) != whole.name:
        return whole.name
    return f"{whole.parent.parent.name.partition('--')[2].replace('--', '/')}@{whole.name[:12]}"


def _probe(path: Path, test: Callable[[Path], bool]) -> bool:
    try:
        return test(path)
    except (OSError, ValueError):  # a name too long, a NUL inside
        return False
