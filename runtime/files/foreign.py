"""Says what a folder is that holds no weights this runtime reads, and what to run to get there.

Trainers, converters and other runtimes leave folders that look like a model's. Each kind is told by its files' names.
"""

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from ..errors import MigicianError, ModelFileError, UnsupportedError
from .tensors import shown

__all__ = ["adapter_beside", "explain", "has_weights", "mlx", "unmerged"]

_MODEL = "from transformers import Qwen2VLForConditionalGeneration as M; "
_ORIGINAL = "give the Hugging Face checkpoint that it was made from"
# files of other runtimes: what they are, how to go on
_RUNTIMES = (
    (r".*\.gguf", "GGUF weights of llama.cpp", f"run them with llama-mtmd-cli, or {_ORIGINAL}"),
    (r"openvino_.*\.(xml|bin)", "an OpenVINO model", f"run it with optimum-intel, or {_ORIGINAL}"),
    (r".*\.mnn(\.weight)?", "an MNN model", f"run it with MNN's llm_demo, or {_ORIGINAL}"),
    (r"(weights.*|model)\.npz", "MLX weights", f"run them with mlx-vlm, or {_ORIGINAL}"),
    (r".*\.(engine|plan)", "a TensorRT engine", f"run it with the TensorRT that built it, or {_ORIGINAL}"),
    (r".*\.rkllm", "an RKLLM model", f"run it with rknn-llm, or {_ORIGINAL}"),
    (r".*\.pte", "an ExecuTorch program", f"run it with executorch, or {_ORIGINAL}"),
    (r".*\.(tflite|task|litertlm)", "a LiteRT model", f"run it with LiteRT, or {_ORIGINAL}"),
    (r".*\.(mlpackage|mlmodelc|mlmodel)", "a Core ML model", f"run it with coremltools, or {_ORIGINAL}"),
    (r".*\.onnx(_data)?", "an ONNX model", f"run it with onnxruntime, or {_ORIGINAL}"),
    (r"flax_model.*\.msgpack", "Flax weights", f"convert them with transformers 4 (from_flax=True), or {_ORIGINAL}"),
    (r"tf_model.*\.h5", "TensorFlow weights", f"convert them with transformers 4 (from_tf=True), or {_ORIGINAL}"),
)
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_ADAPTER_PARTS = frozenset(
    ("base_layer", "modules_to_save", "original_module", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B",
     "lora_magnitude_vector")
)  # fmt: skip
_TRAINER_STATE = (
    r"optimizer.*\.(pt|bin|safetensors)|scheduler\.(pt|bin)|trainer_state\.json|rng_state.*|training_args\.bin"
)


def has_weights(folder: Path) -> bool:
    """True where weights lie under the names that Hugging Face folders give them."""
    return any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))


def explain(folder: Path) -> MigicianError | None:
    """Names what a folder without weights is, with what to run; None where nothing known lies there.

    Raises OSError where the folder cannot be listed.
    """
    names = sorted(path.name for path in folder.iterdir())
    for look in _LOOKS:
        if said := look(folder, names):
            return said
    return None


def _python(code: str) -> str:
    return f"python -c {shlex.quote(code)}"


def _matches(names: list[str], pattern: str) -> list[str]:
    return [name for name in names if re.fullmatch(pattern, name)]


def _adapter(folder: Path, names: list[str]) -> MigicianError | None:
    if not {"adapter_config.json", *_ADAPTERS} & set(names):
        return None
    try:
        settings = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        base, kind = settings.get("base_model_name_or_path"), settings.get("peft_type") or "LoRA"
    except (OSError, ValueError, AttributeError, RecursionError):
        base, kind = None, "LoRA"
    known = isinstance(base, str) and base.isprintable() and 0 < len(base) < 200
    model = json.dumps(base if known else "BASE", ensure_ascii=False)
    place = json.dumps(str(folder), ensure_ascii=False)
    merge = (
        f"{_MODEL}from peft import PeftModel as P; "
        f'P.from_pretrained(M.from_pretrained({model}, dtype="auto"), {place}).merge_and_unload()'
        f'.save_pretrained("merged")'
    )
    of = base if known else "a base model that it does not name"
    return UnsupportedError(
        f"{folder}: a {shown(kind)} adapter of {of}, no model; merge it: {_python(merge)} "
        f"and copy the base model's other files to merged"
    )


def adapter_beside(folder: Path) -> UnsupportedError | None:
    """The refusal of a whole model with an adapter beside it, which may be merged into it or not; None for others."""
    weights = next((name for name in _ADAPTERS if (folder / name).exists()), None)
    if weights is None or not (folder / "adapter_config.json").exists():
        return None
    return UnsupportedError(
        f"{folder}: a whole model and an adapter ({weights}), which may be merged into it or not; if it is, remove "
        f"adapter_config.json, else merge it: load both with peft, merge_and_unload(), save_pretrained()"
    )


def _deepspeed(folder: Path, names: list[str]) -> MigicianError | None:
    steps = [name for name in _matches(names, r"global_step\d+") if (folder / name).is_dir()]
    shards = _matches(names, r".*zero_pp_rank_.*|mp_rank_\d+_model_states\.pt")
    script = "zero_to_fp32.py" in names
    if not (steps or shards or script):
        return None
    home = folder.parent if shards and not (steps or script) else folder
    run = "zero_to_fp32.py" if (home / "zero_to_fp32.py").exists() else "-m deepspeed.utils.zero_to_fp32"
    where = f"cd {shlex.quote(str(home))} && "
    if not steps and not shards:
        return ModelFileError(
            f"{folder}: zero_to_fp32.py and none of the DeepSpeed ZeRO shards that it puts together (global_step*); "
            f"copy the whole checkpoint, then {where}python {run} . . --safe_serialization"
        )
    return UnsupportedError(
        f"{folder}: shards of DeepSpeed ZeRO, not put together yet; run: {where}python {run} . . --safe_serialization"
    )


