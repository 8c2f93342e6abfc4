"""An opened model: every part of it checked against the others, wherever the parts came from.

Weights stay where they are: every tensor of a Checkpoint is a view of a memory-mapped file. Names are brought to the
published Qwen2-VL layout (transformers 4.45), whichever of these a file uses:

| published           | transformers 5, trainers           | early nested saves               |
|---------------------|------------------------------------|----------------------------------|
| model.layers.0.*    | model.language_model.layers.0.*    | language_model.model.layers.0.*  |
| lm_head.weight      | lm_head.weight                     | language_model.lm_head.weight    |
| visual.*            | model.visual.*                     | visual.*                         |

What wrappers put around a name goes first: module., base_model.model., _orig_mod, and one prefix that all names share.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import MigicianError, ModelFileError, UnsupportedError
from .config import ModelConfig, Preprocessor, parse_config, parse_repetition_penalty, untied
from .foreign import unmerged
from .quantization import EMBEDDING, Quantization, stored_tensors
from .tensors import FLOATS, Tensor, TensorFile, parse_json, shown

__all__ = ["FROM_BF16", "Checkpoint", "assemble", "canonical_name", "derive"]

FROM_BF16 = "give the unquantized bf16 checkpoint, or export a .mig file from it"

_RENAMES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.visual.", "visual."),
)
_PREFIXES = ("module.", "base_model.model.")  # DistributedDataParallel and DeepSpeed, PEFT
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))  # torch.compile, FSDP


@dataclass(eq=False)
class Checkpoint:
    """An opened model: geometry, mapped weights and the texts that go with them.

    tensors: exactly those that stored_tensors(config, quantization) lists, in its order, dtype and shape checked; those
    of a folder may be F16 or F64 too.
    raw: the JSON texts `config`, `preprocessor`, `generation` ("{}" where a folder has none); those of a .mig file
    have `quantization` and `calibration` too. `chat_template`, where it is another than Qwen2-VL's own.
    quantization: None where every weight is a float.
    metadata: the other words of a .mig file's header; empty for a folder.
    unused: tensors that the files hold and the model does not want.
    where: the file or folder, for messages.
    notes: what its user should know of how it was opened, one line each.
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
    notes: tuple[str, ...] = ()

    def close(self) -> None:
        """Lets go of the mapped files; tensors still held elsewhere stay valid."""
        self.tensors.clear()
        for file in self.files:
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def canonical_name(name: str) -> str:
    """Returns a tensor's name in the published layout, without what wrappers of trainers put before and into it."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
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
    notes: tuple[str, ...] = (),
    where: Path,
) -> Checkpoint:
    """Puts the parts of a model together, checking each: settings, geometry, policy, and every tensor against them.

    raw: as in Checkpoint; without `quantization` nothing is quantized.   found: the tensors under any layout's names.
    files: closed with the checkpoint.   notes: as in Checkpoint.   where: the file or folder, for messages.
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
    named = _by_published_name(found, where)
    if raw.get("quantization", "none") == "none" and config.text.tied and _has_own_head(named):
        config = replace(config, text=replace(config.text, tied=False))
        raw = {**raw, "config": untied(config_dict)}
        said = "lm_head.weight differs from the embedding, though config.json ties them"
        notes = (*notes, f"{where}: {said}; it is used as stored, as in transformers 5")
    quantization = Quantization.parse(raw.get("quantization", "none"), config, where=where)
    tensors, unused = _select(config, quantization, named, where, folder="quantization" not in raw)
    notes = (*notes, *_said_of_halves(tensors, where))
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
        notes=notes,
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


def _by_published_name(found: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    if fault := unmerged(found, where):
        raise fault
    names = {own: canonical_name(own) for own in found}
    ends = (f"{EMBEDDING}.weight", "lm_head.weight")
    while names and not any(name in ends for name in names.values()):
        first = next(iter(names.values())).partition(".")[0] + "."
        if not all(name.startswith(first) and name != first for name in names.values()):
            break  # else the whole model was an attribute of something larger, and was saved under its name
        names = {own: canonical_name(name.removeprefix(first)) for own, name in names.items()}
    named: dict[str, Tensor] = {}
    for own, published in names.items():
        if published in named:
            other = shown(named[published].name)
            raise ModelFileError(f"{where}: {shown(own)} and {other} are the same tensor twice; remove one of them")
        named[published] = found[own]
    return named


def _has_own_head(named: dict[str, Tensor]) -> bool:
    """True where a tied model's files hold an output head that is not its embedding; a head alone becomes both."""
    embedding, head = named.get(f"{EMBEDDING}.weight"), named.get("lm_head.weight")
    if head is None:
        return False
    if embedding is None:
        named[f"{EMBEDDING}.weight"] = named.pop("lm_head.weight")
        return False
    return not head.equals(embedding)


def _said_of_halves(tensors: Mapping[str, Tensor], where: Path) -> tuple[str, ...]:
    """What weights that the core cannot read in place cost."""
    if not (found := sorted({tensor.dtype for tensor in tensors.values()} & FLOATS - {"BF16", "F32"})):
        return ()
    most = sum(4 * math.prod(tensor.shape) for tensor in tensors.values() if tensor.dtype in found) / 1e9
    return (
        f"{where}: {' and '.join(found)} weights become bf16 in memory where that holds a tensor exactly, else f32: "
        f"up to {most:.1f} GB; migician-export makes a smaller file",
    )


def _select(
    config: ModelConfig, quantization: Quantization | None, named: dict[str, Tensor], where: Path, *, folder: bool
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Picks every tensor that geometry and policy want, by published name; the rest are returned as names."""
    tensors = {}
    for published, (dtypes, shape) in stored_tensors(config, quantization).items():
        if published not in named:
            raise _missing(published, shape, named, quantization, where)
        tensor = named.pop(published)
        _check_tensor(tensor, FLOATS if folder else dtypes, shape, quantization, where)
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
        return UnsupportedError(f"{where}: weights that another tool quantized; {FROM_BF16}")
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
        served = ", ".join(sorted(dtypes))
        raise UnsupportedError(f"{where}: tensor {name} is {tensor.dtype}, {served} are served; {FROM_BF16}")
    if 0 in tensor.shape:
        raise ModelFileError(
            f"{where}: tensor {name} is empty ({list(tensor.shape)}): saved under DeepSpeed ZeRO-3 without gathering; "
            f"put the checkpoint's shards together with its zero_to_fp32.py, or save again with "
            f"stage3_gather_16bit_weights_on_model_save"
        )
    if tensor.shape != shape:
        raise ModelFileError(
            f"{where}: tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}; "
            f"use the config.json of these weights"
        )
