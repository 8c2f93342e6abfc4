"""Makes small random Qwen2-VL checkpoint folders for the tests, with numpy alone.

The weights of one seed are the same whatever the layout and the number of shards; their scale keeps activations near
one and logits a few apart, biases and norms are away from 0 and 1 so that a forgotten one shows. transformers 5 loads
every folder made here.
"""

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
LAYOUTS = ("published", "nested", "v5")

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MERGES = [
    "Ġ t", "h e", "i n", "Ġ a", "r e", "o n", "Ġt he", "e r", "Ġ s", "a t", "o r", "e n", "Ġ c", "Ġ b", "Ġ p", "Ġ o",
    "Ġo f", "i s", "a l", "i t", "Ġ in", "in g", "e s", "Ġ w", "Ġ f", "a n", "e d", "Ġa n", "Ġan d", "i m", "a g",
    "im ag", "imag e",
]  # fmt: skip
_CHUNK = 1 << 22  # values drawn at a time: the memory a checkpoint of any size needs


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Rounds finite f32 to bf16 (as u16), to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def make_checkpoint(
    folder: str | Path,
    *,
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    inter: int = 192,
    vocab: int = 320,
    tied: bool = True,
    v_dim: int = 64,
    v_depth: int = 2,
    v_heads: int = 2,
    layout: str = "published",
    shards: int = 1,
    dtype: str = "bfloat16",
    seed: int = 0,
    names: str | None = None,
    min_pixels: int = 56 * 56,
    max_pixels: int = 28 * 28 * 256,
    repetition_penalty: float = 1.0,
    tokenizer_from: str | Path | None = None,
    max_positions: int = 32768,
) -> Path:
    """Writes a complete random Qwen2-VL folder and returns its path.

    layout: "published" (4.45: flat config, model.* and visual.*), "nested" (4.52: text_config, model.language_model.*)
    or "v5" (transformers 5: rope_parameters, processor_config.json).   names: tensor names of another layout.
    tokenizer_from: a folder whose tokenizer.json is copied (vocab must then hold it), else a byte-level BPE of
    270 to 303 tokens is made. Memory stays at one shard's header plus one 16 MB piece, so the real 2B can be made too.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = _write_tokenizer(folder, vocab, tokenizer_from)
    width = head_dim or hidden // heads
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inter,
        "vocab_size": vocab,
        "max_position_embeddings": max_positions,
    }
    if head_dim is not None:
        text["head_dim"] = head_dim
    vision = {"depth": v_depth, "embed_dim": v_dim, "num_heads": v_heads, "hidden_size": hidden}
    config = make_config(text, vision, special, layout=layout, tied=tied, sections=mrope_section(width), dtype=dtype)
    _write_json(folder / "config.json", config)
    generation = {
        "bos_token_id": special["<|endoftext|>"],
        "pad_token_id": special["<|endoftext|>"],
        "eos_token_id": [special["<|im_end|>"], special["<|endoftext|>"]],
        "repetition_penalty": repetition_penalty,
    }
    _write_json(folder / "generation_config.json", generation)
    _write_preprocessor(folder, layout, min_pixels, max_pixels)
    shapes = _shapes(text, vision, width, tied)
    _write_weights(folder, shapes, names or layout, shards, dtype, seed)
    return folder


def mrope_section(head_dim: int) -> list[int]:
    """Splits head_dim / 2 frequencies over time, height, width about as 16 : 24 : 24."""
    half = head_dim // 2
    time = half // 4
    height = (half - time) // 2
    return [time, height, half - time - height]


def make_config(
    text: dict[str, Any],
    vision: dict[str, Any],
    special: dict[str, int],
    *,
    layout: str,
    tied: bool,
    sections: list[int],
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Builds a config.json as the given generation of transformers writes it."""
    text = {
        **text,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "use_sliding_window": False,
        "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"],
    }
    vision = {**vision, "mlp_ratio": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    root: dict[str, Any] = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "image_token_id": special["<|image_pad|>"],
        "video_token_id": special["<|video_pad|>"],
        "vision_start_token_id": special["<|vision_start|>"],
        "vision_end_token_id": special["<|vision_end|>"],
    }
    if layout == "published":
        scaling = {"type": "mrope", "mrope_section": sections}
        text |= {"rope_theta": 1000000.0, "rope_scaling": scaling, "tie_word_embeddings": tied, "torch_dtype": dtype}
        return {**root, **text, "vision_config": {**vision, "in_chans": 3, "spatial_patch_size": 14}}
    if layout == "nested":
        scaling = {"type": "default", "rope_type": "default", "mrope_section": sections}
        text |= {"model_type": "qwen2_vl_text", "rope_theta": 1000000.0, "rope_scaling": scaling}
        text |= {"tie_word_embeddings": tied, "torch_dtype": dtype}
        vision |= {"model_type": "qwen2_vl", "hidden_act": "quick_gelu", "in_channels": 3, "in_chans": 3}
        return {**root, "text_config": text, "vision_config": vision, "torch_dtype": dtype}
    assert layout == "v5", layout
    rope = {"type": "mrope", "rope_type": "default", "rope_theta": 1000000.0, "mrope_section": sections}
    text |= {"model_type": "qwen2_vl_text", "rope_parameters": rope, "dtype": dtype}
    text |= {"layer_types": ["full_attention"] * text["num_hidden_layers"], "sliding_window": None}
    vision |= {"model_type": "qwen2_vl_vision", "hidden_act": "quick_gelu", "in_channels": 3}
    vision |= {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"}}
    return {**root, "text_config": text, "vision_config": vision, "tie_word_embeddings": tied, "dtype": dtype}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_preprocessor(folder: Path, layout: str, min_pixels: int, max_pixels: int) -> None:
    pictures: dict[str, Any] = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
    }
    if layout == "v5":
        pictures["size"] = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        combined = {"image_processor": pictures, "processor_class": "Qwen2VLProcessor"}
        _write_json(folder / "processor_config.json", combined)
    else:
        pictures |= {"min_pixels": min_pixels, "max_pixels": max_pixels, "processor_class": "Qwen2VLProcessor"}
        _write_json(folder / "preprocessor_config.json", pictures)


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes of byte-level BPE, in byte order (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) if b in plain else chr(256 + others.index(b)) for b in range(256)]


