"""Where pictures come from: paths, file: and data: URLs, pipes, open files, one picture or a list of them.

A picture that lies in a file is read whole here, so that everything after works on bytes that can no longer change.
Nothing is fetched from a network. What messages say of a picture is cut to one short line, however long its name.
"""

import base64
import binascii
import io
import os
import re
import select
import shlex
import stat
import sys
from collections.abc import Iterable
from typing import BinaryIO, TypeAlias
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image, ImageSequence

from .errors import ImageError
from .files.archive import read_bytes
from .kinds import BASE64_PICTURE

__all__ = [
    "FileBytes",
    "PictureSource",
    "as_list",
    "file_name",
    "picture_name",
    "read_source",
    "read_stdin",
]

PictureSource: TypeAlias = (
    str | os.PathLike[str] | os.PathLike[bytes] | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray
)

MAX_FILE_BYTES = 2 << 30  # above 178,956,970 pixels of 64 bits, the largest picture that is decoded
PIPE_PATIENCE_MS = 30_000
_NAME_LENGTH = 80
_GIVE = "give a path, the bytes of an image file, a PIL image or a numpy array"
_URL = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):")
_FETCH = {
    "http": "curl -fLo {name} {url}",
    "https": "curl -fLo {name} {url}",
    "ftp": "curl -fo {name} {url}",
    "ftps": "curl -fo {name} {url}",
    "sftp": "curl -fo {name} {url}",
    "s3": "aws s3 cp {url} {name}",
    "gs": "gcloud storage cp {url} {name}",
    "rtsp": "ffmpeg -i {url} -frames:v 1 {name}",
    "rtmp": "ffmpeg -i {url} -frames:v 1 {name}",
}


class FileBytes(bytes):
    """A file's content that remembers what messages call the file."""

    name: str

    def __new__(cls, content: bytes, name: str) -> "FileBytes":
        made = super().__new__(cls, content)
        made.name = name
        return made


def as_list(images: object) -> list[PictureSource]:
    """Takes what a caller gives for `images` apart: one picture is a list of one.

    images: a picture; or a list, tuple, generator or other ordered collection of pictures; an array of shape
    [N, H, W, 3] holds N pictures, arrays of strings or objects hold paths and pictures.
    Raises ImageError for anything else. The pictures themselves are looked at by whoever reads them.
    """
    if isinstance(images, np.ndarray):
        one = images.dtype.kind not in "OSU" and images.ndim < 4
        return [images] if one else [*images] if images.ndim != 0 else as_list(images.item())
    if isinstance(images, ImageSequence.Iterator):
        return [frame.copy() for frame in images]  # it hands out one and the same image, moved on
    single = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)
    if isinstance(images, single) or _reader(images) is not None:
        return [images]  # type: ignore[list-item]
    kind = type(images).__name__
    if _is_tensor(images):
        raise ImageError(f"images is a {kind}: {_array_from(images)}")
    if isinstance(images, (dict, set, frozenset)):
        raise ImageError(f"images is a {kind}; give a list of pictures, in the order that the question counts them")
    if not isinstance(images, Iterable):
        raise ImageError(f"images is {'None' if images is None else f'of type {kind}'}; {_GIVE}, or a list of such")
    return list(images)


def picture_name(source: object) -> str:
    """What messages call a picture: its path or URL, cut to one line of 80 characters, or what it is."""
    if isinstance(source, FileBytes):
        return source.name
    if isinstance(source, (str, os.PathLike)):
        try:
            return _cut(os.fsdecode(source)) or "''"
        except TypeError:
            return type(source).__name__
    if isinstance(source, np.ndarray):
        return "array"
    attribute = "filename" if isinstance(source, Image.Image) else "name"
    name = getattr(source, attribute, "")
    if isinstance(name, (str, bytes, os.PathLike)) and (isinstance(source, Image.Image) or _reader(source)):
        return _cut(os.fsdecode(name)) or ("PIL image" if attribute == "filename" else type(source).__name__)
    return "PIL image" if isinstance(source, Image.Image) else type(source).__name__


def file_name(source: object) -> str:
    """What a table calls a picture: the last part of its path."""
    name = picture_name(source)
    return name if _URL.match(name) else os.path.basename(name) or name


def read_source(source: PictureSource, *, name: str = "") -> PictureSource:
    """Reads what lies elsewhere: FileBytes for a path, a file: or data: URL and an open file; the rest as it is.

    A str that begins with a scheme is a URL; put "./" before a file of such a name. An open file is read from its
    beginning where it can be rewound. A memoryview of more than one axis is an array of pixels.
    Raises ImageError, one line.
    """
    name = name or picture_name(source)
    try:
        content = _read(source)
    except ImageError as e:
        raise ImageError(f"{name}: {e}") from None
    return FileBytes(content, name) if type(content) is bytes and content is not source else content


