"""Runs all engines over all cases, one after the other in every repeat, and puts the figures together.

The result, which is the command's JSON object:

    kind "migician latency", version 1, date, command, machine {...}, load [before, after]
    model {name, format, mode, bytes, weights}, settings {backend, precision, threads, repeat, warm_up, prompt}
    ceilings {isa, threads, read_bytes, read_bytes_1, f32_ops, int8_ops, bf16_ops} or None: medians of what was measured
        before every repeat, since the speed of a shared machine's memory changes by the minute
    engines {name: {versions, load_ms, meter}}, missing [{engine, why}]
    cases: [{pictures, width, height, new_tokens, patches, visual_tokens, prompt_tokens,
             work {phase: {operations, bytes, floor_ms}},
             engines {name: {preprocess_ms, vision_ms, prefill_ms, decode_ms, total_ms, step_ms {p50, p90, p99},
                             cpu_ms {phase: median}, tokens_per_s, peak_rss_mb, energy_j, prompt_tokens,
                             shares {phase: 0..1}}},
             ratios {name: {phase or total: theirs / ours, tokens_per_s, peak_rss_mb}}}]

decode in `work` is one step, behind the prompt and half of the new tokens. A ratio over 1 says that ours is faster, or
smaller. Percentiles are interpolated between the runs' values; step_ms are those of every single step of every repeat.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...runtime.backends.native import Pool, measure_ceilings
from ...runtime.errors import MigicianError
from ...runtime.files.checkpoint import Checkpoint
from ...runtime.files.describe import describe
from ...runtime.files.open import open_checkpoint
from ...runtime.image import smart_resize
from ...runtime.machine import machine
from ..engines import PHASES
from .load import busy, load_average
from .peers import EngineFailed, EngineMissing, Setting, answers
from .work import decode_work, floor_ms, prefill_work, vision_work
from .workload import PROMPT, Case

__all__ = ["KIND", "Plan", "measure", "percentiles", "ratios", "summarize"]

KIND = "migician latency"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure. reference: the unquantized folder for transformers; peers: the engines beside ours."""

    model: str
    cases: Sequence[Case]
    backend: str = "native"
    precision: str = "auto"
    threads: int = 0
    repeat: int = 5
    warm_up: int = 1
    ceilings: bool = True
    peers: Sequence[Setting] = ()
    options: Mapping[str, str | None] = field(default_factory=dict)  # reference, openvino, llama_cpp, gguf, mmproj
    interpreters: Mapping[str, str] = field(default_factory=dict)


def percentiles(values: Sequence[float]) -> dict[str, Any]:
    """p50, p90, p99 by linear interpolation, and the values themselves."""
    p50, p90, p99 = (round(float(v), 3) for v in np.percentile(values, (50, 90, 99)))
    return {"p50": p50, "p90": p90, "p99": p99, "values": [round(v, 3) for v in values]}


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One engine's figures for one case from its repeats; a part that the engine cannot tell is None."""
    found: dict[str, Any] = {}
    for name in (*(f"{phase}_ms" for phase in PHASES), "total_ms"):
        values = [run[name] for run in runs]
        found[name] = None if None in values else percentiles(values)
    cpu = [run["cpu_ms"] for run in runs if run.get("cpu_ms")]
    found["cpu_ms"] = {p: round(float(np.median([c[p] for c in cpu])), 1) for p in cpu[0]} if cpu else None
    steps = [step for run in runs for step in run["steps_ms"] or ()]
    found["step_ms"] = percentiles(steps) if steps else None
    if found["step_ms"]:
        del found["step_ms"]["values"]
    decode, count = found["decode_ms"], runs[0]["new_tokens"] - 1
    found["tokens_per_s"] = round(1000 * count / decode["p50"], 2) if decode and count and decode["p50"] else None
    found["peak_rss_mb"] = max(run["peak_rss_mb"] for run in runs)
    energy = [run["energy_j"] for run in runs if run.get("energy_j") is not None]
    found["energy_j"] = round(float(np.median(energy)), 2) if energy else None
    found["prompt_tokens"] = runs[0]["prompt_tokens"]
    return found


