"""The GPTQ folder: unpacked here by the format's definition, loaded by transformers, refused where it has no form."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_checkpoint
from PIL import Image
from quantized import as_tensor, default_policy, dequantize, make_quantized, quantize
from reference import draw, reference_logprobs

from migician.export.formats import gptq, hf_folder
from migician.export.formats.gptq import write_gptq
from migician.runtime.chat_template import CHAT_TEMPLATE
from migician.runtime.errors import ModelFileError, UnsupportedError
from migician.runtime.files.checkpoint import Checkpoint, derive
from migician.runtime.files.open import open_checkpoint
from migician.runtime.files.quantization import Quantization
from migician.runtime.prompt import Vocabulary, build_prompt

load_file = pytest.importorskip("safetensors.numpy").load_file

# mode, geometry, (bits, group size) that must come out
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "int4 groups of 128 and 64": ("int4", {"hidden": 256, "inter": 320, "tied": True}, (4, 64)),
    "int4 one group, sharded source": ("int4", {"hidden": 256, "inter": 384, "tied": False, "shards": 2}, (4, 128)),
    "int8 nested": ("int8", {"tied": False, "layout": "nested"}, (8, -1)),
    "int8 odd width, v5": ("int8", {"inter": 204, "layout": "v5"}, (8, -1)),
    "int4 with int8 layers": ("int4", {"inter": 200, "tied": False}, (8, -1)),
}


@pytest.fixture(scope="module", params=list(CASES))
def written(request, tmp_path_factory):
    """(name of the case, .mig file, GPTQ folder)."""
    mode, geometry, form = CASES[request.param]
    root = tmp_path_factory.mktemp("gptq")
    source = make_checkpoint(root / "source", seed=5, max_pixels=28 * 28 * 64, **geometry)
    mig = make_quantized(source, root / "model.mig", mode)
    with open_checkpoint(mig) as checkpoint:
        done = write_gptq(checkpoint, root / "gptq")
    assert (done.bits, done.group_size, done.shards) == (*form, 1)
    return request.param, mig, root / "gptq"


def unpack(state: dict[str, np.ndarray], module: str, bits: int) -> np.ndarray:
    """f64[N, K] from the tensors of one layer, one input after the other."""
    qweight = state[f"{module}.qweight"].view(np.uint32).astype(np.int64)
    qzeros = state[f"{module}.qzeros"].view(np.uint32).astype(np.int64)
    scales, g_idx = state[f"{module}.scales"].astype(np.float64), state[f"{module}.g_idx"]
    per, mask, n = 32 // bits, (1 << bits) - 1, qweight.shape[1]
    assert qweight.shape[0] * per == len(g_idx) and scales.shape == (len(qzeros), n)
    weight = np.empty((n, len(g_idx)))
    for k, group in enumerate(g_idx):
        codes = qweight[k // per] >> bits * (k % per) & mask
        zeros = np.array([qzeros[group, i // per] >> bits * (i % per) & mask for i in range(n)]) + 1
        weight[:, k] = (codes - zeros) * scales[group]
    return weight


def floats(folder: Path) -> dict[str, np.ndarray]:
    """The folder's weights as f32 under published names."""
    state = load_file(folder / "model.safetensors")
    bits = json.loads((folder / "config.json").read_text())["quantization_config"]["bits"]
    values = {}
    for name, array in state.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            weight = unpack(state, module, bits)
            assert np.array_equal(weight.astype(np.float32), weight)
            values[f"{module}.weight"] = weight.astype(np.float32)
        elif kind not in ("qzeros", "scales", "g_idx"):
            assert array.dtype == np.float16
            values[name] = array.astype(np.float32)
    return values


def is_linear(name: str) -> bool:
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def test_the_layers_carry_over_exactly_and_the_rest_in_half_precision(written):
    _, mig, folder = written
    got = floats(folder)
    with open_checkpoint(mig) as checkpoint:
        want = dequantize(checkpoint)
    assert got.keys() == want.keys()
    assert sum(is_linear(name) for name in want) == 14
    for name, values in want.items():
        expected = values if is_linear(name) else values.astype(np.float16).astype(np.float32)
        assert np.array_equal(got[name], expected), name


