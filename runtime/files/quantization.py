"""What of a model is quantized and how: the policy text of a .mig file and the tensors that it promises.

    {"version": 1, "mode": "int4", "group_size": 128, "rotated": true,
     "layers": {"visual.patch_embed.proj": "bf16", "visual.blocks.0.attn.qkv": "int8", ...}}

Every matrix of the model is listed. P is such a layer, logically [N, K]; Np is N rounded up to 16, Kp is K rounded up
to 64, group the largest power of two up to group_size that divides K:

| kind | stored as                                                                                      |
|------|------------------------------------------------------------------------------------------------|
| bf16 | P.weight BF16 or F32 in its logical shape                                                      |
| int8 | P.weight I8 [Np/16, Kp/4, 16, 4], P.weight_scale F32 [Np]                                      |
| int4 | P.weight U8 [Np/16, Kp/8, 16, 4], P.weight_group U8 [Np/16, Kp/group, 16], P.weight_scale F32 [Np] |

Biases and norms are never quantized. export/packing.py tells which element lies where.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ModelFileError, UnsupportedError
from .config import ModelConfig, tensor_shapes
from .tensors import parse_json, shown

__all__ = ["EMBEDDING", "KINDS", "MODES", "Quantization", "group_size", "matrices", "stored_tensors"]

EMBEDDING = "model.embed_tokens"
KINDS = ("int4", "int8", "bf16")
MODES = ("int4", "int8")

_VERSION = 1
_GROUPS = (16, 32, 64, 128)
_KEYS = frozenset(("version", "mode", "group_size", "rotated", "layers"))
_MAX_TEXT = 4 << 20  # the largest geometry that config.py lets through has 13000 matrices
_FLOATS = frozenset(("BF16", "F32"))
_AGAIN = "export it again"


def group_size(k: int, limit: int = 128) -> int:
    """Returns the largest power of two that divides k and is at most limit; 0 where that is under 16 (no int4)."""
    if k <= 0 or limit <= 0:
        raise ValueError(f"group_size({k}, {limit}): expected positive numbers")
    largest = min(k & -k, 1 << (limit.bit_length() - 1))
    return largest if largest >= 16 else 0


def matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Lists every layer that can be quantized, in the order of computation, with its (N, K): outputs, inputs."""
    return {
        name.removesuffix(".weight"): (shape[0], math.prod(shape[1:]))
        for name, shape in tensor_shapes(config).items()
        if len(shape) > 1
    }


@dataclass(frozen=True)
class Quantization:
    """The quantization policy of one model.

    mode: what was asked for; an int4 model has int8 and bf16 layers too.   group_size: upper bound of a group.
    rotated: norms are folded into the layers behind them and the residual stream is rotated.
    layers: the kind of every matrix, int4, int8 or bf16 (stored unquantized, as BF16 or F32).
    """

    mode: str
    group_size: int
    rotated: bool
    layers: Mapping[str, str]

    @staticmethod
    def parse(text: str, config: ModelConfig, *, where: str | os.PathLike[str]) -> "Quantization | None":
        """Reads the policy of a file, "none" included, and checks it against the geometry.

        where: the file's name for messages. Raises UnsupportedError for what a newer release may have written,
        ModelFileError for the rest.
        """
        if text == "none":
            return None
        if len(text) > _MAX_TEXT:
            raise ModelFileError(f"{where}: the quantization policy is over {_MAX_TEXT >> 20} MB long; {_AGAIN}")
        table = parse_json(text, where, "quantization policy")
        _check_version(table, where)
        layers = table["layers"]
        if not isinstance(layers, dict):
            raise _bad(where, f"layers is {shown(layers)}, expected an object")
        for name, kind in layers.items():
            if not isinstance(kind, str):
                raise _bad(where, f"layer {shown(name)} is {shown(kind)}, expected one of {', '.join(KINDS)}")
            if kind not in KINDS:
                raise _newer(where, f"layer {shown(name)} is {shown(kind)}")
        policy = Quantization(table["mode"], table["group_size"], table["rotated"], layers)
        if fault := policy.fault(config):
            raise _bad(where, fault)
        return policy

    def to_text(self) -> str:
        """Returns the policy as JSON; equal policies give equal texts."""
        whole = {
            "version": _VERSION,
            "mode": self.mode,
            "group_size": self.group_size,
            "rotated": self.rotated,
            "layers": {name: self.layers[name] for name in sorted(self.layers)},
        }
        return json.dumps(whole, separators=(",", ":"))

    def group(self, k: int) -> int:
        """Returns the group of an int4 layer with k inputs; 0 where it must stay int8."""
        return group_size(k, self.group_size)

    def fault(self, config: ModelConfig) -> str | None:
        """Says what in this policy contradicts itself or the geometry; None where all is well."""
        wanted = matrices(config)
        if missing := [name for name in wanted if name not in self.layers]:
            return f"layer {missing[0]} is missing ({len(missing)} in all)"
        if unknown := sorted(self.layers.keys() - wanted.keys()):
            return f"layer {shown(unknown[0])} is none of this model"
        for name, (_, k) in wanted.items():
            if self.layers[name] != "int4":
                continue
            if self.mode != "int4":
                return f"layer {name} is int4 in a model of mode {self.mode}"
            if name == EMBEDDING:
                return f"layer {name} is int4, an embedding is int8 or bf16"
            if not self.group(k):
                return f"layer {name} is int4 and its {k} inputs do not divide into groups of 16 or more"
        return None


