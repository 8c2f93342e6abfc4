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
from .tensors import Tensor, TensorFile, parse_json, shown

__all__ = ["open_folder"]

_MAX_JSON_BYTES = 256 << 20
_AGAIN = "download or export it again"
_FOREIGN = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}  # of tools that leave config.json as it was


def open_folder(folder: Path, name: str) -> Checkpoint:
    """Opens a Hugging Face folder, single file or sharded."""
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise UnsupportedError(
                f"{folder}: a LoRA adapter; merge it into its base model (merge_and_unload) and save"
            )
        raise ModelFileError(f"{folder}: no config.json; give the folder of a Qwen2-VL checkpoint")
    raw = {"config": _read_text(folder / "config.json"), "generation": "{}"}
    # the architecture is judged before anything else is asked for
    parse_config(parse_json(raw["config"], folder / "config.json", "configuration"), where=f"{folder}/config.json")
    for file_name, method in _FOREIGN.items():
        if (folder / file_name).exists():
            raise UnsupportedError(f"{folder / file_name}: weights quantized with {method}; {FROM_BF16}")
    if (folder / "generation_config.json").exists():
        raw["generation"] = _read_text(folder / "generation_config.json")
    raw["preprocessor"] = _read_preprocessor(folder)
    raw |= folder_template(folder, _read_text, parse_json)
    tokenizer = _read_tokenizer(folder)
    files: list[TensorFile] = []
    try:
        found = _open_weights(folder, files)
        return assemble(name, raw, tokenizer, found, files=files, where=folder)
    except BaseException:
        for file in files:
            file.close()
        raise


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():
            raise ModelFileError(f"{path}: not there or not a file; {_complete(path.parent)}")
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelFileError(f"{path}: over {_MAX_JSON_BYTES >> 20} MB; {_AGAIN}")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    except UnicodeDecodeError:
        raise ModelFileError(f"{path}: not UTF-8 text; {_AGAIN}") from None


def _complete(folder: Path) -> str:
    return f"complete the checkpoint in {folder}"


def _read_preprocessor(folder: Path) -> str:
    """Returns the picture settings; as in transformers, those inside processor_config.json go first."""
    combined = folder / "processor_config.json"
    if combined.exists():
        inner = parse_json(_read_text(combined), combined, "processor configuration").get("image_processor")
        if isinstance(inner, dict):
            return json.dumps(inner, indent=2, sort_keys=True)
    return _read_text(folder / "preprocessor_config.json")


def _read_tokenizer(folder: Path) -> str:
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / "vocab.json").exists():
        raise ModelFileError(
            f"{path}: missing, only vocab.json is there; make it with transformers: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    return _read_text(path)


def _open_weights(folder: Path, files: list[TensorFile]) -> dict[str, Tensor]:
    """Opens the folder's safetensors; appends each opened file to `files`, returns the tensors by their own names."""
    if (folder / "model.safetensors").exists():
        files.append(TensorFile(folder / "model.safetensors"))
        return files[0].tensors
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _open_shards(folder, index, files)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise UnsupportedError(
            f"{folder}: PyTorch weights (.bin) only; convert them to safetensors with transformers: "
            f"from_pretrained(...).save_pretrained(...)"
        )
    raise ModelFileError(f"{folder}: no model.safetensors and no model.safetensors.index.json; {_complete(folder)}")


def _open_shards(folder: Path, index: Path, files: list[TensorFile]) -> dict[str, Tensor]:
    weight_map = parse_json(_read_text(index), index, "index").get("weight_map")
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