def _sharded_states(folder: Path, names: list[str]) -> MigicianError | None:
    parts = [name for name in names if re.match(r"pytorch_model_fsdp|distributed_checkpoint|.*\.distcp", name)]
    if not parts and not any((folder / name / ".metadata").is_file() for name in names):
        return None
    inner = next((folder / name for name in names if (folder / name / ".metadata").is_file()), folder)
    merge = f"accelerate merge-weights {shlex.quote(str(inner))} {shlex.quote(str(folder))}"
    return UnsupportedError(f"{folder}: the shards of a distributed checkpoint (FSDP); put them together: {merge}")


def _runtimes(folder: Path, names: list[str]) -> MigicianError | None:
    inner = [
        path.name for name in ("onnx", "openvino") if (folder / name).is_dir() for path in (folder / name).iterdir()
    ]
    for pattern, what, then in _RUNTIMES:
        if found := _matches(names, pattern) or _matches(sorted(inner), pattern):
            return UnsupportedError(f"{folder}: {what} ({shown(found[0])}), which is not read here; {then}")
    return None


def _pytorch(folder: Path, names: list[str]) -> MigicianError | None:
    if found := _matches(names, r"pytorch_model.*\.bin"):
        place = json.dumps(str(folder), ensure_ascii=False)
        convert = f'{_MODEL}M.from_pretrained({place}, dtype="auto").save_pretrained({place})'
        return UnsupportedError(
            f"{folder}: PyTorch weights ({shown(found[0])}), pickles that may hold code, which are not read here; "
            f"convert them to safetensors: {_python(convert)}"
        )
    others = [name for name in _matches(names, r".*\.(pt|pth|ckpt)") if not re.fullmatch(_TRAINER_STATE, name)]
    if others:
        return UnsupportedError(
            f"{folder}: PyTorch weights ({shown(others[0])}) of a trainer's own format; load them into "
            f"Qwen2VLForConditionalGeneration (load_state_dict), then save_pretrained() to a folder and give that"
        )
    return None


def _safetensors(folder: Path, names: list[str]) -> MigicianError | None:
    found = [name for name in _matches(names, r".*\.safetensors") if not re.fullmatch(_TRAINER_STATE, name)]
    if not found:
        return None
    if _matches(found, r".*-\d+-of-\d+\.safetensors"):
        return ModelFileError(
            f"{folder}: shards ({shown(found[0])}, ...) and no model.safetensors.index.json, which says what is where; "
            f"copy it from where the shards came from"
        )
    return ModelFileError(
        f"{folder}: no model.safetensors; if {shown(found[0])} is the whole model, rename it to model.safetensors"
    )


def _checkpoints(folder: Path, names: list[str]) -> MigicianError | None:
    found = [name for name in _matches(names, r"checkpoint-\d{1,18}") if (folder / name).is_dir()]
    if not found:
        return None
    newest = max(found, key=lambda name: int(name.removeprefix("checkpoint-")))
    return ModelFileError(
        f"{folder}: a trainer's output with {len(found)} checkpoint{'s' if len(found) > 1 else ''} and no model at its "
        f"top; give the newest: {folder / newest}"
    )


def _state(folder: Path, names: list[str]) -> MigicianError | None:
    found = _matches(names, _TRAINER_STATE)
    if not found:
        return None
    return ModelFileError(
        f"{folder}: a trainer's state ({shown(found[0])}) without weights; give the folder that the trainer saved the "
        f"model to, the one with model.safetensors"
    )


def _inside(folder: Path, names: list[str]) -> MigicianError | None:
    """A model one level down, or the three levels of the hub's cache."""
    if "snapshots" in names and folder.name.startswith("models--"):
        model = folder.name.removeprefix("models--").replace("--", "/")
        return ModelFileError(f"{folder}: the hub's cache of a model; give its name: {model}")
    if "config.json" in names:
        return None
    inner = [
        folder / name for name in names if (folder / name / "config.json").is_file() and has_weights(folder / name)
    ]
    if not inner:
        return None
    more = f", one of {len(inner)} models there" if len(inner) > 1 else ""
    return ModelFileError(f"{folder}: no config.json, but {shown(str(inner[0]))} has one; give that{more}")


def mlx(folder: Path) -> UnsupportedError:
    """The refusal of weights in MLX's own layout."""
    run = f"python -m mlx_vlm.generate --model {shlex.quote(str(folder))}"
    return UnsupportedError(
        f"{folder}: MLX weights, which are not read here; run them with mlx-vlm ({run}), or {_ORIGINAL}"
    )


def unmerged(names: Iterable[str], where: Path) -> UnsupportedError | None:
    """The refusal of weights in which an adapter still lies beside the layers that it changes; None for all others."""
    found = [name for name in names if not _ADAPTER_PARTS.isdisjoint(name.split("."))]
    if not found:
        return None
    return UnsupportedError(
        f"{where}: {len(found)} tensors of an adapter that is not merged ({shown(found[0])}, ...); in the trainer call "
        f"model = model.merge_and_unload(), then model.save_pretrained() to a new folder and give that"
    )


_LOOKS = (
    _adapter, _deepspeed, _sharded_states, _runtimes, _pytorch, _safetensors, _checkpoints, _state, _inside,
)  # fmt: skip