def test_types_shapes_and_settings_are_those_of_the_format(written):
    _, _, folder = written
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    settings = config["quantization_config"]
    bits, group = settings["bits"], settings["group_size"]
    assert settings["quant_method"] == settings["checkpoint_format"] == "gptq"
    assert settings["sym"] is True and settings["desc_act"] is False and settings["lm_head"] is False
    assert config["torch_dtype"] == "float16" and "bfloat16" not in json.dumps(config)
    assert config["tie_word_embeddings"] is ("lm_head.weight" not in state)
    fill = {4: 0x77777777, 8: 0x7F7F7F7F}[bits]
    for name in [name for name in state if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        words, n = state[name].shape
        k = words * 32 // bits
        groups = 1 if group < 0 else k // group
        assert [state[f"{module}.{kind}"].dtype for kind in ("qweight", "qzeros", "scales", "g_idx")] == [
            *("int32", "int32", "float16", "int32")
        ]
        assert state[f"{module}.qzeros"].shape == (groups, n * bits // 32)
        assert (state[f"{module}.qzeros"] == fill).all()
        assert np.array_equal(state[f"{module}.g_idx"], np.arange(k) // (k // groups))


def test_log_probabilities_are_those_of_the_engine(written, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers is the reference; install the [test] extra")
    transformers = pytest.importorskip("transformers")

    from migician.runtime.image import load_picture
    from migician.runtime.model import load

    _, mig, folder = written
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    pytest.importorskip("safetensors.numpy").save_file(
        floats(folder), tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    reference = transformers.Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    images, text = draw([(97, 61), (30, 40)]), "It is (12,34),(56,78) in the image."
    with load(mig, precision="fp32") as model:
        got = model.logprobs(images, "where?", text)
        pictures = [load_picture(image, model.preprocessor) for image in images]
        cells = [p.rgb.shape[0] * p.rgb.shape[1] // 784 for p in pictures]
        vocabulary = Vocabulary(_words(mig))
    prompt, tail = build_prompt(vocabulary, "where?", cells), vocabulary.encode(text)
    want = reference_logprobs(reference, folder, prompt + tail, images)[len(prompt) - 1 : -1]
    np.testing.assert_allclose(got, want[np.arange(len(tail)), tail], atol=0.02)


def _words(mig: Path) -> str:
    with open_checkpoint(mig) as checkpoint:
        return checkpoint.tokenizer_json


def test_transformers_reads_the_tokenizer_and_builds_the_same_prompt(written):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    _, mig, folder = written
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    vocabulary = Vocabulary(_words(mig))
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "find the dog"}]},
        {"role": "assistant", "content": "It is here."},
        {"role": "user", "content": "and the cat?"},
    ]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    want = build_prompt(vocabulary, "and the cat?", [1, 1], history=[("find the dog", "It is here.")])
    assert tokenizer(rendered)["input_ids"] == want
    assert json.loads((folder / "chat_template.json").read_text())["chat_template"] == CHAT_TEMPLATE
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_a_system_turn_replaces_the_usual_one():
    jinja2 = pytest.importorskip("jinja2")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    text = jinja2.Environment().from_string(CHAT_TEMPLATE).render(messages=turns, add_generation_prompt=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "model", tied=False)


@pytest.fixture(scope="module")
def mig(source, tmp_path_factory) -> Path:
    return make_quantized(source, tmp_path_factory.mktemp("mig") / "model.mig", "int4")


@pytest.mark.parametrize("chunk", [1, 1000, 5000])
def test_the_size_of_a_piece_does_not_show(mig, tmp_path, monkeypatch, chunk):
    with open_checkpoint(mig) as checkpoint:
        write_gptq(checkpoint, tmp_path / "whole")
        monkeypatch.setattr(gptq, "CHUNK", chunk)
        monkeypatch.setattr(hf_folder, "CHUNK", chunk)
        write_gptq(checkpoint, tmp_path / "pieces")
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "pieces" / file.name).read_bytes(), file.name


def test_shards_hold_what_one_file_would(mig, tmp_path):
    with open_checkpoint(mig) as checkpoint:
        one = write_gptq(checkpoint, tmp_path / "one")
        many = write_gptq(checkpoint, tmp_path / "many", shard_bytes=100_000)
    assert one.shards == 1 and many.shards > 3 and one.nbytes == many.nbytes
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values()) == one.nbytes
    assert index["weight_map"].keys() == whole.keys()
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) == many.shards
    for file in files:
        shard = load_file(tmp_path / "many" / file)
        assert len(shard) == 1 or sum(array.nbytes for array in shard.values()) <= 100_000
        for name, array in shard.items():
            assert index["weight_map"][name] == file and np.array_equal(array, whole[name])


