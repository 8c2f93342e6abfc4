"""Pictures inside zip files, opened where they lie: "pictures.zip/a/b.jpg" is the member a/b.jpg of pictures.zip.

An archive may be in volumes (x.z01, x.z02, ..., x.zip), as `zip -s` writes them and datasets are published. Nothing is
unpacked to a disk, and 16 bytes a member stay in memory: the hash of its name, and where its entry in the list is.
Source: PKWARE's APPNOTE.TXT 6.3.10: 4.3 (structure), 4.4 (fields), 4.5.3 (zip64), 8 (volumes).
"""

import io
import os
import struct
import weakref
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import ImageError

__all__ = ["Archive", "is_file", "open_archive", "open_file", "read_bytes"]

_MAX_MEMBER = 2 << 30  # more than any picture that is decoded
_CHUNK = 1 << 16
_LIST = 4 << 20  # of a list of members at a time
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MOST_ENTRY = _ENTRY.size + 3 * 0xFFFF


class _Member(NamedTuple):
    """An entry of the list.   start: of its local header, counted through all volumes.   sizes in bytes."""

    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    start: int


class Archive:
    """A zip file.

    prefix: the folders that all members lie in, such as ("home", "me", "data").
    Raises ImageError, without the archive's folder, for what is damaged, incomplete or of a kind that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: list[int] = []
        weakref.finalize(self, _close, self._files)
        for volume in _volumes(path):
            self._files.append(os.open(volume, os.O_RDONLY))
        sizes = [os.fstat(file).st_size for file in self._files]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._size = sum(sizes)
        try:
            self._read_list()
        except struct.error:
            raise self._damaged("cut off") from None

    def _damaged(self, what: str) -> ImageError:
        return ImageError(f"{self.path.name} is no sound zip file ({what}); download it again")

    def _read(self, start: int, size: int) -> bytes:
        """Bytes counted through all volumes; fewer at the end."""
        parts = []
        while size > 0 and 0 <= start < self._size:
            volume = bisect_right(self._starts, start) - 1
            part = os.pread(self._files[volume], min(size, 64 << 20), start - self._starts[volume])
            if not part:  # it has become shorter since it was opened
                break
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return b"".join(parts)

    # ---- the list of members
    def _read_list(self) -> None:
        start, size = self._find_list()
        end_of_list = start + size
        hashes, places = array("q"), array("q")
        prefix: str | None = None
        data, at = b"", 0
        while start + at < end_of_list:
            if len(data) - at < _MOST_ENTRY and start + len(data) < end_of_list:  # the list of a large one is long
                start, data, at = start + at, self._read(start + at, min(_LIST, end_of_list - start - at)), 0
            fields = _ENTRY.unpack_from(data, at)
            if fields[0] != b"PK\1\2":
                raise self._damaged("its list of members")
            end = at + _ENTRY.size + fields[10]
            name = _name(data[at + _ENTRY.size : end], fields[3])
            if not name.endswith("/"):
                hashes.append(hash(name))
                places.append(start + at)
                if prefix is None:
                    prefix = name[: name.rfind("/") + 1]
                while not name.startswith(prefix):
                    prefix = prefix[: prefix.rfind("/", 0, -1) + 1]
            at = end + fields[11] + fields[12]
        order = np.argsort(np.frombuffer(hashes, np.int64), kind="stable")
        self._hashes, self._places = np.frombuffer(hashes, np.int64)[order], np.frombuffer(places, np.int64)[order]
        self.prefix = tuple((prefix or "").split("/")[:-1])

    def _find_list(self) -> tuple[int, int]:
        """Where the list of members begins, and its size."""
        tail_start = max(0, self._size - _END.size - 0xFFFF)
        tail = self._read(tail_start, self._size - tail_start)
        at = tail.rfind(b"PK\5\6")
        while at >= 0 and len(tail) - at - _END.size != int.from_bytes(tail[at + 20 : at + 22], "little"):
            at = tail.rfind(b"PK\5\6", 0, at)
        if at < 0:
            raise self._damaged("no end of central directory")
        end = tail_start + at
        _, disk, first, _, _, size, offset, _ = _END.unpack_from(tail, at)
        locator = self._read(end - _LOCATOR.size, _LOCATOR.size) if end >= _LOCATOR.size else b""
        if locator[:4] == b"PK\6\7":
            _, where, relative, disks = _LOCATOR.unpack(locator)
            self._check_volumes(max(1, disks))
            wide = self._starts[min(where, len(self._starts) - 1)] + relative
            if self._read(wide, 4) != b"PK\6\6":  # something stands before the archive in its file
                wide = end - _LOCATOR.size - _END64.size
            end = wide
            _, _, _, _, disk, first, _, _, size, offset = _END64.unpack(self._read(end, _END64.size))
        self._check_volumes(disk + 1)
        # in one volume the list ends where its end record begins, and all offsets count from there
        self._shift = max(0, end - size - offset) if len(self._starts) == 1 else 0
        start = self._starts[min(first, len(self._starts) - 1)] + offset + self._shift
        if start + size > self._size:
            raise self._damaged("its list of members lies outside")
        return start, size

    def _check_volumes(self, count: int) -> None:
        here = len(self._starts)
        if count != here:
            absent = self.path.with_suffix(f".z{here:02d}").name
            raise ImageError(
                f"{self.path.name} is in {count} volumes, {here} are there; put {absent} and all others beside it"
            )

    def find(self, name: str) -> bool:
        """Whether there is a member of this name."""
        return self._find(name) is not None

    def _find(self, name: str) -> _Member | None:
        key = hash(name)
        for i in range(int(np.searchsorted(self._hashes, key)), len(self._hashes)):
            if self._hashes[i] != key:
                return None
            try:
                member = self._member(int(self._places[i]))
            except struct.error:
                raise self._damaged("it has become shorter") from None
            if member.name == name:
                return member
        return None

    def _member(self, place: int) -> _Member:
        data = self._read(place, 512)
        _, _, _, flags, method, _, _, crc, packed, size, names, extras, _, disk, _, _, offset = _ENTRY.unpack_from(data)
        end = _ENTRY.size + names
        if end + extras > len(data):
            data = self._read(place, end + extras)
        extra = data[end : end + extras]
        while len(extra) >= 4:
            kind, length = struct.unpack_from("<2H", extra)
            if kind == 1:  # zip64: in this order, those that their own field has no room for
                wide = io.BytesIO(extra[4 : 4 + length])
                size = int.from_bytes(wide.read(8), "little") if size == 0xFFFFFFFF else size
                packed = int.from_bytes(wide.read(8), "little") if packed == 0xFFFFFFFF else packed
                offset = int.from_bytes(wide.read(8), "little") if offset == 0xFFFFFFFF else offset
                disk = int.from_bytes(wide.read(4), "little") if disk == 0xFFFF else disk
            extra = extra[4 + length :]
        start = self._starts[min(disk, len(self._starts) - 1)] + offset + self._shift
        return _Member(_name(data[_ENTRY.size : end], flags), flags, method, crc, packed, size, start)

    # ---- a member's content
    def open(self, name: str) -> io.BufferedReader:
        """Opens a member for reading and seeking; what is not asked for is not decompressed.

        Raises ImageError for one that is not there, is encrypted, or packed in a way that is not read.
        """
        member = self._find(name)
        if member is None:
            raise ImageError(f"there is no {name[-80:]} in {self.path.name}; check the path")
        if member.flags & 1 or member.method not in (0, 8):
            how = "encrypted" if member.flags & 1 else f"packed by method {member.method}"
            raise ImageError(f"it is {how} in {self.path.name}; unpack the archive, and name the unpacked pictures")
        if member.size > _MAX_MEMBER:
            raise ImageError(f"{member.size:,} bytes in {self.path.name} are no picture; check which file it is")
        local = self._read(member.start, _LOCAL.size)
        if len(local) < _LOCAL.size or local[:4] != b"PK\3\4":
            raise self._damaged("a member's header")
        *_, names, extras = _LOCAL.unpack(local)
        start = member.start + _LOCAL.size + names + extras
        return io.BufferedReader(_Stream(self, member, start), _CHUNK)


class _Stream(io.RawIOBase):
    """A member's content, decompressed as far as it was asked for, and kept: pictures are small."""

    def __init__(self, archive: Archive, member: _Member, start: int) -> None:
        self._archive, self._member, self._start = archive, member, start
        self._taken, self._at = 0, 0
        self._content = bytearray()
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS) if member.method == 8 else None

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a place; nothing is decompressed for that."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._member.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Reads what there is, up to the buffer's size."""
        wanted = min(self._at + len(buffer), self._member.size)
        while len(self._content) < wanted:
            self._more()
        part = self._content[self._at : wanted]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _more(self) -> None:
        """Decompresses another piece; at the end checks the whole."""
        member, archive = self._member, self._archive
        packed = archive._read(self._start + self._taken, min(_CHUNK, member.packed - self._taken))
        self._taken += len(packed)
        try:
            self._content += self._inflate.decompress(packed) if self._inflate else packed
        except zlib.error:
            raise archive._damaged("a member that cannot be decompressed") from None
        over = len(self._content) > member.size or (not packed and len(self._content) < member.size)
        whole = len(self._content) == member.size
        if over or (whole and zlib.crc32(self._content) != member.crc):
            raise archive._damaged("a member that is not what its list says")


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)


