"""Finds and opens a model: a .mig file, a Hugging Face folder, a hub id in the local cache, or "nano".

Weights stay where they are: every tensor of a Checkpoint is a view of a memory-mapped file. Names are brought to the
published Qwen2-VL layout (transformers 4.45), whichever of these a file uses:

| published           | transformers 5, trainers           | early nested saves               |
|---------------------|------------------------------------|----------------------------------|
| model.layers.0.*    | model.language_model.layers.0.*    | language_model.model.layers.0.*  |
| lm_head.weight      | lm_head.weight                     | language_model.lm_head.weight    |
| visual.*            | model.visual.*                     | visual.*                         |
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import ModelConfig, parse_config, parse_repetition_penalty
from .errors import MigicianError, ModelFileError, UnsupportedError
from .image import Preprocessor
from .quantization import Quantization, stored_tensors
from .tensors import Tensor, TensorFile, parse_json, shown

__all__ = ["NANO_FILE", "Checkpoint", "assemble", "canonical_name", "derive", "find_in_cache", "open_checkpoint"]

NANO_FILE = Path(__file__).with_name("nano.mig")

_MAX_JSON_BYTES = 256 << 20
_AGAIN = "download or export it again"
_FROM_BF16 = "give the unquantized bf16 checkpoint, or export a .mig file from it"
_FOREIGN = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}  # of tools that leave config.json as it was
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_RENAMES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.visual.", "visual."),
)


@dataclass(eq=False)
class Checkpoint:
    """An opened model: geometry, mapped weights and the texts that go with them.

    tensors: exactly those that stored_tensors(config, quantization) lists, in its order, dtype and shape checked.
    raw: the JSON texts `config`, `preprocessor`, `generation` ("{}" where a folder has none); those of a .mig file
    have `quantization` and `calibration` too.
    quantization: None where every weight is BF16 or F32.
    metadata: the other words of a .mig file's header; empty for a folder.
    unused: tensors that the files hold and the model does not want.
    where: the file or folder, for messages.
    """

    name: str
    config: ModelConfig
    tensors: dict[str, Tensor] = field(repr=False)
    tokenizer_json: str = field(repr=False)
    preprocessor: Preprocessor
    repetition_penalty: float
    raw: dict[str, str] = field(repr=False)
    quantization: Quantization | None = field(default=None, repr=False)
    metadata: dict[str, str] = field(default_factory=dict, repr=False)
    unused: tuple[str, ...] = field(default=(), repr=False)
    files: tuple[TensorFile, ...] = field(default=(), repr=False)
    where: str = ""

    def close(self) -> None:
        """Lets go of the mapped files; tensors still held elsewhere stay valid."""
        self.tensors.clear()
        for file in self.files:
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Opens a model by path, hub id or the name "nano"; nothing is downloaded and no weight is read.

    Raises ModelFileError when something is missing or damaged, UnsupportedError when it is sound but not served.
    """
    try:
        return _open(os.fspath(source))
    except (OSError, RuntimeError) as error:  # a folder that may not be entered, a home that does not exist
        raise ModelFileError(
            f"{shown(os.fspath(source))}: cannot be opened ({error}); check the path and its rights"
        ) from None


def _open(word: str) -> Checkpoint:
    from .mig import read_mig  # imports this module

    if word == "nano":
        if not NANO_FILE.is_file():
            raise ModelFileError(f"{NANO_FILE}: the embedded model is not there; reinstall the package")
        return read_mig(NANO_FILE)
    path = Path(word).expanduser()
    if _probe(path, Path.is_dir):
        return _open_folder(path, path.resolve().name)
    if _probe(path, os.path.lexists):
        return read_mig(path)
    if not _HUB_ID.fullmatch(word) or path.suffix in (".mig", ".safetensors"):
        raise ModelFileError(
            f"{shown(word)}: no such model; give a .mig file, a checkpoint folder, a hub id (org/name) or nano"
        )
    folder = find_in_cache(word)
    if folder is None:
        raise ModelFileError(
            f"{word}: no such folder, and not in the Hugging Face cache ({_hub_cache()}); run: hf download {word}"
        )
    return _open_folder(folder, word)


def _probe(path: Path, test: Callable[[Path], bool]) -> bool:
    try:
        return test(path)
    except (OSError, ValueError):  # a name too long, a NUL inside
        return False


def _hub_cache() -> Path:
    """The hub's cache folder by the rules of huggingface_hub."""
    env = os.environ
    if place := env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expandvars(place)).expanduser()
    home = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def find_in_cache(hub_id: str) -> Path | None:
    """Returns the folder of a hub model's main revision in the local cache, or None."""
    root = _hub_cache() / ("models--" + hub_id.replace("/", "--"))
    try:
        commit = (root / "refs" / "main").read_text("ascii").strip()
    except (OSError, ValueError):
        return None
    folder = root / "snapshots" / commit
    return folder if re.fullmatch(r"[0-9A-Za-z_.-]+", commit) and folder.is_dir() else None


def _open_folder(folder: Path, name: str) -> Checkpoint:
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
            raise UnsupportedError(f"{folder / file_name}: weights quantized with {method}; {_FROM_BF16}")
    if (folder / "generation_config.json").exists():
        raw["generation"] = _read_text(folder / "generation_config.json")
    raw["preprocessor"] = _read_preprocessor(folder)
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


def canonical_name(name: str) -> str:
    """Returns a tensor's name in the published layout."""
    for prefix, replacement in _RENAMES:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name