def test_a_model_without_such_a_form_is_refused(source, mig, tmp_path):
    with open_checkpoint(source) as checkpoint, pytest.raises(UnsupportedError, match="not quantized"):
        write_gptq(checkpoint, tmp_path / "out")
    keep = ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]
    kept = make_quantized(source, tmp_path / "kept.mig", "int4", keep=keep)
    with open_checkpoint(kept) as checkpoint, pytest.raises(UnsupportedError, match=r"1.mlp.up_proj is bf16 \(2 of 14"):
        write_gptq(checkpoint, tmp_path / "out")
    narrow = make_checkpoint(tmp_path / "narrow", hidden=48, heads=4, kv_heads=1, head_dim=4)
    with open_checkpoint(make_quantized(narrow, tmp_path / "narrow.mig", "int4")) as checkpoint:
        assert checkpoint.quantization is not None
        assert checkpoint.quantization.layers["model.layers.0.self_attn.k_proj"] == "int4"
        with pytest.raises(UnsupportedError, match=r"k_proj has 4 outputs.*multiple of 8"):
            write_gptq(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vision_layer_in_bf16_is_no_obstacle(source, tmp_path):
    kept = make_quantized(source, tmp_path / "kept.mig", "int4", keep=["visual.patch_embed.proj", "lm_head"])
    with open_checkpoint(kept) as checkpoint:
        write_gptq(checkpoint, tmp_path / "out")
        want = dequantize(checkpoint)
    state = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("visual.patch_embed.proj.weight", "lm_head.weight"):
        assert np.array_equal(state[name], want[name].astype(np.float16))


def changed(checkpoint: Checkpoint, name: str, value: float) -> Checkpoint:
    """The model with the last value of one tensor replaced."""
    array = checkpoint.tensors[name].to_f32().copy()
    array.reshape(-1)[-1] = value
    found = {**checkpoint.tensors, name: as_tensor(name, array)}
    return derive(checkpoint, found, texts={}, where="changed")


@pytest.mark.parametrize("value", [65504.0, 70000.0, -1e9])
def test_a_value_beyond_half_precision_names_its_tensor(mig, tmp_path, value):
    name = "model.layers.1.input_layernorm.weight"
    with open_checkpoint(mig) as checkpoint:
        loud = changed(checkpoint, name, value)
        if abs(value) < 65520:
            write_gptq(loud, tmp_path / "out")
            assert load_file(tmp_path / "out" / "model.safetensors")[name][-1] == value
            return
        with pytest.raises(UnsupportedError, match=name) as caught:
            write_gptq(loud, tmp_path / "out")
    assert "65504" in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_scales_that_would_be_rounded_are_refused(source, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight_scale"
    with open_checkpoint(make_quantized(source, tmp_path / "model.mig", "int8")) as checkpoint:
        array = checkpoint.tensors[name].to_f32() * np.float32(1.0001)
        odd = derive(checkpoint, {**checkpoint.tensors, name: as_tensor(name, array)}, texts={}, where="odd")
        with pytest.raises(ModelFileError, match="up_proj are not exact"):
            write_gptq(odd, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_extremes_of_a_code_survive_eight_bits(source, tmp_path):
    """-8 * 16 and 7 * 16, where int4 layers are written with 8 bits."""
    with open_checkpoint(source) as checkpoint:
        policy = default_policy(checkpoint, "int4")
        layers = {**policy.layers, "model.layers.0.self_attn.q_proj": "int8"}
        mixed = Quantization("int4", 128, False, layers)
        found = quantize(checkpoint, mixed)
        name = "model.layers.0.mlp.up_proj.weight"
        codes = np.full(found[name].shape, 0x0F, np.uint8)  # u = 15 and 0: q = 7 and -8
        found[name] = as_tensor(name, codes)
        found[f"{name}_group"] = as_tensor(f"{name}_group", np.full(found[f"{name}_group"].shape, 16, np.uint8))
        made = derive(checkpoint, found, texts={"quantization": mixed.to_text()}, where="made")
        assert write_gptq(made, tmp_path / "out").bits == 8
        want = dequantize(made)[name]
        assert np.array_equal(floats(tmp_path / "out")[name], want)
        steps = np.unique(want / made.tensors[f"{name}_scale"].to_f32()[: len(want), None])
    assert list(steps) == [-128, 112]


def test_a_folder_in_use_is_left_alone(mig, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "note").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine too")
    with open_checkpoint(mig) as checkpoint:
        with pytest.raises(ModelFileError, match="not empty"):
            write_gptq(checkpoint, full)
        with pytest.raises(ModelFileError, match="in the way"):
            write_gptq(checkpoint, file)
        with pytest.raises(ModelFileError, match="cannot be written"):
            write_gptq(checkpoint, tmp_path / "nowhere" / "out")
    assert [path.name for path in full.iterdir()] == ["note"] and file.read_text() == "mine too"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_an_empty_folder_is_filled(mig, tmp_path):
    (tmp_path / "out").mkdir()
    with open_checkpoint(mig) as checkpoint:
        write_gptq(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_line_and_leaves_nothing(mig, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with open_checkpoint(mig) as checkpoint, pytest.raises(ModelFileError) as caught:
        write_gptq(checkpoint, tmp_path / "out")
    assert "No space left" in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_words_gets_the_general_class(tmp_path):
    transformers = pytest.importorskip("transformers")
    mig = make_quantized("nano", tmp_path / "nano.mig", "int8")
    with open_checkpoint(mig) as checkpoint:
        assert json.loads(checkpoint.tokenizer_json)["model"]["type"] != "BPE"
        write_gptq(checkpoint, tmp_path / "out")
        vocabulary = Vocabulary(checkpoint.tokenizer_json)
    words = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<|im_start|>user\nfind the red circle<|im_end|>"
    assert tokenizer(text)["input_ids"] == vocabulary.encode(text)


def test_pictures_are_prepared_as_before(written):
    pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    from migician.runtime.files.config import Preprocessor
    from migician.runtime.image import load_picture, patchify

    _, mig, folder = written
    image = Image.fromarray(np.random.default_rng(2).integers(0, 255, (61, 97, 3), np.uint8))
    got = pil.Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[image], return_tensors="np")["pixel_values"]
    with open_checkpoint(mig) as checkpoint:
        settings: Preprocessor = checkpoint.preprocessor
    np.testing.assert_allclose(got, patchify(load_picture(image, settings).rgb, settings), atol=1e-5)
