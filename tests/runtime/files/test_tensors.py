"""The safetensors reader: what it maps, and every way in which a file can lie to it."""

import json
import os
import random
import stat

import numpy as np
import pytest
from checkpoints import f32_to_bf16

from migician.runtime.errors import MigicianError, ModelFileError, UnsupportedError
from migician.runtime.files.tensors import Tensor, TensorFile

TWO = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}
DATA = bytes(range(24))


def file_bytes(header, data=DATA, *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def write(path, content):
    path.write_bytes(content)
    return path


def test_reads_tensors_without_a_copy(tmp_path):
    path = write(tmp_path / "x.safetensors", file_bytes({"__metadata__": {"k": "v"}, **TWO}))
    with TensorFile(path) as file:
        assert file.metadata == {"k": "v"}
        assert list(file.tensors) == ["a", "b"]
        tensor = file.tensors["a"]
        assert (tensor.dtype, tensor.shape, tensor.nbytes) == ("F32", (2, 2), 16)
        assert bytes(tensor.data) == DATA[:16]
        assert not tensor.data.flags.owndata and not tensor.data.flags.writeable
        assert bytes(file.data()) == DATA


def test_tensor_outlives_the_file(tmp_path):
    path = write(tmp_path / "x.safetensors", file_bytes(TWO))
    file = TensorFile(path)
    tensor = file.tensors["b"]
    file.close()
    file.close()
    path.unlink()
    assert bytes(tensor.data) == DATA[16:]


def test_agrees_with_the_safetensors_library(tmp_path):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((3, 5)).astype(np.float32),
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 4), np.float32),
        "ids": np.arange(7, dtype=np.int64),
        "flags": np.array([True, False]),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert file.tensors.keys() == arrays.keys()
        for name, array in arrays.items():
            assert file.tensors[name].shape == array.shape
            assert bytes(file.tensors[name].data) == array.tobytes()
        np.testing.assert_array_equal(file.tensors["w"].to_f32(), arrays["w"])
        with pytest.raises(UnsupportedError):
            file.tensors["ids"].to_f32()


def test_bf16_widens_exactly_and_rounds_to_even():
    values = np.array([0.0, -0.0, 1.0, -2.5, 3.0e38, 1e-40], np.float32)
    tensor = Tensor("x", "BF16", (6,), f32_to_bf16(values).view(np.uint8))
    back = tensor.to_f32()
    np.testing.assert_allclose(back, values, rtol=2**-8, atol=1e-40)
    assert np.signbit(back[1])
    # halfway between two bf16 neighbours: the even one
    halves = np.array([0x3F808000, 0x3F818000, 0x3F808001], np.uint32).view(np.float32)
    assert f32_to_bf16(halves).tolist() == [0x3F80, 0x3F82, 0x3F81]


def test_misaligned_tensor_is_copied_to_an_aligned_address(tmp_path):
    text = json.dumps(TWO).encode()
    text += b" " * (1 - len(text) % 2)  # an odd header: every tensor sits on an odd address
    with TensorFile(write(tmp_path / "x", file_bytes(text))) as file:
        tensor = file.tensors["a"]
        assert tensor.data.ctypes.data % 2 == 1
        moved = tensor.aligned()
        assert moved.data.ctypes.data % 4 == 0 and bytes(moved.data) == bytes(tensor.data)
        assert moved.aligned() is moved


def entry(dtype="F32", shape=(6,), offsets=(0, 24)):
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


