"""Finds a model by what it is called: a .mig file, a Hugging Face folder, a hub id in the local cache, or "nano"."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from ..errors import ModelFileError
from .checkpoint import Checkpoint
from .folder import open_folder
from .mig import read_mig
from .tensors import shown

__all__ = ["NANO_FILE", "find_in_cache", "open_checkpoint"]

NANO_FILE = Path(__file__).resolve().parent.parent / "nano.mig"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Opens a model by path, hub id or the name "nano"; nothing is downloaded and no weight is read.

    Raises ModelFileError when something is missing or damaged, UnsupportedError when it is sound but not served.
    """
    try:
        return _open(os.fspath(source))
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
        return open_folder(path, path.resolve().name)
    if _probe(path, os.path.lexists):
        return read_mig(path)
    if not _HUB_ID.fullmatch(word) or path.suffix in (".mig", ".safetensors"):
        raise ModelFileError(
            f"{shown(word)}: no such model; give a .mig file, a checkpoint folder, a hub id (org/name) or nano"
        )
    folder = find_in_cache(word)
    if folder is None:
        raise ModelFileError(
            f"{word}: no such folder, and not in the Hugging Face cache ({_hub_cache()}); run: hf download {word}"
        )
    return open_folder(folder, word)


def _probe(path: Path, test: Callable[[Path], bool]) -> bool:
    try:
        return test(path)
    except (OSError, ValueError):  # a name too long, a NUL inside
        return False


def _hub_cache() -> Path:
    """The hub's cache folder by the rules of huggingface_hub."""
    env = os.environ
    if place := env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expandvars(place)).expanduser()
    home = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def find_in_cache(hub_id: str) -> Path | None:
    """Returns the folder of a hub model's main revision in the local cache, or None."""
    root = _hub_cache() / ("models--" + hub_id.replace("/", "--"))
    try:
        commit = (root / "refs" / "main").read_text("ascii").strip()
    except (OSError, ValueError):
        return None
    folder = root / "snapshots" / commit
    return folder if re.fullmatch(r"[0-9A-Za-z_.-]+", commit) and folder.is_dir() else None
