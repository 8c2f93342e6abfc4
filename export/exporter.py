"""An export from end to end: calibration, quantizing, the file, its accuracy, the gate, the report, other formats."""

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..calib.scenes.evaluate import evaluate
from ..calib.store import Calibration, Sample, nano_calibration, open_calibration
from ..runtime.errors import MigicianError, UnsupportedError
from ..runtime.files.checkpoint import Checkpoint
from ..runtime.files.describe import PARTS, describe
from ..runtime.files.mig import write_mig
from ..runtime.files.open import open_checkpoint

__all__ = ["Options", "Rejected", "export"]

Show = Callable[[float, float, str], None]  # done, in all, what is under way


class Rejected(MigicianError):
    """The gate: the quantized model lost more accuracy than was allowed."""


@dataclass(frozen=True)
class Options:
    """What to make of which model.

    mode: int4, int8 or bf16.   out: the .mig file, or the folder where gptq is the only format.
    calib: "nano", "none" or a calibration folder.   max_side: px of calibration pictures.
    keep: maps that stay bf16 beside the sensitive ones.   held_out: questions per task; 0 asks none.
    max_iou_drop: the gate.   report: an HTML file.
    """

    model: str
    mode: str
    out: Path
    calib: str = "nano"
    samples: int = 128
    seed: int = 0
    formats: tuple[str, ...] = ("mig",)
    resume: bool = False
    rotate: bool = True
    head_int4: bool = False
    keep: tuple[str, ...] = ()
    max_side: int = 512
    held_out: int = 20
    max_iou_drop: float | None = None
    report: Path | None = None
    threads: int = 0


def export(options: Options, show: Show = lambda done, total, what: None) -> list[Path]:
    """Exports a model; returns what was written.

    Can be killed at any point; with `resume` the next run goes on and writes the same bytes.
    Raises Rejected when the gate closes (the file is kept as OUT.rejected), MigicianError.
    """
    for wanted in options.formats:
        if wanted not in ("mig", "gptq"):
            raise UnsupportedError(f"format {wanted} is not part of this version; choose mig or gptq")
    with open_checkpoint(options.model) as checkpoint:
        if checkpoint.quantization is not None:
            raise UnsupportedError(f"{options.model}: quantized already; export from the bf16 checkpoint")
        if options.mode == "bf16":
            return _plain(checkpoint, options)
        return _quantize(checkpoint, options, show)


def _plain(checkpoint: Checkpoint, options: Options) -> list[Path]:
    if options.formats != ("mig",):
        raise UnsupportedError("bf16 has the format mig alone; give --int4 or --int8 for gptq")
    write_mig(options.out, checkpoint)
    return [options.out]


def _calibration(options: Options) -> Calibration | None:
    if options.calib == "none":
        return None
    if options.calib == "nano":
        return nano_calibration(options.samples, options.seed)
    return open_calibration(options.calib, verify=True)


def _chosen(calibration: Calibration, options: Options) -> list[Sample]:
    """As many samples as asked for, spread over the folder by the seed."""
    samples = calibration.samples
    if len(samples) <= options.samples:
        return samples
    picked = np.random.default_rng(options.seed).choice(len(samples), options.samples, replace=False)
    return [samples[i] for i in sorted(picked)]


def _quantize(checkpoint: Checkpoint, options: Options, show: Show) -> list[Path]:
    import torch

    from .folder import WorkFolder
    from .inputs import Inputs
    from .pipeline import SENSITIVE, Job, finish, layer_reports, make_policy, plan_of
    from .units import list_units

    began = time.monotonic()
    if options.threads:
        torch.set_num_threads(options.threads)
    policy = make_policy(
        checkpoint.config,
        options.mode,
        rotated=options.rotate,
        head_int4=options.head_int4,
        keep=(*SENSITIVE, *options.keep),
    )
    calibration = _calibration(options)
    settings: dict[str, Any] = {"source": "none"}
    inputs, samples = None, list[Sample]()
    if calibration is not None:
        samples = _chosen(calibration, options)
        settings = {"sha256": calibration.sha256, "samples": len(samples), "seed": options.seed}
        settings["max_side"] = options.max_side
        inputs = Inputs(checkpoint, samples, seed=options.seed, max_side=options.max_side)
    place = options.out.with_name(options.out.name + ".partial")
    work = WorkFolder(place, plan_of(checkpoint, policy, settings), resume=options.resume)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    Job(checkpoint, policy, inputs, work, device, show).run()
    report: dict[str, Any] = {"model": checkpoint.name, "mode": options.mode, "rotated": options.rotate}
    report["layers"] = list(layer_reports(work, len(list_units(checkpoint.config))))
    report["calibration"] = _coverage(calibration, samples, inputs, options)
    candidate = work.path / "candidate.mig"
    with finish(checkpoint, policy, work, calibration.sha256 if calibration else "") as made:
        write_mig(candidate, made, extra={"report": _text(report)})
    report |= _size(candidate)
    report["accuracy"] = _accuracy(options, candidate, show)
    report |= {"seconds": time.monotonic() - began, "peak_rss_mb": _peak_rss_mb(), "machine": machine()}
    written = _place(options, candidate, report)
    work.remove()
    return written


