"""Runs of `migician-bench latency` as one HTML page: where the time goes, how it grows, what the machine would allow.

The page needs nothing but itself: styles and drawings are inline, there is no script, and it follows the reader's light
or dark setting. Every text of a run is escaped.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ...runtime.report.page import legend, page, section, table, tiles
from ..engines import PHASES
from .figures import STYLE as FIGURE_STYLE
from .figures import Curve, Mark, curves, duration, roofline, stacked
from .load import busy
from .text import ceiling_line

__all__ = ["render"]

Result = Mapping[str, Any]
_OURS = "migician"
_NONE = "–"
_DRAWN = ("vision", "prefill", "decode")


def render(results: Sequence[Result]) -> str:
    """Returns the whole page as HTML."""
    sections = [
        _headline(results),
        _phases(results),
        _growth(results),
        _ceilings(results),
        _every_figure(results),
        *(_circumstances(result) for result in results),
    ]
    return page(f"Latency report: {_names(results)}", sections, style=_STYLE + FIGURE_STYLE)


# ---------------------------------------------------------------------------------------------------------------- words


def _label(result: Result) -> str:
    """The model of a run and how it is stored; the mode is not said twice."""
    name, mode = str(result["model"].get("name")), str(result["model"].get("mode"))
    label = name if mode.lower() in name.lower() else f"{name} {mode}"
    backend = result["settings"].get("backend", "native")  # files of the first releases do not name it
    label += "" if backend == "native" else f" on {backend}"
    return label if result["settings"].get("precision") != "fp32" else f"{label}, fp32 arithmetic"


def _engine_label(result: Result, engine: str) -> str:
    return f"migician {_label(result)}" if engine == _OURS else engine


def _case_label(case: Mapping[str, Any]) -> str:
    plural = "picture" if case["pictures"] == 1 else "pictures"
    return f"{case['pictures']} {plural} of {case['width']} × {case['height']}, {case['new_tokens']} new tokens"


def _names(results: Sequence[Result]) -> str:
    return " · ".join(dict.fromkeys(_label(result) for result in results))


def _p50(entry: Mapping[str, Any], phase: str) -> float | None:
    figures = entry.get(f"{phase}_ms")
    return figures["p50"] if figures else None


def _megabytes(value: float) -> str:
    return f"{value / 1000:.2f} GB" if value >= 1000 else f"{value:.0f} MB"


# ------------------------------------------------------------------------------------------------------------- headline


def _headline(results: Sequence[Result]) -> str:
    first = results[0]
    case = max(first["cases"], key=lambda c: (len(c["engines"]), c["pictures"] * c["width"] * c["height"]))
    ours = case["engines"][_OURS]
    found = [("Answer", duration(ours["total_ms"]["p50"]), f"median; {_case_label(case)}")]
    first_token = sum(_p50(ours, phase) or 0 for phase in ("preprocess", "vision", "prefill"))
    found.append(("First token", duration(first_token), "pictures and prompt read"))
    if ours.get("tokens_per_s"):
        found.append(("Decoding", f"{ours['tokens_per_s']:.3g} tokens/s", _step_note(ours)))
    weights = first["model"].get("bytes")
    of_it = f"{_megabytes(weights / 1e6)} of it the model's file" if isinstance(weights, int | float) else "resident"
    found.append(("Peak memory", _megabytes(ours["peak_rss_mb"] * 1.048576), of_it))
    for name, ratio in case["ratios"].items():
        if "total" in ratio:
            found.append((f"Beside {name}", _times(ratio["total"]), "its median time over ours, whole answer"))
    if ours.get("energy_j") is not None:
        found.append(("Energy", f"{ours['energy_j']:.3g} J", "of the whole machine, one answer"))
    machines = "; ".join(dict.fromkeys(str(result["machine"].get("cpu")) for result in results))
    return (
        f'<header><p class="over">Latency report</p><h1>{escape(_names(results))}</h1>'
        f'<p class="sub"><span>{escape(machines)}</span> <span>{escape(_threads(first))}</span></p></header>'
        + tiles([(name, escape(figure), note) for name, figure, note in found], 3 if len(found) % 4 else 4)
    )


def _step_note(ours: Mapping[str, Any]) -> str:
    step = ours.get("step_ms")
    return f"p50 {duration(step['p50'])}, p99 {duration(step['p99'])} a token" if step else ""


def _threads(result: Result) -> str:
    threads = result["settings"].get("threads")
    return f"{threads} thread{'' if threads == 1 else 's'}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f} ×" if ratio >= 10 else f"{ratio:.2f} ×"


# --------------------------------------------------------------------------------------------------------------- phases


def _phases(results: Sequence[Result]) -> str:
    """Stacked bars, grouped by question; the runs of several results stand together where they asked the same."""
    groups: dict[str, list[tuple[str, Any, str, str]]] = {}
    seen = set()
    for result in results:
        for case in result["cases"]:
            for engine, entry in case["engines"].items():
                seen |= {phase for phase in PHASES if _p50(entry, phase)}
                groups.setdefault(_case_label(case), []).append(_bar(result, case, engine, entry))
    body = "".join(f"<h3>{escape(title)}</h3>{stacked(rows)}" for title, rows in groups.items())
    keys = legend((phase, phase) for phase in PHASES if phase in seen)
    intro = "Medians. Bars of one question share their scale; pictures are new in every repeat, so nothing was kept."
    notes = (busy(result["load"][0], result["settings"]["threads"]) for result in results)
    warnings = "".join(
        f"<p><b>{escape(_label(r))}: {note}.</b></p>" for r, note in zip(results, notes, strict=True) if note
    )
    return section("Where the time goes", warnings + keys + body, intro)


def _bar(result: Result, case: Mapping[str, Any], engine: str, entry: Mapping[str, Any]) -> tuple[str, Any, str, str]:
    parts = []
    for phase in PHASES:
        if (value := _p50(entry, phase)) is not None:
            parts.append((phase, value, f"{phase}: {duration(value)}"))
    ratio = case["ratios"].get(engine, {}).get("total")
    note = f"{_times(ratio)} ours" if ratio else ""
    return _engine_label(result, engine), parts, duration(_p50(entry, "total") or 0), note


# --------------------------------------------------------------------------------------------------------------- growth


def _growth(results: Sequence[Result]) -> str:
    peers = dict.fromkeys(n for r in results for c in r["cases"] for n in c["engines"] if n != _OURS)
    styles = {name: f"peer{i % 3}" for i, name in enumerate(peers)}
    charts = [chart for r in results for chart in (*_over_pictures(r, styles), *_over_sizes(r, styles))]
    if not charts:
        return ""
    rings = [(f"ring {style}", f"{name}, whole answer") for name, style in styles.items()]
    keys = legend([*((phase, phase) for phase in _DRAWN), ("total", "whole answer"), *rings])
    body = "".join(f"<figure>{chart}</figure>" for chart in charts)
    return section("How it grows", f'{keys}<div class="pair">{body}</div>')


def _over_pictures(result: Result, styles: Mapping[str, str]) -> list[str]:
    """A chart for each size that was asked with several numbers of pictures."""
    groups: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for case in result["cases"]:
        groups.setdefault((case["width"], case["height"]), []).append(case)
    found = []
    for (width, height), cases in groups.items():
        if len({case["pictures"] for case in cases}) > 1:
            cases.sort(key=lambda case: case["pictures"])
            lines = _lines(styles, cases, [float(case["pictures"]) for case in cases])
            title = f"{_label(result)}: pictures of {width} × {height}"
            found.append(curves(title, lines, x_unit="pictures", x_words=lambda x: f"{x:g}"))
    return found


def _over_sizes(result: Result, styles: Mapping[str, str]) -> list[str]:
    """A chart for each number of pictures that was asked in several sizes."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for case in result["cases"]:
        groups.setdefault(case["pictures"], []).append(case)
    found = []
    for count, cases in groups.items():
        if len({(case["width"], case["height"]) for case in cases}) > 1:
            cases.sort(key=lambda case: case["width"] * case["height"])
            lines = _lines(styles, cases, [case["width"] * case["height"] / 1e6 for case in cases])
            title = f"{_label(result)}: {count} picture{'' if count == 1 else 's'} of growing size"
            found.append(curves(title, lines, x_unit="megapixels a picture", x_words=lambda x: f"{x:.2g}"))
    return found


