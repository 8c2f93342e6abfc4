"""A memory-mapped safetensors reader that trusts nothing it reads.

Layout of a file (https://github.com/huggingface/safetensors):

    u64 little-endian H | H bytes of JSON | data section
    JSON: {"__metadata__": {str: str}, name: {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, ...}

Offsets count from the start of the data section; the tensors must tile it without hole or overlap, as the reference
reader demands. The `safetensors` package cannot hand bf16 to numpy without a copy, which is why this file exists.
"""

import contextlib
import errno
import json
import math
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelFileError, OutOfMemory, UnsupportedError

__all__ = ["DTYPE_BYTES", "FLOATS", "Tensor", "TensorFile", "iter_chunks", "parse_json", "shown"]

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
FLOATS = frozenset(("BF16", "F16", "F32", "F64"))
_MAX_HEADER_BYTES = 100_000_000  # the reference reader's own limit
_MAX_RANK = 8
_AGAIN = "download or export it again"


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor as stored; `data` points into the mapped file and keeps the mapping alive.

    data: u8[nbytes], read-only.   shape and dtype are the file's own words, checked against nbytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Counts the stored bytes."""
        return self.data.size

    def to_f32(self) -> np.ndarray:
        """Returns the values as f32[shape], a view where the file holds F32 and else a copy; F64 is rounded."""
        return self._floats(self.data).reshape(self.shape)

    def _floats(self, data: np.ndarray) -> np.ndarray:
        if self.dtype == "F32":
            return data.view("<f4")
        if self.dtype == "BF16":
            wide = data.view("<u2").astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        if self.dtype in ("F16", "F64"):
            with np.errstate(over="ignore"):  # to infinity, which whoever reads the weights refuses by name
                return data.view("<f2" if self.dtype == "F16" else "<f8").astype(np.float32)
        raise UnsupportedError(f"tensor {shown(self.name)} is {self.dtype}; only floating point converts to float")

    def served_dtype(self) -> str:
        """BF16 or F32: what the core computes with. F16 and F64 become BF16 where every value is one, which takes a
        reading of them all, else F32."""
        if self.dtype not in ("F16", "F64"):
            return self.dtype
        exact = all(not (piece.view(np.uint32) & 0xFFFF).any() for piece in self.pieces())
        return "BF16" if exact else "F32"

    def served_pieces(self, dtype: str) -> Iterator[memoryview]:
        """Yields the bytes of the values as served_dtype(), piece by piece."""
        if dtype == self.dtype:
            yield from iter_chunks(self.data)
            return
        for piece in self.pieces():
            bits = piece.view(np.uint32)
            yield ((bits >> 16).astype(np.uint16) if dtype == "BF16" else bits).view(np.uint8).data

    def served(self) -> "Tensor":
        """Returns this tensor, or a copy of its values in a dtype that the core computes with."""
        dtype = self.served_dtype()
        if dtype == self.dtype:
            return self
        data = np.empty(math.prod(self.shape) * DTYPE_BYTES[dtype], np.uint8)
        at = 0
        for piece in self.served_pieces(dtype):
            data[at : at + len(piece)] = piece
            at += len(piece)
        return Tensor(self.name, dtype, self.shape, data)

    def pieces(self, count: int = 1 << 18) -> Iterator[np.ndarray]:
        """Yields the values in order as f32[<= count], so that no more of them are held at a time."""
        step = count * DTYPE_BYTES[self.dtype]
        for start in range(0, self.nbytes, step):
            yield self._floats(self.data[start : start + step])

    def equals(self, other: "Tensor") -> bool:
        """True where shape and values are the same, whatever the dtypes; reads no further than a first difference."""
        if self.shape != other.shape:
            return False
        if self.dtype == other.dtype and all(map(np.array_equal, iter_chunks(self.data), iter_chunks(other.data))):
            return True
        return all(map(np.array_equal, self.pieces(), other.pieces()))

    def check_finite(self, where: str | os.PathLike[str]) -> None:
        """Reads every value. Raises ModelFileError for one that is no finite number, or none as f32.

        where: the file or folder, for the message.
        """
        if self.dtype not in FLOATS:
            return
        at = 0
        for piece in self.pieces():
            sound = np.isfinite(piece)
            if not sound.all():
                first = int(np.argmin(sound))
                place = [int(i) for i in np.unravel_index(at + first, self.shape)] if self.shape else []
                raise ModelFileError(
                    f"{where}: tensor {shown(self.name)} holds {piece[first]} at {place}: damaged, or diverged; "
                    f"copy it again or take an earlier checkpoint"
                )
            at += len(piece)

    def aligned(self) -> "Tensor":
        """Returns this tensor, or a copy whose address suits its element type where a file's odd header moved it."""
        if self.data.ctypes.data % DTYPE_BYTES[self.dtype] == 0:
            return self
        return Tensor(self.name, self.dtype, self.shape, self.data.copy())