def _place(options: Options, candidate: Path, report: Mapping[str, Any]) -> list[Path]:
    """Lets the candidate through the gate, or not, and writes the other outputs."""
    from .formats.gptq import write_gptq
    from .report import write_report

    written: list[Path] = []
    if options.report is not None:
        write_report(options.report, report)
        written.append(options.report)
    if (fault := _gate(options, report["accuracy"])) is not None:
        rejected = options.out.with_name(options.out.name + ".rejected")
        os.replace(candidate, rejected)
        raise Rejected(f"{fault}; the file is kept as {rejected}")
    if "gptq" in options.formats:
        folder = options.out
        if "mig" in options.formats:
            folder = options.out.with_name(options.out.name.removesuffix(".mig") + "-gptq")
        with open_checkpoint(candidate) as made:
            write_gptq(made, folder)
        written.insert(0, folder)
    if "mig" in options.formats:
        os.replace(candidate, options.out)
        written.insert(0, options.out)
    return written


def _gate(options: Options, accuracy: Mapping[str, Any] | None) -> str | None:
    if options.max_iou_drop is None or accuracy is None:
        return None
    drop = accuracy["before"]["mean"]["iou"] - accuracy["after"]["mean"]["iou"]
    if drop <= options.max_iou_drop:
        return None
    return f"the mean IoU fell by {drop:.4f}, more than --max-iou-drop {options.max_iou_drop:g}"


def _accuracy(options: Options, candidate: Path, show: Show) -> dict[str, Any] | None:
    """Asks the held-out questions of the model before and after; None where nobody wants to know."""
    if options.held_out == 0 or (options.max_iou_drop is None and options.report is None):
        return None
    from ..runtime.model import load

    result: dict[str, Any] = {"per_task": options.held_out}
    for when, source in (("before", options.model), ("after", str(candidate))):
        asked = 0

        def count(task: str, scores: Sequence[float], when: str = when) -> None:
            nonlocal asked
            asked += 1
            show(asked, 10 * options.held_out, f"held-out questions {when}: {task}")

        with load(source, threads=options.threads) as model:
            result[when] = evaluate(model, options.held_out, progress=count)
    return result


def _coverage(
    calibration: Calibration | None, samples: Sequence[Sample], inputs: Any, options: Options
) -> dict[str, Any] | None:
    """What the calibration consisted of."""
    if calibration is None:
        return None
    tasks, pictures = [s.task for s in samples], [len(s.images) for s in samples]
    return {
        "source": calibration.source,
        "samples": len(samples),
        "seed": options.seed,
        "sha256": calibration.sha256,
        "tasks": {task: tasks.count(task) for task in sorted(set(tasks))},
        "pictures": {str(n): pictures.count(n) for n in sorted(set(pictures))},
        "visual_tokens": inputs.visual_tokens,
        "text_tokens": inputs.tokens - inputs.visual_tokens,
    }


def _size(path: Path) -> dict[str, Any]:
    with open_checkpoint(path) as made:
        facts = describe(made)
    return {key: facts[key] for key in ("bytes", "weights", "bits_per_weight")} | {
        "parts": {part: facts["parts"][part] for part in PARTS}
    }


def _text(report: Mapping[str, Any]) -> str:
    """The report as it goes into the file: nothing in it depends on the machine or the clock."""
    return json.dumps(report, sort_keys=True)


def _peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def machine() -> str:
    """Names this machine's processor and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"
