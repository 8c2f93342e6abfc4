"""Says what a model file is: its size by part, its quantization policy, and what the exporter measured.

The exporter's report is a file's own word like any other: whatever is malformed in it is left out, never an error.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from .checkpoint import Checkpoint
from .config import tensor_shapes
from .hub_cache import revision_of
from .quantization import KINDS, matrices
from .tensors import FLOATS, shown

__all__ = ["PARTS", "describe", "describe_line", "describe_text"]

PARTS = ("vision", "language model", "embedding", "head", "other")

_PREFIXES = {"visual.": "vision", "model.embed_tokens.": "embedding", "lm_head.": "head", "model.": "language model"}
_WORST = 5  # layers shown
_MAX_REPORT = 16 << 20


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns what there is to say about a model, from its headers alone; no weight is read.

    name, revision (commit of a model in the hub's cache, else None), format ("mig" or "folder"), bytes of its files,
    parts {part: bytes} (other: texts, headers, padding, unused tensors), weights (parameters of the model),
    bits_per_weight (of tensors alone), dtypes {dtype: tensors} of what is not quantized, quantization (None or mode,
    group_size, groups, rotated, layers {kind: count}, kept [names left bf16]), calibration (sha256 or None), report
    (None or worst [layers by output error], accuracy, calibration).
    """
    parts = dict.fromkeys(PARTS, 0)
    for name, tensor in checkpoint.tensors.items():
        parts[_part(name)] += tensor.nbytes
    tensors = sum(parts.values())
    whole = max(tensors, sum(file.size_bytes for file in checkpoint.files))
    parts["other"] += whole - tensors
    weights = sum(math.prod(shape) for shape in tensor_shapes(checkpoint.config).values())
    dtypes = Counter(tensor.dtype for tensor in checkpoint.tensors.values() if tensor.dtype in FLOATS)
    return {
        "name": checkpoint.name,
        "revision": revision_of(os.path.abspath(checkpoint.where)),
        "format": "mig" if "quantization" in checkpoint.raw else "folder",
        "bytes": whole,
        "parts": parts,
        "weights": weights,
        "bits_per_weight": round(8 * tensors / weights, 3),
        "dtypes": dict(sorted(dtypes.items())),
        "quantization": _policy(checkpoint),
        "calibration": checkpoint.raw.get("calibration") or None,
        "report": _headline(checkpoint.metadata.get("report")),
    }


def _part(name: str) -> str:
    return next((part for prefix, part in _PREFIXES.items() if name.startswith(prefix)), "other")


def _policy(checkpoint: Checkpoint) -> dict[str, Any] | None:
    policy = checkpoint.quantization
    if policy is None:
        return None
    counts = Counter(policy.layers.values())
    sizes = matrices(checkpoint.config)
    return {
        "mode": policy.mode,
        "group_size": policy.group_size,
        "groups": sorted({policy.group(k) for name, (_, k) in sizes.items() if policy.layers[name] == "int4"}),
        "rotated": policy.rotated,
        "layers": {kind: counts[kind] for kind in KINDS},
        "kept": [name for name in sizes if policy.layers[name] == "bf16"],
    }


def _headline(text: str | None) -> dict[str, Any] | None:
    """The report's main figures; None where there is no report or nothing sound in it."""
    if text is None or len(text) > _MAX_REPORT:
        return None
    try:
        report = json.loads(text)
    except (ValueError, RecursionError):
        return None
    report = _table(report)
    layers = [layer for layer in map(_layer, _list(report.get("layers"))) if layer]
    layers.sort(key=lambda layer: -layer["error"])
    # where some layers have an output error and others none, only the former compare
    measured = [layer for layer in layers if layer["of"] == "output"] or layers
    found = {
        "worst": measured[:_WORST],
        "accuracy": _accuracy(_table(report.get("accuracy"))),
        "calibration": _samples(_table(report.get("calibration"))),
    }
    return found if any(found.values()) else None


def _layer(entry: Any) -> dict[str, Any] | None:
    """{name, kind, error, of}: the output error where one was measured, else the weights'."""
    entry = _table(entry)
    output, weight = _number(entry.get("output_error")), _number(entry.get("weight_error"))
    error = weight if output is None else output
    if error is None or not isinstance(entry.get("name"), str):
        return None
    of = "weight" if output is None else "output"
    return {"name": shown(entry["name"]), "kind": shown(entry.get("kind", "")), "error": error, "of": of}