def _lines(styles: Mapping[str, str], cases: Sequence[Mapping[str, Any]], xs: Sequence[float]) -> list[Curve]:
    ours = [case["engines"][_OURS] for case in cases]
    lines = []
    for phase in ("total", *_DRAWN):
        points = [(x, (_p50(entry, phase) or 0) / 1000) for x, entry in zip(xs, ours, strict=True)]
        lines.append(Curve(phase, phase, points))
    for name, style in styles.items():
        asked = [(x, case["engines"][name]) for x, case in zip(xs, cases, strict=True) if name in case["engines"]]
        points = [(x, (_p50(entry, "total") or 0) / 1000) for x, entry in asked]
        if points:
            lines.append(Curve(style, name, points, peer=True))
    return lines


# ------------------------------------------------------------------------------------------------------------- ceilings


def _ceilings(results: Sequence[Result]) -> str:
    body = ""
    for result in results:
        if result.get("ceilings"):
            rows = [row for case in result["cases"] for row in _share_rows(case)]
            head = ("Question", "Phase", "Share, 0 to 100 %", "share", "took", "at the ceiling")
            heading = f"<h3>{escape(_label(result))}: {escape(ceiling_line(result['ceilings']))}</h3>"
            chart = f'<figure class="roofline">{_roofline(result)}</figure>'
            body += f"{heading}{chart}{table(head, rows, text=3)}"
    if not body:
        return ""
    intro = (
        "The least time that the machine needs for a phase's products and attention, or for reading its weights where "
        "that takes longer, as a share of the time it took. Ceilings are medians of measurements before each repeat; "
        "norms, softmax and activations are not counted. Where int4 takes fewer instructions than int8 (AVX2), a phase "
        "can pass the int8 ceiling."
    )
    return section("Beside the machine's own ceilings", body, intro)


