"""Writes a quantized model as a Hugging Face GPTQ checkpoint, which transformers, vLLM and others read.

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

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.errors import ModelFileError, UnsupportedError
from ...runtime.files.checkpoint import Checkpoint
from ...runtime.files.config import tensor_shapes
from ...runtime.files.quantization import matrices
from ...runtime.files.tensors import Tensor, parse_json
from ..packing import unpack_int4, unpack_int8

__all__ = ["CHAT_TEMPLATE", "SHARD_BYTES", "GptqFolder", "write_gptq"]

SHARD_BYTES = 5_000_000_000

# The turns that runtime/prompt.py builds, for transformers; pictures stand where the message has them.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_DTYPE_BYTES = {"F16": 2, "I32": 4}
_CHUNK = 1 << 22  # values converted at a time
_ROWS = 16  # rows of a stored block


@dataclass(frozen=True)
class GptqFolder:
    """What was written: bits and group_size (-1: one scale per row) of the layers, files and bytes of weights."""

    bits: int
    group_size: int
    shards: int
    nbytes: int


@dataclass(frozen=True)
class _Entry:
    """One tensor to be written; `pieces` makes its bytes anew, part by part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * _DTYPE_BYTES[self.dtype]


def write_gptq(
    checkpoint: Checkpoint, folder: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES
) -> GptqFolder:
    """Writes the checkpoint folder; it appears under its name complete or not at all.

    checkpoint: an opened .mig file whose language model is int4 or int8.   shard_bytes: the most one file of weights
    holds, a larger tensor excepted. Memory: one layer's codes and a few pieces of 4 million values.
    Raises UnsupportedError for a model that has no such form, or a value that half precision does not hold,
    ModelFileError for a folder that is not empty or cannot be written.
    """
    layers = _linears(checkpoint)
    bits, group = _common_form(checkpoint, layers)
    shards = _shards(_entries(checkpoint, layers, bits, group), shard_bytes)
    texts = _texts(checkpoint, bits, group)
    target = Path(folder)
    _check_target(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
    except OSError as error:
        raise _unwritable(target, error) from None
    try:
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        _write_weights(temporary, shards)
        os.replace(temporary, target)  # takes the place of an empty folder too
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise _unwritable(target, error) from None
        raise
    return GptqFolder(bits, group, len(shards), sum(entry.nbytes for shard in shards for entry in shard))


def _unwritable(target: Path, error: OSError) -> ModelFileError:
    return ModelFileError(f"{target}: cannot be written ({error.strerror}); free some space or choose another place")


def _check_target(target: Path) -> None:
    with contextlib.suppress(OSError):  # what cannot be looked at cannot be written, which is said there
        if target.is_dir() and not target.is_symlink():
            if any(target.iterdir()):
                raise ModelFileError(f"{target}: not empty; choose a new folder")
        elif os.path.lexists(target):
            raise ModelFileError(f"{target}: something else is in the way; choose a new folder")


# --------------------------------------------------------------------------------------------------------- the form


def _linears(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """The language model's linear layers, each [N, K]."""
    return {name: shape for name, shape in matrices(checkpoint.config).items() if name.startswith("model.layers.")}


def _common_form(checkpoint: Checkpoint, layers: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Finds (bits, group size) that hold every layer without loss; group size -1 is one scale per row."""
    policy = checkpoint.quantization
    if policy is None:
        raise UnsupportedError(f"{checkpoint.name}: not quantized; a GPTQ folder is made of an int4 or int8 .mig file")
    kinds = {name: policy.layers[name] for name in layers}
    if wide := [name for name, kind in kinds.items() if kind == "bf16"]:
        raise UnsupportedError(
            f"{checkpoint.name}: {wide[0]} is bf16 ({len(wide)} of {len(kinds)} layers), a GPTQ folder has none in the "
            f"language model; export the .mig file without keeping it"
        )
    bits = 8 if "int8" in kinds.values() else 4
    for name, (n, _) in layers.items():
        if n * bits % 32:
            raise UnsupportedError(
                f"{checkpoint.name}: {name} has {n} outputs, a GPTQ folder wants a multiple of {32 // bits}; "
                "use the .mig file"
            )
    return bits, -1 if bits == 8 else min(policy.group(k) for _, k in layers.values())


def _entries(
    checkpoint: Checkpoint, layers: Mapping[str, tuple[int, int]], bits: int, group: int
) -> list[_Entry]:
    """Lists every tensor to be written, in the order of computation."""
    entries = []
    for name, shape in tensor_shapes(checkpoint.config).items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in layers:
            entries += _linear_entries(checkpoint, module, *layers[module], bits=bits, group=group)
        else:
            entries.append(_Entry(name, "F16", shape, _HalfPieces(checkpoint, name, shape)))
    return entries


def _linear_entries(checkpoint: Checkpoint, module: str, n: int, k: int, *, bits: int, group: int) -> list[_Entry]:
    length = k if group < 0 else group
    count = k // length

    def qweight() -> Iterator[np.ndarray]:
        codes = _codes(checkpoint, module, n, k, bits)
        rows = 32 // bits * max(1, _CHUNK // (n * 32 // bits))
        for begin in range(0, k, rows):
            yield _packed(codes[:, begin : begin + rows], bits)

    def qzeros() -> Iterator[np.ndarray]:
        yield np.full((count, n * bits // 32), {4: 0x77777777, 8: 0x7F7F7F7F}[bits], "<i4")

    def scales() -> Iterator[np.ndarray]:
        steps = _steps(checkpoint, module, n, k, bits)  # f32[N, K / its own group]
        steps = np.repeat(steps, count // steps.shape[1], axis=1).T
        half = _half(steps, checkpoint, f"{module}.weight_scale")
        if not np.array_equal(half.astype(np.float32), steps):
            raise ModelFileError(
                f"{checkpoint.name}: the scales of {module} are not exact in half precision; export the .mig file again"
            )
        yield half

    def g_idx() -> Iterator[np.ndarray]:
        yield (np.arange(k) // length).astype("<i4")

    return [
        _Entry(f"{module}.qweight", "I32", (k * bits // 32, n), qweight),
        _Entry(f"{module}.qzeros", "I32", (count, n * bits // 32), qzeros),
        _Entry(f"{module}.scales", "F16", (count, n), scales),
        _Entry(f"{module}.g_idx", "I32", (k,), g_idx),
    ]


# --------------------------------------------------------------------------------------------- codes, scales, floats


def _array(tensor: Tensor) -> np.ndarray:
    """A quantized tensor as stored: i8 or u8 of its own shape."""
    return tensor.data.view(np.int8 if tensor.dtype == "I8" else np.uint8).reshape(tensor.shape)


def _codes(checkpoint: Checkpoint, module: str, n: int, k: int, bits: int) -> np.ndarray:
    """Returns q: i8[N, K]; the factors of an int4 layer are multiplied in where 8 bits are written."""
    tensors, name = checkpoint.tensors, f"{module}.weight"
    if tensors[name].dtype == "I8":
        return unpack_int8(_array(tensors[name]), n, k)
    q, factors = unpack_int4(_array(tensors[name]), _array(tensors[f"{name}_group"]), n, k)
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
    groups = _array(tensors[f"{module}.weight_group"])  # [Np/16, Kp/group, 16]
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


@dataclass(frozen=True)
class _HalfPieces:
    """Yields a tensor's values as F16, a few million at a time."""

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, ...]

    def __call__(self) -> Iterator[np.ndarray]:
        tensor = self.checkpoint.tensors[self.name]
        floats = self._plain(tensor) if tensor.dtype in ("BF16", "F32") else self._dequantized(tensor)
        for values in floats:
            yield _half(values, self.checkpoint, self.name)

    def _plain(self, tensor: Tensor) -> Iterator[np.ndarray]:
        step = _CHUNK * (2 if tensor.dtype == "BF16" else 4)
        for begin in range(0, tensor.nbytes, step):
            data = tensor.data[begin : begin + step]
            count = len(data) * _CHUNK // step
            yield Tensor(tensor.name, tensor.dtype, (count,), data).to_f32()

    def _dequantized(self, tensor: Tensor) -> Iterator[np.ndarray]:
        n, k = self.shape[0], int(np.prod(self.shape[1:]))
        tensors, blocks = self.checkpoint.tensors, _array(tensor)
        scale = tensors[f"{self.name}_scale"].to_f32()
        groups = _array(tensors[f"{self.name}_group"]) if tensor.dtype == "U8" else None
        step = max(1, _CHUNK // (_ROWS * k))
        for begin in range(0, len(blocks), step):
            end = min(begin + step, len(blocks))
            rows = min(end * _ROWS, n) - begin * _ROWS
            if groups is None:
                values = unpack_int8(blocks[begin:end], rows, k).astype(np.float32)
            else:
                q, factors = unpack_int4(blocks[begin:end], groups[begin:end], rows, k)
                values = q.astype(np.float32) * np.repeat(factors, k // factors.shape[1], axis=1)
            yield values * scale[begin * _ROWS : begin * _ROWS + rows, None]


def _half(values: np.ndarray, checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Rounds f32 to F16. Raises UnsupportedError for a value that is none."""
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    if not np.isfinite(half).all():
        worst = float(values.reshape(-1)[np.argmin(np.isfinite(half).reshape(-1))])
        raise UnsupportedError(
            f"{checkpoint.name}: tensor {name} holds {worst:.4g}, half precision ends at 65504; use the .mig file"
        )
    return half


# --------------------------------------------------------------------------------------------------------- the files


def _shards(entries: list[_Entry], shard_bytes: int) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _write_weights(folder: Path, shards: list[list[_Entry]]) -> None:
    """Writes the shards, and an index where there are several."""
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for file_name, shard in zip(names, shards, strict=True):
        _write_shard(folder / file_name, shard)
    if len(shards) > 1:
        total = sum(entry.nbytes for shard in shards for entry in shard)
        where = {entry.name: file_name for file_name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(_json(index), encoding="utf-8")


def _write_shard(path: Path, entries: list[_Entry]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        end = position + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            before = file.tell()
            for piece in entry.pieces():
                file.write(np.ascontiguousarray(piece).data)
            if file.tell() - before != entry.nbytes:
                raise AssertionError(f"{entry.name}: {file.tell() - before} bytes written, {entry.nbytes} announced")
        file.flush()
        os.fsync(file.fileno())


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _texts(checkpoint: Checkpoint, bits: int, group: int) -> dict[str, str]:
    """The folder's files that are text, by name."""
    raw = checkpoint.raw
    pictures = parse_json(raw["preprocessor"], checkpoint.name, "preprocessor configuration")
    pictures.setdefault("image_processor_type", "Qwen2VLImageProcessor")
    pictures.setdefault("processor_class", "Qwen2VLProcessor")
    texts = {
        "config.json": _json(_config(checkpoint, bits, group)),
        "preprocessor_config.json": _json(pictures),
        "tokenizer.json": checkpoint.tokenizer_json,
        "tokenizer_config.json": _json(_tokenizer_config(checkpoint)),
        "chat_template.json": _json({"chat_template": CHAT_TEMPLATE}),
    }
    if parse_json(raw["generation"], checkpoint.name, "generation configuration"):
        texts["generation_config.json"] = raw["generation"]
    return texts


def _config(checkpoint: Checkpoint, bits: int, group: int) -> dict[str, Any]:
    config = parse_json(checkpoint.raw["config"], checkpoint.name, "configuration")
    config.setdefault("architectures", ["Qwen2VLForConditionalGeneration"])
    tables = [config, *(config[key] for key in ("text_config", "vision_config") if isinstance(config.get(key), dict))]
    for table in tables:
        for key in ("dtype", "torch_dtype"):
            if key in table:
                table[key] = "float16"
        if "tie_word_embeddings" in table and table is not config:
            table["tie_word_embeddings"] = checkpoint.config.text.tied
    config |= {"torch_dtype": "float16", "tie_word_embeddings": checkpoint.config.text.tied}
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
    return config


def _tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What transformers wants besides tokenizer.json; Qwen2's own class only for its kind of tokenizer."""
    table = parse_json(checkpoint.tokenizer_json, "tokenizer.json", "tokenizer")
    model = table.get("model")
    byte_pairs = isinstance(model, dict) and model.get("type") == "BPE"
    special = [token["content"] for token in table.get("added_tokens") or () if token.get("special")]

    def known(word: str) -> str | None:
        return word if word in special else None

    return {
        "tokenizer_class": "Qwen2Tokenizer" if byte_pairs else "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": known("<|im_end|>"),
        "pad_token": known("<|endoftext|>"),
        "unk_token": model.get("unk_token") if isinstance(model, dict) else None,
        "additional_special_tokens": [word for word in special if word != "<|endoftext|>"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": checkpoint.config.text.max_positions,
        "chat_template": CHAT_TEMPLATE,
    }
