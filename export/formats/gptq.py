"""A Hugging Face GPTQ checkpoint, which transformers, vLLM and others read.

Of P, a linear layer of the language model with N outputs and K inputs, b bits and groups of g inputs:

| tensor    | dtype | shape          | content                                                             |
|-----------|-------|----------------|---------------------------------------------------------------------|
| P.qweight | I32   | [K * b/32, N]  | u = q + 2^(b-1), packed along K, the first in the lowest bits        |
| P.qzeros  | I32   | [K/g, N * b/32]| 2^(b-1) - 1 everywhere, packed alike: version 1 stores the zero less one |
| P.scales  | F16   | [K/g, N]       | w = (u - 2^(b-1)) * scale                                            |
| P.g_idx   | I32   | [K]            | k // g                                                               |
| P.bias    | F16   | [N]            | where the layer has one                                              |

Codes and scales carry over without loss: a stored factor times its row's scale is exact in half precision. Everything
else, the vision encoder, the embedding, the head and the norms, is written as F16.

The readers know one width and one group for all layers. So groups of several lengths are cut to the shortest, which
repeats scales. Where int8 and int4 layers are mixed all are written with 8 bits and one scale per row, since a code of
4 bits times its factor is a whole number of 8; the readers' only other means, rules by layer ("dynamic"), are not known
to transformers. A layer of the language model that is left in bf16 has no form at all.

Format: https://github.com/ModelCloud/GPTQModel, checkpoint_format "gptq".
Letters: N outputs, K inputs, G groups of a row.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...runtime.errors import ModelFileError, UnsupportedError
from ...runtime.files.checkpoint import Checkpoint
from ...runtime.files.config import ModelConfig, tensor_shapes
from ...runtime.files.quantization import Quantization, matrices
from ..packing import unpack_int4, unpack_int8
from .hf_folder import CHUNK, Entry, half_config, half_entry, stored_array, to_half, write_folder
from .table import SHARD_BYTES, WriteOptions

__all__ = ["GptqFolder", "check", "write", "write_gptq"]


@dataclass(frozen=True)
class GptqFolder:
    """What was written: bits and group_size (-1: one scale per row) of the layers, files and bytes of weights."""

    bits: int
    group_size: int
    shards: int
    nbytes: int


def check(config: ModelConfig, policy: Quantization | None, where: str) -> None:
    """Raises UnsupportedError for a model that has no such form."""
    _common_form(config, policy, where)


def write(source: Checkpoint, target: Path, options: WriteOptions) -> None:
    """As write_gptq."""
    write_gptq(source, target, shard_bytes=options.shard_bytes)


def write_gptq(checkpoint: Checkpoint, folder: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES) -> GptqFolder:
    """Writes the checkpoint folder; it appears under its name complete or not at all.

    checkpoint: an opened .mig file whose language model is int4 or int8.   shard_bytes: the most one file of weights
    holds, a larger tensor excepted. Memory: one layer's codes and a few pieces of 4 million values.
    Raises UnsupportedError for a model that has no such form, or a value that half precision does not hold,
    ModelFileError for a folder that is not empty or cannot be written.
    """
    bits, group = _common_form(checkpoint.config, checkpoint.quantization, checkpoint.name)
    entries = _entries(checkpoint, bits, group)
    config = half_config(checkpoint)
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "damp_percent": 0.01,
        "desc_act": False,
        "sym": True,
        "true_sequential": True,
        "modules_in_block_to_quantize": None,
        "dataset": None,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "pack_dtype": "int32",
    }
    shards = write_folder(Path(folder), checkpoint, config, entries, shard_bytes=shard_bytes)
    return GptqFolder(bits, group, shards, sum(entry.nbytes for entry in entries))


# --------------------------------------------------------------------------------------------------------- the form


def _linears(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The language model's linear layers, each [N, K]."""
    return {name: shape for name, shape in matrices(config).items() if name.startswith("model.layers.")}


def _common_form(config: ModelConfig, policy: Quantization | None, where: str) -> tuple[int, int]:
    """Finds (bits, group size) that hold every layer without loss; group size -1 is one scale per row."""
    if policy is None:
        raise UnsupportedError(f"{where}: not quantized; a GPTQ folder is made of an int4 or int8 .mig file")
    layers = _linears(config)
    kinds = {name: policy.layers[name] for name in layers}
    if wide := [name for name, kind in kinds.items() if kind == "bf16"]:
        raise UnsupportedError(
            f"{where}: {wide[0]} is bf16 ({len(wide)} of {len(kinds)} layers), a GPTQ folder has none in the "
            f"language model; export the .mig file without keeping it"
        )
    bits = 8 if "int8" in kinds.values() else 4
    for name, (n, _) in layers.items():
        if n * bits % 32:
            raise UnsupportedError(
                f"{where}: {name} has {n} outputs, a GPTQ folder wants a multiple of {32 // bits}; use the .mig file"
            )
    return bits, -1 if bits == 8 else min(policy.group(k) for _, k in layers.values())


