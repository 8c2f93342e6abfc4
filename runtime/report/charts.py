"""Small SVG drawings for a page: bars, a line chart on a logarithmic scale, a radar, a scatter of two measures.

Colours come from the page: a class sets the CSS variable --c, and --ink, --soft, --line, --card are the page's own.
Every function returns markup whose words are escaped; sizes are in CSS pixels of a figure 264 wide, radar and scatter
400.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["STYLE", "Line", "Point", "Ring", "Series", "bar", "bounds", "line_chart", "radar", "scatter", "shares"]

_WIDTH, _HEIGHT = 264, 172
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 26, 34
_WIDE, _RADAR_HEIGHT, _SCATTER_HEIGHT = 400, 292, 290
_LETTER = 6.0  # generous width of a letter at 11 px

STYLE = """
svg{display:block;width:100%;height:auto}figure{margin:0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(236px,1fr));gap:14px 18px}
.charts text{font-size:10.5px;fill:var(--soft)}.charts .title{font-size:12.5px;font-weight:650;fill:var(--ink)}
.grid{stroke:var(--line);stroke-width:1}.line{fill:none;stroke:var(--c);stroke-width:1.6;stroke-linejoin:round}
.line.rtn{stroke-dasharray:4 3}.dot{fill:var(--c)}.dot.ring{fill:var(--card);stroke:var(--c);stroke-width:1.6}
.bar{display:block;height:9px;margin:2px 0;min-width:84px;border-radius:2px;background:var(--line)}
.bar i{display:block;height:9px;border-radius:2px;background:var(--c)}.bars{min-width:90px}
.bar{position:relative}.bar b{position:absolute;top:3.5px;height:2px;background:var(--ink);opacity:.55}
.plot{max-width:640px}.plot text{font-size:11px;fill:var(--soft)}
.plot .value,.plot .label{fill:var(--ink)}.plot .value{font-weight:600}
.plot .label,.plot .tick{paint-order:stroke;stroke:var(--card);stroke-width:2.5px;stroke-linejoin:round}
.outline{fill:var(--c);fill-opacity:.1;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}
.outline.thin{fill:none;stroke-width:1.3;stroke-dasharray:4 3}.whisker{stroke:var(--c);stroke-width:1.2;opacity:.6}
.shares{display:flex;height:26px;border-radius:6px;overflow:hidden;gap:2px;margin-bottom:10px}
.shares i{background:var(--c);min-width:2px}
"""


@dataclass(frozen=True)
class Line:
    """One line: its class, its points (x, y, hint), and the x whose dot is a ring. Points without a hint get no dot."""

    style: str
    points: Sequence[tuple[int, float, str]]
    rings: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Ring:
    """One outline of a radar: its class, its name, its value on each axis (0..1, None where there is none).

    thin: a dashed outline that is not filled, for what is there to compare with.
    """

    style: str
    name: str
    values: Sequence[float | None]
    thin: bool = False


@dataclass(frozen=True)
class Point:
    """One dot of a scatter: x > 0, y, the words beside it and under the pointer, an interval of y to draw."""

    x: float
    y: float
    label: str = ""
    hint: str = ""
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """Dots of one class, joined in their order."""

    style: str
    points: Sequence[Point]


def _clip(share: float) -> float:
    return min(max(share, 0.0), 1.0)


def bar(style: str, share: float, interval: tuple[float, float] | None = None) -> str:
    """A horizontal bar filled to `share`, 0 to 1, with a thin line over an interval of shares."""
    whisker = ""
    if interval is not None:
        low, high = (100 * _clip(v) for v in interval)
        whisker = f'<b style="left:{low:.1f}%;width:{high - low:.1f}%"></b>'
    return f'<span class="bar {style}"><i style="width:{100 * _clip(share):.1f}%"></i>{whisker}</span>'


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


# ------------------------------------------------------------------------------------------------------------- radar


def radar(title: str, axes: Sequence[str], rings: Sequence[Ring], *, values: Sequence[str] = ()) -> str:
    """Outlines over axes that run from 0 in the middle to 1; at least three axes, the first one upwards.

    values: words below the axes' names.   An outline passes by an axis on which it has no value.
    """
    middle, centre, radius = _WIDE / 2, _RADAR_HEIGHT / 2, 102.0

    def at(axis: int, share: float) -> tuple[float, float]:
        angle = 2 * math.pi * axis / len(axes)
        return middle + radius * share * math.sin(angle), centre - radius * share * math.cos(angle)

    def outline(shares_of: Sequence[float | None]) -> str:
        places = [at(i, _clip(share)) for i, share in enumerate(shares_of) if share is not None]
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)

    parts = []
    for tick in (0.25, 0.5, 0.75, 1.0):
        parts.append(f'<polygon class="grid" fill="none" points="{outline([tick] * len(axes))}"/>')
    for i, name in enumerate(axes):
        x, y = at(i, 1.0)
        parts.append(f'<line class="grid" x1="{middle}" y1="{centre}" x2="{x:.1f}" y2="{y:.1f}"/>')
        parts += _axis_words(at(i, 1.1), middle, centre, name, values[i] if values else "")
    for ring in rings:
        thin = " thin" if ring.thin else ""
        parts.append(f'<polygon class="outline {ring.style}{thin}" points="{outline(ring.values)}"/>')
    for ring in (r for r in rings if not r.thin):
        for i, share in enumerate(ring.values):
            if share is not None:
                x, y = at(i, _clip(share))
                hint = escape(f"{ring.name}, {axes[i]}: {100 * share:.1f} %")
                parts.append(
                    f'<circle class="dot {ring.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"><title>{hint}</title></circle>'
                )
    for tick in (0.5, 1.0):  # last, so that no outline crosses them
        x, y = at(0, tick)
        parts.append(
            f'<text class="tick" x="{x + 4:.1f}" y="{y + (4 if tick < 1 else 12):.1f}">{100 * tick:.0f}</text>'
        )
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDE} {_RADAR_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _axis_words(place: tuple[float, float], middle: float, centre: float, name: str, value: str) -> list[str]:
    """An axis' name outside its end, its value below the name."""
    x, y = place
    anchor = "middle" if abs(x - middle) < 1 else "start" if x > middle else "end"
    y += 4 + (6 if y > centre + 90 else -6 if y < centre - 90 else 0) - (6 if value else 0)
    words = [f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(name)}</text>']
    if value:
        words.append(f'<text class="value" x="{x:.1f}" y="{y + 13:.1f}" text-anchor="{anchor}">{escape(value)}</text>')
    return words


