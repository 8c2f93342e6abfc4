"""The report of a quantized model as one HTML page: what it weighs, what it lost, where, and how that was found out.

The page needs nothing but itself: styles and drawings are inline, there is no script, and it follows the reader's
light or dark setting. Every text of the report is escaped.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..runtime.report.charts import Line, bar, bounds, line_chart, shares
from ..runtime.report.page import legend, page, section, signed, table, tiles, write_page
from .report import Accuracy, Coverage, Layer, Report, Size

__all__ = ["iou_change", "render_report", "write_report"]

_NUMBERED = re.compile(r"(model\.layers|visual\.blocks)\.(\d+)\.(.+)", re.ASCII)
_TOWERS = (("model.layers", "Language model", "layer"), ("visual.blocks", "Vision encoder", "block"))
_KINDS = ("int4", "int8", "bf16")
_NONE = "–"


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Writes the page; it appears under its name complete or not at all.

    Raises ModelFileError when the place cannot be written.
    """
    write_page(path, render_report(report))


def render_report(report: Report) -> str:
    """Returns the whole page as HTML."""
    made = report.made
    title = f"{made.model} · {made.mode}"
    sections = [
        _headline(report),
        _size(report.size),
        _accuracy(report.accuracy),
        _errors(made.layers),
        _worst(made.layers),
        _policy(made.layers),
        _calibration(made.calibration),
        _every_layer(made.layers),
    ]
    return page(f"Quantization report: {title}", sections, style=_STYLE)


# ---------------------------------------------------------------------------------------------------- words, numbers


def _bytes(count: float) -> str:
    """5130000000 -> "5.13 GB"; decimal units, three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{_three(count / size)} {unit}"
    return f"{count:.0f} bytes"


def _three(value: float) -> str:
    """At least three significant digits, none lost before the point."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 2
    return f"{value:,.{min(digits, 6)}f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{_three(seconds)} s" if seconds >= 1 else f"{seconds:.2f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _percent(value: float | None) -> str:
    """A relative error: 0.0123 -> "1.23 %"."""
    return _NONE if not _known(value) else f"{_three(100 * value)} %" if value else "0 %"


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _name(module: str) -> str:
    """A module's name that a narrow table may break behind its dots."""
    return f"<code>{escape(module).replace('.', '.<wbr>')}</code>"


def _kind(kind: str) -> str:
    return f'<span class="kind {escape(kind)}">{escape(kind)}</span>'


# ---------------------------------------------------------------------------------------------------------- headline


def iou_change(accuracy: Accuracy) -> tuple[float, float | None, int]:
    """Returns (mean IoU after - before, half width of its 95 % interval, questions).

    The half width is None unless both sides kept each question's score. Questions are paired, tasks weigh alike:
    the variance of the mean over T tasks is sum(s_t^2 / n_t) / T^2, s_t^2 that of the differences within a task.
    """
    before, after = accuracy.before, accuracy.after
    change = after["mean"]["iou"] - before["mean"]["iou"]
    questions = sum(task["n"] for task in after["tasks"].values())
    first, second = before.get("scores"), after.get("scores")
    if not first or not second or first.keys() != second.keys():
        return change, None, questions
    variance = 0.0
    for task in first:
        if len(first[task]) != len(second[task]) or len(first[task]) < 2:
            return change, None, questions
        gaps = [b - a for a, b in zip(first[task], second[task], strict=True)]
        mean = sum(gaps) / len(gaps)
        variance += sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps)
    return change, 1.96 * math.sqrt(variance) / len(first), questions


def _headline(report: Report) -> str:
    made, size = report.made, report.size
    plain = 2 * size.weights
    saved = f"{abs(1 - size.bytes / plain):.0%}".replace("%", " %") if plain else ""
    direction = "smaller" if size.bytes <= plain else "larger"
    figures = [
        ("Size", _bytes(size.bytes), f"{saved} {direction} than bf16 ({_bytes(plain)})"),
        ("Bits per weight", f"{size.bits_per_weight:.2f}", f"{_weights(size.weights)} weights"),
        *_accuracy_tiles(report.accuracy),
        _calibration_tile(made.calibration),
        ("Time", _duration(report.seconds), "accuracy runs included" if report.accuracy else ""),
        ("Peak memory", _bytes(1e6 * report.peak_rss_mb), "resident, of the exporter"),
    ]
    rotated = "rotated" if made.rotated else "not rotated"
    return (
        f'<header><p class="over">Quantization report</p><h1>{escape(made.model)}</h1>'
        f'<p class="sub">{_kind(made.mode)} <span>{rotated}</span> '
        f"<span>{escape(report.machine)}</span></p></header>"
        f"{tiles(figures, 3 if len(figures) % 4 else 4)}"
    )