def _accuracy(accuracy: Mapping[str, Any]) -> dict[str, Any] | None:
    """{per_task, before: {iou, acc50}, after: {...}}, the means over all tasks."""
    found: dict[str, Any] = {}
    for when in ("before", "after"):
        mean = _table(_table(accuracy.get(when)).get("mean"))
        found[when] = {key: _number(mean.get(key)) for key in ("iou", "acc50")}
        if None in found[when].values():
            return None
    return {"per_task": _count(accuracy.get("per_task")), **found}


def _samples(calibration: Mapping[str, Any]) -> dict[str, Any] | None:
    """{source, samples}: what the calibration ran on."""
    samples = _count(calibration.get("samples"))
    source = calibration.get("source")
    return None if samples is None else {"source": shown(source) if source else "", "samples": samples}


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    # the bound keeps huge integers from float(), and infinities and NaN out
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def describe_line(found: Mapping[str, Any]) -> str:
    """One line: "model nano: int4 groups of 128 + int8, rotated, 4.9 bits per weight, 5.1 MB"."""
    name = shown(found["name"]) + (f" (revision {shown(found['revision'])})" if found["revision"] else "")
    return f"model {name}: {_kind(found)}, {found['bits_per_weight']:.1f} bits per weight, {_size(found['bytes'])}"


def _kind(found: Mapping[str, Any]) -> str:
    policy = found["quantization"]
    if policy is None:
        return " + ".join(dtype.lower() for dtype in found["dtypes"])
    kinds = [f"int4 {_groups(policy)}" if kind == "int4" else kind for kind in KINDS if policy["layers"][kind]]
    return " + ".join(kinds) + (", rotated" if policy["rotated"] else "")


def _groups(policy: Mapping[str, Any]) -> str:
    low, high = policy["groups"][0], policy["groups"][-1]
    return f"groups of {low}" if low == high else f"groups of {low} to {high}"


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def describe_text(found: Mapping[str, Any]) -> str:
    """The same for people, about twenty lines of at most 100 columns or so; no newline at the end."""
    whole = found["bytes"]
    kind = "one .mig file" if found["format"] == "mig" else "checkpoint folder"
    lines = [
        f"model          {shown(found['name'])} ({kind})",
        *([f"revision       {shown(found['revision'])}"] if found["revision"] else []),
        f"size           {_size(whole)}, {found['weights']:,} weights, {found['bits_per_weight']:.2f} bits per weight",
    ]
    for part, size in found["parts"].items():
        if size:
            lines.append(f"  {part:<14} {_size(size):>10}  {100 * size / whole:5.1f} %")
    lines += _policy_lines(found)
    lines.append(f"calibration    {_calibration(found)}")
    return "\n".join(lines + _report_lines(found["report"]))


def _policy_lines(found: Mapping[str, Any]) -> list[str]:
    policy = found["quantization"]
    if policy is None:
        return [f"quantization   none, weights are {_kind(found)}"]
    lines = [f"quantization   {policy['mode']}, {'rotated' if policy['rotated'] else 'not rotated'}"]
    for kind, count in policy["layers"].items():
        note = f" in {_groups(policy)}" if kind == "int4" and count else ""
        if kind == "bf16" and count:
            kept = policy["kept"]
            note = ": " + ", ".join(kept[:3]) + (f" and {len(kept) - 3} more" if len(kept) > 3 else "")
        lines.append(f"  {kind:<14} {count} layers{note}")
    return lines


def _calibration(found: Mapping[str, Any]) -> str:
    if not found["calibration"]:
        return "none"
    told = (found["report"] or {}).get("calibration")
    source = f" of {told['source']}" if told and told["source"] else ""
    return f"sha256 {found['calibration'][:16]}..." + (f", {told['samples']} samples{source}" if told else "")


def _report_lines(report: Mapping[str, Any] | None) -> list[str]:
    if report is None:
        return ["report         none"]
    lines = []
    if accuracy := report["accuracy"]:
        before, after = accuracy["before"], accuracy["after"]
        scenes = f" ({accuracy['per_task']} per task)" if accuracy["per_task"] else ""
        lines.append(
            f"accuracy       IoU {before['iou']:.3f} before, {after['iou']:.3f} after; "
            f"at IoU 0.5 {before['acc50']:.3f} before, {after['acc50']:.3f} after{scenes}"
        )
    if worst := report["worst"]:
        lines.append(f"worst layers   by relative {worst[0]['of']} error")
        lines += [f"  {layer['error']:.4f}  {layer['kind']:<5} {layer['name']}" for layer in worst]
    return lines
