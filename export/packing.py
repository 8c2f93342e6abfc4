"""Brings quantized matrices into the one interleaved layout that every kernel reads in place, and back.

    int8   blocks i8[Np/16, Kp/4, 16, 4]    [b, j, r, i] = q[16b + r, 4j + i]
    int4   blocks u8[Np/16, Kp/8, 16, 4]    [b, j, r, i] = (q[16b + r, 8j + i] + 8) | (q[16b + r, 8j + 4 + i] + 8) << 4
           groups u8[Np/16, Kp/group, 16]   [b, g, r]    = factors[16b + r, g]

N rows are outputs, K columns inputs; Np is N rounded up to 16, Kp is K rounded up to 64. What lies beyond N and K
adds nothing to a sum: q is 0 there, a factor 1.
"""

import numpy as np

from ..runtime.files.quantization import group_size

__all__ = ["group_size", "pack_int4", "pack_int8", "unpack_int4", "unpack_int8"]

_ROWS = 16  # rows of a block
_COLUMNS = 64  # K is padded to a multiple of this
_AT_A_TIME = 64  # row blocks in work at once, so that the working copy stays small


def pack_int8(q: np.ndarray) -> np.ndarray:
    """Interleaves int8 weights.   q: i8[N, K].   Returns i8[Np/16, Kp/4, 16, 4].   Raises ValueError."""
    rows, cols = _matrix(q, np.int8)
    blocks = np.empty((-(-rows // _ROWS), _padded(cols) // 4, _ROWS), np.uint32)
    for begin in range(0, len(blocks), _AT_A_TIME):
        part = blocks[begin : begin + _AT_A_TIME]
        words = _padded_rows(q, begin, len(part)).view(np.uint32)  # four columns of a row move together
        part[...] = words.reshape(len(part), _ROWS, -1).transpose(0, 2, 1)
    return blocks.view(np.int8).reshape(*blocks.shape, 4)


def unpack_int8(blocks: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Undoes pack_int8.   blocks: i8[Np/16, Kp/4, 16, 4].   Returns i8[rows, cols].   Raises ValueError."""
    _expect(blocks, np.int8, (-(-rows // _ROWS), _padded(cols) // 4, _ROWS, 4))
    q = np.empty((rows, cols), np.int8)
    words = np.ascontiguousarray(blocks).view(np.uint32)[..., 0]
    for begin in range(0, len(words), _AT_A_TIME):
        part = np.ascontiguousarray(words[begin : begin + _AT_A_TIME].transpose(0, 2, 1))
        into = q[begin * _ROWS : (begin + _AT_A_TIME) * _ROWS]
        into[...] = part.view(np.int8).reshape(-1, _padded(cols))[: len(into), :cols]
    return q


def pack_int4(q: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Interleaves int4 weights and their group factors.

    q: i8[N, K] in -8..7.   factors: u8[N, K/group] in 1..16, group a power of two from 16 to 128.
    Returns (blocks: u8[Np/16, Kp/8, 16, 4], groups: u8[Np/16, Kp/group, 16]).
    Raises ValueError for another shape, type or range.
    """
    rows, cols = _matrix(q, np.int8)
    count = _matrix(factors, np.uint8)[1]
    if factors.shape[0] != rows or cols % count or (cols // count) not in (16, 32, 64, 128):
        raise ValueError(f"factors {factors.shape} do not give q {q.shape} groups of 16, 32, 64 or 128 columns")
    if q.min() < -8 or q.max() > 7:
        raise ValueError(f"q holds {q.min()}..{q.max()}, int4 holds -8..7")
    if factors.min() < 1 or factors.max() > 16:
        raise ValueError(f"factors hold {factors.min()}..{factors.max()}, expected 1..16")
    blocks = np.empty((-(-rows // _ROWS), _padded(cols) // 8, _ROWS), np.uint32)
    for begin in range(0, len(blocks), _AT_A_TIME):
        part = blocks[begin : begin + _AT_A_TIME]
        codes = _padded_rows(q, begin, len(part))
        codes += 8
        pairs = codes.view(np.uint32).reshape(len(part), _ROWS, -1, 2)
        # four codes in a word, each under 16: the shift carries nothing into a neighbour, in either byte order
        part[...] = (pairs[..., 0] | pairs[..., 1] << 4).transpose(0, 2, 1)
    return blocks.view(np.uint8).reshape(*blocks.shape, 4), _pack_factors(factors, cols)


def _pack_factors(factors: np.ndarray, cols: int) -> np.ndarray:
    rows, count = factors.shape
    wide = np.ones((-(-rows // _ROWS) * _ROWS, _padded(cols) // (cols // count)), np.uint8)
    wide[:rows, :count] = factors
    return np.ascontiguousarray(wide.reshape(-1, _ROWS, wide.shape[1]).transpose(0, 2, 1))


def unpack_int4(blocks: np.ndarray, groups: np.ndarray, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Undoes pack_int4.

    blocks: u8[Np/16, Kp/8, 16, 4].   groups: u8[Np/16, Kp/group, 16].
    Returns (q: i8[rows, cols] in -8..7, factors: u8[rows, cols/group]).   Raises ValueError.
    """
    _expect(blocks, np.uint8, (-(-rows // _ROWS), _padded(cols) // 8, _ROWS, 4))
    count = groups.shape[1] if groups.ndim == 3 else 0
    _expect(groups, np.uint8, (len(blocks), count, _ROWS))
    group = _padded(cols) // count if count else 0
    if group not in (16, 32, 64, 128) or _padded(cols) % count or cols % group:
        raise ValueError(f"groups {groups.shape} do not give {cols} columns groups of 16, 32, 64 or 128")
    q = np.empty((rows, cols), np.int8)
    words = np.ascontiguousarray(blocks).view(np.uint32)[..., 0]
    for begin in range(0, len(words), _AT_A_TIME):
        part = words[begin : begin + _AT_A_TIME].transpose(0, 2, 1)
        pairs = np.empty((*part.shape, 2), np.uint32)
        pairs[..., 0] = part & 0x0F0F0F0F
        pairs[..., 1] = part >> 4 & 0x0F0F0F0F
        into = q[begin * _ROWS : (begin + _AT_A_TIME) * _ROWS]
        into[...] = pairs.view(np.int8).reshape(-1, _padded(cols))[: len(into), :cols]
        into -= 8
    factors = groups.transpose(0, 2, 1).reshape(-1, count)[:rows, : cols // group]
    return q, np.ascontiguousarray(factors)


def _padded(cols: int) -> int:
    return -(-cols // _COLUMNS) * _COLUMNS


def _padded_rows(q: np.ndarray, begin: int, blocks: int) -> np.ndarray:
    """Copies the rows of some blocks into i8[16 * blocks, Kp], 0 beyond N and K."""
    rows = q[begin * _ROWS : (begin + blocks) * _ROWS]
    wide = np.zeros((blocks * _ROWS, _padded(q.shape[1])), np.int8)
    wide[: len(rows), : q.shape[1]] = rows
    return wide


def _matrix(array: np.ndarray, dtype: type) -> tuple[int, int]:
    if array.ndim != 2 or array.dtype != dtype or 0 in array.shape:
        raise ValueError(f"expected a {np.dtype(dtype)} matrix, got {array.dtype}{list(array.shape)}")
    return array.shape[0], array.shape[1]


def _expect(array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"expected {np.dtype(dtype)}{list(shape)}, got {array.dtype}{list(array.shape)}")
