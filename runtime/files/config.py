"""Reads a Qwen2-VL config.json and preprocessor_config.json in each of the shapes that transformers has written.

| written by       | language model's keys | rope                                         | tie_word_embeddings |
|------------------|-----------------------|----------------------------------------------|---------------------|
| 4.45 (published) | at the root           | rope_theta, rope_scaling.mrope_section       | root                |
| 4.52 and later   | in text_config        | text_config.rope_theta, .rope_scaling        | text_config or root |
| 5                | in text_config        | text_config.rope_parameters, vision's too    | root                |

A key that is absent has the default of transformers' Qwen2VLConfig. Whatever this runtime does not compute exactly as
the reference does is refused here, before any weight is touched.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import MigicianError, ModelFileError, UnsupportedError
from .tensors import shown

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "ModelConfig",
    "Preprocessor",
    "TextConfig",
    "VisionConfig",
    "parse_config",
    "parse_repetition_penalty",
    "tensor_shapes",
    "untied",
]

# Per channel (RGB), of pixels scaled to 0..1: those that CLIP was trained with, and Qwen2-VL after it
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_MISSING = object()


@dataclass(frozen=True)
class VisionConfig:
    """Geometry of the vision encoder; out_dim is the language model's hidden size."""

    depth: int
    embed_dim: int
    heads: int
    mlp_dim: int
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    in_channels: int
    rope_theta: float
    out_dim: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.heads

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class TextConfig:
    """Geometry of the language model; mrope_section counts frequencies for time, height, width."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rms_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tied: bool
    max_positions: int


@dataclass(frozen=True)
class ModelConfig:
    """A whole Qwen2-VL model; eos_tokens are those of generation_config.json where it names any."""

    text: TextConfig
    vision: VisionConfig
    image_token: int
    video_token: int
    vision_start_token: int
    vision_end_token: int
    eos_tokens: tuple[int, ...]


class _Reader:
    """One table of a config file; every look-up names file and key when it fails."""

    def __init__(self, table: Mapping[str, Any], where: str) -> None:
        self.table, self.where = table, where

    def bad(self, fault: str) -> ModelFileError:
        return ModelFileError(f"{self.where}: {fault}; restore the file that belongs to these weights")

    def unsupported(self, found: str, served: str) -> UnsupportedError:
        return UnsupportedError(f"{self.where}: {found}; {served}")

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value; an absent key and null both give the default."""
        value = self.table.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any, *, low: int = 1, high: int) -> int:
        value = self.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.bad(f"{key} is {shown(value)}, expected an integer from {low} to {high}")
        return value

    def number(self, key: str, default: Any, *, low: float, high: float) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.bad(f"{key} is {shown(value)}, expected a number from {low:g} to {high:g}")
        return float(value)

    def square(self, key: str, default: int, *, high: int) -> int:
        """An integer, or a list that repeats one (transformers 5 allows [14, 14])."""
        value = self.get(key, default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        return _Reader({key: value}, self.where).integer(key, default, high=high)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.bad(f"{key} is {shown(value)}, expected true or false")
        return value

    def sub(self, key: str, default: Any = _MISSING) -> "_Reader":
        value = self.get(key, default)
        if not isinstance(value, Mapping):
            raise self.bad(f"{key} is {'missing' if value is _MISSING else shown(value)}, expected an object")
        return _Reader(value, f"{self.where} ({key})")


def parse_config(
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    *,
    where: str = "config.json",
    generation_where: str = "generation_config.json",
) -> ModelConfig:
    """Turns the contents of config.json, and of generation_config.json if there is one, into a checked geometry.

    where, generation_where: the files' names for messages.
    Raises UnsupportedError for another architecture or a feature that is not computed here, ModelFileError for
    values that contradict each other or are out of all bounds.
    """
    root = _Reader(config, where)
    _check_family(root)
    nested = root.get("text_config") is not None
    text_table = root.sub("text_config") if nested else root
    tied = root.flag("tie_word_embeddings", False) or text_table.flag("tie_word_embeddings", False)
    text = _parse_text(text_table, tied)
    vision = _parse_vision(root.sub("vision_config", {}))
    if vision.out_dim != text.hidden:
        raise root.bad(f"vision_config.hidden_size {vision.out_dim} differs from the language model's {text.hidden}")
    special = {
        key: root.integer(key, default, low=0, high=text.vocab - 1)
        for key, default in (
            ("image_token_id", 151655),
            ("video_token_id", 151656),
            ("vision_start_token_id", 151652),
            ("vision_end_token_id", 151653),
        )
    }
    return ModelConfig(
        text=text,
        vision=vision,
        image_token=special["image_token_id"],
        video_token=special["video_token_id"],
        vision_start_token=special["vision_start_token_id"],
        vision_end_token=special["vision_end_token_id"],
        eos_tokens=_eos_tokens(_Reader(generation or {}, generation_where), text_table, root),
    )


def _check_family(root: _Reader) -> None:
    kind = root.get("model_type")
    if kind != "qwen2_vl":
        names = root.get("architectures")
        found = f"model_type {shown(kind)}" if kind is not None else f"no model_type, architectures {shown(names)}"
        raise root.unsupported(found, "this runtime serves the Qwen2-VL family alone (model_type qwen2_vl)")
    quantized = root.get("quantization_config")
    if quantized is None:
        quantized = root.sub("text_config", {}).get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method", "another tool") if isinstance(quantized, Mapping) else quantized
        raise root.unsupported(
            f"weights quantized with {shown(method)} (quantization_config)",
            "give the unquantized bf16 checkpoint, or export a .mig file from it",
        )


def _parse_text(table: _Reader, tied: bool) -> TextConfig:
    act = table.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise table.unsupported(f"hidden_act {shown(act)}", "only silu is computed here")
    layer_types = table.get("layer_types", [])
    if not isinstance(layer_types, list):
        raise table.bad(f"layer_types is {shown(layer_types)}, expected a list")
    if table.flag("use_sliding_window", False) or any(kind != "full_attention" for kind in layer_types):
        raise table.unsupported(
            "sliding-window attention is on", "set use_sliding_window to false or use another model"
        )
    hidden = table.integer("hidden_size", 8192, high=1 << 16)
    heads = table.integer("num_attention_heads", 64, high=1024)
    kv_heads = table.integer("num_key_value_heads", 8 if "num_key_value_heads" not in table.table else heads, high=1024)
    if heads % kv_heads:
        raise table.bad(f"{heads} attention heads do not divide among {kv_heads} key/value heads")
    if table.get("head_dim") is None and hidden % heads:
        raise table.bad(f"hidden_size {hidden} does not divide by {heads} attention heads")
    head_dim = table.integer("head_dim", hidden // heads, low=2, high=1024)
    theta, sections = _parse_mrope(table)
    if 2 * sum(sections) != head_dim:
        raise table.bad(f"mrope_section {list(sections)} must sum to half of head_dim {head_dim}")
    return TextConfig(
        layers=table.integer("num_hidden_layers", 80, high=1024),
        hidden=hidden,
        intermediate=table.integer("intermediate_size", 29568, high=1 << 20),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=table.integer("vocab_size", 152064, high=1 << 22),
        rms_eps=table.number("rms_norm_eps", 1e-5, low=0.0, high=1.0),
        rope_theta=theta,
        mrope_section=sections,
        tied=tied,
        max_positions=table.integer("max_position_embeddings", 32768, high=1 << 24),
    )


def _parse_mrope(table: _Reader) -> tuple[float, tuple[int, int, int]]:
    """Returns (theta, mrope_section). rope_scaling wins over rope_parameters and its theta over the outer one."""
    key = "rope_scaling" if table.get("rope_scaling") else "rope_parameters"
    rope = table.sub(key, {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    # "mrope" is the published name; transformers writes "default" in its place and keeps the sections
    if kind not in ("mrope", "default"):
        raise rope.unsupported(f"rope type {shown(kind)}", "only Qwen2-VL's own M-RoPE is computed here")
    sections = rope.get("mrope_section", [16, 24, 24])
    if not isinstance(sections, list) or len(sections) != 3 or not all(type(s) is int and s >= 0 for s in sections):
        raise rope.bad(f"mrope_section is {shown(sections)}, expected three counts")
    outer = table.number("rope_theta", 1e6, low=1.0, high=1e15)
    theta = rope.number("rope_theta", outer, low=1.0, high=1e15)
    return theta, (sections[0], sections[1], sections[2])


def _parse_vision(table: _Reader) -> VisionConfig:
    act = table.get("hidden_act", "quick_gelu")
    if act != "quick_gelu":
        raise table.unsupported(f"hidden_act {shown(act)}", "only quick_gelu is computed in the vision encoder")
    embed_dim = table.integer("embed_dim", 1280, high=1 << 16)
    heads = table.integer("num_heads", 16, high=1024)
    if embed_dim % (4 * heads):  # 2-D RoPE rotates pairs in two halves
        raise table.bad(f"embed_dim {embed_dim} does not divide into {heads} heads of a multiple of 4")
    channels = table.integer("in_channels", table.get("in_chans", 3), high=64)
    if channels != 3:
        raise table.unsupported(f"{channels} picture channels", "only RGB is served")
    rope = table.sub("rope_parameters", {})
    kind = rope.get("rope_type", "axial")
    if kind not in ("axial", "default"):
        raise rope.unsupported(f"rope type {shown(kind)}", "only axial 2-D RoPE is computed in the vision encoder")
    ratio = table.number("mlp_ratio", 4, low=0.01, high=64)
    return VisionConfig(
        depth=table.integer("depth", 32, high=1024),
        embed_dim=embed_dim,
        heads=heads,
        mlp_dim=max(1, math.floor(embed_dim * ratio)),
        patch_size=table.square("patch_size", 14, high=128),
        merge_size=table.integer("spatial_merge_size", 2, high=8),
        temporal_patch_size=table.square("temporal_patch_size", 2, high=8),
        in_channels=channels,
        rope_theta=rope.number("rope_theta", 10000.0, low=1.0, high=1e15),
        out_dim=table.integer("hidden_size", 3584, high=1 << 16),
    )


def _eos_tokens(*tables: _Reader) -> tuple[int, ...]:
    """The stop tokens of the first table that names any (generation before config), else Qwen2-VL's <|im_end|>."""
    for table in tables:
        found = table.get("eos_token_id")
        if found is None or found == []:
            continue
        tokens = found if isinstance(found, list) else [found]
        if not all(type(t) is int and 0 <= t < 1 << 31 for t in tokens):
            raise table.bad(f"eos_token_id is {shown(found)}, expected token ids")
        return tuple(dict.fromkeys(tokens))
    return (151645,)


def parse_repetition_penalty(generation: Mapping[str, Any], *, where: str = "generation_config.json") -> float:
    """Returns the checkpoint's own repetition penalty, 1.0 (none) where it names none."""
    return _Reader(generation, where).number("repetition_penalty", 1.0, low=1e-3, high=1e3)


def untied(config: Mapping[str, Any]) -> str:
    """Returns the text of a config.json whose output head is its own, whatever this one says of it."""
    table = {**config, "tie_word_embeddings": False}
    inner = table.get("text_config")
    if isinstance(inner, Mapping) and "tie_word_embeddings" in inner:
        table["text_config"] = {**inner, "tie_word_embeddings": False}
    return json.dumps(table, indent=2)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Lists every tensor of the model by its published name, in the order of computation, with its shape."""
    return {**_vision_shapes(config.vision), **_text_shapes(config.text)}


def _vision_shapes(v: VisionConfig) -> dict[str, tuple[int, ...]]:
    dim, merged = v.embed_dim, v.embed_dim * v.merge_size**2
    patch = (v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    shapes: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (dim, *patch)}
    for i in range(v.depth):
        block = {
            "norm1.weight": (dim,),
            "norm1.bias": (dim,),
            "attn.qkv.weight": (3 * dim, dim),
            "attn.qkv.bias": (3 * dim,),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
            "norm2.weight": (dim,),
            "norm2.bias": (dim,),
            "mlp.fc1.weight": (v.mlp_dim, dim),
            "mlp.fc1.bias": (v.mlp_dim,),
            "mlp.fc2.weight": (dim, v.mlp_dim),
            "mlp.fc2.bias": (dim,),
        }
        shapes.update({f"visual.blocks.{i}.{name}": shape for name, shape in block.items()})
    merger = {
        "ln_q.weight": (dim,),
        "ln_q.bias": (dim,),
        "mlp.0.weight": (merged, merged),
        "mlp.0.bias": (merged,),
        "mlp.2.weight": (v.out_dim, merged),
        "mlp.2.bias": (v.out_dim,),
    }
    shapes.update({f"visual.merger.{name}": shape for name, shape in merger.items()})
    return shapes


def _text_shapes(t: TextConfig) -> dict[str, tuple[int, ...]]:
    q, kv = t.heads * t.head_dim, t.kv_heads * t.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (t.vocab, t.hidden)}
    for i in range(t.layers):
        layer = {
            "input_layernorm.weight": (t.hidden,),
            "self_attn.q_proj.weight": (q, t.hidden),
            "self_attn.q_proj.bias": (q,),
            "self_attn.k_proj.weight": (kv, t.hidden),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, t.hidden),
            "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (t.hidden, q),
            "post_attention_layernorm.weight": (t.hidden,),
            "mlp.gate_proj.weight": (t.intermediate, t.hidden),
            "mlp.up_proj.weight": (t.intermediate, t.hidden),
            "mlp.down_proj.weight": (t.hidden, t.intermediate),
        }
        shapes.update({f"model.layers.{i}.{name}": shape for name, shape in layer.items()})
    shapes["model.norm.weight"] = (t.hidden,)
    if not t.tied:
        shapes["lm_head.weight"] = (t.vocab, t.hidden)
    return shapes


@dataclass(frozen=True)
class Preprocessor:
    """How a model wants its pictures: the fields of its `preprocessor_config.json`.

    min_pixels, max_pixels: bounds of H * W after the resize.   patch_size: pixels per side of a patch.
    merge_size: patches per side of a cell, which is one token of the language model.
    temporal_patch_size: how often a still picture is repeated in its patches.
    mean, std: per channel (RGB), of pixels scaled to 0..1.
    Raises MigicianError for a value that no picture could satisfy.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels", "patch_size", "merge_size", "temporal_patch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
                raise MigicianError(f"{name} is {value!r}: expected a whole number from 1 up; correct it")
        if self.min_pixels > self.max_pixels:
            raise MigicianError(f"min_pixels {self.min_pixels} is over max_pixels {self.max_pixels}: raise the second")
        for name, values in (("image_mean", self.mean), ("image_std", self.std)):
            if len(values) != 3 or not all(math.isfinite(v) for v in values) or (name == "image_std" and 0 in values):
                raise MigicianError(f"{name} is {list(values)}: expected three finite numbers, no std of 0; correct it")

    @property
    def factor(self) -> int:
        """Pixels per side of a cell (28): every resized side is a multiple of it."""
        return self.patch_size * self.merge_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of cells of a resized picture; their product is its count of visual tokens."""
        return height // self.factor, width // self.factor

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "Preprocessor":
        """Reads the JSON object of a `preprocessor_config.json`, in any of the layouts in use.

        d: pixel bounds as `min_pixels`/`max_pixels` (which win) or as `size: {shortest_edge, longest_edge}`, on top or
        under `image_processor`. What is missing takes transformers' default for Qwen2-VL.
        Raises ModelFileError for values that make no sense, UnsupportedError for steps that the runtime does not do.
        """
        d = d.get("image_processor", d)
        size = (d.get("size") or {}) if isinstance(d, Mapping) else None
        if not isinstance(size, Mapping):
            raise ModelFileError("not a JSON object with a size; download preprocessor_config.json again")
        _refuse_other_steps(d)
        bounds = {
            "min_pixels": (d.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels"), 56 * 56),
            "max_pixels": (d.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels"), 28 * 28 * 1280),
        }
        values: dict[str, Any] = {name: next(v for v in found if v is not None) for name, found in bounds.items()}
        values |= {k: d[k] for k in ("patch_size", "merge_size", "temporal_patch_size") if d.get(k) is not None}
        try:
            for name, key in (("mean", "image_mean"), ("std", "image_std")):
                if d.get(key) is not None:
                    values[name] = tuple(float(v) for v in d[key])
            return cls(**values)
        except (MigicianError, TypeError, ValueError) as e:
            raise ModelFileError(str(e)) from None


def _refuse_other_steps(d: Mapping[str, Any]) -> None:
    """Refuses a preprocessor file that asks for another pipeline than resize, rescale, normalize."""
    wanted = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
    for key, value in wanted.items():
        if d.get(key, value) not in (value, None):
            raise UnsupportedError(f"{key} = {d[key]!r}, only {value!r} is served; change it")
    scale = d.get("rescale_factor")
    if scale is not None and (not isinstance(scale, float) or abs(scale * 255 - 1) > 1e-6):
        raise UnsupportedError(f"rescale_factor = {scale!r}, only 1/255 is served; change it")
