"""An export from end to end: calibration, quantizing, the file, its accuracy, the gate, the report, other formats."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..calib.scenes.evaluate import evaluate
from ..calib.store import Calibration, Sample, nano_calibration, open_calibration
from ..runtime.errors import MigicianError, UnsupportedError
from ..runtime.files.checkpoint import Checkpoint
from ..runtime.files.describe import PARTS, describe
from ..runtime.files.mig import write_mig
from ..runtime.files.open import open_checkpoint
from ..runtime.files.write import move_file
from ..runtime.machine import cores, processor
from ..runtime.memory import peak_rss_mb
from ..runtime.prompt import check_words
from .formats.table import DEFAULT, Format, WriteOptions, choose
from .places import check_source
from .report import Accuracy, Coverage, Made, Report, Size

if TYPE_CHECKING:
    from .inputs import Inputs

__all__ = ["Options", "Rejected", "export"]

Show = Callable[[float, float, str], None]  # done, in all, what is under way
Targets = Sequence[tuple[Format, Path]]


class Rejected(MigicianError):
    """The gate: the quantized model lost more accuracy than was allowed."""


@dataclass(frozen=True)
class Options:
    """What to make of which model.

    mode, formats: of formats/table.py, which says too where each goes if there are several.   out: file or folder.
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
    formats: tuple[str, ...] = (DEFAULT,)
    resume: bool = False
    rotate: bool = True
    head_int4: bool = False
    keep: tuple[str, ...] = ()
    max_side: int = 512
    held_out: int = 20
    max_iou_drop: float | None = None
    report: Path | None = None
    threads: int = 0


def export(
    options: Options, show: Show = lambda done, total, what: None, say: Callable[[str], None] = lambda line: None
) -> list[Path]:
    """Exports a model; returns what was written.   say: takes what there is to know of the source, line by line.

    Can be killed at any point; with `resume` the next run goes on and writes the same bytes.
    Raises Rejected when the gate closes (the file is kept as OUT.rejected), MigicianError.
    """
    rows = choose(options.formats, options.mode)
    targets = [(row, row.target(options.out, several=len(rows) > 1)) for row in rows]
    for row, target in targets:
        row.check_target(target)
    with open_checkpoint(options.model) as checkpoint:
        if checkpoint.quantization is not None:
            raise UnsupportedError(f"{options.model}: quantized already; export from the bf16 checkpoint")
        check_source(checkpoint, options.out)
        check_words(checkpoint)
        for note in checkpoint.notes:
            say(note)
        if options.mode == "bf16":
            return _plain(checkpoint, targets)
        _check_numbers(checkpoint, show)
        return _quantize(checkpoint, options, targets, show)


def _check_numbers(checkpoint: Checkpoint, show: Show) -> None:
    """Reads every weight once: a minute before the hours that one which is no number would waste."""
    tensors = checkpoint.tensors.values()
    done, total = 0.0, float(sum(tensor.nbytes for tensor in tensors))
    for tensor in tensors:
        show(done, total, "reading the weights")
        tensor.check_finite(checkpoint.where)
        done += tensor.nbytes
        for file in checkpoint.files:
            file.release()
    show(total, total, "reading the weights")


def _plain(checkpoint: Checkpoint, targets: Targets) -> list[Path]:
    for row, _ in targets:
        row.check(checkpoint.config, None, checkpoint.name)
    for row, target in targets:
        row.write(checkpoint, target, WriteOptions())
    return [target for _, target in targets]


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


def _quantize(checkpoint: Checkpoint, options: Options, targets: Targets, show: Show) -> list[Path]:
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
    for row, _ in targets:
        row.check(checkpoint.config, policy, checkpoint.name)
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
    layers = list(layer_reports(work, len(list_units(checkpoint.config))))
    coverage = _coverage(calibration, samples, inputs, options.seed)
    made = Made(checkpoint.name, options.mode, options.rotate, layers, coverage)
    candidate = work.path / "candidate.mig"
    with finish(checkpoint, policy, work, calibration.sha256 if calibration else "") as quantized:
        write_mig(candidate, quantized, extra={"report": made.to_text()})
    size, accuracy = _size(candidate), _accuracy(options, candidate, show)
    machine = f"{processor()}, {cores()} cores"
    report = Report(made, size, accuracy, time.monotonic() - began, peak_rss_mb(), machine)
    written = _place(options, targets, candidate, report)
    work.remove()
    return written


def _place(options: Options, targets: Targets, candidate: Path, report: Report) -> list[Path]:
    """Lets the candidate through the gate, or not, and writes what was asked for."""
    from .page import write_report

    if options.report is not None:
        write_report(options.report, report)
    if (fault := _gate(options, report.accuracy)) is not None:
        rejected = options.out.with_name(options.out.name + ".rejected")
        move_file(candidate, rejected)
        raise Rejected(f"{fault}; the file is kept as {rejected}")
    with open_checkpoint(candidate) as made:
        # the table's first row takes the candidate away: it is the last to be written
        for row, target in reversed(targets):
            row.write(made, target, WriteOptions(finished=candidate))
    return [*(target for _, target in targets), *([options.report] if options.report is not None else [])]


def _gate(options: Options, accuracy: Accuracy | None) -> str | None:
    if options.max_iou_drop is None or accuracy is None or accuracy.drop <= options.max_iou_drop:
        return None
    return f"the mean IoU fell by {accuracy.drop:.4f}, more than --max-iou-drop {options.max_iou_drop:g}"


def _accuracy(options: Options, candidate: Path, show: Show) -> Accuracy | None:
    """Asks the held-out questions of the model before and after; None where nobody wants to know."""
    if options.held_out == 0 or (options.max_iou_drop is None and options.report is None):
        return None
    from ..runtime.model import load

    found: dict[str, Any] = {}
    for when, source in (("before", options.model), ("after", str(candidate))):
        asked = 0

        def count(task: str, scores: Sequence[float], when: str = when) -> None:
            nonlocal asked
            asked += 1
            show(asked, 10 * options.held_out, f"held-out questions {when}: {task}")

        with load(source, threads=options.threads) as model:
            found[when] = evaluate(model, options.held_out, progress=count)
    return Accuracy(options.held_out, **found)


def _coverage(
    calibration: Calibration | None, samples: Sequence[Sample], inputs: "Inputs | None", seed: int
) -> Coverage | None:
    """What the calibration consisted of."""
    if calibration is None or inputs is None:
        return None
    tasks, pictures = [s.task for s in samples], [len(s.images) for s in samples]
    return Coverage(
        source=calibration.source,
        samples=len(samples),
        seed=seed,
        sha256=calibration.sha256,
        tasks={task: tasks.count(task) for task in sorted(set(tasks))},
        pictures={str(n): pictures.count(n) for n in sorted(set(pictures))},
        visual_tokens=inputs.visual_tokens,
        text_tokens=inputs.tokens - inputs.visual_tokens,
    )


def _size(path: Path) -> Size:
    with open_checkpoint(path) as made:
        facts = describe(made)
    parts = {part: facts["parts"][part] for part in PARTS}
    return Size(facts["bytes"], facts["weights"], facts["bits_per_weight"], parts)
