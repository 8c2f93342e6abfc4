"""Files and folders that appear under their name complete, or not at all.

    with whole_file("x.mig") as file:
        file.write(...)          # into `.x.mig.0123456789abcdef.tmp` beside it
    # synced, and named x.mig

What had the name before stays until then. When the block raises, KeyboardInterrupt included, it stays for good and what
was written is removed. Two writers of one name never meet, the later one's work is kept. Only a kill leaves something
behind: the temporary, hidden by its dot (remove_leftovers).
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import ModelFileError

__all__ = ["check_new_folder", "move_file", "remove_leftovers", "whole_file", "whole_folder"]

_ADVICE = "free some space or choose another place"
_NAME_CHARS = 40  # of the final name in a temporary one: four bytes each at most, and 255 are allowed in all
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.tmp", re.DOTALL)


@contextmanager
def whole_file(path: str | os.PathLike[str], *, advice: str = _ADVICE) -> Iterator[BinaryIO]:
    """Opens a binary file for writing and seeking, which is synced and becomes `path` when the block has ended well.

    A link is followed. A device or a pipe is written to as it is.   advice: what to do, the end of an error's line.
    Raises ModelFileError where the place cannot be written. An OSError of the block that is about another file, or a
    broken connection, passes as it is.
    """
    path = Path(path)
    kind = _kind(path)
    if kind not in (None, stat.S_IFREG, stat.S_IFDIR):
        with _explaining(path, path, advice), open(path, "wb") as file:
            yield file
        return
    if kind == stat.S_IFDIR:  # renaming would say so too, after all the work
        raise ModelFileError(f"{path}: cannot be written ({os.strerror(errno.EISDIR)}); choose another place")
    target = Path(os.path.realpath(path))
    temporary = _temporary(target)
    with _explaining(path, temporary, advice):
        try:
            with open(temporary, "x+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    with suppress(OSError):
        _sync(target.parent)


@contextmanager
def whole_folder(
    path: str | os.PathLike[str], *, parents: bool = False, advice: str = _ADVICE
) -> Iterator[Path]:
    """Makes a folder to fill, which is synced with all in it and becomes `path` when the block has ended well.

    path: must not be there, or be an empty folder.   parents: make those that are missing; they go too on a failure.
    Raises as whole_file does, and ModelFileError where something is in the way.
    """
    path = Path(path)
    check_new_folder(path)
    temporary = _temporary(Path(os.path.abspath(path)))
    made = [parent for parent in temporary.parents if not parent.exists()] if parents else []
    with _explaining(path, temporary, advice):
        try:
            if made:
                temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in (*names, "."):
                    _sync(Path(folder, name))
            os.replace(temporary, path)  # takes the place of an empty folder too
        except BaseException:
            _remove_tree(temporary)
            with suppress(OSError):
                for parent in made:
                    parent.rmdir()
            raise
    with suppress(OSError):
        _sync(temporary.parent)


def move_file(source: Path, path: Path) -> None:
    """Moves a whole file to its name in the same file system. Raises ModelFileError where that fails."""
    with _explaining(path, source, _ADVICE):
        os.replace(source, path)
    with suppress(OSError):
        _sync(path.parent)


def check_new_folder(path: Path) -> None:
    """Raises ModelFileError where something stands that whole_folder would not replace: all but an empty folder."""
    with suppress(OSError):  # what cannot be looked at cannot be written, which is said there
        if path.is_dir() and not path.is_symlink():
            if any(path.iterdir()):
                raise ModelFileError(f"{path}: already there and not empty; choose another folder or delete it")
        elif os.path.lexists(path):
            raise ModelFileError(f"{path}: something else is in the way; choose another folder")


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that killed writers left in a folder.   Nobody may be writing there now."""
    with suppress(OSError):
        for entry in folder.iterdir():
            if _LEFTOVER.fullmatch(entry.name):
                with suppress(OSError):
                    entry.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:_NAME_CHARS]}.{os.urandom(8).hex()}.tmp")


def _remove_tree(folder: Path) -> None:
    import shutil  # slow to import, and whoever opens a model imports this module

    shutil.rmtree(folder, ignore_errors=True)


def _kind(path: Path) -> int | None:
    """The type bits of what a path leads to; None where there is nothing to see."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except OSError:
        return None


@contextmanager
def _explaining(path: Path, temporary: Path, advice: str) -> Iterator[None]:
    """Turns an error of writing into one line."""
    try:
        yield
    except OSError as error:
        if not _is_of_writing(error, temporary):
            raise
        raise ModelFileError(f"{path}: cannot be written ({error.strerror}); {advice}") from None


def _is_of_writing(error: OSError, temporary: Path) -> bool:
    """Whether an error names no file, or one of ours.

    Errors without a number are not the system's, such as Pillow's of a damaged picture; a broken connection, such as a
    closed stdout, is the block's own.
    """
    if error.errno is None or isinstance(error, ConnectionError):
        return False
    names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    return not names or any(temporary in (name, *name.parents) or name in temporary.parents for name in names)


def _sync(path: Path) -> None:
    """Makes a file's content, or a folder's names, durable, where the system lets that be done."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a link to nowhere, a file that its owner may not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(descriptor)
