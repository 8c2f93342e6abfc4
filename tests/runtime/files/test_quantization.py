"""The quantization policy, and quantized .mig files: what is written is what is read."""

import json

import numpy as np
import pytest
from checkpoints import make_checkpoint
from quantized import default_policy, dequantize, make_quantized, quantize, unquantized

from migician.runtime.errors import MigicianError, ModelFileError, UnsupportedError
from migician.runtime.files.checkpoint import derive
from migician.runtime.files.config import parse_config, tensor_shapes
from migician.runtime.files.mig import read_mig, write_mig
from migician.runtime.files.open import open_checkpoint
from migician.runtime.files.quantization import EMBEDDING, Quantization, matrices, stored_tensors
from migician.runtime.files.tensors import Tensor, TensorFile

# rows and columns of every remainder: 301 rows, 120 and 100 columns, 72 in the vision encoder
ODD = {"hidden": 120, "heads": 5, "kv_heads": 1, "inter": 100, "vocab": 301, "v_dim": 72, "v_heads": 2}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("config"), layers=1, v_depth=1, tied=False)
    return parse_config(json.loads((folder / "config.json").read_text()))


@pytest.fixture
def table(config):
    layers = dict.fromkeys(matrices(config), "int8") | {"model.layers.0.mlp.down_proj": "int4"}
    return {"version": 1, "mode": "int4", "group_size": 128, "rotated": True, "layers": layers}


def parse(table, config):
    return Quantization.parse(table if isinstance(table, str) else json.dumps(table), config, where="m.mig")


def refused(table, config, kind):
    with pytest.raises(MigicianError) as caught:
        parse(table, config)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert message.startswith("m.mig: ") and message.isprintable() and "; " in message and len(message) < 400
    return message


def test_none_is_none(config):
    assert parse("none", config) is None


def test_text_and_back(table, config):
    policy = parse(table, config)
    assert (policy.mode, policy.group_size, policy.rotated) == ("int4", 128, True)
    assert policy.layers == table["layers"]
    assert parse(policy.to_text(), config) == policy
    shuffled = Quantization("int4", 128, True, dict(reversed(policy.layers.items())))
    assert shuffled == policy and shuffled.to_text() == policy.to_text()
    assert json.loads(policy.to_text()) == table


def test_every_matrix_is_a_layer(config):
    found = matrices(config)
    assert list(found)[:2] == ["visual.patch_embed.proj", "visual.blocks.0.attn.qkv"]
    assert found["visual.patch_embed.proj"] == (64, 1176)
    assert found[EMBEDDING] == found["lm_head"] == (320, 128)
    assert found["model.layers.0.mlp.down_proj"] == (128, 192)
    assert len(found) == 1 + 4 + 2 + 1 + 7 + 1
    assert not any("norm" in name or "ln_q" in name or name.endswith("bias") for name in found)


NEWER = [{"version": 2}, {"mode": "int3"}, {"group_size": 256}, {"group_size": 0}, {"group_size": 1 << 300}, {"x": 1}]
DAMAGED = [
    {"version": None}, {"version": True}, {"version": "1"}, {"version": 1.0}, {"mode": 4}, {"mode": None},
    {"mode": "int8"}, {"group_size": 128.0}, {"group_size": "128"}, {"group_size": True}, {"rotated": 1},
    {"rotated": None}, {"layers": None}, {"layers": []}, {"layers": {}},
]  # fmt: skip


@pytest.mark.parametrize("change", NEWER, ids=str)
def test_what_a_newer_release_may_write(table, config, change):
    assert "upgrade" in refused(table | change, config, UnsupportedError)


@pytest.mark.parametrize("change", DAMAGED, ids=str)
def test_damaged_settings(table, config, change):
    refused(table | change, config, ModelFileError)


@pytest.mark.parametrize("key", ["version", "mode", "group_size", "rotated", "layers"])
def test_settings_missing(table, config, key):
    del table[key]
    assert key in refused(table, config, ModelFileError)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "None", "int4", '{"version": 1, "version": 1}', "\ud800"])
def test_no_policy_at_all(config, text):
    refused(text, config, ModelFileError)