# ----------------------------------------------------------------------------------------------------------- scatter


def _ticks_within(low: float, high: float) -> list[float]:
    """Round numbers of a logarithmic axis, at least three where the range allows, at most seven."""
    best: list[float] = []
    halves, tenths = [n / 2 for n in range(3, 20)], [n / 10 for n in range(10, 100)]
    for mantissas in ([1.0], [1.0, 3.0], [1.0, 2.0, 5.0], [1.0, 1.5, 2.0, 3.0, 5.0, 7.0], [1.0, 1.2, *halves], tenths):
        ticks = [m * 10.0**e for e in range(-6, 10) for m in mantissas]
        ticks = [t for t in ticks if low <= t <= high]
        if len(ticks) <= 7:
            best = ticks
        if len(best) >= 4:
            break
    return best


def _linear(values: Sequence[float], least: float, limits: tuple[float, float]) -> list[float]:
    """Ticks of a linear axis around values: three to eight, at least `least` from end to end, inside the limits."""
    low, high = min(values), max(values)
    grow = max(0.0, least - (high - low)) / 2
    low, high = max(limits[0], low - grow), min(limits[1], high + grow)
    step = next(m * 10.0**e for e in range(-6, 9) for m in (1, 2, 5) if (high - low) / (m * 10.0**e) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 9) for i in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class _Axes:
    """From values to places in a scatter."""

    x_range: tuple[float, float]
    y_ticks: Sequence[float]
    left, right, top, bottom = 44.0, _WIDE - 14.0, 30.0, _SCATTER_HEIGHT - 42.0

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (self.right - self.left) * math.log(value / low) / math.log(high / low)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.bottom - (self.bottom - self.top) * (min(max(value, low), high) - low) / (high - low)

    def markup(self, x_unit: str, y_unit: str) -> list[str]:
        left, right, bottom = self.left, self.right, self.bottom
        parts = [f'<text x="0" y="13">{escape(y_unit)}</text>']
        for tick in self.y_ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for tick in _ticks_within(*self.x_range):
            x, words = self.x(tick), f"{tick:,.6g}"
            middle = min(x, _WIDE - 2 - 1.1 * _LETTER * len(words) / 2)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            parts.append(f'<text x="{middle:.1f}" y="{bottom + 17}" text-anchor="middle">{words}</text>')
        middle, foot = (left + right) / 2, _SCATTER_HEIGHT - 8
        return [*parts, f'<text x="{middle}" y="{foot}" text-anchor="middle">{escape(x_unit)}</text>']


