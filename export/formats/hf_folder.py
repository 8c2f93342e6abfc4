"""A Hugging Face checkpoint folder, whatever its weights are stored as: shards, index, texts, values as F16.

    config.json  generation_config.json  preprocessor_config.json  tokenizer.json  tokenizer_config.json
    chat_template.json  model.safetensors or model-00001-of-00002.safetensors ... and model.safetensors.index.json

A format lists its tensors as entries, in the order of computation, and says what config.json has besides.
Letters: N outputs, K inputs.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.chat_template import CHAT_TEMPLATE
from ...runtime.errors import UnsupportedError
from ...runtime.files.checkpoint import Checkpoint
from ...runtime.files.tensors import Tensor, parse_json
from ...runtime.files.write import whole_folder
from ..packing import unpack_int4, unpack_int8

__all__ = ["CHUNK", "Entry", "half_config", "half_entry", "stored_array", "to_half", "write_folder"]

CHUNK = 1 << 22  # values converted at a time

_DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "I32": 4, "U8": 1}
_ROWS = 16  # rows of a stored block


@dataclass(frozen=True)
class Entry:
    """One tensor to be written; `pieces` makes its bytes anew, part by part.   dtype: as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return int(np.prod(self.shape)) * _DTYPE_BYTES[self.dtype]


def write_folder(
    target: Path, checkpoint: Checkpoint, config: dict[str, Any], entries: Sequence[Entry], *, shard_bytes: int
) -> int:
    """Writes the folder, whole or not at all; returns how many files of weights it has.

    config: the content of config.json.   shard_bytes: the most one file of weights holds, a larger tensor excepted.
    Raises ModelFileError for a folder that is not empty or cannot be written, and what `pieces` raises.
    """
    shards, texts = _shards(entries, shard_bytes), _texts(checkpoint, config)
    with whole_folder(target) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        _write_weights(folder, shards)
    return len(shards)


# ------------------------------------------------------------------------------------------------------------ values


def stored_array(tensor: Tensor) -> np.ndarray:
    """A quantized tensor as stored: i8 or u8 of its own shape."""
    return tensor.data.view(np.int8 if tensor.dtype == "I8" else np.uint8).reshape(tensor.shape)


def half_entry(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Entry:
    """A tensor of any kind as F16; a value beyond it raises UnsupportedError when its turn comes."""
    return Entry(name, "F16", shape, _HalfPieces(checkpoint, name, shape))


@dataclass(frozen=True)
class _HalfPieces:
    """Yields a tensor's values as F16, a few million at a time."""

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, ...]

    def __call__(self) -> Iterator[np.ndarray]:
        tensor = self.checkpoint.tensors[self.name]
        floats = self._dequantized(tensor) if tensor.dtype in ("I8", "U8") else self._plain(tensor)
        for values in floats:
            yield to_half(values, self.checkpoint, self.name)

    def _plain(self, tensor: Tensor) -> Iterator[np.ndarray]:
        step = CHUNK * _DTYPE_BYTES[tensor.dtype]
        for begin in range(0, tensor.nbytes, step):
            data = tensor.data[begin : begin + step]
            count = len(data) * CHUNK // step
            yield Tensor(tensor.name, tensor.dtype, (count,), data).to_f32()

    def _dequantized(self, tensor: Tensor) -> Iterator[np.ndarray]:
        n, k = self.shape[0], int(np.prod(self.shape[1:]))
        tensors, blocks = self.checkpoint.tensors, stored_array(tensor)
        scale = tensors[f"{self.name}_scale"].to_f32()
        groups = stored_array(tensors[f"{self.name}_group"]) if tensor.dtype == "U8" else None
        step = max(1, CHUNK // (_ROWS * k))
        for begin in range(0, len(blocks), step):
            end = min(begin + step, len(blocks))
            rows = min(end * _ROWS, n) - begin * _ROWS
            if groups is None:
                values = unpack_int8(blocks[begin:end], rows, k).astype(np.float32)
            else:
                q, factors = unpack_int4(blocks[begin:end], groups[begin:end], rows, k)
                values = q.astype(np.float32) * np.repeat(factors, k // factors.shape[1], axis=1)
            yield values * scale[begin * _ROWS : begin * _ROWS + rows, None]


def to_half(values: np.ndarray, checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Rounds f32 to F16. Raises UnsupportedError for a value that is none."""
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    if not np.isfinite(half).all():
        worst = float(values.reshape(-1)[np.argmin(np.isfinite(half).reshape(-1))])
        raise UnsupportedError(
            f"{checkpoint.name}: tensor {name} holds {worst:.4g}, half precision ends at 65504; use the .mig file"
        )
    return half


# ------------------------------------------------------------------------------------------------------------- files


def _shards(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _write_weights(folder: Path, shards: list[list[Entry]]) -> None:
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


def _write_shard(path: Path, entries: list[Entry]) -> None:
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


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def half_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of config.json for a model whose floats are written as F16."""
    config = parse_json(checkpoint.raw["config"], checkpoint.name, "configuration")
    config.setdefault("architectures", ["Qwen2VLForConditionalGeneration"])
    tables = [config, *(config[key] for key in ("text_config", "vision_config") if isinstance(config.get(key), dict))]
    for table in tables:
        for key in ("dtype", "torch_dtype"):
            if key in table:
                table[key] = "float16"
        if "tie_word_embeddings" in table and table is not config:
            table["tie_word_embeddings"] = checkpoint.config.text.tied
    return config | {"torch_dtype": "float16", "tie_word_embeddings": checkpoint.config.text.tied}


def _texts(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, str]:
    """The folder's files that are text, by name."""
    raw = checkpoint.raw
    pictures = parse_json(raw["preprocessor"], checkpoint.name, "preprocessor configuration")
    pictures.setdefault("image_processor_type", "Qwen2VLImageProcessor")
    pictures.setdefault("processor_class", "Qwen2VLProcessor")
    texts = {
        "config.json": _json(config),
        "preprocessor_config.json": _json(pictures),
        "tokenizer.json": checkpoint.tokenizer_json,
        "tokenizer_config.json": _json(_tokenizer_config(checkpoint)),
        "chat_template.json": _json({"chat_template": raw.get("chat_template", CHAT_TEMPLATE)}),
    }
    if parse_json(raw["generation"], checkpoint.name, "generation configuration"):
        texts["generation_config.json"] = raw["generation"]
    return texts


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
        "chat_template": checkpoint.raw.get("chat_template", CHAT_TEMPLATE),
    }
