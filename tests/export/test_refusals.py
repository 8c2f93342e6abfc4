"""What an export refuses before it begins, and while it reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

pytestmark = pytest.mark.slow


def run(*words: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "migician.export.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def refused(done: "subprocess.CompletedProcess[str]", *parts: str, status: int = 1) -> str:
    """Checks for one line with these parts and nothing on stdout; returns the line."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == status and done.stdout == "", (done.returncode, done.stderr)
    assert status == 2 or len(lines) == 1, done.stderr
    for part in parts:
        assert part in lines[-1], lines[-1]
    return lines[-1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def left(folder: Path) -> list[str]:
    """What lies beside the model."""
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


@pytest.mark.parametrize("mode", ["--bf16", "--int8"])
def test_a_tokenizer_without_the_templates_tokens(folder: Path, mode: str) -> None:
    table = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    table["added_tokens"] = table["added_tokens"][:3]
    (folder / "tokenizer.json").write_text(json.dumps(table), "utf-8")
    (folder / "tokenizer_config.json").unlink()
    done = run(folder, mode, "--calib", "none", "-o", folder.parent / "out.mig")
    refused(done, "<|vision_start|>", str(folder))
    assert left(folder) == []


def test_what_there_is_to_know_of_the_source_is_said(folder: Path) -> None:
    table = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    tokens, table["added_tokens"] = table["added_tokens"], table["added_tokens"][:3]
    (folder / "tokenizer.json").write_text(json.dumps(table), "utf-8")
    others = {str(token.pop("id")): token for token in tokens[3:]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": others}), "utf-8")
    done = run(folder, "--bf16", "-o", folder.parent / "out.mig")
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1 and "fits config.json" in done.stderr


# Weights that are no numbers

NAMES = (
    "visual.patch_embed.proj.weight",
    "visual.blocks.1.norm2.bias",
    "visual.merger.mlp.2.bias",
    "model.embed_tokens.weight",
    "model.layers.1.self_attn.k_proj.bias",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
)


@pytest.mark.parametrize("mode", [("--bf16",), ("--int8", "--no-rotate"), ("--int4",)])
@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_no_numbers(tmp_path: Path, name: str, mode: tuple[str, ...]) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    folder = make_checkpoint(tmp_path / "model", tied=False, shards=1)
    weights = safetensors.load_file(folder / "model.safetensors")
    kinds = {"--bf16": (torch.float32, "nan"), "--int8": (torch.float16, "-inf"), "--int4": (torch.bfloat16, "inf")}
    dtype, value = kinds[mode[0]]
    weights[name] = weights[name].to(dtype)
    weights[name].view(-1)[-1] = float(value)
    last = [size - 1 for size in weights[name].shape]
    safetensors.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    words = [*mode, "--calib", "none", "-o", str(tmp_path / "out.mig"), "--report", str(tmp_path / "r.html")]
    refuse_here(folder, words, f"tensor {name} holds {value} at {last}", str(folder))
    assert left(folder) == []


def refuse_here(folder: Path, words: list[str], *parts: str) -> None:
    """As run() and refused(), without the cost of a process for each."""
    from click.testing import CliRunner

    from migician.export.cli import command
    from migician.runtime.errors import ModelFileError

    result = CliRunner().invoke(command, [str(folder), *words], standalone_mode=False)
    assert isinstance(result.exception, ModelFileError) and result.stdout == "", result
    for part in parts:
        assert part in str(result.exception), str(result.exception)


def test_a_number_too_large_for_f32(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    weights = {name: w.double() for name, w in safetensors.load_file(folder / "model.safetensors").items()}
    weights["model.norm.weight"][3] = torch.tensor(1e300)
    safetensors.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    done = run(folder, "--bf16", "-o", folder.parent / "out.mig")
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and "model.norm.weight holds inf at [3]" in lines[-1] and left(folder) == []


# Where an export shall go


def place(folder: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    return run(folder, "--calib", "none", *words)


def test_two_modes_at_once(folder: Path) -> None:
    for modes in (("--int4", "--int8"), ("--int8", "--int4"), ("--bf16", "--int8"), ("--int4", "--int8", "--bf16")):
        done = place(folder, *modes, "-o", folder.parent / "out.mig")
        refused(done, *modes, "together", status=2)
    refused(place(folder, "-o", folder.parent / "out.mig"), "--int4", status=2)
    done = place(folder, "--bf16", "--bf16", "-o", folder.parent / "out.mig")
    assert done.returncode == 0 and left(folder) == ["out.mig"]


@pytest.mark.parametrize("mode", ["--bf16", "--int8"])
def test_a_folder_where_a_file_is_written(folder: Path, mode: str) -> None:
    there = folder.parent / "there"
    there.mkdir()
    for out in (there, f"{there}/", f"{folder.parent}/new/", "/", ".", ".."):
        refused(place(folder, mode, "-o", out), "is a folder", "model.mig", status=2)
    assert left(folder) == ["there"] and not any(there.iterdir())


@pytest.mark.parametrize("mode", ["--bf16", "--int8"])
def test_a_parent_that_is_not_there_or_no_folder(folder: Path, mode: str) -> None:
    refused(place(folder, mode, "-o", folder.parent / "no" / "x.mig"), "no folder", "create it")
    refused(place(folder, mode, "-o", folder / "config.json" / "x.mig"), "no folder")
    refused(place(folder, mode, "-o", folder.parent / "x.mig", "--report", folder.parent / "no" / "r.html"), "--report")
    assert left(folder) == []


def test_a_parent_that_cannot_be_written(folder: Path) -> None:
    refused(place(folder, "--bf16", "-o", "/proc/x.mig"), "/proc", "choose another place")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["--bf16", "--int8"])
def test_the_source_itself(folder: Path, mode: str) -> None:
    mig = folder.parent / "source.mig"
    assert place(folder, "--bf16", "-o", mig).returncode == 0
    (folder.parent / "link.mig").symlink_to(mig)
    before = mig.read_bytes()
    for source, out in ((mig, mig), (mig, folder.parent / "link.mig"), (folder, folder / "model.safetensors")):
        refused(place(source, mode, "-o", out), "the source itself")
    assert mig.read_bytes() == before and left(folder) == ["link.mig", "source.mig"]


def test_a_gptq_folder_that_is_taken(folder: Path) -> None:
    taken = folder.parent / "taken"
    taken.mkdir()
    (taken / "x").touch()
    refused(place(folder, "--int8", "--format", "gptq", "-o", taken), "not empty")
    refused(place(folder, "--int8", "--format", "gptq", "-o", folder), "not empty")
    refused(place(folder, "--int8", "--format", "gptq", "-o", taken / "x"), "in the way")
    taken.rename(folder.parent / "out-gptq")
    refused(
        place(folder, "--int8", "--format", "gptq", "--format", "mig", "-o", folder.parent / "out.mig"), "not empty"
    )
    assert left(folder) == ["out-gptq"]


def test_report_and_file_in_one_place(folder: Path) -> None:
    out = folder.parent / "out.mig"
    refused(place(folder, "--int8", "-o", out, "--report", out), "--report", status=2)
