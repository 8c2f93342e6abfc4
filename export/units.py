"""A model cut into the units that are quantized one after the other, each with its weights folded and rotated.

| unit          | maps                                     | reads        | writes       |
|---------------|------------------------------------------|--------------|--------------|
| stem          | visual.patch_embed.proj                  | pixels       | vision       |
| block N       | attn.qkv, attn.proj, mlp.fc1, mlp.fc2    | vision       | vision       |
| merger        | mlp.0, mlp.2                             | vision       | language     |
| embedding     | model.embed_tokens                       | tokens       | language     |
| layer N       | q, k, v, o, gate, up, down               | language     | language     |
| head          | lm_head                                  | language     | logits       |

With rotations, the residual stream "vision" carries x Qv and "language" x Ql; value heads are rotated besides. Norms
lose their gains to the maps behind them and keep ones, so the architecture is what it was.

Letters: N outputs, K inputs, D width of a residual stream.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.files.checkpoint import Checkpoint
from ..runtime.files.config import ModelConfig
from .rotate import Rotation, fold_gain, read_rotated, rotate_heads_in, rotate_heads_out, write_rotated

__all__ = ["Rotations", "Unit", "chunks_of", "list_units", "load_unit", "matrices_of"]

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_HEAD_SEED, _VISION_SEED, _LANGUAGE_SEED = 3, 1, 2


@dataclass(frozen=True)
class Unit:
    """kind: stem, block, merger, embedding, layer or head.   prefix: of its tensors' names."""

    kind: str
    prefix: str

    @property
    def name(self) -> str:
        return self.prefix.rstrip(".")


class Rotations:
    """The orthogonal matrices of one model: two residual streams, two kinds of value heads."""

    def __init__(self, config: ModelConfig) -> None:
        vision, text = config.vision, config.text
        self.vision = Rotation(vision.embed_dim, _VISION_SEED, keeps_ones=True)
        self.language = Rotation(text.hidden, _LANGUAGE_SEED)
        self.vision_head = Rotation(vision.head_dim, _HEAD_SEED)
        self.language_head = Rotation(text.head_dim, _HEAD_SEED)


def list_units(config: ModelConfig) -> list[Unit]:
    """Lists the units in the order of computation."""
    return [
        Unit("stem", "visual.patch_embed.proj."),
        *(Unit("block", f"visual.blocks.{i}.") for i in range(config.vision.depth)),
        Unit("merger", "visual.merger."),
        Unit("embedding", "model.embed_tokens."),
        *(Unit("layer", f"model.layers.{i}.") for i in range(config.text.layers)),
        Unit("head", "lm_head."),
    ]


def matrices_of(unit: Unit) -> list[str]:
    """Names a unit's linear maps, without ".weight"."""
    inner = {
        "stem": [""],
        "block": ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"],
        "merger": ["mlp.0", "mlp.2"],
        "embedding": [""],
        "layer": [
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        ],
        "head": [""],
    }[unit.kind]
    return [(unit.prefix + name).rstrip(".") for name in inner]


