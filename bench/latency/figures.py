"""The drawings of a latency page: stacked bars, curves over what grows, a roofline.

A class sets the CSS variable --c; --ink, --soft, --line and --card are the page's own. Every word is escaped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["STYLE", "Curve", "Mark", "curves", "duration", "roofline", "stacked"]

_WIDTH, _HEIGHT = 380, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 14.0, 30.0, 40.0

STYLE = """
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:18px 28px}
figure{margin:0;max-width:560px}svg{display:block;width:100%;height:auto}
svg text{font-size:11px;fill:var(--soft)}svg .title{font-size:13px;font-weight:650;fill:var(--ink)}
svg .word{fill:var(--ink)}svg .grid{stroke:var(--line);stroke-width:1}
svg .curve{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
svg .curve.peer{stroke-dasharray:5 4;stroke-width:1.5}
svg .roof{stroke:var(--soft);stroke-width:1.4;fill:none}svg .drop{stroke:var(--c);stroke-width:1.4;stroke-dasharray:2 3}
svg .dot{fill:var(--c)}svg .dot.hollow{fill:var(--card);stroke:var(--c);stroke-width:1.8}
.stack{display:grid;
grid-template-columns:minmax(96px,168px) minmax(0,1fr) minmax(84px,max-content);gap:7px 14px;align-items:center;
margin-bottom:20px}
.stack:last-child{margin-bottom:0}.stack .who{font-size:14px}
.stack .long{font-variant-numeric:tabular-nums;font-size:14px;
text-align:right;font-weight:600}.stack .long small{color:var(--soft);font-weight:400;display:block;font-size:12px}
.stack .bars{display:flex;gap:1px;height:22px;border-radius:5px;overflow:hidden;min-width:3px}
.stack .bars i{background:var(--c);display:block;min-width:1px}
"""


def duration(ms: float) -> str:
    """Milliseconds as people say them: 0.42 ms, 87 ms, 3.21 s, 75.4 s, 4 min 10 s."""
    if ms < 1000:
        return f"{ms:.2g} ms" if ms < 10 else f"{ms:.0f} ms"
    seconds = ms / 1000
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"


def stacked(rows: Sequence[tuple[str, Sequence[tuple[str, float, str]], str, str]]) -> str:
    """One bar a row, all on one scale: (words, [(class, length, hint)], value, words below the value)."""
    longest = max((sum(length for _, length, _ in parts) for _, parts, _, _ in rows), default=0) or 1
    cells = []
    for words, parts, value, note in rows:
        whole = sum(length for _, length, _ in parts)
        pieces = "".join(
            f'<i class="{style}" style="flex:{max(length, 1e-9) / (whole or 1):.5f}" title="{escape(hint)}"></i>'
            for style, length, hint in parts
        )
        below = f"<small>{escape(note)}</small>" if note else ""
        cells.append(
            f'<div class="who">{escape(words)}</div>'
            f'<div><div class="bars" style="width:{100 * whole / longest:.2f}%">{pieces}</div></div>'
            f'<div class="long">{escape(value)}{below}</div>'
        )
    return f'<div class="stack">{"".join(cells)}</div>'


@dataclass(frozen=True)
class Curve:
    """A line of a chart: its class, its points (x, y) and what the pointer is told of them. peer: drawn dashed."""

    style: str
    name: str
    points: Sequence[tuple[float, float]]
    peer: bool = False


def _steps(high: float) -> list[float]:
    """Round numbers from 0 to at least `high`, four to seven of them."""
    step = next(m * 10.0**e for e in range(-6, 10) for m in (1, 2, 5) if high <= 5 * m * 10.0**e)
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def _frame(title: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'<text class="title" x="0" y="14">{escape(title)}</text>{"".join(body)}</svg>'
    )


def curves(title: str, lines: Sequence[Curve], *, x_unit: str, x_words: Callable[[float], str]) -> str:
    """Seconds over something that grows, both from 0; x has a tick at every point of the first line."""
    top = max((y for line in lines for _, y in line.points), default=1) or 1
    last = max((x for line in lines for x, _ in line.points), default=1) or 1
    ticks = _steps(top)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + (right - _LEFT) * x / last, bottom - (bottom - _TOP) * y / ticks[-1]

    body = []
    for tick in ticks:
        y = at(0, tick)[1]
        body.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:g} s</text>')
    taken = -1e9
    for value, _ in lines[0].points if lines else ():
        x = at(value, 0)[0]
        if x - taken > 26:
            body.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(x_words(value))}</text>')
            taken = x
    body.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_unit)}</text>')
    for line in lines:
        places = [at(x, y) for x, y in line.points]
        peer = " peer" if line.peer else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        body.append(f'<polyline class="curve {line.style}{peer}" points="{path}"/>')
        for (x, y), (value, seconds) in zip(places, line.points, strict=True):
            hint = escape(f"{line.name}, {x_words(value)}: {duration(1000 * seconds)}")
            body.append(
                f'<circle class="dot {line.style}{" hollow" if line.peer else ""}" cx="{x:.1f}" cy="{y:.1f}" r="3.4">'
                f"<title>{hint}</title></circle>"
            )
    return _frame(title, body)


@dataclass(frozen=True)
class Mark:
    """One phase on a roofline: its class and name, operations per byte, operations per second, those it could have."""

    style: str
    name: str
    intensity: float
    rate: float
    roof: float


def roofline(title: str, *, read_bytes: float, roofs: Sequence[tuple[str, float]], marks: Sequence[Mark]) -> str:
    """Operations per second over operations per byte, both logarithmic; a dot stands under the roof that holds for it.

    read_bytes: bytes per second.   roofs: (name, operations per second), the highest first.
    """
    xs = [m.intensity for m in marks] + [rate / read_bytes for _, rate in roofs]
    ys = [m.rate for m in marks] + [rate for _, rate in roofs]
    x0, x1 = math.floor(math.log10(min(xs)) - 0.2), math.ceil(math.log10(max(xs)) + 0.1)
    y0, y1 = math.floor(math.log10(min(ys)) - 0.1), math.ceil(math.log10(max(ys)) + 0.05)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x0) / (x1 - x0)
        up = (math.log10(y) - y0) / (y1 - y0)
        return _LEFT + (right - _LEFT) * across, bottom - (bottom - _TOP) * min(max(up, 0.0), 1.0)

    body = []
    for power in range(y0, y1 + 1):
        y = at(10.0**x0, 10.0**power)[1]
        body.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_giga(10.0**power)}</text>')
    for power in range(x0, x1 + 1):
        x = at(10.0**power, 10.0**y0)[0]
        anchor = "end" if power == x1 else "middle"
        body.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{10.0**power:,.6g}</text>')
    middle = (_LEFT + right) / 2
    body.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">operations for each byte of weights</text>')
    # the slope of reading begins where it enters the frame
    begin = max(10.0**x0, 10.0**y0 / read_bytes)
    for i, (name, rate) in enumerate(roofs):
        knee, end = at(rate / read_bytes, rate), at(10.0**x1, rate)
        start = at(begin, begin * read_bytes)
        slope = f"{start[0]:.1f},{start[1]:.1f} " if i == 0 else ""
        body.append(f'<polyline class="roof" points="{slope}{knee[0]:.1f},{knee[1]:.1f} {end[0]:.1f},{end[1]:.1f}"/>')
        words = knee[1] + (13 if i else -5)  # the highest above its line, the others below theirs
        body.append(f'<text x="{knee[0] + 8:.1f}" y="{words:.1f}">{escape(name)}</text>')
    taken: list[tuple[float, float]] = []
    for mark in marks:
        x, y = at(mark.intensity, mark.rate)
        words = y + 17
        while any(abs(x - other) < 44 and abs(words - height) < 13 for other, height in taken):
            words += 13
        taken.append((x, words))
        _, roof = at(mark.intensity, mark.roof)
        hint = escape(
            f"{mark.name}: {_giga(mark.rate)} of {_giga(mark.roof)} GOPS, {100 * mark.rate / mark.roof:.0f} %"
        )
        body.append(f'<line class="drop {mark.style}" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{roof:.1f}"/>')
        body.append(
            f'<circle class="dot {mark.style}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{hint}</title></circle>'
        )
        body.append(f'<text class="word" x="{x:.1f}" y="{words:.1f}" text-anchor="middle">{escape(mark.name)}</text>')
    return _frame(title, body)


def _giga(rate: float) -> str:
    return f"{rate / 1e9:,.0f}" if rate >= 1e11 else f"{rate / 1e9:.3g}"