def _share_rows(case: Mapping[str, Any]) -> Iterable[list[str]]:
    ours = case["engines"][_OURS]
    steps = {"decode": case["new_tokens"] - 1}
    for phase, share in ours.get("shares", {}).items():
        floor, took = case["work"][phase].get("floor_ms"), _p50(ours, phase)
        if phase in _DRAWN and floor is not None and took is not None:
            share_bar = f'<span class="bar {phase}"><i style="width:{100 * min(max(share, 0), 1):.1f}%"></i></span>'
            least = floor * steps.get(phase, 1)
            yield [
                f"{case['pictures']} × {case['width']} × {case['height']}",
                phase,
                share_bar,
                f"{100 * share:.1f} %",
                duration(took),
                duration(least),
            ]


def _roofline(result: Result) -> str:
    """The phases of the first question with the most pictures, under the machine's roofs."""
    ceilings = result["ceilings"]
    case = max(result["cases"], key=lambda c: (c["pictures"], -c["width"] * c["height"]))
    ours = case["engines"][_OURS]
    marks = []
    for phase in _DRAWN:
        work, took = case["work"][phase], _p50(ours, phase)
        steps = case["new_tokens"] - 1 if phase == "decode" else 1
        if took and steps and work.get("floor_ms") and work.get("bytes"):
            rate, roof = 1000 * work["operations"] * steps / took, 1000 * work["operations"] / work["floor_ms"]
            marks.append(Mark(phase, phase, work["operations"] / work["bytes"], rate, roof))
    named = [("int8", ceilings["int8_ops"]), ("bf16", ceilings["bf16_ops"]), ("fp32", ceilings["f32_ops"])]
    roofs = sorted(((f"{n} {v / 1e9:,.0f}", v) for n, v in named if v), key=lambda roof: -roof[1])
    title = f"Operations a second, GOPS: {case['pictures']} × {case['width']} × {case['height']}"
    return roofline(title, read_bytes=ceilings["read_bytes"], roofs=roofs, marks=marks)


# --------------------------------------------------------------------------------------------------------- every figure