def _check_version(table: dict[str, Any], where: str | os.PathLike[str]) -> None:
    """Checks everything in the policy but its layers; the version first, since the rest hangs on it."""
    version = table.get("version")
    if type(version) is not int:
        raise _bad(where, f"version is {shown(version)}, expected {_VERSION}")
    if version != _VERSION:
        raise _newer(where, f"version is {shown(version)}")
    if missing := sorted(_KEYS - table.keys()):
        raise _bad(where, f"{', '.join(missing)} missing")
    if unknown := sorted(table.keys() - _KEYS):
        raise _newer(where, f"{shown(unknown[0])} is unknown")
    mode, group, rotated = table["mode"], table["group_size"], table["rotated"]
    if not isinstance(mode, str):
        raise _bad(where, f"mode is {shown(mode)}, expected {' or '.join(MODES)}")
    if mode not in MODES:
        raise _newer(where, f"mode is {shown(mode)}")
    if type(group) is not int:
        raise _bad(where, f"group_size is {shown(group)}, expected one of {', '.join(map(str, _GROUPS))}")
    if group not in _GROUPS:
        raise _newer(where, f"group_size is {shown(group)}")
    if not isinstance(rotated, bool):
        raise _bad(where, f"rotated is {shown(rotated)}, expected true or false")


def _bad(where: str | os.PathLike[str], fault: str) -> ModelFileError:
    return ModelFileError(f"{where}: quantization policy: {fault}; {_AGAIN}")


def _newer(where: str | os.PathLike[str], fault: str) -> UnsupportedError:
    return UnsupportedError(
        f"{where}: quantization policy: {fault}, which this release does not know; upgrade or export it again"
    )


def stored_tensors(
    config: ModelConfig, quantization: Quantization | None
) -> dict[str, tuple[frozenset[str], tuple[int, ...]]]:
    """Lists every tensor that a file of this model holds: name, dtypes allowed, shape as stored.

    In the order of computation, the companions of a quantized weight right behind it. The policy must have no fault.
    """
    layers = quantization.layers if quantization else {}
    wanted: dict[str, tuple[frozenset[str], tuple[int, ...]]] = {}
    for name, shape in tensor_shapes(config).items():
        kind = layers.get(name.removesuffix(".weight"), "bf16") if len(shape) > 1 else "bf16"
        if kind == "bf16":
            wanted[name] = (_FLOATS, shape)
        else:
            k = math.prod(shape[1:])
            group = quantization.group(k) if quantization and kind == "int4" else 0
            wanted.update(_packed(name, shape[0], k, group))
    return wanted


def _packed(name: str, n: int, k: int, group: int) -> dict[str, tuple[frozenset[str], tuple[int, ...]]]:
    """The tensors of one quantized matrix; group 0 is int8."""
    blocks, columns = -(-n // 16), -(-k // 64) * 64
    scale = {f"{name}_scale": (frozenset(("F32",)), (16 * blocks,))}
    if not group:
        return {name: (frozenset(("I8",)), (blocks, columns // 4, 16, 4)), **scale}
    return {
        name: (frozenset(("U8",)), (blocks, columns // 8, 16, 4)),
        f"{name}_group": (frozenset(("U8",)), (blocks, columns // group, 16)),
        **scale,
    }