def _calibration_tile(calibration: Coverage | None) -> tuple[str, str, str]:
    if calibration is None:
        return "Calibration", "none", "every weight rounded to nearest"
    tokens = calibration.visual_tokens + calibration.text_tokens
    return "Calibration", f"{calibration.samples:,} samples", f"{tokens:,} tokens"


def _weights(count: int) -> str:
    for unit, size in ((" billion", 1e9), (" million", 1e6)):
        if count >= size:
            return f"{_three(count / size)}{unit}"
    return f"{count:,}"


def _accuracy_tiles(accuracy: Accuracy | None) -> list[tuple[str, str, str]]:
    if accuracy is None:
        return [("Accuracy", "not measured", "no questions were asked")]
    before, after = accuracy.before["mean"], accuracy.after["mean"]
    change, half, questions = iou_change(accuracy)
    if half is None:
        note = f"{questions:,} questions"
    else:
        # the sign of zero is settled by rounding, so that an end of the interval never reads as minus nothing
        low, high = signed(change - half, 3), signed(change + half, 3)
        note = f"95 % interval {low} to {high}, {questions:,} questions, paired"
    share = 100 * (after["acc50"] - before["acc50"])
    return [
        ("Mean IoU", _arrow(f"{before['iou']:.3f}", f"{after['iou']:.3f}"), "before and after"),
        ("Change in IoU", signed(change, 3), note),
        (
            "Boxes at IoU ≥ 0.5",
            _arrow(f"{100 * before['acc50']:.1f}", f"{100 * after['acc50']:.1f} %"),
            f"{signed(share, 1)} points",
        ),
    ]


def _arrow(before: str, after: str) -> str:
    return f'<span class="was">{before} →</span> {after}'


# -------------------------------------------------------------------------------------------------- size and accuracy


def _size(found: Size) -> str:
    parts = {part: size for part, size in found.parts.items() if size}
    total = sum(parts.values())
    if not total:
        return ""
    order = list(found.parts)
    colour = {part: f"p{min(order.index(part), 5)}" for part in parts}
    rows = [
        (
            f'<i class="key {colour[part]}"></i>{escape(part)}',
            _bytes(size),
            f"{100 * size / total:.1f} %",
        )
        for part, size in parts.items()
    ]
    picture = shares([(colour[part], size / total, f"{part}: {_bytes(size)}") for part, size in parts.items()])
    return section("Size by part", picture + table(("Part", "Size", "Share"), rows))