def make_tokenizer(vocab: int) -> dict[str, Any]:
    """Builds a tokenizer.json of Qwen2's kind: bytes, up to 33 merges, then the special tokens; at most `vocab` ids."""
    room = vocab - 256 - len(SPECIAL_TOKENS)
    assert room >= 0, f"vocab {vocab} is under {256 + len(SPECIAL_TOKENS)}"
    merges = [merge.split(" ") for merge in _MERGES[:room]]
    pieces = byte_alphabet() + ["".join(merge) for merge in merges]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(pieces) + i, "content": word, **plain} for i, word in enumerate(SPECIAL_TOKENS)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": level,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


def _write_tokenizer(folder: Path, vocab: int, source: str | Path | None) -> dict[str, int]:
    """Writes tokenizer.json and tokenizer_config.json; returns the ids of the special tokens."""
    target = folder / "tokenizer.json"
    if source is None:
        _write_json(target, make_tokenizer(vocab))
    else:
        shutil.copyfile(Path(source) / "tokenizer.json", target)
    added = {token["content"]: token["id"] for token in json.loads(target.read_text("utf-8"))["added_tokens"]}
    special = {word: added[word] for word in SPECIAL_TOKENS}
    assert max(special.values()) < vocab, f"vocab {vocab} does not hold the tokenizer's special tokens"
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "model_max_length": 32768,
    }
    _write_json(folder / "tokenizer_config.json", config)
    return special


