"""Folders as trainers, converters and other runtimes leave them: opened where that is exact, else named."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_checkpoint

from migician.runtime.errors import MigicianError, ModelFileError, UnsupportedError
from migician.runtime.files.open import open_checkpoint

safetensors = pytest.importorskip("safetensors.numpy")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in f32, which numpy reads; treat it as read-only."""
    return make_checkpoint(tmp_path_factory.mktemp("published") / "model", dtype="float32", tied=False)


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "model")


@pytest.fixture
def bare(folder: Path) -> Path:
    """A folder with everything but weights."""
    (folder / "model.safetensors").unlink()
    return folder


def refused(folder: Path, kind: type[MigicianError], *words: str) -> str:
    with pytest.raises(MigicianError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert message.isprintable() and "; " in message and message.startswith(str(folder))
    for word in words:
        assert word in message, message
    return message


def put(folder: Path, *names: str, content: bytes = b"x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def rename(folder: Path, change: Callable[[str], str]) -> None:
    weights = safetensors.load_file(folder / "model.safetensors")
    safetensors.save_file({change(name): w for name, w in weights.items()}, folder / "model.safetensors")


# Names that wrappers leave

V5 = {"model.": "model.language_model.", "visual.": "model.visual."}


def as_v5(name: str) -> str:
    return next((new + name.removeprefix(old) for old, new in V5.items() if name.startswith(old)), name)


WRAPPED: dict[str, Callable[[str], str]] = {
    "DistributedDataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "PEFT of transformers 5": lambda name: f"base_model.model.{as_v5(name)}",
    "all": lambda name: f"module._orig_mod.base_model.model.{as_v5(name)}",
    "all, the other way": lambda name: f"_orig_mod.module.module.base_model.model.{name}",
    "compiled blocks": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name.replace('layers.1.', 'layers.1._fsdp_wrapped_module.')}",
    "activation checkpoints": lambda name: name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
    "an attribute": lambda name: f"policy.{as_v5(name)}",
    "an attribute of an attribute": lambda name: f"trainer.actor.module.{name}",
}


@pytest.mark.parametrize("name", WRAPPED)
def test_names_that_wrappers_leave(published: Path, folder: Path, name: str) -> None:
    rename(folder, WRAPPED[name])
    with open_checkpoint(published) as plain, open_checkpoint(folder) as model:
        assert list(model.tensors) == list(plain.tensors) and model.unused == ()
        for key, tensor in model.tensors.items():
            assert tensor.name == key and np.array_equal(tensor.data, plain.tensors[key].data)


def test_wrapped_names_in_shards(published: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", dtype="float32", tied=False, shards=3)
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    for shard in folder.glob("model-*.safetensors"):
        safetensors.save_file({f"module.{n}": w for n, w in safetensors.load_file(shard).items()}, shard)
    table["weight_map"] = {f"module.{name}": shard for name, shard in table["weight_map"].items()}
    index.write_text(json.dumps(table))
    with open_checkpoint(published) as plain, open_checkpoint(folder) as model:
        assert all(tensor.equals(plain.tensors[name]) for name, tensor in model.tensors.items())


def test_wrapped_and_plain_together(folder: Path) -> None:
    weights = safetensors.load_file(folder / "model.safetensors")
    safetensors.save_file(
        {**weights, "module.model.norm.weight": weights["model.norm.weight"]}, folder / "model.safetensors"
    )
    refused(folder, ModelFileError, "module.model.norm.weight", "same tensor twice")


def test_wrapped_and_incomplete(folder: Path) -> None:
    weights = safetensors.load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    safetensors.save_file({f"module.{name}": w for name, w in weights.items()}, folder / "model.safetensors")
    refused(folder, ModelFileError, "model.norm.weight", "missing")


# Adapters


@pytest.mark.parametrize(
    "leftover",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_B.default.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
        "model.layers.0.mlp.up_proj.lora_magnitude_vector.default.weight",
    ],
)
def test_an_adapter_that_is_not_merged(folder: Path, leftover: str) -> None:
    weights = safetensors.load_file(folder / "model.safetensors")
    safetensors.save_file({**weights, leftover: np.zeros((4, 4), np.float32)}, folder / "model.safetensors")
    refused(folder, UnsupportedError, leftover, "merge_and_unload")


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("extra", [(), ("global_step5/mp_rank_00_model_states.pt", "checkpoint-5/config.json")])
def test_an_adapter_alone(bare: Path, config: bool, extra: tuple[str, ...]) -> None:
    if not config:
        (bare / "config.json").unlink()
    put(bare, "adapter_model.safetensors", "optimizer.pt", "training_args.bin", *extra)
    settings = {"base_model_name_or_path": "Qwen/Qwen2-VL-7B-Instruct", "peft_type": "LORA"}
    (bare / "adapter_config.json").write_text(json.dumps(settings))
    message = refused(bare, UnsupportedError, "LORA adapter of Qwen/Qwen2-VL-7B-Instruct", "merge_and_unload")
    assert message.count("Qwen/Qwen2-VL-7B-Instruct") == 2


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"base_model_name_or_path": 5}', '{"base_model_name_or_path": "\\n"}']
)
def test_an_adapter_that_names_no_base(bare: Path, text: str) -> None:
    (bare / "adapter_config.json").write_text(text)
    refused(bare, UnsupportedError, "adapter of a base model that it does not name", '"BASE"')