def _entries(checkpoint: Checkpoint, bits: int, group: int) -> list[Entry]:
    """Lists every tensor to be written, in the order of computation."""
    entries, layers = [], _linears(checkpoint.config)
    for name, shape in tensor_shapes(checkpoint.config).items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in layers:
            entries += _linear_entries(checkpoint, module, *layers[module], bits=bits, group=group)
        else:
            entries.append(half_entry(checkpoint, name, shape))
    return entries


def _linear_entries(checkpoint: Checkpoint, module: str, n: int, k: int, *, bits: int, group: int) -> list[Entry]:
    length = k if group < 0 else group
    count = k // length

    def qweight() -> Iterator[np.ndarray]:
        codes = _codes(checkpoint, module, n, k, bits)
        rows = 32 // bits * max(1, CHUNK // (n * 32 // bits))
        for begin in range(0, k, rows):
            yield _packed(codes[:, begin : begin + rows], bits)

    def qzeros() -> Iterator[np.ndarray]:
        yield np.full((count, n * bits // 32), {4: 0x77777777, 8: 0x7F7F7F7F}[bits], "<i4")

    def scales() -> Iterator[np.ndarray]:
        steps = _steps(checkpoint, module, n, k, bits)  # f32[N, K / its own group]
        steps = np.repeat(steps, count // steps.shape[1], axis=1).T
        half = to_half(steps, checkpoint, f"{module}.weight_scale")
        if not np.array_equal(half.astype(np.float32), steps):
            raise ModelFileError(
                f"{checkpoint.name}: the scales of {module} are not exact in half precision; export the .mig file again"
            )
        yield half

    def g_idx() -> Iterator[np.ndarray]:
        yield (np.arange(k) // length).astype("<i4")

    return [
        Entry(f"{module}.qweight", "I32", (k * bits // 32, n), qweight),
        Entry(f"{module}.qzeros", "I32", (count, n * bits // 32), qzeros),
        Entry(f"{module}.scales", "F16", (count, n), scales),
        Entry(f"{module}.g_idx", "I32", (k,), g_idx),
    ]


# ------------------------------------------------------------------------------------------------ codes and scales


def _codes(checkpoint: Checkpoint, module: str, n: int, k: int, bits: int) -> np.ndarray:
    """Returns q: i8[N, K]; the factors of an int4 layer are multiplied in where 8 bits are written."""
    tensors, name = checkpoint.tensors, f"{module}.weight"
    if tensors[name].dtype == "I8":
        return unpack_int8(stored_array(tensors[name]), n, k)
    q, factors = unpack_int4(stored_array(tensors[name]), stored_array(tensors[f"{name}_group"]), n, k)
    if bits == 4:
        return q
    # (u - 8) * factor is -128..112; a slice at a time, so that no wide copy of the matrix is made
    length = k // factors.shape[1]
    for g in range(factors.shape[1]):
        q[:, g * length : (g + 1) * length] *= factors[:, g : g + 1].view(np.int8)
    return q


def _steps(checkpoint: Checkpoint, module: str, n: int, k: int, bits: int) -> np.ndarray:
    """Returns f32[N, G]: what a code is multiplied with; G is 1 with 8 bits."""
    tensors = checkpoint.tensors
    scale = tensors[f"{module}.weight_scale"].to_f32()[:n, None]
    if bits == 8:
        return scale
    groups = stored_array(tensors[f"{module}.weight_group"])  # [Np/16, Kp/group, 16]
    count = k // (-(-k // 64) * 64 // groups.shape[1])
    return groups.transpose(0, 2, 1).reshape(-1, groups.shape[1])[:n, :count] * scale


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs i8[N, K] along K into i32[K * bits/32, N], the first in the lowest bits."""
    per = 32 // bits
    words = np.zeros((codes.shape[1] // per, len(codes)), "<u4")
    for i in range(per):
        part = (codes[:, i::per].T.astype(np.int16) + (1 << bits - 1)).astype(np.uint32)
        words |= part << np.uint32(bits * i)
    return words.view("<i4")