def _mapped(checkpoint: Checkpoint, name: str) -> Tensor:
    """A view of the file in its own dtype; not to be written to."""
    stored = checkpoint.tensors[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of read-only memory
        view = torch.from_numpy(stored.data)
    return view.view(_DTYPES[stored.dtype]).view(stored.shape)


def _load(checkpoint: Checkpoint, name: str) -> Tensor:
    return _mapped(checkpoint, name).to(torch.float32, copy=True)


def load_unit(checkpoint: Checkpoint, unit: Unit, rotations: Rotations | None) -> dict[str, Tensor]:
    """Loads a unit's tensors as f32, patch embedding as [D, 1176], folded and rotated where rotations are given.

    The embedding and the head come through chunks_of() instead: they are too large to hold in f32.
    """
    names = [name for name in checkpoint.tensors if name.startswith(unit.prefix)]
    weights = {name: _load(checkpoint, name) for name in names}
    if unit.kind == "stem":
        name = unit.prefix + "weight"
        weights[name] = weights[name].flatten(1)
    if rotations is not None:
        {"stem": _rotate_stem, "block": _rotate_block, "merger": _rotate_merger, "layer": _rotate_layer}[unit.kind](
            weights, unit.prefix, rotations
        )
    return weights


def chunks_of(checkpoint: Checkpoint, unit: Unit, rotations: Rotations | None, rows: int) -> Iterator[Tensor]:
    """Yields the embedding's or the head's rows, f32[<= rows, D], the head with the final norm's gain folded in."""
    name = "model.embed_tokens.weight" if checkpoint.config.text.tied else unit.prefix + "weight"
    gain = _load(checkpoint, "model.norm.weight") if unit.kind == "head" and rotations is not None else None
    for part in _mapped(checkpoint, name).split(rows):
        part = part.float()
        if gain is not None:
            part = part * gain
        yield part if rotations is None else rotations.language.apply(part)


def _fold(weights: dict[str, Tensor], prefix: str, norm: str, readers: tuple[str, ...]) -> None:
    """Folds a norm into its readers and leaves it as ones (and zeros)."""
    gain, shift = weights[f"{prefix}{norm}.weight"], weights.get(f"{prefix}{norm}.bias")
    for reader in readers:
        w, bias = f"{prefix}{reader}.weight", f"{prefix}{reader}.bias"
        weights[w], folded = fold_gain(weights[w], weights.get(bias), gain, shift)
        if folded is not None:
            weights[bias] = folded
    weights[f"{prefix}{norm}.weight"] = torch.ones_like(gain)
    if shift is not None:
        weights[f"{prefix}{norm}.bias"] = torch.zeros_like(shift)


def _read(weights: dict[str, Tensor], prefix: str, readers: tuple[str, ...], q: Rotation) -> None:
    for reader in readers:
        weights[f"{prefix}{reader}.weight"] = read_rotated(weights[f"{prefix}{reader}.weight"], q)


def _write(weights: dict[str, Tensor], prefix: str, writer: str, q: Rotation) -> None:
    w, bias = f"{prefix}{writer}.weight", f"{prefix}{writer}.bias"
    weights[w], turned = write_rotated(weights[w], weights.get(bias), q)
    if turned is not None:
        weights[bias] = turned


def _rotate_stem(weights: dict[str, Tensor], prefix: str, r: Rotations) -> None:
    weights[prefix + "weight"], _ = write_rotated(weights[prefix + "weight"], None, r.vision)


def _rotate_block(weights: dict[str, Tensor], prefix: str, r: Rotations) -> None:
    _fold(weights, prefix, "norm1", ("attn.qkv",))
    _fold(weights, prefix, "norm2", ("mlp.fc1",))
    _read(weights, prefix, ("attn.qkv", "mlp.fc1"), r.vision)
    w, bias = weights[prefix + "attn.qkv.weight"], weights[prefix + "attn.qkv.bias"]
    values = slice(2 * len(w) // 3, None)
    w[values], bias[values] = rotate_heads_out(w[values], bias[values], r.vision_head)
    weights[prefix + "attn.proj.weight"] = rotate_heads_in(weights[prefix + "attn.proj.weight"], r.vision_head)
    _write(weights, prefix, "attn.proj", r.vision)
    _write(weights, prefix, "mlp.fc2", r.vision)


def _rotate_merger(weights: dict[str, Tensor], prefix: str, r: Rotations) -> None:
    _fold(weights, prefix, "ln_q", ("mlp.0",))
    _read(weights, prefix, ("mlp.0",), r.vision)
    _write(weights, prefix, "mlp.2", r.language)


def _rotate_layer(weights: dict[str, Tensor], prefix: str, r: Rotations) -> None:
    attention = tuple(f"self_attn.{name}_proj" for name in "qkv")
    _fold(weights, prefix, "input_layernorm", attention)
    _fold(weights, prefix, "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
    _read(weights, prefix, (*attention, "mlp.gate_proj", "mlp.up_proj"), r.language)
    value, out = prefix + "self_attn.v_proj", prefix + "self_attn.o_proj"
    weights[value + ".weight"], weights[value + ".bias"] = rotate_heads_out(
        weights[value + ".weight"], weights[value + ".bias"], r.language_head
    )
    weights[out + ".weight"] = rotate_heads_in(weights[out + ".weight"], r.language_head)
    _write(weights, prefix, "self_attn.o_proj", r.language)
    _write(weights, prefix, "mlp.down_proj", r.language)
