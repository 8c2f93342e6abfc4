"""A Hugging Face checkpoint folder: its texts, its weights in one file or in shards.

Raises for what is missing, damaged, or of another tool, with what to do about it.
"""

import json
import re
from pathlib import Path

from ..chat_template import folder_template
from ..errors import ModelFileError, UnsupportedError
from .checkpoint import FROM_BF16, Checkpoint, assemble
from .config import parse_config
from .foreign import adapter_beside, explain, has_weights, mlx
from .tensors import Tensor, TensorFile, parse_json, shown
from .text import read_text
from .tokenizer import compose_tokenizer

__all__ = ["open_folder"]

_AGAIN = "download or export it again"
_FOREIGN = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}  # of tools that leave config.json as it was


def open_folder(folder: Path, name: str) -> Checkpoint:
    """Opens a Hugging Face folder, single file or sharded."""
    if fault := adapter_beside(folder) if has_weights(folder) else explain(folder):
        raise fault
    if not (folder / "config.json").exists():
        raise ModelFileError(f"{folder}: no config.json; give the folder of a Qwen2-VL checkpoint")
    raw = {"config": read_text(folder / "config.json"), "generation": "{}"}
    table = parse_json(raw["config"], folder / "config.json", "configuration")
    # the architecture is judged before anything else is asked for
    config = parse_config(table, where=f"{folder}/config.json")
    if isinstance(table.get("quantization"), dict):
        raise mlx(folder)
    for file_name, method in _FOREIGN.items():
        if (folder / file_name).exists():
            raise UnsupportedError(f"{folder / file_name}: weights quantized with {method}; {FROM_BF16}")
    if (folder / "generation_config.json").exists():
        raw["generation"] = read_text(folder / "generation_config.json")
    raw["preprocessor"] = _read_preprocessor(folder)
    raw |= folder_template(folder, read_text, parse_json)
    tokenizer, notes = compose_tokenizer(folder, config)
    files: list[TensorFile] = []
    try:
        found = _open_weights(folder, files)
        if any(file.metadata.get("format") == "mlx" for file in files):
            raise mlx(folder)
        return assemble(name, raw, tokenizer, found, files=files, notes=notes, where=folder)
    except BaseException:
        for file in files:
            file.close()
        raise


def _complete(folder: Path) -> str:
    return f"complete the checkpoint in {folder}"


def _read_preprocessor(folder: Path) -> str:
    """Returns the picture settings; as in transformers, those inside processor_config.json go first."""
    combined = folder / "processor_config.json"
    if combined.exists():
        inner = parse_json(read_text(combined), combined, "processor configuration").get("image_processor")
        if isinstance(inner, dict):
            return json.dumps(inner, indent=2, sort_keys=True)
    return read_text(folder / "preprocessor_config.json")


def _open_weights(folder: Path, files: list[TensorFile]) -> dict[str, Tensor]:
    """Opens the folder's safetensors; appends each opened file to `files`, returns the tensors by their own names."""
    if (folder / "model.safetensors").exists():
        files.append(TensorFile(folder / "model.safetensors"))
        return files[0].tensors
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _open_shards(folder, index, files)
    raise ModelFileError(f"{folder}: no model.safetensors and no model.safetensors.index.json; {_complete(folder)}")


def _open_shards(folder: Path, index: Path, files: list[TensorFile]) -> dict[str, Tensor]:
    weight_map = parse_json(read_text(index), index, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{index}: no weight_map; {_AGAIN}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard, re.ASCII):
            raise ModelFileError(f"{index}: tensor {shown(name)} lies in {shown(shard)}, no name of a shard; {_AGAIN}")
    opened: dict[str, TensorFile] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).exists():
            raise ModelFileError(f"{folder / shard}: shard missing; {_complete(folder)}")
        opened[shard] = TensorFile(folder / shard)
        files.append(opened[shard])
    for name, shard in weight_map.items():
        if name not in opened[shard].tensors:
            raise ModelFileError(
                f"{folder / shard}: tensor {shown(name)} is not in it, though {index.name} says so; {_AGAIN}"
            )
    return {name: opened[shard].tensors[name] for name, shard in weight_map.items()}
