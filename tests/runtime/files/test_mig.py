"""The .mig file: it round-trips, any safetensors library reads it, and it is complete or not there at all."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import LAYOUTS, make_checkpoint

from migician.runtime.errors import MigicianError, ModelFileError, UnsupportedError
from migician.runtime.files import mig
from migician.runtime.files.mig import read_mig, write_mig
from migician.runtime.files.open import open_checkpoint
from migician.runtime.files.tensors import TensorFile

# hidden 120 x bf16 = 240 bytes: not a multiple of 64, so padding is needed
ODD = {"hidden": 120, "heads": 5, "kv_heads": 1, "inter": 100, "vocab": 301, "v_dim": 72, "v_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), **ODD, tied=False, repetition_penalty=1.05)


@pytest.fixture
def file(folder, tmp_path):
    with open_checkpoint(folder) as model:
        write_mig(tmp_path / "tiny.mig", model, extra={"card": "a note, ünicode"})
    return tmp_path / "tiny.mig"


def header_of(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewrite(path, edit):
    header, data = header_of(path)
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def refused(path, kind=ModelFileError, **options):
    with pytest.raises(MigicianError) as caught:
        read_mig(path, **options)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert message.startswith(str(path)) and message.isprintable() and "; " in message
    return message


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path, dtype, tied):
    with open_checkpoint(make_checkpoint(tmp_path / "m", **ODD, dtype=dtype, tied=tied, shards=2)) as model:
        write_mig(tmp_path / "m.mig", model)
        with open_checkpoint(tmp_path / "m.mig") as back:
            assert back.name == "m"
            assert back.config == model.config
            assert back.preprocessor == model.preprocessor
            assert back.repetition_penalty == model.repetition_penalty
            assert back.tokenizer_json == model.tokenizer_json
            assert {key: back.raw[key] for key in model.raw} == model.raw
            assert back.unused == () and back.metadata == {}
            assert list(back.tensors) == list(model.tensors)
            for name, tensor in back.tensors.items():
                assert (tensor.dtype, tensor.shape) == (model.tensors[name].dtype, model.tensors[name].shape)
                assert np.array_equal(tensor.data, model.tensors[name].data)
                assert tensor.data.ctypes.data % 64 == 0 and not tensor.data.flags.owndata


def test_safetensors_library_reads_it(file, folder):
    import safetensors

    with safetensors.safe_open(file, "np") as theirs, TensorFile(file) as ours, open_checkpoint(folder) as model:
        assert theirs.metadata()["format"] == "migician"
        assert set(theirs.keys()) == set(ours.tensors)
        names = [name for name in theirs.keys() if not name.startswith("_pad.")]  # noqa: SIM118
        assert set(names) == set(model.tensors)
        assert len(names) < len(ours.tensors)
        for name in names:
            assert tuple(theirs.get_slice(name).get_shape()) == model.tensors[name].shape


def test_safetensors_library_reads_the_same_values(tmp_path):
    from safetensors.numpy import load_file

    with open_checkpoint(make_checkpoint(tmp_path / "m", **ODD, dtype="float32")) as model:
        write_mig(tmp_path / "m.mig", model)
        arrays = load_file(tmp_path / "m.mig")
        for name, tensor in model.tensors.items():
            np.testing.assert_array_equal(arrays[name], tensor.to_f32())
            arrays.pop(name)
        assert all(name.startswith("_pad.") and not array.any() for name, array in arrays.items())


def test_header(file, folder):
    header, data = header_of(file)
    metadata = header["__metadata__"]
    assert metadata["format_version"] == "1"
    assert metadata["quantization"] == "none" and metadata["calibration"] == ""
    assert metadata["config"] == (folder / "config.json").read_text()
    assert metadata["tokenizer"] == (folder / "tokenizer.json").read_text()
    assert metadata["checksum"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert (file.stat().st_size - len(data)) % 64 == 0
    with read_mig(file) as model:
        assert model.metadata == {"card": "a note, ünicode"}


def test_no_padding_where_none_is_needed(tmp_path):
    with open_checkpoint(make_checkpoint(tmp_path / "m")) as model:
        write_mig(tmp_path / "m.mig", model)
        header, _ = header_of(tmp_path / "m.mig")
        assert set(header) - {"__metadata__"} == set(model.tensors)


def test_same_input_same_bytes(tmp_path, folder, file):
    with open_checkpoint(folder) as model:
        write_mig(tmp_path / "again.mig", model, extra={"card": "a note, ünicode"})
    assert (tmp_path / "again.mig").read_bytes() == file.read_bytes()
    with read_mig(file) as model:  # a .mig written again is itself, over itself too
        before = file.read_bytes()
        write_mig(file, model)
        assert file.read_bytes() == before
        assert model.tensors["model.norm.weight"].to_f32().any()


def test_layouts_and_shards_give_the_same_data(tmp_path):
    sums = set()
    for layout in LAYOUTS:
        for shards in (1, 3):
            with open_checkpoint(
                make_checkpoint(tmp_path / f"{layout}{shards}", layout=layout, shards=shards)
            ) as model:
                write_mig(tmp_path / "x.mig", model)
            sums.add(header_of(tmp_path / "x.mig")[0]["__metadata__"]["checksum"])
    assert len(sums) == 1


def test_extra_may_not_forge_the_format(folder, tmp_path):
    with open_checkpoint(folder) as model, pytest.raises(ValueError, match="checksum"):
        write_mig(tmp_path / "x.mig", model, extra={"checksum": "sha256:0"})
    assert list(tmp_path.iterdir()) == []


def test_flipped_bit_is_found(file, monkeypatch):
    content = bytearray(file.read_bytes())
    content[-5000] ^= 4
    file.write_bytes(content)
    assert "checksum" in refused(file)
    read_mig(file, verify=False).close()
    monkeypatch.setattr(mig, "_VERIFY_BYTES", 1000)  # a large file opens without reading its weights
    read_mig(file).close()
    assert "checksum" in refused(file, verify=True)


def test_truncated_and_empty(file):
    content = file.read_bytes()
    for keep in (0, 7, 8, 500, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:keep])
        refused(file, verify=False)


def test_foreign_versions_and_metadata(file):
    sound = file.read_bytes()

    def edited(**changes):
        file.write_bytes(sound)
        rewrite(file, lambda header: header["__metadata__"].update(changes))
        return file

    assert "version 2" in refused(edited(format_version="2"), UnsupportedError)
    assert "version is 2" in refused(edited(quantization='{"version": 2}'), UnsupportedError)
    refused(edited(quantization="int4"))
    refused(edited(calibration="yesterday"))
    refused(edited(calibration="A" * 64))
    assert "plain safetensors" in refused(edited(format="pt"))
    refused(edited(config="{"))
    refused(edited(config="[]"))
    refused(edited(config='{"model_type": "llama"}'), UnsupportedError)
    refused(edited(preprocessor="{}x"))
    refused(edited(generation='{"repetition_penalty": "high"}'))
    refused(edited(checksum="md5:0"))
    for key in ("config", "tokenizer", "preprocessor", "generation", "quantization", "calibration", "checksum"):
        file.write_bytes(sound)
        rewrite(file, lambda header, key=key: header["__metadata__"].pop(key))
        assert key in refused(file)
    file.write_bytes(sound)
    rewrite(file, lambda header: header.pop("__metadata__"))
    refused(file)


def test_wrong_shape_and_alignment(file):
    sound = file.read_bytes()
    rewrite(file, lambda header: header["lm_head.weight"]["shape"].reverse())
    assert "lm_head.weight" in refused(file)
    file.write_bytes(sound)
    header, data = header_of(file)
    text = json.dumps(header).encode()
    text += b" " * (32 - (8 + len(text)) % 64 + 64)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert "64-byte" in refused(file)


def test_failure_while_writing_leaves_nothing(folder, tmp_path, monkeypatch):
    def failing(error):
        def pieces(*args):
            yield b"begun"
            raise error

        return pieces

    target = tmp_path / "x.mig"
    with open_checkpoint(folder) as model:
        monkeypatch.setattr(mig, "_pieces", failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(ModelFileError, match="No space left"):
            write_mig(target, model)
        assert list(tmp_path.iterdir()) == []
        target.write_bytes(b"the old one")
        monkeypatch.setattr(mig, "_pieces", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            write_mig(target, model)
        assert target.read_bytes() == b"the old one"
        assert list(tmp_path.iterdir()) == [target]


def test_place_where_no_file_can_be_made(folder, tmp_path):
    with open_checkpoint(folder) as model:
        for place in (tmp_path / "no" / "such" / "folder" / "x.mig", tmp_path, folder / "config.json" / "x.mig"):
            with pytest.raises(ModelFileError, match="cannot be written"):
                write_mig(place, model)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from migician.runtime.files import mig
from migician.runtime.files.open import open_checkpoint
pieces = mig._pieces
def dying(*args):
    for number, piece in enumerate(pieces(*args)):
        if number == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        yield piece
mig._pieces = dying
mig.write_mig(sys.argv[2], open_checkpoint(sys.argv[1]))
"""


def test_killed_while_writing_leaves_nothing_under_the_name(folder, tmp_path):
    target = tmp_path / "x.mig"
    done = subprocess.run([sys.executable, "-c", KILLED, folder, target], env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    with open_checkpoint(folder) as model:
        write_mig(target, model)  # what is left does not stand in the way
    read_mig(target).close()


def test_memory_stays_small(tmp_path):
    """A model far larger than the pieces is written without holding its weights: the writer's own peak is measured."""
    import tracemalloc

    folder = make_checkpoint(tmp_path / "m", hidden=1024, heads=8, inter=2048, vocab=20000, layers=1)
    with open_checkpoint(folder) as model:
        weights = sum(tensor.nbytes for tensor in model.tensors.values())
        tracemalloc.start()
        write_mig(tmp_path / "m.mig", model)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert weights > 50_000_000 and peak < 5_000_000
