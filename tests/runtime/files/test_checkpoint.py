"""Checkpoint folders: every layout gives the same tensors, every defect one clear line."""

import json
import shutil

import numpy as np
import pytest
from checkpoints import LAYOUTS, SPECIAL_TOKENS, make_checkpoint

from migician.runtime.errors import MigicianError, ModelFileError, UnsupportedError
from migician.runtime.files import open as module
from migician.runtime.files.checkpoint import canonical_name
from migician.runtime.files.config import tensor_shapes
from migician.runtime.files.open import open_checkpoint
from migician.runtime.files.tensors import TensorFile


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("published"))


@pytest.fixture
def folder(published, tmp_path):
    """A copy of the small checkpoint, free to be damaged."""
    return shutil.copytree(published, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    return make_checkpoint(tmp_path / "sharded", shards=3)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(path, edit):
    """Rewrites a safetensors file: edit(header, data) changes the two in place or returns the data."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    edit(header, data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def refused(source, kind=ModelFileError):
    """Opens what must not open; returns the message after checking its manners."""
    with pytest.raises(MigicianError) as caught:
        open_checkpoint(source)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert message.isprintable() and "; " in message and len(message) < 500
    return message


def test_opens_the_published_layout(published):
    with open_checkpoint(published) as model:
        assert model.name == published.name
        assert list(model.tensors) == list(tensor_shapes(model.config))
        assert model.unused == ()
        assert model.config.text.tied and "lm_head.weight" not in model.tensors
        assert len(model.config.eos_tokens) == 2
        assert (model.preprocessor.min_pixels, model.preprocessor.max_pixels) == (3136, 200704)
        assert model.repetition_penalty == 1.0
        assert json.loads(model.raw["config"])["model_type"] == "qwen2_vl"
        assert json.loads(model.tokenizer_json)["model"]["type"] == "BPE"
        for tensor in model.tensors.values():
            assert not tensor.data.flags.owndata  # mapped, not copied
            assert tensor.dtype == "BF16"


@pytest.mark.parametrize("tied", [True, False])
def test_layouts_and_shards_give_the_same_bytes(tmp_path, tied):
    models = [
        open_checkpoint(
            make_checkpoint(
                tmp_path / f"{i}", layout=layout, shards=shards, names=names, tied=tied, repetition_penalty=1.05
            )
        )
        for i, (layout, shards, names) in enumerate(
            [(layout, shards, None) for layout in LAYOUTS for shards in (1, 4)]
            + [("v5", 1, "published"), ("published", 2, "nested"), ("nested", 1, "early")]
        )
    ]
    first = models[0]
    assert ("lm_head.weight" in first.tensors) is not tied
    for model in models[1:]:
        assert model.config == first.config
        assert model.preprocessor == first.preprocessor
        assert model.tokenizer_json == first.tokenizer_json
        assert model.repetition_penalty == 1.05
        assert list(model.tensors) == list(first.tensors)
        for name, tensor in model.tensors.items():
            expected = first.tensors[name]
            assert (tensor.name, tensor.dtype, tensor.shape) == (name, expected.dtype, expected.shape)
            assert np.array_equal(tensor.data, expected.data)
        model.close()


def test_f32_and_bf16_hold_the_same_values(tmp_path, published):
    with (
        open_checkpoint(make_checkpoint(tmp_path / "f32", dtype="float32")) as wide,
        open_checkpoint(published) as narrow,
    ):
        for name, tensor in wide.tensors.items():
            assert tensor.dtype == "F32"
            np.testing.assert_allclose(narrow.tensors[name].to_f32(), tensor.to_f32(), rtol=2**-8, atol=0)


def test_geometry_that_the_family_allows(tmp_path):
    for i, sizes in enumerate(
        [
            {"hidden": 224, "heads": 7, "kv_heads": 1, "v_dim": 80, "v_heads": 1},
            {"hidden": 128, "heads": 2, "kv_heads": 2, "head_dim": 32},
            {"hidden": 1024, "heads": 8, "kv_heads": 2, "layers": 3, "vocab": 1000, "tied": False},
        ]
    ):
        with open_checkpoint(make_checkpoint(tmp_path / str(i), **sizes)) as model:
            assert model.config.text.heads == sizes["heads"]


def test_transformers_loads_what_is_made_and_agrees(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for layout in LAYOUTS:
        folder = make_checkpoint(tmp_path / layout, layout=layout, shards=2, tied=layout != "v5")
        model, report = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32
        )
        assert not any(report.values()), report
        state = model.state_dict()
        with open_checkpoint(folder) as ours:
            for name, tensor in ours.tensors.items():
                theirs = name.replace("model.", "model.language_model.", 1)
                theirs = f"model.{name}" if name.startswith("visual.") else theirs
                np.testing.assert_array_equal(tensor.to_f32(), state[theirs].numpy())
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert [tokenizer.convert_tokens_to_ids(word) for word in SPECIAL_TOKENS] == sorted(
            tokenizer.convert_tokens_to_ids(word) for word in SPECIAL_TOKENS
        )


def test_what_transformers_saves_is_read(tmp_path, published):
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(published, dtype="auto")
    model.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(published / name, tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    with open_checkpoint(tmp_path / "saved") as ours, open_checkpoint(published) as before:
        assert ours.config == before.config
        for name, tensor in before.tensors.items():
            assert np.array_equal(ours.tensors[name].data, tensor.data)


def test_canonical_names():
    for name in ("model.layers.0.mlp.up_proj.weight", "visual.merger.ln_q.bias", "lm_head.weight", "model.norm.weight"):
        assert canonical_name(name) == name
    assert canonical_name("model.language_model.norm.weight") == "model.norm.weight"
    assert canonical_name("language_model.model.norm.weight") == "model.norm.weight"
    assert canonical_name("language_model.lm_head.weight") == "lm_head.weight"
    assert canonical_name("model.visual.blocks.3.norm1.bias") == "visual.blocks.3.norm1.bias"


def test_weights_that_another_tool_quantized(folder):
    """Whatever it left behind, the message says what the weights are and where to go from here."""
    config = folder / "config.json"
    before = config.read_text()
    for settings in ({"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}, {"bits": 4}, "aqlm"):
        edit_json(config, quantization_config=settings)
        message = refused(folder, UnsupportedError)
        assert str(config) in message and "quantized with" in message and "bf16" in message
    config.write_text(before)
    for name, method in (("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")):
        (folder / name).write_text("{}")
        message = refused(folder, UnsupportedError)
        assert name in message and method in message and "bf16" in message
        (folder / name).unlink()

    def pack(header, data):
        header["model.layers.0.mlp.up_proj.qweight"] = header.pop("model.layers.0.mlp.up_proj.weight")

    rewrite(folder / "model.safetensors", pack)
    assert "another tool quantized" in refused(folder, UnsupportedError)


def test_generation_config_is_optional(folder):
    (folder / "generation_config.json").unlink()
    with open_checkpoint(folder) as model:
        assert len(model.config.eos_tokens) == 1
        assert model.repetition_penalty == 1.0
        assert model.raw["generation"] == "{}"


def test_processor_config_goes_before_preprocessor_config(folder):
    inner = json.loads((folder / "preprocessor_config.json").read_text())
    del inner["min_pixels"], inner["max_pixels"]
    inner["size"] = {"shortest_edge": 784, "longest_edge": 7840}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    with open_checkpoint(folder) as model:
        assert (model.preprocessor.min_pixels, model.preprocessor.max_pixels) == (784, 7840)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor"}))
    with open_checkpoint(folder) as model:
        assert model.preprocessor.min_pixels == 3136


def test_head_missing_from_an_untied_model(folder):
    edit_json(folder / "config.json", tie_word_embeddings=False)
    assert "tie_word_embeddings" in refused(folder)


def test_unknown_tensors_are_listed_only(folder):
    def add(header, data):
        header["model.extra"] = {"dtype": "F16", "shape": [2], "data_offsets": [len(data), len(data) + 4]}
        data += bytes(4)

    rewrite(folder / "model.safetensors", add)
    with open_checkpoint(folder) as model:
        assert model.unused == ("model.extra",)


def test_files_missing(folder):
    for name in ("preprocessor_config.json", "tokenizer.json", "model.safetensors", "config.json"):
        (folder / name).rename(folder / "aside")
        assert name in refused(folder)
        (folder / "aside").rename(folder / name)


def test_pytorch_weights_and_adapters(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "convert" in refused(folder, UnsupportedError)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    assert "merge" in refused(folder, UnsupportedError)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": 1, "a": 2}', b'{"x":' * 10000])
def test_side_file_damaged(folder, name, content):
    (folder / name).write_bytes(content)
    refused(folder)


def test_side_file_is_a_folder_or_dangling(folder):
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").mkdir()
    refused(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "nowhere")
    refused(folder)


def test_preprocessor_of_another_model(folder):
    edit_json(folder / "preprocessor_config.json", patch_size=16)
    assert "patch_size" in refused(folder)
    edit_json(folder / "preprocessor_config.json", patch_size="x")
    refused(folder)


def test_unsupported_architecture_is_said_first(folder):
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    edit_json(folder / "config.json", model_type="qwen2_5_vl")
    message = refused(folder, UnsupportedError)
    assert "qwen2_5_vl" in message and "Qwen2-VL" in message


def test_shard_missing(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003" in refused(sharded)


def test_shard_truncated(sharded):
    shard = sharded / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    message = refused(sharded)
    assert "model-00003-of-00003" in message and "cut short" in message


def test_index_names_a_tensor_that_the_shard_lacks(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["model.norm.weight"] = "model-00003-of-00003.safetensors"
    edit_json(index, weight_map=weight_map)
    assert "model.norm.weight" in refused(sharded)


@pytest.mark.parametrize(
    "place", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 5, None, "x.bin", "\n.safetensors"]
)
def test_index_may_not_lead_out_of_the_folder(sharded, place):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "model.norm.weight": place})
    assert "model.norm.weight" in refused(sharded)
    edit_json(index, weight_map=place)
    refused(sharded)


def test_truncated_anywhere(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for keep in (0, 4, 8, 100, 3000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        refused(folder)


def test_wrong_shape(folder):
    def transpose(header, data):
        header["model.layers.0.mlp.up_proj.weight"]["shape"].reverse()

    rewrite(folder / "model.safetensors", transpose)
    message = refused(folder)
    assert "model.layers.0.mlp.up_proj.weight" in message and "[128, 192]" in message and "[192, 128]" in message


def test_tensor_missing_and_twice(folder):
    def rename(header, data):
        header["model.language_model.norm.weight"] = header.pop("model.layers.1.input_layernorm.weight")

    rewrite(folder / "model.safetensors", rename)
    assert "twice" in refused(folder)

    def drop(header, data):
        header["elsewhere"] = header.pop("model.language_model.norm.weight")

    rewrite(folder / "model.safetensors", drop)
    assert "model.layers.1.input_layernorm.weight" in refused(folder)


def test_more_layers_than_the_file_has(folder):
    edit_json(folder / "config.json", num_hidden_layers=3)
    assert "model.layers.2." in refused(folder)


@pytest.mark.parametrize("dtype", ["U16", "I16"])
def test_other_element_types(folder, dtype):
    def retype(header, data):
        header["model.norm.weight"]["dtype"] = dtype

    rewrite(folder / "model.safetensors", retype)
    message = refused(folder, UnsupportedError)
    assert "model.norm.weight" in message and dtype in message and "bf" in message


def test_sources_that_are_no_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for source in (
        "",
        ".",
        "no-such-model",
        "a/b/c",
        "/no/such/folder",
        "x.mig",
        "dir/x.mig",
        "~nobody-here/x",
        "nul\0",
        "long" * 2000,
    ):
        refused(source)
    text = tmp_path / "notes.txt"
    text.write_text("hello world, not a model")
    refused(text)


def test_a_lone_safetensors_file_points_to_its_folder(folder):
    assert "folder" in refused(folder / "model.safetensors")


def test_nano_absent(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "NANO_FILE", tmp_path / "nano.mig")
    assert "nano.mig" in refused("nano")


def test_hub_id_is_looked_up_in_the_local_cache(tmp_path, monkeypatch, published):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "hf download Org/Tiny-VL" in refused("Org/Tiny-VL")
    commit = "0123456789abcdef0123456789abcdef01234567"

    def place(hub):
        repo = hub / "models--Org--Tiny-VL"
        (repo / "blobs").mkdir(parents=True)
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in published.iterdir():  # the cache links to blobs, as huggingface_hub does
            shutil.copy(file, repo / "blobs" / file.name)
            (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        return repo

    def opens():
        with open_checkpoint("Org/Tiny-VL") as model:
            assert model.name == "Org/Tiny-VL" and model.tensors

    repo = place(tmp_path / ".cache" / "huggingface" / "hub")
    opens()
    (repo / "refs" / "main").write_text("../../../..")
    refused("Org/Tiny-VL")
    place(tmp_path / "home" / "hub")
    monkeypatch.setenv("HF_HOME", "~/home")
    opens()
    place(tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    opens()


def test_tensors_outlive_the_checkpoint(published):
    model = open_checkpoint(published)
    tensor = model.tensors["model.norm.weight"]
    model.close()
    model.close()
    with TensorFile(published / "model.safetensors") as file:
        assert np.array_equal(tensor.data, file.tensors["model.norm.weight"].data)