class TensorFile:
    """One safetensors file, mapped read-only, its header fully checked.

    Opening reads the header alone. A tensor outlives close(): the mapping goes when its last array does.
    Trap: a mapped file must be replaced by rename, as every sane writer does; one shortened in place ends the process.
    Raises ModelFileError for everything that is not a sound safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.tensors: dict[str, Tensor] = {}
        self.metadata: dict[str, str] = {}
        self.data_start = 0
        self._map = _map_file(self.path)
        self.size_bytes = len(self._map)
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def data(self) -> memoryview:
        """Returns the data section: every byte behind the header."""
        return memoryview(self._map)[self.data_start :]

    def release(self) -> None:
        """Gives pages already read back to the system; they are read again when they are wanted."""
        with contextlib.suppress(OSError, ValueError):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Lets go of the tensors and, when no array is left elsewhere, of the mapping."""
        self.tensors.clear()
        with contextlib.suppress(BufferError):  # arrays handed out still look at it; the last of them unmaps
            self._map.close()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read_header(self) -> None:
        size = len(self._map)
        if size < 8:
            raise self._bad(f"{size} bytes are too few for a safetensors header")
        length = int.from_bytes(self._map[:8], "little")
        if length > _MAX_HEADER_BYTES:
            raise self._not_safetensors()
        if length > size - 8:
            if self._map[8:9] != b"{":
                raise self._not_safetensors()
            raise self._bad(f"cut short: the header needs {length} bytes and {size - 8} follow")
        header = parse_json(self._map[8 : 8 + length], self.path, "safetensors header")
        self.data_start = 8 + length
        self.metadata = self._check_metadata(header.pop("__metadata__", None))
        spans = [(*self._check_entry(name, entry), name) for name, entry in header.items()]
        self._check_tiling(spans, size - self.data_start)
        for begin, end, name in spans:  # header order
            entry = header[name]
            self.tensors[name] = Tensor(name, entry["dtype"], tuple(entry["shape"]), self._view(begin, end))

    def _view(self, begin: int, end: int) -> np.ndarray:
        if begin == end:
            return np.empty(0, np.uint8)  # frombuffer refuses an empty range at the end of the file
        return np.frombuffer(self._map, np.uint8, end - begin, self.data_start + begin)

    def _check_metadata(self, metadata: Any) -> dict[str, str]:
        if metadata is None:
            return {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._bad("__metadata__ is not a table of strings")
        return metadata

    def _check_entry(self, name: str, entry: Any) -> tuple[int, int]:
        """Checks one header entry by itself; returns its (begin, end) in the data section."""
        where = f"tensor {shown(name)}"
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise self._bad(f"{where} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise self._bad(f"{where} has the unknown dtype {shown(dtype)}")
        if not _counts(shape) or len(shape) > _MAX_RANK:
            raise self._bad(f"{where} has the impossible shape {shown(shape)}")
        if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._bad(f"{where} has the impossible data_offsets {shown(offsets)}")
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]  # Python integers: no overflow to exploit
        if nbytes != offsets[1] - offsets[0]:
            raise self._bad(
                f"{where} {dtype}{shown(shape)} needs {shown(nbytes)} bytes, data_offsets give "
                f"{shown(offsets[1] - offsets[0])}"
            )
        return offsets[0], offsets[1]

    def _check_tiling(self, spans: list[tuple[int, int, str]], available: int) -> None:
        position = 0
        for begin, end, name in sorted(spans):
            if end > available:
                raise self._bad(
                    f"cut short: tensor {shown(name)} ends at byte {shown(end)} of the data, {available} are there"
                )
            if begin != position:
                fault = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
                raise self._bad(f"tensor {shown(name)} {fault} (begins at {begin}, expected {position})")
            position = end
        if position != available:
            raise self._bad(f"{available - position} bytes behind the last tensor belong to none")

    def _bad(self, fault: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {fault}; {_AGAIN}")

    def _not_safetensors(self) -> ModelFileError:
        magic = bytes(self._map[:4])
        if magic == b"GGUF":
            return ModelFileError(f"{self.path}: a GGUF file; give the Hugging Face folder or a .mig file")
        if magic == b"PK\x03\x04":
            return ModelFileError(f"{self.path}: a zip or PyTorch file; convert it to safetensors")
        if self._map[:60].startswith(b"version https://git-lfs"):
            return ModelFileError(f"{self.path}: a Git LFS pointer, not the file itself; run: git lfs pull")
        return self._bad("not a safetensors file")


def _map_file(path: Path) -> mmap.mmap:
    """Maps a regular file read-only; a directory, a device, a FIFO or an empty file is refused before any read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be opened ({_reason(error)}); check the path and its rights") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path}: not a regular file; give the safetensors file itself")
        if status.st_size == 0:
            raise ModelFileError(f"{path}: 0 bytes long; {_AGAIN}")
        return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise OutOfMemory(
                f"{path}: no address space left for its {status.st_size / 1e6:.0f} MB; raise the limit (ulimit -v)"
            ) from None
        raise ModelFileError(f"{path}: cannot be mapped ({_reason(error)}); {_AGAIN}") from None
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _counts(value: Any) -> bool:
    """True for a list of integers from 0 to 2**63 - 1; True and False are no integers here."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {shown(twice)} stands there twice")
    return table


def parse_json(text: bytes | str, path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Parses a JSON object; bad UTF-8, bad JSON, a name given twice or another type raise ModelFileError."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError:
        raise ModelFileError(f"{path}: the {what} is not UTF-8 text; {_AGAIN}") from None
    except RecursionError:
        raise ModelFileError(f"{path}: the {what} is nested too deeply; {_AGAIN}") from None
    except ValueError as error:
        raise ModelFileError(f"{path}: the {what} is not sound JSON ({_one_line(str(error))}); {_AGAIN}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: the {what} is not a JSON object; {_AGAIN}")
    return value


def _one_line(text: str, limit: int = 120) -> str:
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


def shown(value: Any) -> str:
    """Returns a value from a file as short printable text for a message: no control characters, at most 120 long."""
    if isinstance(value, int) and abs(value) >= 1 << 200:
        return "a number beyond reason"  # str() of a huge integer is slow, or refused
    if isinstance(value, list):
        return "[" + ", ".join(shown(v) for v in value[:10]) + (", ...]" if len(value) > 10 else "]")
    return _one_line(value if isinstance(value, str) else repr(value))


def iter_chunks(data: np.ndarray | memoryview, size: int = 8 << 20) -> Iterator[memoryview]:
    """Yields a byte range piece by piece, so that hashing or writing it never copies the whole."""
    view = data if isinstance(data, memoryview) else data.data
    for start in range(0, len(view), size):
        yield view[start : start + size]
