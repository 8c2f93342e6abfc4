"""Quantizer law: to pack and unpack is the identity, and every element lies where the kernels look for it."""

import tracemalloc

import numpy as np
import pytest

from migician.export.packing import group_size, pack_int4, pack_int8, unpack_int4, unpack_int8

SHAPES = [(1, 1), (16, 64), (17, 65), (15, 63), (301, 120), (72, 1176), (1100, 48), (2048, 128), (33, 200)]
SHAPES_INT4 = [(1, 16, 16), (16, 64, 64), (17, 80, 16), (33, 96, 32), (301, 448, 64), (1100, 128, 128), (5, 384, 32)]


def random_int4(rows, cols, group):
    rng = np.random.default_rng([rows, cols])
    q = rng.integers(-8, 8, (rows, cols), np.int8)
    return q, rng.integers(1, 17, (rows, cols // group), np.uint8)


GROUPS = {1: 0, 8: 0, 24: 0, 120: 0, 1176: 0, 16: 16, 48: 16, 80: 16, 96: 32, 64: 64, 896: 128, 3584: 128, 5120: 128}


@pytest.mark.parametrize(("k", "group"), GROUPS.items())
def test_group_size(k, group):
    assert group_size(k) == group
    assert group == 0 or k % group == 0


def test_group_size_obeys_its_limit():
    assert group_size(512, 32) == group_size(512, 63) == 32
    assert group_size(512, 15) == 0
    assert group_size(512, 1 << 20) == 512
    with pytest.raises(ValueError, match="positive"):
        group_size(0)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_int8_comes_back(rows, cols):
    q = np.random.default_rng(0).integers(-128, 128, (rows, cols), np.int8)
    blocks = pack_int8(q)
    assert blocks.dtype == np.int8 and blocks.flags.c_contiguous
    assert blocks.shape == (-(-rows // 16), -(-cols // 64) * 16, 16, 4)
    assert np.array_equal(unpack_int8(blocks, rows, cols), q)
    assert np.abs(blocks.astype(int)).sum() == np.abs(q.astype(int)).sum()  # nothing but zeros was added


@pytest.mark.parametrize(("rows", "cols", "group"), SHAPES_INT4)
def test_int4_comes_back(rows, cols, group):
    q, factors = random_int4(rows, cols, group)
    blocks, groups = pack_int4(q, factors)
    padded = -(-cols // 64) * 64
    assert blocks.dtype == groups.dtype == np.uint8 and blocks.flags.c_contiguous and groups.flags.c_contiguous
    assert blocks.shape == (-(-rows // 16), padded // 8, 16, 4)
    assert groups.shape == (-(-rows // 16), padded // group, 16)
    back, factors_back = unpack_int4(blocks, groups, rows, cols)
    assert back.dtype == np.int8 and factors_back.dtype == np.uint8
    assert np.array_equal(back, q) and np.array_equal(factors_back, factors)


def test_int8_elements_lie_where_the_layout_says():
    q = np.random.default_rng(1).integers(-127, 128, (35, 70), np.int8)
    blocks = pack_int8(q)
    for b, j, r, i in np.ndindex(*blocks.shape):
        n, k = 16 * b + r, 4 * j + i
        assert blocks[b, j, r, i] == (q[n, k] if n < 35 and k < 70 else 0)


def test_int4_elements_lie_where_the_layout_says():
    q, factors = random_int4(35, 80, 16)
    blocks, groups = pack_int4(q, factors)

    def code(n, k):
        return int(q[n, k]) + 8 if n < 35 and k < 80 else 8

    for b, j, r, i in np.ndindex(*blocks.shape):
        n, k = 16 * b + r, 8 * j + i
        assert blocks[b, j, r, i] == code(n, k) | code(n, k + 4) << 4
    for b, g, r in np.ndindex(*groups.shape):
        assert groups[b, g, r] == (factors[16 * b + r, g] if 16 * b + r < 35 and g < 5 else 1)


def test_views_pack_as_their_copies():
    q = np.random.default_rng(2).integers(-8, 8, (128, 96), np.int8)
    assert np.array_equal(pack_int8(q.T), pack_int8(q.T.copy()))
    factors = np.ones((96, 1), np.uint8)
    assert np.array_equal(pack_int4(q.T, factors)[0], pack_int4(q.T.copy(), factors)[0])


def test_what_is_no_int4_is_refused():
    q, factors = random_int4(16, 64, 32)
    for bad_q, bad_factors in [
        (q.astype(np.int16), factors),
        (q + np.int8(9), factors),
        (q - np.int8(1), factors),
        (q[:15], factors),
        (q, factors * 0),
        (q, factors + np.uint8(16)),
        (q, np.ones((16, 8), np.uint8)),
        (q, np.ones((16, 3), np.uint8)),
        (q[:, :0], factors[:, :0]),
    ]:
        with pytest.raises(ValueError, match=r"\d|matrix"):
            pack_int4(bad_q, bad_factors)
    blocks, groups = pack_int4(q, factors)
    for arguments in [(blocks, groups, 17, 64), (blocks, groups, 16, 65), (blocks, groups[:, :1, :8], 16, 64)]:
        with pytest.raises(ValueError, match="expected"):
            unpack_int4(*arguments)
    with pytest.raises(ValueError, match="groups"):
        unpack_int4(blocks, groups[:, :0], 16, 64)
    with pytest.raises(ValueError, match="expected"):
        unpack_int8(blocks, 16, 64)


def test_memory_stays_near_the_result():
    q, factors = random_int4(8192, 1024, 128)
    for job, most in ((lambda: pack_int8(q), 2.0), (lambda: pack_int4(q, factors), 2.0)):
        tracemalloc.start()
        job()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most * q.nbytes
