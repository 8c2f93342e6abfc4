"""config.json in every shape that transformers has written, and what is refused."""

import copy
import json

import pytest
from checkpoints import LAYOUTS, SPECIAL_TOKENS, make_config

from migician.runtime.errors import ModelFileError, UnsupportedError
from migician.runtime.files.config import parse_config, parse_repetition_penalty, tensor_shapes

SPECIAL = {word: 151643 + i for i, word in enumerate(SPECIAL_TOKENS)}

# Qwen/Qwen2-VL-2B-Instruct as published, without the keys that say nothing about the geometry
PUBLISHED_2B = json.loads("""{
  "architectures": ["Qwen2VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
  "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 1536,
  "intermediate_size": 8960, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2_vl",
  "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "use_sliding_window": false,
  "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
    "hidden_size": 1536, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2},
  "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 151936}""")


def layout_2b(layout):
    text = {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    }
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536}
    return make_config(text, vision, SPECIAL, layout=layout, tied=True, sections=[16, 24, 24])


def changed(path, value, base=PUBLISHED_2B):
    """A copy of a config with one key set; `path` is dotted."""
    config = copy.deepcopy(base)
    table = config
    *parents, key = path.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
    table[key] = value
    return config


def test_published_2b():
    config = parse_config(PUBLISHED_2B)
    text, vision = config.text, config.vision
    assert (text.layers, text.hidden, text.intermediate, text.vocab) == (28, 1536, 8960, 151936)
    assert (text.heads, text.kv_heads, text.head_dim, text.mrope_section) == (12, 2, 128, (16, 24, 24))
    assert (text.rms_eps, text.rope_theta, text.tied, text.max_positions) == (1e-6, 1e6, True, 32768)
    assert (vision.depth, vision.embed_dim, vision.heads, vision.head_dim, vision.mlp_dim) == (32, 1280, 16, 80, 5120)
    assert (vision.patch_size, vision.merge_size, vision.temporal_patch_size, vision.patch_dim) == (14, 2, 2, 1176)
    assert (vision.rope_theta, vision.out_dim, vision.in_channels) == (1e4, 1536, 3)
    assert (config.image_token, config.video_token) == (151655, 151656)
    assert (config.vision_start_token, config.vision_end_token, config.eos_tokens) == (151652, 151653, (151645,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_model(layout):
    assert parse_config(layout_2b(layout)) == parse_config(PUBLISHED_2B)


def test_sizes_of_2b():
    shapes = tensor_shapes(parse_config(PUBLISHED_2B))
    count = 0
    for shape in shapes.values():
        size = 1
        for d in shape:
            size *= d
        count += size
    assert count == 2_208_985_600  # the published checkpoint's 4.42 GB of bf16
    assert "lm_head.weight" not in shapes
    assert "lm_head.weight" in tensor_shapes(parse_config(changed("tie_word_embeddings", False)))


def test_absent_keys_have_the_defaults_of_transformers():
    config = parse_config({"model_type": "qwen2_vl", "vision_config": {"hidden_size": 8192}})
    text, vision = config.text, config.vision
    assert (text.layers, text.hidden, text.intermediate, text.vocab) == (80, 8192, 29568, 152064)
    assert (text.heads, text.kv_heads, text.head_dim, text.mrope_section) == (64, 8, 128, (16, 24, 24))
    assert (text.rms_eps, text.rope_theta, text.tied) == (1e-5, 1e6, False)
    assert (vision.depth, vision.embed_dim, vision.heads, vision.mlp_dim, vision.in_channels) == (32, 1280, 16, 5120, 3)
    assert (config.image_token, config.eos_tokens) == (151655, (151645,))


def test_absent_keys_against_transformers_itself():
    transformers = pytest.importorskip("transformers")
    given = {"model_type": "qwen2_vl", "vision_config": {"hidden_size": 8192}}
    reference = transformers.Qwen2VLConfig(**copy.deepcopy(given)).to_dict()
    assert parse_config(given) == parse_config(reference)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_transformers_saves_is_read_the_same(tmp_path, layout):
    transformers = pytest.importorskip("transformers")
    config = layout_2b(layout)
    transformers.Qwen2VLConfig(**copy.deepcopy(config)).save_pretrained(tmp_path)
    assert parse_config(json.loads((tmp_path / "config.json").read_text())) == parse_config(config)


def test_tied_inside_text_config_or_at_the_root():
    nested = layout_2b("nested")
    assert "tie_word_embeddings" not in {k: v for k, v in nested.items() if k != "text_config"}
    assert parse_config(nested).text.tied
    nested["text_config"]["tie_word_embeddings"] = False
    assert not parse_config(nested).text.tied
    nested["tie_word_embeddings"] = True
    assert parse_config(nested).text.tied


def test_small_variations():
    assert parse_config(changed("num_key_value_heads", None)).text.kv_heads == 12
    assert parse_config(changed("head_dim", 64) | {"rope_scaling": {"mrope_section": [8, 12, 12]}}).text.head_dim == 64
    assert parse_config(changed("vision_config.patch_size", [14, 14])).vision.patch_size == 14
    assert parse_config(changed("vision_config.mlp_ratio", 3.5)).vision.mlp_dim == 4480
    inner = {"mrope_section": [16, 24, 24], "rope_type": "default", "rope_theta": 5e5}
    assert parse_config(changed("rope_scaling", inner)).text.rope_theta == 5e5
    assert parse_config(changed("vision_config.rope_parameters", {"rope_theta": 100.0})).vision.rope_theta == 100.0


def test_stop_tokens():
    both = {"eos_token_id": [151645, 151643, 151645]}
    assert parse_config(PUBLISHED_2B, both).eos_tokens == (151645, 151643)
    assert parse_config(PUBLISHED_2B, {"eos_token_id": 151643}).eos_tokens == (151643,)
    assert parse_config(PUBLISHED_2B, {"eos_token_id": None}).eos_tokens == (151645,)
    for bad in ("x", [True], [-1], 1.5):
        with pytest.raises(ModelFileError, match="generation_config"):
            parse_config(PUBLISHED_2B, {"eos_token_id": bad})


def test_repetition_penalty():
    assert parse_repetition_penalty({}) == 1.0
    assert parse_repetition_penalty({"repetition_penalty": None}) == 1.0
    assert parse_repetition_penalty({"repetition_penalty": 1.05}) == 1.05
    for bad in (0, -1, "1", True, float("nan"), float("inf"), 10**400):
        with pytest.raises(ModelFileError):
            parse_repetition_penalty({"repetition_penalty": bad})


UNSUPPORTED = [
    ("model_type", "qwen2_5_vl", "qwen2_5_vl"),
    ("model_type", "llama", "Qwen2-VL"),
    ("model_type", None, "Qwen2VLForConditionalGeneration"),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
    ("quantization_config", {}, "quantized"),
    ("use_sliding_window", True, "sliding"),
    ("layer_types", ["sliding_attention"], "sliding"),
    ("hidden_act", "gelu", "gelu"),
    ("vision_config.hidden_act", "silu", "silu"),
    ("vision_config.in_chans", 1, "1 picture channels"),
    ("rope_scaling", {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}, "yarn"),
    ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "linear"),
    ("vision_config.rope_parameters", {"rope_type": "yarn"}, "yarn"),
]


@pytest.mark.parametrize(("path", "value", "word"), UNSUPPORTED)
def test_unsupported(path, value, word):
    with pytest.raises(UnsupportedError, match=word) as caught:
        parse_config(changed(path, value), where="folder/config.json")
    assert str(caught.value).startswith("folder/config.json")


CONTRADICTORY = [
    ("hidden_size", 0),
    ("hidden_size", -1536),
    ("hidden_size", "1536"),
    ("hidden_size", 1536.0),
    ("hidden_size", True),
    ("hidden_size", 1537),
    ("hidden_size", 10**30),
    ("num_hidden_layers", 10**6),
    ("num_attention_heads", 7),
    ("num_key_value_heads", 5),
    ("num_key_value_heads", 24),
    ("head_dim", 64),
    ("vocab_size", 1000),
    ("vocab_size", 1 << 40),
    ("rms_norm_eps", "small"),
    ("rms_norm_eps", -1e-6),
    ("rope_theta", 0),
    ("rope_theta", float("nan")),
    ("rope_theta", [1e6]),
    ("rope_scaling", [16, 24, 24]),
    ("rope_scaling", {"mrope_section": [16, 24, 25]}),
    ("rope_scaling", {"mrope_section": [64]}),
    ("rope_scaling", {"mrope_section": [-16, 40, 40]}),
    ("rope_scaling", {"mrope_section": ["a", "b", "c"]}),
    ("tie_word_embeddings", "yes"),
    ("use_sliding_window", 1),
    ("layer_types", "full_attention"),
    ("image_token_id", -1),
    ("image_token_id", 151936),
    ("text_config", [1]),
    ("vision_config", "x"),
    ("vision_config.depth", 0),
    ("vision_config.embed_dim", 1288),
    ("vision_config.num_heads", 640),
    ("vision_config.mlp_ratio", float("inf")),
    ("vision_config.hidden_size", 3584),
    ("vision_config.patch_size", [14, 16]),
    ("vision_config.patch_size", []),
    ("vision_config.spatial_merge_size", 0),
    ("max_position_embeddings", 0),
]


@pytest.mark.parametrize(("path", "value"), CONTRADICTORY)
def test_contradictory(path, value):
    with pytest.raises(ModelFileError) as caught:
        parse_config(changed(path, value))
    message = str(caught.value)
    assert message.startswith("config.json") and message.isprintable() and len(message) < 300