def test_an_adapter_without_its_settings(bare: Path) -> None:
    put(bare, "adapter_model.safetensors")
    refused(bare, UnsupportedError, "adapter of a base model that it does not name")


def test_an_adapter_beside_a_whole_model(folder: Path) -> None:
    put(folder, "adapter_config.json", content=b"{}")
    open_checkpoint(folder).close()  # a merge left the settings behind
    put(folder, "adapter_model.safetensors")
    refused(folder, UnsupportedError, "adapter_model.safetensors", "merge", "remove adapter_config.json")


# DeepSpeed and other trainers


def test_zero_shards(bare: Path) -> None:
    put(
        bare,
        "global_step100/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "global_step100/zero_pp_rank_0_mp_rank_00_model_states.pt",
        "latest",
        "zero_to_fp32.py",
        "trainer_state.json",
    )
    refused(bare, UnsupportedError, f"cd {bare} && python zero_to_fp32.py . . --safe_serialization")
    refused(bare / "global_step100", UnsupportedError, f"cd {bare} && python zero_to_fp32.py . .")
    (bare / "zero_to_fp32.py").unlink()
    refused(bare, UnsupportedError, "python -m deepspeed.utils.zero_to_fp32 . .")
    shutil.rmtree(bare / "global_step100")
    put(bare, "zero_to_fp32.py")
    refused(bare, ModelFileError, "none of the DeepSpeed ZeRO shards")


def test_shards_beside_a_whole_model_do_no_harm(folder: Path) -> None:
    put(folder, "global_step100/zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_to_fp32.py", "model.gguf", "x.onnx")
    open_checkpoint(folder).close()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("tied", [True, False])
def test_empty_tensors(folder: Path, name: str, tied: bool) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    weights = safetensors.load_file(folder / "model.safetensors")
    weights[name] = np.zeros(0, np.float32)
    safetensors.save_file(weights, folder / "model.safetensors")
    refused(folder, ModelFileError, name, "[0]", "ZeRO-3", "zero_to_fp32.py")


def test_fsdp_shards(bare: Path) -> None:
    put(bare, "pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata", "trainer_state.json")
    refused(bare, UnsupportedError, f"accelerate merge-weights {bare / 'pytorch_model_fsdp_0'} {bare}")


def test_checkpoints_alone(tmp_path: Path) -> None:
    for step in (500, 1500, 90):
        put(tmp_path, f"checkpoint-{step}/config.json")
    put(tmp_path, "checkpoint-x/config.json", "runs/events", "trainer_state.json", "training_args.bin")
    refused(tmp_path, ModelFileError, "3 checkpoints", f"give the newest: {tmp_path / 'checkpoint-1500'}")


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state_0.pth", "training_args.bin"]
)
def test_a_trainers_state_alone(bare: Path, name: str) -> None:
    put(bare, name)
    refused(bare, ModelFileError, name, "without weights")