def _accuracy(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return section("Accuracy", '<p class="quiet">Not measured for this file.</p>')
    before, after = accuracy.before, accuracy.after
    rows = [
        _accuracy_row(escape(task), before["tasks"][task], now)
        for task, now in after["tasks"].items()
        if task in before["tasks"]
    ]
    rows.append(_accuracy_row("<b>mean of the tasks</b>", before["mean"], after["mean"]))
    head = ("Task", "IoU, 0 to 1", "IoU before", "after", "change", "IoU ≥ 0.5 before", "after", "questions")
    intro = (
        f"{accuracy.per_task:,} held-out questions per task, the same before and after. IoU is the overlap of the "
        "first box with the truth, 0 without a box or in the wrong picture."
    )
    key = legend([("before", "before"), ("after", "after quantizing")])
    return section("Accuracy by task", key + table(head, rows, text=2), intro)


def _accuracy_row(task: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    bars = bar("before", before["iou"]) + bar("after", after["iou"])
    return [
        task,
        f'<div class="bars">{bars}</div>',
        f"{before['iou']:.3f}",
        f"{after['iou']:.3f}",
        signed(after["iou"] - before["iou"], 3),
        f"{100 * before['acc50']:.1f} %",
        f"{100 * after['acc50']:.1f} %",
        f"{after['n']:,}" if "n" in after else _NONE,
    ]


# ------------------------------------------------------------------------------------------------------ layer errors


def _error_key(layers: Sequence[Layer]) -> str:
    """Which error the page speaks of: that of the outputs where any was measured, else that of the weights."""
    return "output_error" if any(_known(layer.output_error) for layer in layers) else "weight_error"


def _errors(layers: Sequence[Layer]) -> str:
    key = _error_key(layers)
    what = "output" if key == "output_error" else "weight"
    meaning = (
        "Error of a matrix's outputs over the calibration inputs, relative to the outputs"
        if what == "output"
        else "Error of a matrix's weights, relative to the weights (nothing was calibrated)"
    )
    groups = "".join(_tower(layers, key, *tower) for tower in _TOWERS)
    if not groups:
        return ""
    mixed = "dot after ring" in groups
    keys = [("after", "as stored"), ("rtn", "rounded to nearest, for comparison")]
    keys += [("ring", "a layer of another kind than most of its module")] if mixed else []
    intro = f"{meaning}, in percent on a logarithmic scale; lower is better. Charts of one tower share their axes."
    return section(f"Relative {what} error by layer", legend(keys) + groups, intro)


def _tower(layers: Sequence[Layer], key: str, prefix: str, title: str, unit: str) -> str:
    """One small chart per kind of module, all of a tower on the same axes."""
    modules: dict[str, dict[int, Layer]] = {}
    for layer in layers:
        found = _NUMBERED.fullmatch(layer.name)
        if found and found[1] == prefix and _known(getattr(layer, key)):
            modules.setdefault(found[3], {})[int(found[2])] = layer
    if not modules:
        return ""
    rivals = f"rtn_{key}"
    entries = [layer for group in modules.values() for layer in group.values()]
    everything: list[Any] = [getattr(layer, k) for layer in entries for k in (key, rivals)]
    low, high = bounds([value for value in everything if _known(value) and value > 0])
    last = max(index for group in modules.values() for index in group)
    charts = []
    for module, group in modules.items():
        points = sorted(group.items())
        lines = [
            Line("rtn", [(i, getattr(layer, rivals), "") for i, layer in points if _known(getattr(layer, rivals))]),
            Line("after", [(i, getattr(x, key), _hint(unit, i, x, key)) for i, x in points], rings=_rings(points)),
        ]
        charts.append(f"<figure>{line_chart(module, lines, last=last, low=low, high=high, unit=unit)}</figure>")
    return f'<h3>{title}</h3><div class="charts">{"".join(charts)}</div>'


def _rings(points: Sequence[tuple[int, Layer]]) -> frozenset[int]:
    """Marks the layers of another kind than most of their module."""
    usual = Counter(layer.kind for _, layer in points).most_common(1)[0][0]
    return frozenset(index for index, layer in points if layer.kind != usual)


def _hint(unit: str, index: int, layer: Layer, key: str) -> str:
    rival = getattr(layer, f"rtn_{key}")
    against = f", rounded to nearest {_percent(rival)}" if _known(rival) else ""
    return f"{unit} {index}, {layer.kind}: {_percent(getattr(layer, key))}{against}"


_LAYER_HEAD = ("Matrix", "Kind", "output error", "if rounded", "weight error", "if rounded", "damping", "N × K")


def _layer_row(layer: Layer) -> list[str]:
    errors = (layer.output_error, layer.rtn_output_error, layer.weight_error, layer.rtn_weight_error)
    return [
        _name(layer.name),
        _kind(layer.kind),
        *map(_percent, errors),
        f"{layer.damping:g}" if _known(layer.damping) else _NONE,
        " × ".join(str(side) for side in layer.shape),
    ]


def _worst(layers: Sequence[Layer]) -> str:
    key = _error_key(layers)
    known = [layer for layer in layers if _known(getattr(layer, key))]
    known.sort(key=lambda layer: -getattr(layer, key))
    if not known:
        return ""
    ten = known[:10]
    numbers = {10: "ten"}
    title = f"The {numbers.get(len(ten), str(len(ten)))} largest errors" if len(ten) > 1 else "The largest error"
    what = "output" if key == "output_error" else "weight"
    return section(title, table(_LAYER_HEAD, map(_layer_row, ten), text=2), f"By relative {what} error.")


def _every_layer(layers: Sequence[Layer]) -> str:
    if not layers:
        return ""
    every = table(_LAYER_HEAD, map(_layer_row, layers), text=2)
    return f"<section><details><summary>All {len(layers):,} matrices</summary>{every}</details></section>"


# ------------------------------------------------------------------------------------------- policy and calibration


def _policy(layers: Sequence[Layer]) -> str:
    """How many matrices of each module are of which kind, and by name those that differ from their siblings."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        found = _NUMBERED.fullmatch(layer.name)
        groups.setdefault(f"{found[1]}.*.{found[3]}" if found else layer.name, []).append(layer)
    if not groups:
        return ""
    kinds = [kind for kind in _KINDS if any(layer.kind == kind for layer in layers)]
    rows, odd = [], []
    for module, group in groups.items():
        counts = Counter(layer.kind for layer in group)
        usual = counts.most_common(1)[0][0]
        rows.append([_name(module), *(str(counts[kind]) if counts[kind] else _NONE for kind in kinds)])
        odd += [layer for layer in group if layer.kind != usual]
    wide = [layer.name for layer in layers if layer.kind == "bf16"]
    notes = _exceptions(odd) + (
        f"<p>Left in bf16: {', '.join(map(_name, wide))}.</p>" if wide else "<p>No matrix was left in bf16.</p>"
    )
    intro = "Matrices of each module by the kind they are stored in. Norms and biases are never quantized."
    return section("Policy", f'<div class="narrow">{table(("Module", *kinds), rows)}</div>{notes}', intro)


def _exceptions(odd: Sequence[Layer]) -> str:
    if not odd:
        return ""
    names = ", ".join(f"{_name(layer.name)} {_kind(layer.kind)}" for layer in odd)
    return f"<p>Unlike most of their module: {names}.</p>"


def _calibration(calibration: Coverage | None) -> str:
    if calibration is None:
        return section("Calibration", '<p class="quiet">Nothing was calibrated; weights were rounded to nearest.</p>')
    samples, visual, text = calibration.samples, calibration.visual_tokens, calibration.text_tokens
    facts = [
        ("Source", escape(calibration.source)),
        ("Samples", f"{samples:,}"),
        ("Tokens", f"{visual + text:,}: {visual:,} of pictures, {text:,} of text"),
        ("Seed", str(calibration.seed)),
        ("Manifest", f'<code class="long">sha256 {escape(calibration.sha256)}</code>'),
    ]
    listed = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in facts)
    pictures = sorted(calibration.pictures.items(), key=lambda item: (len(item[0]), item[0]))
    columns = [
        ("Samples by task", list(calibration.tasks.items())),
        ("Pictures in a sample", pictures),
        ("Tokens", [("pictures", visual), ("text", text)]),
    ]
    lists = "".join(f"<div><h3>{title}</h3>{_bar_list(items)}</div>" for title, items in columns if items)
    return section("Calibration", f'<dl class="facts">{listed}</dl><div class="columns">{lists}</div>')


def _bar_list(items: Sequence[tuple[str, int]]) -> str:
    most = max((count for _, count in items), default=0) or 1
    rows = "".join(
        f"<tr><td>{escape(str(label))}</td><td>{bar('after', count / most)}</td><td class=num>{count:,}</td></tr>"
        for label, count in items
    )
    return f'<table class="list"><tbody>{rows}</tbody></table>'


# beside the style of every page
_STYLE = """
:root{--after:#2467d6;--before:#a9b4c4;--rtn:#c77b0a;
--p0:#7a5af0;--p1:#2467d6;--p2:#0f9d7a;--p3:#dd8a07;--p4:#8a94a6;--p5:#c2408f;--int4:#2467d6;--int8:#0f8567;--bf16:#7b6a2e}
@media(prefers-color-scheme:dark){:root{--after:#6ea4ff;--before:#5d6a7d;--rtn:#e5a549;
--p0:#9d85ff;--p1:#5f97f5;--p2:#35b894;--p3:#e5a549;--p4:#7d8899;--p5:#e06bb2;--int4:#6ea4ff;--int8:#4cc9a4;--bf16:#cdb663}}
.narrow{max-width:620px;margin-bottom:12px}th{white-space:nowrap;vertical-align:middle}
code{overflow-wrap:normal}.long{overflow-wrap:anywhere}
.kind{font-size:12px;font-weight:650;padding:1px 7px;border-radius:9px;border:1px solid currentColor;white-space:nowrap}
.kind.int4{color:var(--int4)}.kind.int8{color:var(--int8)}.kind.bf16{color:var(--bf16)}
.key.ring{background:none;border:2px solid var(--after);border-radius:50%}
.before{--c:var(--before)}.after{--c:var(--after)}.rtn{--c:var(--rtn)}.p0{--c:var(--p0)}.p1{--c:var(--p1)}
.p2{--c:var(--p2)}.p3{--c:var(--p3)}.p4{--c:var(--p4)}.p5{--c:var(--p5)}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:0}
.facts dt{color:var(--soft)}.facts dd{margin:0;min-width:0}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:8px 36px}
.list td{padding:3px 8px;border:0}.list td:nth-child(2){width:55%}
.list td:first-child{white-space:nowrap;padding-left:0}
@media(max-width:600px){.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:8px}
th,th.num{white-space:normal}td>code{display:inline-block;min-width:132px}}
"""