def assemble(
    name: str,
    raw: Mapping[str, str],
    tokenizer_json: str,
    found: Mapping[str, Tensor],
    *,
    files: Iterable[TensorFile] = (),
    metadata: Mapping[str, str] | None = None,
    where: Path,
) -> Checkpoint:
    """Puts the parts of a model together, checking each: settings, geometry, policy, and every tensor against them.

    raw: as in Checkpoint; without `quantization` nothing is quantized.   found: the tensors under any layout's names.
    files: closed with the checkpoint.   where: the file or folder, for messages.
    Raises ModelFileError, UnsupportedError.
    """
    config_dict = parse_json(raw["config"], where, "configuration")
    generation = parse_json(raw["generation"], where, "generation configuration")
    folder = f"{where}/" if where.is_dir() else f"{where}: "
    config = parse_config(
        config_dict, generation, where=f"{folder}config.json", generation_where=f"{folder}generation_config.json"
    )
    preprocessor = _parse_preprocessor(parse_json(raw["preprocessor"], where, "preprocessor configuration"), where)
    for key in ("patch_size", "merge_size", "temporal_patch_size"):
        pictures, encoder = getattr(preprocessor, key), getattr(config.vision, key)
        if pictures != encoder:
            raise ModelFileError(
                f"{where}: {key} is {pictures} in the preprocessor's settings and {encoder} in the vision encoder's; "
                f"restore the files that belong together"
            )
    quantization = Quantization.parse(raw.get("quantization", "none"), config, where=where)
    tensors, unused = _select(config, quantization, found, where)
    return Checkpoint(
        name=name,
        config=config,
        tensors=tensors,
        tokenizer_json=tokenizer_json,
        preprocessor=preprocessor,
        repetition_penalty=parse_repetition_penalty(generation, where=f"{folder}generation_config.json"),
        raw=dict(raw),
        quantization=quantization,
        metadata=dict(metadata or {}),
        unused=unused,
        files=tuple(files),
        where=str(where),
    )


def _parse_preprocessor(settings: dict[str, Any], where: Path) -> Preprocessor:
    try:
        return Preprocessor.from_dict(settings)
    except UnsupportedError as error:
        raise UnsupportedError(f"{where}: {error}") from None
    except (MigicianError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelFileError(
            f"{where}: the preprocessor configuration is damaged ({shown(str(error))}); "
            f"restore the file that belongs to these weights"
        ) from None


def derive(
    source: Checkpoint,
    found: Mapping[str, Tensor],
    *,
    texts: Mapping[str, str],
    files: Iterable[TensorFile] = (),
    where: str | os.PathLike[str],
) -> Checkpoint:
    """Makes a checkpoint of another's words and these tensors, checked as if it had been opened.

    found: tensors by published name, of `files` or of memory; write_mig streams them from where they lie.
    texts: what changes in `raw`: config, quantization, calibration.   where: what they are called in messages.
    `source` must stay open as long as its own tensors are among those found.
    """
    raw = {**source.raw, **texts}
    return assemble(
        source.name, raw, source.tokenizer_json, found, files=files, metadata=source.metadata, where=Path(where)
    )


def _select(
    config: ModelConfig, quantization: Quantization | None, found: Mapping[str, Tensor], where: Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Picks every tensor that geometry and policy want, by published name; the rest are returned as names."""
    named: dict[str, Tensor] = {}
    for own, tensor in found.items():
        published = canonical_name(own)
        if published in named:
            other = shown(named[published].name)
            raise ModelFileError(f"{where}: {shown(own)} and {other} are the same tensor twice; remove one of them")
        named[published] = tensor
    tensors = {}
    for published, (dtypes, shape) in stored_tensors(config, quantization).items():
        if published not in named:
            raise _missing(published, shape, named, quantization, where)
        tensor = named.pop(published)
        _check_tensor(tensor, dtypes, shape, quantization, where)
        tensor = tensor.aligned()
        tensors[published] = Tensor(published, tensor.dtype, tensor.shape, tensor.data)
    return tensors, tuple(sorted(tensor.name for tensor in named.values()))


def _missing(
    name: str, shape: tuple[int, ...], named: Mapping[str, Tensor], quantization: Quantization | None, where: Path
) -> MigicianError:
    fault = f"{where}: tensor {name} {list(shape)} is missing"
    if quantization:
        return ModelFileError(f"{fault}, though config and quantization policy ask for it; export it again")
    if any(own.endswith((".qweight", ".weight_packed")) for own in named):
        return UnsupportedError(f"{where}: weights that another tool quantized; {_FROM_BF16}")
    hint = " or set tie_word_embeddings" if name == "lm_head.weight" else ""
    return ModelFileError(f"{fault}; use the config.json of these weights{hint}")


def _check_tensor(
    tensor: Tensor,
    dtypes: frozenset[str],
    shape: tuple[int, ...],
    quantization: Quantization | None,
    where: Path,
) -> None:
    name = shown(tensor.name)
    if quantization and (tensor.dtype not in dtypes or tensor.shape != shape):
        raise ModelFileError(
            f"{where}: tensor {name} is {tensor.dtype}{list(tensor.shape)}, config and quantization policy ask for "
            f"{' or '.join(sorted(dtypes))}{list(shape)}; export it again"
        )
    if tensor.dtype not in dtypes:
        how = "load it with transformers (dtype=torch.bfloat16) and save_pretrained" if tensor.dtype == "F16" else ""
        how = how or _FROM_BF16
        raise UnsupportedError(f"{where}: tensor {name} is {tensor.dtype}, BF16 and F32 are served; {how}")
    if tensor.shape != shape:
        raise ModelFileError(
            f"{where}: tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}; "
            f"use the config.json of these weights"
        )