def test_a_model_one_level_down(folder: Path) -> None:
    refused(folder.parent, ModelFileError, str(folder))


def test_the_hubs_folder_of_a_model(tmp_path: Path) -> None:
    put(tmp_path, "models--Qwen--Qwen2-VL-2B/snapshots/abc/config.json", "models--Qwen--Qwen2-VL-2B/refs/main")
    refused(tmp_path / "models--Qwen--Qwen2-VL-2B", ModelFileError, "Qwen/Qwen2-VL-2B")


# Other runtimes


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("qwen2-vl-q4_k_m.gguf", "mmproj-f16.gguf"), ("GGUF", "llama-mtmd-cli")),
        (("openvino_language_model.xml", "openvino_language_model.bin"), ("OpenVINO", "optimum-intel")),
        (("openvino/openvino_model.bin", "openvino/openvino_model.xml"), ("OpenVINO",)),
        (("onnx/decoder_model_merged_q4.onnx", "onnx/vision_encoder.onnx"), ("ONNX", "onnxruntime")),
        (("model.onnx", "model.onnx_data"), ("ONNX",)),
        (("llm.mnn", "llm.mnn.weight", "visual.mnn", "llm_config.json"), ("MNN", "llm_demo")),
        (("weights.00.npz",), ("MLX",)),
        (("rank0.engine", "visual.engine"), ("TensorRT",)),
        (("model.rkllm",), ("RKLLM",)),
        (("flax_model.msgpack",), ("Flax",)),
    ],
)
def test_other_runtimes(bare: Path, names: tuple[str, ...], words: tuple[str, ...], config: bool) -> None:
    if not config:
        (bare / "config.json").unlink()
    put(bare, *names)
    refused(bare, UnsupportedError, *words, "Hugging Face checkpoint")


def test_mnn_has_a_config_of_its_own(tmp_path: Path) -> None:
    put(tmp_path, "llm.mnn", "config.json", content=b'{"llm_model": "llm.mnn"}')
    refused(tmp_path, UnsupportedError, "MNN")


def test_mlx(folder: Path) -> None:
    weights = safetensors.load_file(folder / "model.safetensors")
    safetensors.save_file(weights, folder / "model.safetensors", {"format": "mlx"})
    refused(folder, UnsupportedError, "MLX", "mlx_vlm.generate")
    safetensors.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    open_checkpoint(folder).close()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": {"group_size": 64, "bits": 4}}))
    refused(folder, UnsupportedError, "MLX")


# Weights under other names


@pytest.mark.slow
def test_pytorch_weights_convert_as_it_says(folder: Path, published: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    weights = safetensors.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(w) for name, w in weights.items()}, folder / "pytorch_model.bin")
    put(folder, "training_args.bin")
    message = refused(folder, UnsupportedError, "pytorch_model.bin", "python -c")
    command = message[message.index("python -c") :].replace("python", sys.executable, 1)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    with open_checkpoint(published) as plain, open_checkpoint(folder) as model:
        assert all(tensor.equals(plain.tensors[name]) for name, tensor in model.tensors.items())


@pytest.mark.parametrize("name", ["consolidated.00.pth", "epoch3.pt", "last.ckpt"])
def test_a_trainers_own_pytorch_format(bare: Path, name: str) -> None:
    put(bare, name, "optimizer.pt")
    refused(bare, UnsupportedError, name, "save_pretrained")


def test_safetensors_under_another_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    refused(folder, ModelFileError, "model.fp16.safetensors", "rename")


def test_shards_without_an_index(bare: Path) -> None:
    put(bare, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    refused(bare, ModelFileError, "model.safetensors.index.json")


def test_nothing_at_all(bare: Path, tmp_path: Path) -> None:
    refused(bare, ModelFileError, "no model.safetensors")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", ModelFileError, "no config.json")
