"""Charts as SVG text: no library, no script; colours come from CSS classes, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from alignkit.report.read import Points

LEFT, RIGHT, BOTTOM = 48, 14, 34

STYLE = """
:root { --ink: #1c2330; --muted: #667085; --line: #e3e7ee; --page: #f6f7f9; --card: #ffffff;
  --s0: #2f6fed; --s1: #d9730d; --s2: #12805c; --s3: #9333ea; --good: #12805c; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --muted: #98a2b3; --line: #2b3240; --page: #10141b; --card: #181d27;
  --s0: #6ea4ff; --s1: #f5a45d; --s2: #4cc38a; --s3: #c084fc; --good: #4cc38a; --bad: #f97066; } }
svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
svg text { fill: var(--muted); font-size: 11px; } svg text.strong { fill: var(--ink); font-weight: 600; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .mark { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 3 3; }
svg .mark.warned { stroke: var(--bad); }
svg .s0 { --c: var(--s0); } svg .s1 { --c: var(--s1); } svg .s2 { --c: var(--s2); } svg .s3 { --c: var(--s3); }
svg .curve { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .raw { fill: none; stroke: var(--c); stroke-width: 1; opacity: .35; } svg .dot { fill: var(--c); }
svg .hit { fill: transparent; } svg .band { fill: var(--c); opacity: .22; }
"""


@dataclass(frozen=True, slots=True)
class Series:
    """A named curve."""

    name: str
    points: Points


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture's size in pixels; ``top`` is kept free above the plot."""

    width: int = 340
    height: int = 190
    top: int = 12

    def x(self, values: Sequence[float], *, apart: float = 0.0) -> Scale:
        """The horizontal scale of ``values``; ticks are at least ``apart`` from each other. A lone value is in the middle."""
        low, high = min(values), max(values)
        air = 0.0 if high > low else 1.0
        return Scale(low - air, high + air, LEFT, self.width - RIGHT, apart)

    def y(self, values: Sequence[float]) -> Scale:
        """The vertical scale: from zero where the values come near it; otherwise their range, with some air."""
        low, high = min(values), max(values)
        air = 0.08 * (high - low) or 0.1 * abs(high) or 0.5
        start = 0.0 if 0.0 <= low < 0.4 * high else low - air
        return Scale(start, high + air, self.height - BOTTOM, self.top)


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values in [low, high] to pixels in [start, end], with round numbers to label, at least ``apart`` from each other."""

    low: float
    high: float
    start: float
    end: float
    apart: float = 0.0

    def __call__(self, value: float) -> float:
        """The pixel of ``value``."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) between the ends, each with its label."""
        rough = max((self.high - self.low) / count, self.apart)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        values = [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        plain = 1e-4 <= step < 1e5
        return [(value, (f"{value:,.{decimals}f}" if plain else f"{value:.0e}").replace("-", "−")) for value in values]


def line_chart(series: Sequence[Series], *, title: str, x_title: str = "step", marks: Sequence[tuple[float, str]] = ()) -> str:
    """Curves over steps. A long curve is drawn as its moving average over the faint original; a lone point is a dot.

    ``marks``: steps at which something happened, with its name: a line from top to bottom. Those beyond the curves are left out.
    """
    frame = Frame(top=28 if len(series) > 1 else 12)
    everything = [point for one in series for point in one.points]
    x, y = frame.x([p[0] for p in everything], apart=1.0), frame.y([p[1] for p in everything])
    curves = [f'<g class="s{i % 4}">{_curve(one, x, y)}</g>' for i, one in enumerate(series)]
    legend = _legend([one.name for one in series]) if len(series) > 1 else ""
    return _svg(frame, title, [_axes(frame, x, y, x_title), *_marks(marks, frame, x), *curves, legend])


def frontier_chart(path: Points, *, title: str, x_title: str, first: str, last: str) -> str:
    """A path through the plane, pale where it begins and full where it ends; the ends are labelled ``first`` and ``last``."""
    frame = Frame(width=560, height=250, top=24)
    x, y = frame.x([0.0, *(p[0] for p in path)]), frame.y([p[1] for p in path])
    dots = [
        f'<circle class="dot" cx="{x(a):.1f}" cy="{y(b):.1f}" r="4.5" opacity="{0.25 + 0.75 * i / len(path):.2f}">'
        f"<title>{number(a)}, {number(b)}</title></circle>"
        for i, (a, b) in enumerate(path, start=1)
    ]
    (x0, y0), (x1, y1) = path[0], path[-1]
    ends = (
        f'<text class="strong" x="{x(x0) + 8:.1f}" y="{min(y(y0) + 16, frame.height - BOTTOM - 4):.1f}">{escape(first)}</text>'
        f'<text class="strong" x="{x(x1):.1f}" y="{max(y(y1) - 10, 11):.1f}" text-anchor="end">{escape(last)}</text>'
    )
    return _svg(frame, title, [_axes(frame, x, y, x_title), f'<g class="s0">{_path(path, x, y, "raw")}{"".join(dots)}</g>', ends])


def interval_bar(value: float, low: float, high: float, *, ends: tuple[float, float], mark: float, title: str) -> str:
    """A value with its interval on a short axis, and a mark to compare with (such as one half for a win rate)."""
    x = Scale(min(ends[0], low), max(ends[1], high), 8, 232)
    shapes = (
        f'<line class="grid" x1="8" x2="232" y1="14" y2="14"/><line class="mark" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="3" y2="25"/>'
        f'<g class="s2"><rect class="band" x="{x(low):.1f}" y="8" width="{max(x(high) - x(low), 1):.1f}" height="12" rx="3"/>'
        f'<circle class="dot" cx="{x(value):.1f}" cy="14" r="5"/></g>'
    )
    return f'<svg viewBox="0 0 240 28" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>{shapes}</svg>'


def moving_average(points: Points) -> Points:
    """Each value as the mean of those near it, a twelfth of the curve wide; curves of fewer than 36 points stay as they are."""
    reach = len(points) // 24
    if len(points) < 36:
        return points
    near = [points[max(0, i - reach) : i + reach + 1] for i in range(len(points))]
    return [(point[0], sum(value for _, value in around) / len(around)) for point, around in zip(points, near, strict=True)]


def number(value: float | None) -> str:
    """A figure for people: three significant digits, a dash for what is not there."""
    if value is None or not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{value:,.0f}".replace("-", "−")
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}".replace("-", "−")


def _curve(one: Series, x: Scale, y: Scale) -> str:
    if len(one.points) == 1:
        return _dots(one.points, x, y, "dot", 4.0)
    smooth = moving_average(one.points)
    raw = _path(one.points, x, y, "raw") if smooth is not one.points else ""
    return raw + _path(smooth, x, y, "curve") + _dots(one.points, x, y, "hit", 6.0)


def _path(points: Points, x: Scale, y: Scale, css: str) -> str:
    return f'<polyline class="{css}" points="{" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)}"/>'


def _dots(points: Points, x: Scale, y: Scale, css: str, radius: float) -> str:
    """Circles that name their value when the pointer rests on them."""
    return "".join(
        f'<circle class="{css}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="{radius}"><title>{number(a)}: {number(b)}</title></circle>'
        for a, b in points
    )


def _axes(frame: Frame, x: Scale, y: Scale, x_title: str) -> str:
    bottom, right = frame.height - BOTTOM, frame.width - RIGHT
    rows = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{label}</text>'
        for value, label in y.ticks(5)
    )
    columns = "".join(f'<text x="{x(value):.1f}" y="{bottom + 15}" text-anchor="middle">{label}</text>' for value, label in x.ticks(5))
    return f'{rows}{columns}<text x="{(LEFT + right) / 2}" y="{frame.height - 4}" text-anchor="middle">{escape(x_title)}</text>'


def _marks(marks: Sequence[tuple[float, str]], frame: Frame, x: Scale) -> Iterator[str]:
    for step, name in marks:
        if x.low <= step <= x.high:
            at = f'x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{frame.top}" y2="{frame.height - BOTTOM}"'
            yield f'<line class="mark warned" {at}><title>{escape(name)} at {number(step)}</title></line>'


def _legend(names: Sequence[str]) -> str:
    """One line of names at the top left, each with its colour."""
    entries, left = [], LEFT + 8
    for i, name in enumerate(names):
        entries.append(f'<g class="s{i % 4}"><circle class="dot" cx="{left}" cy="12" r="4"/></g>')
        entries.append(f'<text x="{left + 8}" y="16">{escape(name)}</text>')
        left += 24 + 7 * len(name)
    return "".join(entries)


def _svg(frame: Frame, title: str, parts: Sequence[str]) -> str:
    name = escape(title)
    return f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{name}"><title>{name}</title>{"".join(parts)}</svg>'
