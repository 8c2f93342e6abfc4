"""Quantizes small checkpoints for the tests by rounding to nearest, with numpy alone, and turns them back to floats."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from migician.export.packing import pack_int4, pack_int8, unpack_int4, unpack_int8
from migician.runtime.files.checkpoint import Checkpoint, derive
from migician.runtime.files.config import tensor_shapes
from migician.runtime.files.mig import write_mig
from migician.runtime.files.open import open_checkpoint
from migician.runtime.files.quantization import EMBEDDING, Quantization, group_size, matrices
from migician.runtime.files.tensors import Tensor

_INT8_ALWAYS = (EMBEDDING, "lm_head")


def round_int8(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w: f32[N, K].   Returns (q: i8[N, K] in -127..127, scale: f32[N], exact in fp16)."""
    scale = np.maximum(np.abs(w).max(1) / 127, 2.0**-24).astype(np.float16).astype(np.float32)
    return np.rint(w / scale[:, None]).clip(-127, 127).astype(np.int8), scale


def round_int4(w: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w: f32[N, K].   Returns (q: i8[N, K] in -8..7, factors: u8[N, K/group] in 1..16, scale: f32[N] of 7 bits)."""
    rows, cols = w.shape
    groups = w.reshape(rows, -1, group)
    steps = np.maximum(groups.max(2) / 7, -groups.min(2) / 8)  # f32[N, K/group]
    wanted = np.maximum(steps.max(1).astype(np.float64) / 16, 2.0**-24)
    quantum = np.maximum(2.0 ** (np.frexp(wanted)[1] - 7), 2.0**-24)
    scale = (np.ceil(wanted / quantum) * quantum).astype(np.float32)
    factors = np.rint(steps / scale[:, None]).clip(1, 16).astype(np.uint8)
    q = np.rint(groups / (factors * scale[:, None])[:, :, None]).clip(-8, 7).astype(np.int8)
    return q.reshape(rows, cols), factors, scale


def default_policy(
    checkpoint: Checkpoint, mode: str, *, keep: Iterable[str] = (), group: int = 128, rotated: bool = False
) -> Quantization:
    """int8: every matrix.   int4: every matrix but embedding, head and those of odd width.   keep: layers left bf16."""
    layers = {}
    for name, (_, k) in matrices(checkpoint.config).items():
        small = mode == "int4" and name not in _INT8_ALWAYS and group_size(k, group)
        layers[name] = "bf16" if name in set(keep) else "int4" if small else "int8"
    return Quantization(mode, group, rotated, layers)


def quantize(checkpoint: Checkpoint, policy: Quantization) -> dict[str, Tensor]:
    """Rounds every matrix as the policy says; the rest stays as it is."""
    stored = {}
    for name, tensor in checkpoint.tensors.items():
        kind = policy.layers.get(name.removesuffix(".weight"), "bf16") if name.endswith(".weight") else "bf16"
        if kind == "bf16":
            stored[name] = tensor
            continue
        w = tensor.to_f32().reshape(tensor.shape[0], -1)
        if kind == "int8":
            q, scale = round_int8(w)
            stored[name] = as_tensor(name, pack_int8(q))
        else:
            q, factors, scale = round_int4(w, policy.group(w.shape[1]))
            blocks, groups = pack_int4(q, factors)
            stored[name] = as_tensor(name, blocks)
            stored[f"{name}_group"] = as_tensor(f"{name}_group", groups)
        padded = np.zeros(-(-len(scale) // 16) * 16, np.float32)
        padded[: len(scale)] = scale
        stored[f"{name}_scale"] = as_tensor(f"{name}_scale", padded)
    return stored


def as_tensor(name: str, array: np.ndarray) -> Tensor:
    """Wraps an array as a stored tensor."""
    dtype = {"int8": "I8", "uint8": "U8", "float32": "F32"}[array.dtype.name]
    return Tensor(name, dtype, array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def make_quantized(
    folder: str | Path,
    path: str | Path,
    mode: str = "int4",
    *,
    keep: Iterable[str] = (),
    group: int = 128,
    rotated: bool = False,
    calibration: str = "",
    report: str | None = None,
) -> Path:
    """Writes the model in `folder` as a quantized .mig file and returns its path. `rotated` is said, not done."""
    with open_checkpoint(folder) as model:
        policy = default_policy(model, mode, keep=keep, group=group, rotated=rotated)
        texts = {"quantization": policy.to_text(), "calibration": calibration}
        made = derive(model, quantize(model, policy), texts=texts, where=path)
        write_mig(path, made, extra={} if report is None else {"report": report})
    return Path(path)


def dequantize(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Returns every tensor of a model as f32 in its logical shape, exactly what the stored codes stand for."""
    values = {}
    for name, shape in tensor_shapes(checkpoint.config).items():
        tensor = checkpoint.tensors[name]
        if tensor.dtype not in ("I8", "U8"):
            values[name] = tensor.to_f32()
            continue
        rows, cols = shape[0], int(np.prod(shape[1:]))
        blocks = tensor.data.view(np.int8 if tensor.dtype == "I8" else np.uint8).reshape(tensor.shape)
        if tensor.dtype == "I8":
            whole = unpack_int8(blocks, rows, cols).astype(np.float32)
        else:
            groups = checkpoint.tensors[f"{name}_group"]
            q, factors = unpack_int4(blocks, groups.data.reshape(groups.shape), rows, cols)
            whole = q.astype(np.float32) * np.repeat(factors, cols // factors.shape[1], axis=1)
        scale = checkpoint.tensors[f"{name}_scale"].to_f32()[:rows]
        values[name] = (whole * scale[:, None]).reshape(shape)
    return values


def unquantized(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the same model with f32 weights of the same values, for comparison with the quantized one."""
    found = {name: as_tensor(name, values) for name, values in dequantize(checkpoint).items()}
    return derive(checkpoint, found, texts={"quantization": "none"}, where=f"{checkpoint.name} in floats")