def _shapes(text: dict[str, Any], vision: dict[str, Any], width: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """Lists the tensors by published name; written out here too, so that the tests check runtime's own list."""
    d, inter, v = text["hidden_size"], text["intermediate_size"], vision["embed_dim"]
    q, kv = text["num_attention_heads"] * width, text["num_key_value_heads"] * width
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (text["vocab_size"], d)}
    for i in range(text["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            shapes |= {f"{layer}self_attn.{name}.weight": (rows, d), f"{layer}self_attn.{name}.bias": (rows,)}
        shapes |= {f"{layer}self_attn.o_proj.weight": (d, q), f"{layer}mlp.down_proj.weight": (d, inter)}
        shapes |= {f"{layer}mlp.gate_proj.weight": (inter, d), f"{layer}mlp.up_proj.weight": (inter, d)}
        shapes |= {f"{layer}input_layernorm.weight": (d,), f"{layer}post_attention_layernorm.weight": (d,)}
    shapes["model.norm.weight"] = (d,)
    if not tied:
        shapes["lm_head.weight"] = (text["vocab_size"], d)
    shapes["visual.patch_embed.proj.weight"] = (v, 3, 2, 14, 14)
    parts = {"norm1": (v,), "norm2": (v,), "attn.qkv": (3 * v, v), "attn.proj": (v, v)}
    parts |= {"mlp.fc1": (4 * v, v), "mlp.fc2": (v, 4 * v)}
    linears = {f"visual.blocks.{i}.{name}": shape for i in range(vision["depth"]) for name, shape in parts.items()}
    linears |= {"visual.merger.ln_q": (v,), "visual.merger.mlp.0": (4 * v, 4 * v), "visual.merger.mlp.2": (d, 4 * v)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _name_in(layout: str, name: str) -> str:
    """A tensor's name in the files of a layout; "early" is the layout of the first nested saves."""
    if layout == "published" or name.startswith("lm_head."):
        return f"language_model.{name}" if layout == "early" else name
    if layout == "early":
        return f"language_model.{name}" if name.startswith("model.") else name
    return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)


def _scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(mean, standard deviation) of a tensor's values."""
    if len(shape) == 1:
        is_norm = name.endswith("weight")
        return (1.0, 0.1) if is_norm else (0.0, 0.2 if "proj" in name or "qkv" in name else 0.1)
    fan_in = int(np.prod(shape[1:]))
    gain = 2.5 if name.startswith(("lm_head", "model.embed_tokens")) else 0.7 if "o_proj" in name else 1.0
    return 0.0, gain * fan_in**-0.5


def _values(name: str, shape: tuple[int, ...], dtype: str, seed: int) -> Iterator[np.ndarray]:
    mean, deviation = _scale(name, shape)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    count = int(np.prod(shape))
    for start in range(0, count, _CHUNK):
        values = rng.standard_normal(min(_CHUNK, count - start), np.float32)
        values *= np.float32(deviation)
        values += np.float32(mean)
        yield f32_to_bf16(values) if dtype == "bfloat16" else values


def _write_weights(
    folder: Path, shapes: dict[str, tuple[int, ...]], layout: str, shards: int, dtype: str, seed: int
) -> None:
    groups: list[list[str]] = [list(group) for group in np.array_split(np.array(sorted(shapes)), shards)]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file_name = f"model-{number:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        with open(folder / file_name, "wb") as file:
            _write_shard(file, {str(name): shapes[name] for name in group}, layout, dtype, seed)
        weight_map |= {_name_in(layout, str(name)): file_name for name in group}
    if shards > 1:
        item = 2 if dtype == "bfloat16" else 4
        total = sum(int(np.prod(shape)) * item for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_shard(file: BinaryIO, shapes: dict[str, tuple[int, ...]], layout: str, dtype: str, seed: int) -> None:
    word, item = {"bfloat16": ("BF16", 2), "float32": ("F32", 4)}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + int(np.prod(shape)) * item
        header[_name_in(layout, name)] = {"dtype": word, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape in shapes.items():
        for piece in _values(name, shape, dtype, seed):
            file.write(memoryview(piece).cast("B"))
