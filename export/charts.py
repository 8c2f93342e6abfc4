"""Small SVG drawings for a page: a bar, a bar of shares, a line chart on a logarithmic scale.

Colours come from the page: a class sets the CSS variable --c, and --ink, --soft, --line, --card are the page's own.
Every function returns markup whose words are escaped; sizes are in CSS pixels of a 264-wide figure.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["STYLE", "Line", "bar", "bounds", "line_chart", "shares"]

_WIDTH, _HEIGHT = 264, 172
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 26, 34

STYLE = """
svg{display:block;width:100%;height:auto}figure{margin:0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(236px,1fr));gap:14px 18px}
.charts text{font-size:10.5px;fill:var(--soft)}.charts .title{font-size:12.5px;font-weight:650;fill:var(--ink)}
.grid{stroke:var(--line);stroke-width:1}.line{fill:none;stroke:var(--c);stroke-width:1.6;stroke-linejoin:round}
.line.rtn{stroke-dasharray:4 3}.dot{fill:var(--c)}.dot.ring{fill:var(--card);stroke:var(--c);stroke-width:1.6}
.bar{display:block;height:9px;margin:2px 0;min-width:84px;border-radius:2px;background:var(--line)}
.bar i{display:block;height:9px;border-radius:2px;background:var(--c)}.bars{min-width:90px}
.shares{display:flex;height:26px;border-radius:6px;overflow:hidden;gap:2px;margin-bottom:10px}
.shares i{background:var(--c);min-width:2px}
"""


@dataclass(frozen=True)
class Line:
    """One line: its class, its points (x, y, hint), and the x whose dot is a ring. Points without a hint get no dot."""

    style: str
    points: Sequence[tuple[int, float, str]]
    rings: frozenset[int] = frozenset()


def bar(style: str, share: float) -> str:
    """A horizontal bar filled to `share`, 0 to 1."""
    return f'<span class="bar {style}"><i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></span>'


def shares(items: Sequence[tuple[str, float, str]]) -> str:
    """One bar cut into (class, share, hint)."""
    cells = "".join(
        f'<i class="{style}" style="flex:{share:.5f}" title="{escape(hint)}"></i>' for style, share, hint in items
    )
    return f'<div class="shares">{cells}</div>'


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """The range of a logarithmic axis around positive values: the next 1, 2 or 5 times a power of ten outwards."""
    if not values:
        return 0.001, 1.0
    steps = [m * 10.0**e for e in range(-12, 7) for m in (1, 2, 5)]
    low = max((s for s in steps if s <= min(values) * 1.0001), default=steps[0])
    high = min((s for s in steps if s >= max(values) * 0.9999), default=steps[-1])
    return (low, high) if low < high else (low / 2, high * 2)


def _y_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten inside the range, thinned to at most eight."""
    for mantissas in ((1, 2, 5), (1,)):
        ticks = [m * 10.0**e for e in range(-12, 7) for m in mantissas]
        ticks = [t for t in ticks if low * 0.9999 <= t <= high * 1.0001]
        if 2 <= len(ticks) <= 8:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 8)] if len(ticks) > 8 else [low, high]


def _x_ticks(last: int) -> list[int]:
    """Layer numbers from 0, the last one included, at most seven."""
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100, 200) if last / s <= 6 or s == 200)
    ticks = list(range(0, last + 1, step))
    if last - ticks[-1] < step * 0.6 and len(ticks) > 1:
        ticks.pop()
    return ticks if ticks and ticks[-1] == last else [*ticks, last]


def _tick_text(value: float) -> str:
    """A relative error as percent: 0.002 -> "0.2 %"."""
    percent = 100 * value
    return f"{percent:.0e} %" if percent < 0.001 else f"{percent:g} %"


def line_chart(title: str, lines: Sequence[Line], *, last: int, low: float, high: float, unit: str) -> str:
    """Lines over x = 0..last, y from `low` to `high` logarithmic and labelled in percent.

    unit: what x counts, written below the axis. Values outside the range are drawn on its edge.
    """
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    span = math.log(high / low)

    def x(index: float) -> float:
        return _LEFT + 6 + (right - _LEFT - 12) * (index / last if last else 0.5)

    def y(value: float) -> float:
        share = math.log(min(max(value, low), high) / low) / span
        return bottom - (bottom - _TOP) * share

    parts = [f'<text class="title" x="0" y="12">{escape(title)}</text>']
    for tick in _y_ticks(low, high):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{_tick_text(tick)}</text>')
    for tick in _x_ticks(last):
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 14}" text-anchor="middle">{tick}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(unit)}</text>')
    for line in lines:
        parts += _draw(line, x, y)
    label = escape(f"{title}: relative error by {unit}")
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _draw(line: Line, x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    path = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value, _ in line.points)
    parts = [f'<polyline class="line {line.style}" points="{path}"/>'] if line.points else []
    for index, value, hint in line.points:
        if hint:
            ring = " ring" if index in line.rings else ""
            place = f'cx="{x(index):.1f}" cy="{y(value):.1f}" r="{2.8 if ring else 2.2}"'
            parts.append(f'<circle class="dot {line.style}{ring}" {place}><title>{escape(hint)}</title></circle>')
    return parts