def ratios(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Their median over ours by phase, our tokens per second over theirs, their memory over ours: over 1 is better."""
    found = {}
    for phase in (*PHASES, "total"):
        mine, other = ours[f"{phase}_ms"], theirs[f"{phase}_ms"]
        if mine and other and mine["p50"]:
            found[phase] = round(other["p50"] / mine["p50"], 3)
    if ours["tokens_per_s"] and theirs["tokens_per_s"]:
        found["tokens_per_s"] = round(ours["tokens_per_s"] / theirs["tokens_per_s"], 3)
    found["peak_rss_mb"] = round(theirs["peak_rss_mb"] / ours["peak_rss_mb"], 3)
    return found


def _ceilings(threads: int) -> dict[str, Any]:
    pool = Pool(threads)
    found = {"isa": pool.isa, "threads": pool.threads, **measure_ceilings(pool)}
    one = found["read_bytes"] if pool.threads == 1 else measure_ceilings(Pool(1), seconds=0.15)["read_bytes"]
    return found | {"read_bytes_1": one}


def _typical(ceilings: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The medians of several measurements; None of none."""
    if not ceilings:
        return None
    rates = [name for name in ceilings[0] if name not in ("isa", "threads")]
    return {**ceilings[0], **{name: float(np.median([c[name] for c in ceilings])) for name in rates}}


def _geometry(checkpoint: Checkpoint, case: Case) -> dict[str, Any]:
    """patches and visual tokens of all pictures of a case."""
    pre = checkpoint.preprocessor
    height, width = smart_resize(
        case.height, case.width, factor=pre.factor, min_pixels=pre.min_pixels, max_pixels=pre.max_pixels
    )
    patches = height * width // pre.patch_size**2
    return {"patches": case.pictures * patches, "visual_tokens": case.pictures * patches // pre.merge_size**2}


def _work(
    checkpoint: Checkpoint, case: Mapping[str, Any], plan: Plan, ceilings: Mapping[str, Any] | None
) -> dict[str, Any]:
    """operations, bytes and, with ceilings, floor_ms of vision, prefill and one decoding step."""
    patches = [case["patches"] // case["pictures"]] * case["pictures"]
    length = case["prompt_tokens"] + case["new_tokens"] / 2
    phases = {
        "vision": vision_work(checkpoint, patches, plan.precision),
        "prefill": prefill_work(checkpoint, case["prompt_tokens"], plan.precision),
        "decode": decode_work(checkpoint, length, plan.precision),
    }
    return {
        phase: {
            "operations": work.operations,
            "attention": work.attention,
            "bytes": work.bytes,
            "floor_ms": round(floor_ms(work, ceilings, plan.precision), 4) if ceilings else None,
        }
        for phase, work in phases.items()
    }


def _shares(work: Mapping[str, Any], ours: Mapping[str, Any], steps: int) -> dict[str, float]:
    """The floor's share of the measured median, by phase."""
    counts = {"vision": 1, "prefill": 1, "decode": steps}
    return {
        phase: round(work[phase]["floor_ms"] * count / ours[f"{phase}_ms"]["p50"], 4)
        for phase, count in counts.items()
        if count and work[phase]["floor_ms"] is not None and ours[f"{phase}_ms"]["p50"]
    }


class _Collected:
    """What the engines have said so far."""

    def __init__(self) -> None:
        self.runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
        self.engines: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}

    def add(self, name: str, event: Mapping[str, Any]) -> None:
        if event["event"] == "loaded":
            known = self.engines.setdefault(name, {"versions": event["versions"], "load_ms": [], "meter": None})
            known["load_ms"].append(round(event["load_ms"], 1))
        else:
            self.engines[name]["meter"] = event["meter"]
            self.runs.setdefault((name, event["case"]), []).append(event["run"])

    def drop(self, name: str, why: str) -> None:
        """A peer that failed once is out: half of its repeats would compare nothing."""
        self.missing[name] = why
        self.engines.pop(name, None)
        for key in [key for key in self.runs if key[0] == name]:
            del self.runs[key]


def _run_one(plan: Plan, setting: Setting, name: str, repeat: int, collected: _Collected, say: Say) -> None:
    options = {"model": plan.model, "backend": plan.backend, "threads": plan.threads, **plan.options}
    steps = answers(setting, options, plan.cases, repeat=repeat, warm_up=plan.warm_up, interpreters=plan.interpreters)
    say(f"repeat {repeat + 1} of {plan.repeat}: {name}")
    for event in steps:
        collected.add(name, event)
        if event["event"] == "run":
            total = event["run"]["total_ms"] / 1000
            say(f"repeat {repeat + 1} of {plan.repeat}: {name}, {plan.cases[event['case']].name}: {total:.2f} s")


def measure(plan: Plan, say: Say, *, command: str = "") -> dict[str, Any]:
    """Measures; see this module's head for what is returned.

    say: told each step in one line. Raises what our own engine raises; a peer that fails is listed as missing.
    """
    load_before = load_average()
    own = Setting("migician", plan.precision)
    with open_checkpoint(plan.model) as checkpoint:
        if note := busy(load_before, plan.threads):
            say(note)
        collected, measured = _Collected(), []
        for repeat in range(plan.repeat):
            if plan.ceilings:
                say(f"repeat {repeat + 1} of {plan.repeat}: what this machine can do at most")
                measured.append(_ceilings(plan.threads))
            for setting in (own, *plan.peers):
                name = setting.engine if setting is own else setting.name
                if name in collected.missing:
                    continue
                try:
                    _run_one(plan, setting, name, repeat, collected, say)
                except (EngineMissing, EngineFailed) as error:
                    if setting is own:
                        raise MigicianError(str(error)) from None
                    collected.drop(name, str(error))
                    say(f"left out: {name}: {error}")
        ceilings = _typical(measured)
        cases = [_case(checkpoint, plan, i, ceilings, collected) for i in range(len(plan.cases))]
        about = describe(checkpoint)
    mode = about["quantization"]["mode"] if about["quantization"] else "/".join(about["dtypes"]).lower()
    return {
        "kind": KIND,
        "version": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine(),
        "load": [load_before, load_average()],
        "model": {key: about[key] for key in ("name", "format", "bytes", "weights")} | {"mode": mode},
        "settings": {
            "backend": plan.backend,
            "precision": plan.precision,
            "threads": plan.threads,
            "repeat": plan.repeat,
            "warm_up": plan.warm_up,
            "prompt": PROMPT,
        },
        "ceilings": ceilings,
        "engines": collected.engines,
        "missing": [{"engine": name, "why": why} for name, why in collected.missing.items()],
        "cases": cases,
    }


def _case(
    checkpoint: Checkpoint, plan: Plan, number: int, ceilings: Mapping[str, Any] | None, collected: _Collected
) -> dict[str, Any]:
    case = plan.cases[number]
    engines = {name: summarize(runs) for (name, i), runs in collected.runs.items() if i == number}
    ours = engines["migician"]
    found = {**case.to_dict(), **_geometry(checkpoint, case), "prompt_tokens": ours["prompt_tokens"]}
    found["work"] = _work(checkpoint, found, plan, ceilings)
    ours["shares"] = _shares(found["work"], ours, case.new_tokens - 1)
    found["engines"] = engines
    found["ratios"] = {name: ratios(ours, other) for name, other in engines.items() if name != "migician"}
    return found