def _name(raw: bytes, flags: int) -> str:
    """A member's name as a path with slashes, from where the archive begins."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        name = raw.decode("utf-8" if flags & 0x800 else "cp437", "replace")
    return name.replace("\\", "/").removeprefix("./").lstrip("/")


def _volumes(path: Path) -> list[Path]:
    """The files that an archive is in, in order."""
    found: list[Path] = []
    while (volume := path.with_suffix(f".z{len(found) + 1:02d}")).is_file():
        found.append(volume)
    return [*found, path]


# ---- files and members alike
def open_archive(path: Path) -> Archive:
    """Opens an archive; the last ones stay open. Raises ImageError, OSError."""
    state = [(volume.stat().st_mtime_ns, volume.stat().st_size) for volume in _volumes(path)]
    return _opened(os.path.abspath(path), tuple(state))


@lru_cache(maxsize=16)
def _opened(path: str, _: Sequence[tuple[int, int]]) -> Archive:
    return Archive(Path(path))


def _cut(path: str | os.PathLike[str]) -> tuple[Path, str] | None:
    """The archive and the member that a path means; None where no part of it is a zip file."""
    whole = Path(path)
    for parent in whole.parents:
        if os.path.isdir(parent):
            return None
        if parent.suffix.lower() == ".zip" and os.path.isfile(parent):
            return parent, whole.relative_to(parent).as_posix()
    return None


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a file, or of a file inside a zip file."""
    if os.path.isfile(path):
        return True
    try:
        return (found := _cut(path)) is not None and open_archive(found[0]).find(found[1])
    except (ImageError, OSError):
        return False


def open_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a file, or a file inside a zip file, for reading. Raises OSError, ImageError."""
    found = None if os.path.isfile(path) else _cut(path)
    return open(path, "rb") if found is None else open_archive(found[0]).open(found[1])


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Reads such a file whole. Raises OSError, ImageError."""
    with open_file(path) as file:
        return file.read()