def scatter(
    title: str,
    series: Sequence[Series],
    *,
    x_unit: str,
    y_unit: str,
    least: float = 10.0,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> str:
    """Dots joined by lines, x logarithmic, y linear; words stand beside the dots where there is room.

    title: what is drawn, for those who cannot see it.   x_unit, y_unit: what the axes count.
    least: how long the y axis is at least.   limits: how far it may go.   Returns "" without a dot.
    """
    points = [p for s in series for p in s.points]
    if not points:
        return ""
    ys = [v for p in points for v in (p.y, *(p.interval or ()))]
    xs = [p.x for p in points]
    axes = _Axes((min(xs) / 1.12, max(xs) * 1.12), _linear(ys, least, limits))
    parts = axes.markup(x_unit, y_unit)
    for s in series:
        path = " ".join(f"{axes.x(p.x):.1f},{axes.y(p.y):.1f}" for p in s.points)
        parts.append(f'<polyline class="line {s.style}" points="{path}"/>')
        for p in s.points:
            parts += _whisker(s.style, p, axes)
    for s in series:
        for p in s.points:
            place = f'cx="{axes.x(p.x):.1f}" cy="{axes.y(p.y):.1f}" r="4"'
            parts.append(f'<circle class="dot {s.style}" {place}><title>{escape(p.hint)}</title></circle>')
    frame = axes.left, axes.top - 10, axes.right + 12, axes.bottom
    parts += _labels([(p.label, axes.x(p.x), axes.y(p.y)) for p in points], frame)
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDE} {_SCATTER_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _whisker(style: str, p: Point, axes: _Axes) -> list[str]:
    if p.interval is None:
        return []
    x, (low, high) = axes.x(p.x), p.interval
    ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{axes.y(low):.1f}" y2="{axes.y(high):.1f}"'
    return [f'<line class="whisker {style}" {ends}/>']


def _labels(dots: Sequence[tuple[str, float, float]], frame: tuple[float, float, float, float]) -> list[str]:
    """Words beside dots, each at the first place that is inside the frame and free; none where no place is."""
    taken = [(px - 5, py - 5, px + 5, py + 5) for _, px, py in dots]
    parts = []
    for text, px, py in dots:
        width = _LETTER * len(text)
        places = [(px + 8, py + 4), (px - 8 - width, py + 4), (px - width / 2, py - 9), (px - width / 2, py + 18)]
        places += [(px + 7, py - 7), (px - 7 - width, py - 7), (px + 7, py + 14), (px - 7 - width, py + 14)]
        for left, base in places if text else ():
            box = (left, base - 10, left + width, base + 2)
            inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
            if inside and all(box[2] <= a or c <= box[0] or box[3] <= b or d <= box[1] for a, b, c, d in taken):
                taken.append(box)
                parts.append(f'<text class="label" x="{left:.1f}" y="{base:.1f}">{escape(text)}</text>')
                break
    return parts