def _every_figure(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        for case in result["cases"]:
            for engine, entry in case["engines"].items():
                rows.append(_figure_row(result, case, engine, entry))
    head = ("Question", "Engine", *PHASES, "total", "tokens/s", "peak", "energy")
    spread = table(
        ("Question", "Engine", "Phase", "p50", "p90", "p99"),
        (row for r in results for c in r["cases"] for e, x in c["engines"].items() for row in _spread(r, c, e, x)),
        text=3,
    )
    details = f"<details><summary>Every phase's p50, p90 and p99</summary>{spread}</details>"
    return section("Every figure", table(head, rows, text=2) + details, "Medians over the repeats.")


def _short(case: Mapping[str, Any]) -> str:
    return f"{case['pictures']} × {case['width']} × {case['height']}, {case['new_tokens']} new"


def _figure_row(result: Result, case: Mapping[str, Any], engine: str, entry: Mapping[str, Any]) -> list[str]:
    times = [duration(v) if (v := _p50(entry, p)) is not None else _NONE for p in (*PHASES, "total")]
    rate, energy = entry.get("tokens_per_s"), entry.get("energy_j")
    return [
        escape(_short(case)),
        escape(_engine_label(result, engine)),
        *times,
        f"{rate:.3g}" if rate else _NONE,
        _megabytes(entry["peak_rss_mb"] * 1.048576),
        f"{energy:.3g} J" if energy is not None else _NONE,
    ]


def _spread(result: Result, case: Mapping[str, Any], engine: str, entry: Mapping[str, Any]) -> Iterable[list[str]]:
    for phase in (*PHASES, "total", "step"):
        if figures := entry.get(f"{phase}_ms"):
            name = "each token" if phase == "step" else phase
            values = [duration(figures[p]) for p in ("p50", "p90", "p99")]
            yield [escape(_short(case)), escape(_engine_label(result, engine)), name, *values]


def _circumstances(result: Result) -> str:
    """What ran where, as every figure has to say."""
    machine, settings, model = result["machine"], result["settings"], result["model"]
    versions = {k: v for engine in result["engines"].values() for k, v in engine.get("versions", {}).items()}
    load = ["unknown" if v is None else f"{v:.2f}" for v in result["load"]]
    facts = [
        ("Model", f"{model.get('name')} ({model.get('mode')}, {_megabytes((model.get('bytes') or 0) / 1e6)})"),
        ("Machine", f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB"),
        ("Instructions", ", ".join(map(str, machine.get("flags") or [])) or "none of those that matter here"),
        ("System", f"{machine.get('system')}, Python {machine.get('python')}"),
        ("Versions", ", ".join([f"migician {machine.get('migician')}", *(f"{k} {v}" for k, v in versions.items())])),
        (
            "Repeats",
            f"{settings.get('repeat')}, each in a process of its own, {settings.get('warm_up')} warm-up before",
        ),
        ("Load average", f"{load[0]} before, {load[1]} after; the run itself counts {settings.get('threads')}"),
        (
            "Energy",
            ", ".join({str(e["meter"]) for e in result["engines"].values() if e.get("meter")}) or "not reported here",
        ),
        ("Date", str(result["date"])),
    ]
    if machine.get("board"):
        facts.insert(2, ("Board", str(machine["board"])))
    listed = "".join(f"<dt>{label}</dt><dd>{escape(value)}</dd>" for label, value in facts)
    if result["command"]:
        listed += f'<dt>Command</dt><dd><code class="long">{escape(result["command"])}</code></dd>'
    for entry in result["missing"]:
        listed += f"<dt>Left out</dt><dd>{escape(str(entry.get('engine')))}: {escape(str(entry.get('why')))}</dd>"
    return section(f"How it was measured: {_label(result)}", f'<dl class="facts">{listed}</dl>')


_STYLE = """
h3{margin:0 0 10px}table+h3{margin-top:22px}td{white-space:nowrap}summary{margin-top:12px}.scroll+h3{margin-top:24px}
.bar{display:block;height:9px;min-width:90px;border-radius:3px;background:var(--line)}
.bar i{display:block;height:9px;border-radius:3px;background:var(--c)}.roofline{margin:4px 0 14px}
.key.ring{background:none;border:2px solid var(--c);border-radius:50%}
.preprocess{--c:var(--t2)}.vision{--c:var(--s0)}.prefill{--c:var(--s4)}.decode{--c:var(--s1)}.total{--c:var(--ink)}
.peer0{--c:var(--s2)}.peer1{--c:var(--s3)}.peer2{--c:var(--s5)}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:0}
.facts dt{color:var(--soft)}.facts dd{margin:0;min-width:0;overflow-wrap:anywhere}
@media(max-width:600px){.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:8px}
.stack{grid-template-columns:minmax(0,1fr) max-content;gap:2px 10px;grid-auto-flow:dense}
.stack .who{grid-column:1;font-size:13px}.stack .who+div{grid-column:1/-1;margin-bottom:8px}.stack .long{grid-column:2}}
"""