HOSTILE = {
    "empty": b"",
    "seven bytes": b"1234567",
    "text": b"hello, this is no model at all\n",
    "header longer than the file": file_bytes(TWO, length=5000),
    "header over 100 MB": file_bytes(TWO, length=100_000_001),
    "header of 2**64 - 1": file_bytes(TWO, length=2**64 - 1),
    "header empty": file_bytes(b""),
    "header not UTF-8": file_bytes(b'{"\xff": 1}'),
    "header not JSON": file_bytes(b'{"a": '),
    "header a list": file_bytes(b"[1, 2]"),
    "header a number": file_bytes(b"1"),
    "header nested 100000 deep": file_bytes(b'{"a":' * 100_000),
    "header with a huge number": file_bytes(
        b'{"x":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,24]}}'
    ),
    "duplicate tensor": file_bytes(
        b'{"x":{"dtype":"U8","shape":[24],"data_offsets":[0,24]},"x":{"dtype":"U8","shape":[24],"data_offsets":[0,24]}}'
    ),
    "duplicate key in an entry": file_bytes(b'{"x":{"dtype":"U8","dtype":"I8","shape":[24],"data_offsets":[0,24]}}'),
    "metadata not a table": file_bytes({"__metadata__": [1], **TWO}),
    "metadata not strings": file_bytes({"__metadata__": {"a": 1}, **TWO}),
    "entry not a table": file_bytes({"x": 5}),
    "entry null": file_bytes({"x": None}),
    "entry without dtype": file_bytes({"x": {"shape": [24], "data_offsets": [0, 24]}}),
    "dtype unknown": file_bytes(entry("F33")),
    "dtype a list": file_bytes(entry(["F32"])),
    "shape negative": file_bytes(entry(shape=(-6,))),
    "shape two negatives": file_bytes(entry(shape=(-2, -3))),
    "shape a float": file_bytes(entry(shape=(6.0,))),
    "shape a bool": file_bytes(entry("U8", shape=(True, 24))),
    "shape a string": file_bytes(entry(shape=("6",))),
    "shape a table": file_bytes({"x": {"dtype": "U8", "shape": {"0": 24}, "data_offsets": [0, 24]}}),
    "shape wraps 64 bits": file_bytes(entry("U8", shape=(2**32, 2**32), offsets=(0, 0))),
    "shape wraps to 24": file_bytes(entry("U8", shape=(2**61 + 3, 8))),
    "shape over 63 bits": file_bytes(entry("U8", shape=(2**63,), offsets=(0, 2**63))),
    "shape of rank 1000": file_bytes(entry(shape=[1] * 1000 + [6])),
    "size disagrees": file_bytes(entry(shape=(5,))),
    "offsets negative": file_bytes(entry("U8", shape=(24,), offsets=(-24, 0))),
    "offsets reversed": file_bytes(entry("U8", shape=(24,), offsets=(24, 0))),
    "offsets three": file_bytes(entry(offsets=(0, 24, 24))),
    "offsets floats": file_bytes(entry(offsets=(0.0, 24.0))),
    "offsets past the end": file_bytes(entry("U8", shape=(25,), offsets=(0, 25))),
    "offsets far past the end": file_bytes(entry("U8", shape=(2**62,), offsets=(0, 2**62))),
    "overlap": file_bytes(
        {**entry("U8", (16,), (0, 16)), "y": {"dtype": "U8", "shape": [12], "data_offsets": [12, 24]}}
    ),
    "same bytes twice": file_bytes({**entry(), "y": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}),
    "hole": file_bytes({**entry("U8", (8,), (0, 8)), "y": {"dtype": "U8", "shape": [8], "data_offsets": [16, 24]}}),
    "hole at the start": file_bytes(entry("U8", (16,), (8, 24))),
    "bytes left over": file_bytes(entry("U8", (16,), (0, 16))),
    "one byte short": file_bytes(TWO, DATA[:-1]),
    "GGUF": b"GGUF\x03\x00\x00\x00" + bytes(100),
    "zip": b"PK\x03\x04\x00\x00\x08\x08" + bytes(100),
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_file_is_refused_in_one_line(tmp_path, content):
    path = write(tmp_path / "x.safetensors", content)
    with pytest.raises(ModelFileError) as caught:
        TensorFile(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "; " in message
    assert "\n" not in message and message.isprintable() and len(message) < 400


def test_control_characters_of_a_file_do_not_reach_the_message(tmp_path):
    path = write(tmp_path / "x", file_bytes({"\x1b[31m\n\r" + "n" * 5000: {}}))
    with pytest.raises(ModelFileError) as caught:
        TensorFile(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("fifo", "folder", "dangling", "loop", "absent", "nul\0inside", "long" * 500):
        with pytest.raises(ModelFileError):
            TensorFile(tmp_path / name)
    with pytest.raises(ModelFileError):
        TensorFile("/dev/null")
    real = write(tmp_path / "real", file_bytes(TWO))
    (tmp_path / "link").symlink_to(real)
    with TensorFile(tmp_path / "link") as file:
        assert len(file.tensors) == 2


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = write(tmp_path / "x", file_bytes(TWO))
    path.chmod(stat.S_IWUSR)
    with pytest.raises(ModelFileError, match="cannot be opened"):
        TensorFile(path)


def test_damaged_at_random_never_escapes_the_error_tree(tmp_path):
    rng = random.Random(0)
    sound = file_bytes({"__metadata__": {"k": "v"}, **TWO})
    path = tmp_path / "x"
    refused = 0
    for _ in range(1500):
        content = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content) - len(DATA))] = rng.choice(b'0123456789-.[]{}",: \x00\xffeE')
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            with TensorFile(path) as file:
                assert sum(tensor.nbytes for tensor in file.tensors.values()) <= len(content)
        except MigicianError:
            refused += 1
    assert refused > 1000