def read_stdin() -> FileBytes:
    """Reads one picture from standard input, to its end. Raises ImageError where there is none to read."""
    name = "standard input"
    if sys.stdin is None or sys.stdin.closed:
        raise ImageError(f"{name}: is closed; pipe the picture in, or give its path")
    if sys.stdin.isatty():
        raise ImageError(f"{name}: is a terminal; pipe the picture in: cat picture.png | ...")
    try:
        content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as e:
        raise ImageError(f"{name}: {_unreadable(e, 'pipe the picture in, or give its path')}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ImageError(f"{name}: {_TOO_LARGE}")
    return FileBytes(content, name)


_TOO_LARGE = f"more than {MAX_FILE_BYTES >> 30} GiB is no picture that can be used; check which file it is"


def _cut(text: str) -> str:
    """Text as one line of at most 80 characters: control characters escaped, the middle left out."""
    size = len(text)
    if re.match(r"\s*data:", text[:_NAME_LENGTH], re.I) and size > _NAME_LENGTH:
        text = f"{text.lstrip()[:40]}... ({size:,} characters)"
    elif size > 4 * _NAME_LENGTH:
        text = text[: 2 * _NAME_LENGTH] + text[-2 * _NAME_LENGTH :]
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(line) > _NAME_LENGTH:  # the end names the file
        line = f"{line[:30]}...{line[33 - _NAME_LENGTH :]}"
    return line


def _reader(source: object) -> object:
    """The method that gives an open file's content, None for what is not one."""
    found = getattr(source, "read", None) or getattr(source, "read_bytes", None)
    return found if callable(found) else None


def _is_tensor(source: object) -> bool:
    """Whether an object holds an array without being one: a tensor of torch, jax or tensorflow, a pixel buffer."""
    if isinstance(source, (list, tuple)) or type(source).__module__.partition(".")[0] == "pandas":
        return False
    return hasattr(source, "__array__") or hasattr(source, "__array_interface__") or hasattr(source, "__dlpack__")


def _array_from(source: object) -> str:
    if type(source).__module__.partition(".")[0] == "torch":
        return "give an array [H, W, 3]: tensor.permute(1, 2, 0).cpu().numpy() if its channels come first"
    return "give an array [H, W, 3]: numpy.asarray(it)"


def _read(source: object) -> PictureSource:
    if isinstance(source, (str, os.PathLike)):
        return _read_named(source)
    if isinstance(source, memoryview) and source.ndim > 1:
        return np.asarray(source)
    if isinstance(source, (bytes, bytearray, memoryview, Image.Image, np.ndarray)):
        return source
    reader = _reader(source)
    if callable(reader):
        return _read_open(source, reader)
    if source is not None and _is_tensor(source):
        raise ImageError(f"not a picture yet: {_array_from(source)}")
    raise ImageError(f"not a picture; {_GIVE}")


def _read_open(file: object, reader: object) -> bytes:
    """Reads an open file, from its beginning if it has one."""
    if isinstance(file, io.TextIOBase):
        raise ImageError("the file was opened as text; open it with mode 'rb'")
    try:
        if getattr(file, "seekable", bool)():
            file.seek(0)  # type: ignore[attr-defined]
        content = reader()  # type: ignore[operator]
    except Exception as e:
        raise ImageError(_unreadable(e, "open it again, or give its path")) from None
    if not isinstance(content, (bytes, bytearray, memoryview)):
        close = getattr(content, "close", None)
        if callable(close):
            close()  # a coroutine would complain that nobody awaited it
        raise ImageError(f"its read() gave {type(content).__name__} instead of bytes; read it yourself and give those")
    return bytes(content)


def _unreadable(error: Exception, advice: str = "check the path and its permissions") -> str:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120] or type(error).__name__
    return f"cannot be read ({reason}); {advice}"


def _read_named(source: str | os.PathLike[str] | os.PathLike[bytes]) -> bytes:
    try:
        text = os.fsdecode(source)
    except TypeError:
        raise ImageError(f"its __fspath__ gives no path; {_GIVE}") from None
    found = _URL.match(text[:_NAME_LENGTH]) if isinstance(source, str) else None
    scheme = found[1].lower() if found else ""
    if scheme == "data":
        return _from_data_url(text.strip())
    if scheme == "file":
        return _read_path(_path_of(text.strip()))
    if found and (text.startswith("//", found.end()) or scheme == "blob"):
        raise ImageError(_elsewhere(text.strip(), scheme))
    return _read_path(text)


