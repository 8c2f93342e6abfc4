"""Reads the small text files of a checkpoint."""

from pathlib import Path

from ..errors import ModelFileError

__all__ = ["read_text"]

_MAX_BYTES = 256 << 20
_AGAIN = "download or export it again"


def read_text(path: Path) -> str:
    """Returns a file's text, without a byte order mark. Raises ModelFileError where there is none to be had."""
    try:
        if not path.is_file():
            raise ModelFileError(f"{path}: not there or not a file; complete the checkpoint in {path.parent}")
        if path.stat().st_size > _MAX_BYTES:
            raise ModelFileError(f"{path}: over {_MAX_BYTES >> 20} MB; {_AGAIN}")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    except UnicodeDecodeError:
        raise ModelFileError(f"{path}: not UTF-8 text; {_AGAIN}") from None