def test_layers_must_be_those_of_the_model(table, config):
    layers = table["layers"]
    for name in ("lm_head", "visual.merger.mlp.0"):
        rest = {key: kind for key, kind in layers.items() if key != name}
        assert name in refused({**table, "layers": rest}, config, ModelFileError)
    for name in ("model.layers.1.mlp.up_proj", "lm_head.weight", "model.norm", "\x1b[2J\n", ""):
        refused({**table, "layers": {**layers, name: "int8"}}, config, ModelFileError)
    for kind in (4, None, ["int8"]):
        refused({**table, "layers": {**layers, "lm_head": kind}}, config, ModelFileError)
    assert "fp8" in refused({**table, "layers": {**layers, "lm_head": "fp8"}}, config, UnsupportedError)


def test_int4_has_its_limits(table, config):
    layers = table["layers"]
    assert EMBEDDING in refused({**table, "layers": {**layers, EMBEDDING: "int4"}}, config, ModelFileError)
    odd = {**layers, "visual.patch_embed.proj": "int4"}  # 1176 = 8 * 147
    assert "1176" in refused({**table, "layers": odd}, config, ModelFileError)
    assert parse({**table, "layers": {**layers, "lm_head": "int4"}}, config).layers["lm_head"] == "int4"


def test_a_policy_has_a_size_limit(table, config):
    table["layers"] |= {f"model.layers.{i}.mlp.up_proj": "int8" for i in range(140_000)}
    assert "MB" in refused(table, config, ModelFileError)


def test_stored_tensors_keep_their_order_and_companions(table, config):
    stored = stored_tensors(config, parse(table, config))
    names = list(stored)
    weight = "model.layers.0.mlp.down_proj.weight"
    at = names.index(weight)
    assert names[at : at + 3] == [weight, f"{weight}_group", f"{weight}_scale"]
    assert stored[weight] == ({"U8"}, (8, 24, 16, 4))
    assert stored[f"{weight}_group"] == ({"U8"}, (8, 3, 16))
    assert stored[f"{weight}_scale"] == ({"F32"}, (128,))
    assert stored["visual.patch_embed.proj.weight"] == ({"I8"}, (4, 304, 16, 4))
    assert stored["model.norm.weight"] == (*stored["visual.merger.ln_q.bias"][:1], (128,))
    plain = [name for name in names if not name.endswith(("_group", "_scale"))]
    assert plain == list(tensor_shapes(config))
    assert {name: shape for name, (_, shape) in stored_tensors(config, None).items()} == tensor_shapes(config)


@pytest.mark.parametrize("mode", ["int4", "int8"])
@pytest.mark.parametrize("sizes", [{}, ODD, {**ODD, "tied": False, "dtype": "float32"}], ids=["even", "odd", "untied"])
def test_a_quantized_file_comes_back(tmp_path, mode, sizes):
    folder = make_checkpoint(tmp_path / "m", **sizes)
    keep = ["visual.merger.mlp.2"]
    make_quantized(folder, tmp_path / "m.mig", mode, keep=keep, calibration="ab" * 32, report="{}")
    with open_checkpoint(folder) as model, read_mig(tmp_path / "m.mig") as back:
        policy = default_policy(model, mode, keep=keep)
        stored = quantize(model, policy)
        assert back.quantization == policy and back.raw["quantization"] == policy.to_text()
        assert back.raw["calibration"] == "ab" * 32 and back.metadata == {"report": "{}"}
        assert back.config == model.config
        assert list(back.tensors) == list(stored) == list(stored_tensors(model.config, policy))
        for name, tensor in back.tensors.items():
            assert (tensor.dtype, tensor.shape) == (stored[name].dtype, stored[name].shape)
            assert np.array_equal(tensor.data, stored[name].data)
            assert tensor.data.ctypes.data % 64 == 0 and not tensor.data.flags.owndata
        write_mig(tmp_path / "again.mig", back)
    assert (tmp_path / "again.mig").read_bytes() == (tmp_path / "m.mig").read_bytes()


