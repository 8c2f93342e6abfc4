"""migician-export from end to end: the files it writes, killed and resumed runs, the gate, full disks."""

import hashlib
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_checkpoint
from click.testing import CliRunner
from hostile import make_hostile
from quantized import dequantize

torch = pytest.importorskip("torch")

from migician.calib.store import nano_samples, write_calibration  # noqa: E402
from migician.export import pipeline  # noqa: E402
from migician.export.cli import command  # noqa: E402
from migician.export.exporter import Options, Rejected, export  # noqa: E402
from migician.export.folder import WorkFolder  # noqa: E402
from migician.export.grid import dequantize_activations  # noqa: E402
from migician.export.inputs import Inputs  # noqa: E402
from migician.runtime.errors import MigicianError, ModelFileError, UnsupportedError  # noqa: E402
from migician.runtime.files.open import open_checkpoint  # noqa: E402
from migician.runtime.model import load  # noqa: E402

SMALL = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "inter": 96, "v_dim": 32, "v_depth": 2, "v_heads": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("small") / "model", **SMALL)


@pytest.fixture(scope="module")
def calib(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calib") / "set"
    write_calibration(folder, nano_samples(6, 3), source="nano", licence="MIT", seed=3)
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def options(model, out: Path, **changes) -> Options:
    usual = {"model": str(model), "mode": "int4", "out": out, "samples": 4, "held_out": 0, "threads": 2}
    return Options(**usual | changes)


@pytest.mark.parametrize("mode", ["int4", "int8"])
@pytest.mark.parametrize("calibrated", ["nano", "none"])
def test_what_is_written_opens_and_answers(mode: str, calibrated: str, small: Path, picture: Path, tmp_path) -> None:
    out = tmp_path / "m.mig"
    assert export(options(small, out, mode=mode, calib=calibrated)) == [out]
    assert list(tmp_path.iterdir()) == [out]
    with open_checkpoint(out) as made:
        kinds = set(made.quantization.layers.values())
        assert kinds == {mode, "int8", "bf16"} and made.quantization.rotated and not made.config.text.tied
        assert made.quantization.layers["visual.patch_embed.proj"] == "bf16"
        assert bool(made.raw["calibration"]) == (calibrated == "nano")
        report = json.loads(made.metadata["report"])
    errors = {layer["name"]: layer for layer in report["layers"]}
    assert len(errors) == len(report["layers"]) == 1 + 2 * 4 + 2 + 1 + 2 * 7 + 1
    if calibrated == "nano":
        fitted = [layer for layer in report["layers"] if layer["output_error"] is not None]
        assert np.mean([layer["output_error"] / layer["rtn_output_error"] for layer in fitted]) < 0.8
    with load(small, precision="fp32") as before, load(out) as after:
        question = "the thing in both pictures"
        want = before.logprobs([picture, picture], question, "yes it is")
        got = after.logprobs([picture, picture], question, "yes it is")
    assert np.abs(want - got).mean() < (1.5 if mode == "int4" else 0.15)


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(small: Path, calib: Path, tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export(options(small, tmp_path / name / "m.mig", calib=str(calib)))
    assert sha256(tmp_path / "a" / "m.mig") == sha256(tmp_path / "b" / "m.mig")
    export(options(small, tmp_path / "c.mig", calib=str(calib), seed=1, samples=3))
    assert sha256(tmp_path / "c.mig") != sha256(tmp_path / "a" / "m.mig")


def test_the_engine_computes_what_the_exporter_simulated(small: Path, tmp_path, monkeypatch) -> None:
    """The last activations of the simulation, through the head, are the engine's log-probabilities."""
    kept = {}
    keep = WorkFolder.keep
    monkeypatch.setattr(WorkFolder, "keep", lambda self, n, t, r, x: (kept.update({n: x}), keep(self, n, t, r, x))[1])
    samples = nano_samples(3, 0)
    out = tmp_path / "m.mig"
    export(options(small, out, samples=3))
    with open_checkpoint(small) as source:
        inputs = Inputs(source, samples, seed=0, max_side=512)
        eps = source.config.text.rms_eps
    x = kept[max(n for n in kept if kept[n] is not None)]
    with open_checkpoint(out) as made:
        head = torch.from_numpy(dequantize(made)["lm_head.weight"].copy())
    rows = inputs.language_rows(x)
    hidden = torch.nn.functional.rms_norm(x, (x.shape[1],), eps=eps)
    scores = (dequantize_activations(hidden) @ head.T).log_softmax(-1)
    with load(out) as model:
        for sample, (_, stop) in zip(samples, rows.spans, strict=True):
            (question, answer), = sample.turns
            got = model.logprobs(sample.images, question, answer)
            ids = inputs._ids[stop - len(got) - 1 : stop - 1]
            want = scores[range(stop - len(got) - 2, stop - 2), ids].numpy()
            assert np.abs(got - want).mean() < 0.05  # int4 itself moves them by ten times as much


KILLED = """
import os, signal, sys
from migician.export.cli import main
count, replace = int(sys.argv[1]), os.replace
def dying(source, target):
    global count
    count -= 1
    if count == 0:
        os.truncate(source, os.path.getsize(source) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = dying
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_killed_runs_go_on_and_give_the_same_bytes(small: Path, calib: Path, tmp_path) -> None:
    straight, torn = tmp_path / "straight.mig", tmp_path / "torn.mig"
    words = [str(small), "--int4", "--calib", str(calib), "--samples", "4", "--held-out", "0", "--threads", "2", "-o"]
    done = CliRunner().invoke(command, [*words, str(straight)])
    assert done.exit_code == 0 and done.stdout == f"{straight}\n"
    resume: list[str] = []
    for writes in (1, 6, 5, 3):  # of the plan, then of units and activations
        run = subprocess.run(
            [sys.executable, "-c", KILLED, str(writes), *words, str(torn), *resume], capture_output=True, check=False
        )
        assert run.returncode == -signal.SIGKILL and not torn.exists()
        assert len(list((tmp_path / "torn.mig.partial").glob(".*.tmp"))) == 1  # those of earlier runs are swept
        resume = ["--resume"]
    refused = CliRunner().invoke(command, [*words, str(torn)])
    assert "--resume" in str(refused.exception)
    other = CliRunner().invoke(command, [*words, str(torn), "--resume", "--seed", "9"])
    assert "other options" in str(other.exception)
    assert CliRunner().invoke(command, [*words, str(torn), "--resume"]).exit_code == 0
    assert sha256(torn) == sha256(straight)
    assert sorted(tmp_path.iterdir()) == [straight, torn]


def test_interrupting_keeps_what_is_done(small: Path, tmp_path) -> None:
    code = """
import signal, sys
from migician.export import pipeline
from migician.export.cli import main
layer = pipeline.run_layer
def interrupted(*args):
    signal.raise_signal(signal.SIGINT)
    return layer(*args)
pipeline.run_layer = interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
main(sys.argv[1:])
"""
    out = tmp_path / "m.mig"
    words = [str(small), "--int8", "--calib", "none", "-o", str(out)]
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert run.returncode == 130 and "--resume" in run.stderr.splitlines()[-1] and not out.exists()
    assert CliRunner().invoke(command, [*words, "--resume"]).exit_code == 0 and out.exists()


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_no_file(small: Path, tmp_path) -> None:
    out = tmp_path / "m.mig"
    words = [str(small), "--int4", "--calib", "none", "-o", str(out), "--resume"]
    for limit in (2_000, 40_000, 150_000):  # the plan, the units, the whole file do not fit
        run = subprocess.run(
            [sys.executable, "-m", "migician.export.cli", *words],
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 1 and not out.exists() and "Traceback" not in run.stderr
        assert "cannot be written" in run.stderr.splitlines()[-1]
    assert CliRunner().invoke(command, words).exit_code == 0
    assert out.exists()


@pytest.mark.slow
def test_the_gate_keeps_a_rejected_file_under_another_name(tmp_path) -> None:
    out, page = tmp_path / "nano.mig", tmp_path / "nano.html"
    with pytest.raises(Rejected, match="fell by"):
        export(options("nano", out, calib="none", held_out=1, max_iou_drop=-1.0, report=page))
    assert not out.exists() and (tmp_path / "nano.mig.rejected").exists() and page.exists()
    assert export(options("nano", out, calib="none", held_out=1, max_iou_drop=1.0, resume=True)) == [out]


@pytest.mark.slow
def test_outlier_channels_cost_nothing_after_rotation_and_much_without(tmp_path) -> None:
    """The hostile nano answers as nano does; int8 activations survive its outliers only when they are rotated away."""
    hostile = make_hostile("nano", tmp_path / "hostile.mig")
    samples = nano_samples(6, 11)

    def logprobs(path) -> np.ndarray:
        precision = "fp32" if path in ("nano", hostile) else "auto"
        with load(path, precision=precision) as model:
            return np.concatenate([model.logprobs(s.images, *s.turns[0]) for s in samples])

    want = logprobs("nano")
    assert np.abs(logprobs(hostile) - want).max() < 2e-3
    error = {}
    for rotate in (True, False):
        for source in ("nano", hostile):
            out = tmp_path / f"{rotate}.mig"
            export(options(source, out, mode="int8", calib="none", rotate=rotate))
            error[rotate, source] = float(np.abs(logprobs(out) - want).mean())
    assert error[True, hostile] < 1.5 * error[True, "nano"] + 1e-3
    assert error[False, hostile] > 4 * error[True, hostile]


def test_bf16_is_the_model_in_one_file(small: Path, tmp_path) -> None:
    export(options(small, tmp_path / "m.mig", mode="bf16"))
    with open_checkpoint(tmp_path / "m.mig") as made, open_checkpoint(small) as source:
        assert made.quantization is None
        assert all(np.array_equal(made.tensors[name].data, t.data) for name, t in source.tensors.items())


def test_policy_names_what_stays_and_what_is_four_bits(small: Path) -> None:
    with open_checkpoint(small) as model:
        policy = pipeline.make_policy(model.config, "int4", head_int4=True, keep=("visual.merger.mlp.2",))
        assert policy.layers["lm_head"] == "int4" and policy.layers["visual.merger.mlp.2"] == "bf16"
        assert policy.layers["model.embed_tokens"] == "int8" and policy.layers["visual.blocks.0.attn.qkv"] == "int8"
        flat = pipeline.make_policy(model.config, "int8", rotated=False)
        assert "lm_head" not in flat.layers and set(flat.layers.values()) == {"int8", "bf16"}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "--out"),
        (["-o", "x.mig"], "--int4"),
        (["some/model", "--int4", "-o", "x.mig"], "--calib"),
        (["--int4", "-o", "x.mig", "--format", "gguf"], "gguf"),
    ],
)
def test_usage_errors_say_what_is_missing(words: list[str], text: str) -> None:
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 2 and text in done.output


def test_what_cannot_be_done_is_said(small: Path, tmp_path) -> None:
    with pytest.raises(UnsupportedError, match="onnx"):
        export(options(small, tmp_path / "m.mig", formats=("onnx",)))
    with pytest.raises(MigicianError, match="migician-calib"):
        export(options(small, tmp_path / "m.mig", calib=str(tmp_path / "nothing")))
    with pytest.raises(MigicianError, match="keep"):
        export(options(small, tmp_path / "m.mig", calib="none", keep=("no.such.map",)))
    with pytest.raises(ModelFileError):
        export(options(tmp_path / "no-model", tmp_path / "m.mig"))
    export(options(small, tmp_path / "m.mig", calib="none"))
    with pytest.raises(UnsupportedError, match="quantized already"):
        export(options(tmp_path / "m.mig", tmp_path / "n.mig"))


def test_describe_says_what_a_file_is(small: Path, tmp_path) -> None:
    export(options(small, tmp_path / "m.mig", calib="none"))
    done = CliRunner().invoke(command, ["--describe", str(tmp_path / "m.mig")])
    assert done.exit_code == 0 and "int4" in done.output and "rotated" in done.output