def _elsewhere(url: str, scheme: str) -> str:
    """Why a URL is not opened, and the command that fetches it."""
    if scheme == "blob":
        return "a blob: URL exists in its browser alone; save the picture, or give its data: URL"
    why = "this runtime opens no network connections for pictures"
    command = _FETCH.get(scheme)
    if command is None:
        return f"{why}, and {_cut(scheme)}: is unknown to it; copy the picture to a file and give its path"
    try:
        last = os.path.basename(unquote(urlsplit(url).path))
    except ValueError:
        last = ""
    name = last if re.fullmatch(r"[\w-][\w.-]{0,40}\.\w{2,5}", last, re.ASCII) else "picture.jpg"
    if len(url) > _NAME_LENGTH:
        return f"{why}; fetch it first: {command.format(name=name, url='URL')} with the URL in quotes"
    return f"{why}; fetch it first: {command.format(name=name, url=shlex.quote(_cut(url)))}"


def _from_data_url(url: str) -> bytes:
    """The bytes of a data: URL, base64 (both alphabets, padded or not, folded or not) or percent-encoded."""
    head, comma, body = url[len("data:") :].partition(",")
    if not comma:
        raise ImageError("a data: URL needs a comma before its content: data:image/png;base64,...")
    try:
        content = unquote_to_bytes(body.encode("ascii"))
    except UnicodeEncodeError:
        raise ImageError("a data: URL holds ASCII only; encode the picture again, with base64") from None
    if "base64" in [word.strip() for word in head.lower().split(";")]:
        letters = content.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n\v\f").rstrip(b"=")
        try:
            content = base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
        except binascii.Error:
            cut = len(letters) % 4 == 1
            raise ImageError(
                f"the base64 of the data: URL is {'cut off' if cut else 'damaged'}; encode the picture again"
            ) from None
    if not content:
        raise ImageError("the data: URL holds no bytes; put the picture's content behind its comma")
    return content


def _path_of(url: str) -> str:
    """The path of a file: URL."""
    rest = url[len("file:") :]
    if rest.startswith("//"):
        host, _, path = rest[2:].partition("/")
        if host.lower() not in ("", "localhost", "127.0.0.1", "[::1]"):
            raise ImageError(
                f"the file: URL names the machine {_cut(host)!r}; write file:///PATH with the whole path from /"
            )
        rest = f"/{path}"
    return os.fsdecode(unquote_to_bytes(os.fsencode(rest)))


def _read_path(path: str) -> bytes:
    """Reads a file whole: a decoder working on a mapped file would crash if another program shortened it."""
    try:
        mode = os.stat(path).st_mode  # before opening, which alone sets some devices going
        if stat.S_ISDIR(mode):
            raise ImageError("is a folder; name the picture in it")
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise ImageError("is a device; save the picture to a file (from a camera: ffmpeg -i DEVICE -frames:v 1)")
        # Not blocking: opening a named pipe would wait for its writer without end.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb", buffering=0) as file:
            if stat.S_ISFIFO(mode):
                return _read_pipe(handle)
            if os.fstat(handle).st_size > MAX_FILE_BYTES:
                raise ImageError(_TOO_LARGE)
            return file.readall()
    except FileNotFoundError:
        raise ImageError(_missing(path)) from None
    except NotADirectoryError:
        return _read_member(path)
    except (OSError, ValueError) as e:
        raise ImageError(_missing(path) if BASE64_PICTURE.match(path) else _unreadable(e)) from None


def _read_member(path: str) -> bytes:
    """Reads a picture inside a zip file: set.zip/a.jpg."""
    try:
        return read_bytes(path)
    except (OSError, ValueError) as e:
        raise ImageError(_missing(path) if BASE64_PICTURE.match(path) else _unreadable(e)) from None


def _read_pipe(handle: int) -> bytes:
    """Reads a pipe to its end, without waiting forever for somebody to write."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    content = bytearray()
    while True:
        if not poll.poll(PIPE_PATIENCE_MS):
            raise ImageError(f"is a pipe that brought nothing for {PIPE_PATIENCE_MS // 1000} s; check who writes to it")
        try:
            part = os.read(handle, 1 << 20)
        except BlockingIOError:
            continue
        if not part:
            return bytes(content)
        content += part
        if len(content) > MAX_FILE_BYTES:
            raise ImageError(_TOO_LARGE)


def _missing(path: str) -> str:
    """What to say of a path that leads nowhere: often it is something else than a path."""
    if path == "-":
        return "no such file; only migician-run reads - from standard input, give sys.stdin.buffer.read() here"
    url = re.match(r"([a-z][a-z0-9]+):/", path)
    if url and url[1] in _FETCH:
        return "no such file; a URL put into a Path loses a slash, give it as it is"
    if BASE64_PICTURE.match(path):
        return "base64 is not a path; give base64.b64decode(text), or put data:image/png;base64, before it"
    return "no such file; check the path"