@pytest.mark.parametrize(("mode", "most"), [("int4", 0.15), ("int8", 0.012)])
def test_rounding_obeys_the_numbers(tmp_path, mode, most):
    folder = make_checkpoint(tmp_path / "m", **ODD, tied=False)
    with open_checkpoint(folder) as model, read_mig(make_quantized(folder, tmp_path / "m.mig", mode)) as back:
        for name, values in dequantize(back).items():
            exact = model.tensors[name].to_f32()
            error = np.linalg.norm(values - exact) / np.linalg.norm(exact)
            assert values.shape == exact.shape
            assert (0 < error < most) if exact.ndim > 1 else error == 0
            if f"{name}_scale" in back.tensors:
                scale = back.tensors[f"{name}_scale"].to_f32()
                widest = 16 if f"{name}_group" in back.tensors else 1
                for factor in range(1, widest + 1):
                    product = scale * np.float32(factor)
                    assert np.array_equal(product.astype(np.float16).astype(np.float32), product)
                assert not scale[exact.shape[0] :].any() and scale[: exact.shape[0]].all()


def test_floats_of_a_quantized_model_are_a_model(tmp_path):
    folder = make_checkpoint(tmp_path / "m")
    with read_mig(make_quantized(folder, tmp_path / "m.mig")) as back:
        floats = unquantized(back)
        assert floats.quantization is None and floats.config == back.config
        assert list(floats.tensors) == list(tensor_shapes(back.config))
        write_mig(tmp_path / "floats.mig", floats)
    read_mig(tmp_path / "floats.mig").close()


def test_an_exporter_streams_from_its_own_files(tmp_path):
    """Tensors that lie in several safetensors files become one .mig file without being held in memory."""
    import tracemalloc

    from safetensors.numpy import save_file

    folder = make_checkpoint(tmp_path / "m", hidden=1024, heads=8, inter=2048, vocab=20000, layers=1)
    with open_checkpoint(folder) as model:
        policy = default_policy(model, "int8")
        stored = quantize(model, policy)
        types = {"I8": np.int8, "F32": np.float32}
        names = [name for name, tensor in stored.items() if tensor.dtype in types]
        for part in range(2):
            arrays = {n: stored[n].data.view(types[stored[n].dtype]).reshape(stored[n].shape) for n in names[part::2]}
            save_file(arrays, tmp_path / f"{part}.safetensors")
        kept = {name: tensor for name, tensor in stored.items() if tensor.dtype not in types}
        expected = {name: tensor.data for name, tensor in stored.items()}
        del stored, arrays
        files = [TensorFile(tmp_path / f"{part}.safetensors") for part in range(2)]
        found = {**kept, **files[0].tensors, **files[1].tensors}
        texts = {"quantization": policy.to_text(), "calibration": ""}
        tracemalloc.start()
        made = derive(model, found, texts=texts, files=files, where=tmp_path)
        write_mig(tmp_path / "m.mig", made, extra={"report": "{}"})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 5_000_000 < 25_000_000 < sum(data.size for data in expected.values())
    with read_mig(tmp_path / "m.mig") as back:
        assert back.name == "m"
        assert all(np.array_equal(tensor.data, expected[name]) for name, tensor in back.tensors.items())


def test_derive_checks_as_opening_does(tmp_path):
    with open_checkpoint(make_checkpoint(tmp_path / "m")) as model:
        policy = default_policy(model, "int8")
        found = quantize(model, policy)
        texts = {"quantization": policy.to_text()}
        lacking = {name: tensor for name, tensor in found.items() if name != "model.norm.weight"}
        with pytest.raises(ModelFileError, match=r"somewhere.*model\.norm\.weight"):
            derive(model, lacking, texts=texts, where="somewhere")
        name = "visual.patch_embed.proj.weight_scale"
        wrong = {**found, name: Tensor(name, "F32", (4, 16), found[name].data)}
        with pytest.raises(ModelFileError, match=name):
            derive(model, wrong, texts=texts, where="somewhere")
        with pytest.raises(ModelFileError, match="policy"):
            derive(model, found, texts={"quantization": "{}"}, where="somewhere")
