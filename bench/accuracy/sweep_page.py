"""The page and the table of a sweep: accuracy against time, and where the time goes."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ...runtime.report.charts import Point, Series, scatter
from ...runtime.report.page import legend, page, section, table
from .markdown import markdown_table

__all__ = ["render_html", "render_markdown"]

_PHASES = (("vision_ms", "vision", "p1"), ("prefill_ms", "prefill", "p2"), ("decode_ms", "decode", "p3"))
_EXPLAINED = (
    "AVE is the mean over the tasks of the percentage of answers with IoU ≥ 0.5. Times are medians over the questions, "
    "memory is the peak of the process. Differences within the intervals may be chance."
)


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _mb(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _side(row: Mapping[str, Any]) -> str:
    return f"{row['max_side'] or 'native'}"


def _where(result: Mapping[str, Any]) -> str:
    machine, threads = result["machine"], result["threads"]
    used = f", {threads} thread{'s' if threads > 1 else ''}" if threads else ""
    return f"{machine['cpu']}, {machine['cores']} cores{used}"


def _what(result: Mapping[str, Any]) -> str:
    prompt = ", asked without the request for a format" if result["bare"] else ""
    least = f", pictures of at least {result['min_pixels']:,} pixels" if result["min_pixels"] else ""
    return f"{result['benchmark']}: {result['questions']:,} questions of {result['tasks']} tasks{prompt}{least}"


def render_markdown(result: Mapping[str, Any]) -> str:
    """Returns the table as Markdown."""
    rows = []
    for row in result["rows"]:
        low, high = row["interval"]
        times = [_ms(row[key]) for key in ("vision_ms", "prefill_ms", "decode_ms", "total_ms")]
        accuracy = [f"{row['ave']:.1f}", f"{low:.1f} to {high:.1f}", f"{row['iou']:.3f}"]
        memory = [f"{row['peak_rss_mb']:,.0f}", _mb(row["weights_mb"])]
        tokens = f"{row['prompt_tokens']:,.0f}"
        rows.append([row["model"], _side(row), *accuracy, tokens, *times, *memory, "yes" if row["best"] else ""])
    head = (
        "model", "longer side", "AVE", "95 %", "mean IoU", "prompt tokens", "vision ms", "prefill ms", "decode ms",
        "total ms", "peak MB", "weights MB", "unbeaten",
    )  # fmt: skip
    note = '"Unbeaten": no other row is at least as fast and as accurate, and better in one of the two.'
    return (
        f"# Sweep: {_what(result)}\n\n{_where(result)}. {_EXPLAINED} {note}\n\n{markdown_table(head, rows, text=2)}\n"
    )


def render_html(result: Mapping[str, Any]) -> str:
    """Returns the page."""
    rows = result["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    header = (
        f'<header><p class="over">Accuracy and latency</p><h1>{escape(", ".join(models))}</h1>'
        f'<p class="sub"><span>{escape(_what(result))}</span><span>{escape(_where(result))}</span></p></header>'
    )
    return page("Accuracy and latency", [header, _plot(rows, models), _table(rows, models)], style=_STYLE)


def _plot(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    series = []
    for i, model in enumerate(models):
        own = sorted((row for row in rows if row["model"] == model), key=lambda row: row["max_side"] or 1 << 30)
        points = [Point(row["total_ms"], row["ave"], _side(row), _hint(row), row["interval"]) for row in own]
        series.append(Series(f"s{i % 6}", points))
    x_unit = "milliseconds a question, median, logarithmic"
    y_unit = "AVE at IoU ≥ 0.5, percent, with 95 % intervals"
    drawn = scatter("Accuracy against time", series, x_unit=x_unit, y_unit=y_unit, limits=(0.0, 100.0))
    keys = legend([(f"s{i % 6}", model) for i, model in enumerate(models)])
    intro = "Up is more accurate, left is faster. The word at a dot is the longer side of a picture in pixels."
    return section("What a setting costs", f"{keys}<figure>{drawn}</figure>", intro)


def _hint(row: Mapping[str, Any]) -> str:
    return (
        f"{row['model']} at {_side(row)}: AVE {row['ave']:.1f} %, {_ms(row['total_ms'])} ms, "
        f"{row['peak_rss_mb']:,.0f} MB"
    )


def _table(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    longest = max(row["total_ms"] for row in rows)
    cells = []
    for row in rows:
        low, high = row["interval"]
        name = f'<i class="key s{models.index(row["model"]) % 6}"></i>{escape(row["model"])}'
        mark = ' <i class="key best" title="unbeaten"></i>' if row["best"] else ""
        accuracy = [f"<b>{row['ave']:.1f}</b>", f"{low:.1f} to {high:.1f}", f"{row['iou']:.3f}"]
        times = [_ms(row[key]) for key in ("vision_ms", "prefill_ms", "decode_ms")]
        times.append(f"<b>{_ms(row['total_ms'])}</b>")
        memory = [f"{row['peak_rss_mb']:,.0f}", _mb(row["weights_mb"])]
        tokens = f"{row['prompt_tokens']:,.0f}"
        cells.append([name, f"{_side(row)}{mark}", _phases(row, longest), *accuracy, tokens, *times, *memory])
    head = (
        "Model", "Longer side", "Where the time goes", "AVE", "95 %", "mean IoU", "prompt tokens", "vision ms",
        "prefill ms", "decode ms", "total ms", "peak MB", "weights MB",
    )  # fmt: skip
    unbeaten = "unbeaten: no other row is at least as fast and as accurate, and better in one of the two"
    keys = legend([*((style, name) for _, name, style in _PHASES), ("best", unbeaten)])
    return section("Every setting", keys + table(head, cells, text=3), _EXPLAINED)


def _phases(row: Mapping[str, Any], longest: float) -> str:
    """One bar, as long as the time, cut into phases."""
    parts = "".join(
        f'<i class="{style}" style="width:{100 * row[key] / longest:.2f}%" title="{name} {_ms(row[key])} ms"></i>'
        for key, name, style in _PHASES
    )
    return f'<div class="phases">{parts}</div>'


_STYLE = """
:root{--p1:#7a5af0;--p2:#1699b3;--p3:#d6a300}@media(prefers-color-scheme:dark){:root{--p1:#9d85ff;--p2:#45c2da;--p3:#e5c04a}}
.p1{--c:var(--p1)}.p2{--c:var(--p2)}.p3{--c:var(--p3)}.plot{margin:0 auto;max-width:700px}.line{opacity:.55}
@media(min-width:700px){.plot text{font-size:8.5px}.plot .dot{r:3px}}
.phases{display:flex;height:10px;min-width:110px;border-radius:2px;overflow:hidden;background:var(--line)}
.phases i{background:var(--c);height:10px}.best{--c:var(--s3)}.key.best{border-radius:50%;width:9px;height:9px}
td .key.best{margin:0 0 0 5px}td:first-child,td:nth-child(2){white-space:nowrap}
@media(min-width:601px){td,th{padding:6px 8px}table{font-size:13.5px}}
"""
