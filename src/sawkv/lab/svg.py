"""Plots as SVG text: heat maps, lines, points. Colours are CSS variables of the page (report.css), so one drawing serves light and dark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

COLOURS = 6
"""Colours that lines have; later ones start again."""
LINE_HEIGHT = 15


@dataclass(frozen=True)
class Point:
    """A named point; `strong` ones are drawn in the accent colour."""

    name: str
    x: float
    y: float
    strong: bool = False


@dataclass(frozen=True)
class Line:
    """A named line through (x, y); `dashed` for what is a level to compare with."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    show: Callable[[float], str],
    title: str,
    column_title: str = "",
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    cell_width: int | None = None,
) -> str:
    """A grid of cells, darker for more.

    Args:
        values: [rows][columns]; NaN is an empty cell.
        rows, columns: labels.
        show: a value as text, in the cell if all fit and in its tooltip.
        title: for those who cannot see it.
        column_title: under the column labels.
        low, high: ends of the colour scale; None takes those of the values.
        log: the scale is logarithmic.
        cell_width: in pixels; None fits the number of columns.
    """
    known = [value for row in values for value in row if math.isfinite(value)]
    low = min(known, default=0.0) if low is None else low
    high = max(known, default=1.0) if high is None else high
    width = cell_width or max(9, min(58, 900 // max(1, len(columns))))
    height = 26 if width >= 40 else 20
    fits = all(7.5 * len(show(value)) <= width - 4 for value in known)  # all cells have their text, or none
    left = 12 + max((len(row) for row in rows), default=0) * 7
    parts = []
    for i, row in enumerate(values):
        y = i * height
        parts.append(_text(left - 8, y + height / 2, rows[i], "end"))
        for j, value in enumerate(row):
            x = left + j * width
            if not math.isfinite(value):
                continue
            share = _share(value, low, high, log)
            label = show(value)
            parts.append(
                f"<g><title>{escape(rows[i])}, {escape(column_title)} {escape(columns[j])}: {escape(label)}</title>"
                f'<rect x="{x}" y="{y}" width="{width - 1}" height="{height - 1}" rx="2" style="--heat:{100 * share:.0f}%"/>'
            )
            if fits:
                parts.append(_text(x + width / 2, y + height / 2, label, "middle", "over" if share > 0.55 else "under"))
            parts.append("</g>")
    every = max(1, math.ceil(max((len(column) for column in columns), default=0) * 7.5 / width))
    bottom = len(values) * height
    parts += [_text(left + j * width + width / 2, bottom + 11, column, "middle") for j, column in enumerate(columns) if j % every == 0]
    if column_title:
        parts.append(_text(left + len(columns) * width / 2, bottom + 28, column_title, "middle", "axis"))
    middle = left + len(columns) * width / 2
    return _svg(
        "heat", max(left + len(columns) * width, middle + 3.5 * len(column_title)), bottom + (36 if column_title else 20), parts, title
    )


def line_chart(
    lines: Sequence[Line], *, x_labels: Sequence[str], x_title: str, y_title: str, title: str, width: int = 900, height: int = 320
) -> str:
    """Lines over numbered places 0, 1, ... on a logarithmic y-axis, each named at its end."""
    left, right, top, bottom = 62, 200, 12, 46
    lines = [replace(line, points=[(x, y) for x, y in line.points if 0 < y < math.inf]) for line in lines]
    drawn = [line for line in lines if line.points]
    lowest, highest = _decades([y for line in drawn for _, y in line.points])
    step = (width - left - right) / max(1, len(x_labels) - 1)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x * step, _on_log(y, lowest, highest, height - bottom, top)

    parts = _y_axis(lowest, highest, left, width - right, height - bottom, top, y_title)
    parts += [_text(left + i * step, height - bottom + 16, label, "middle") for i, label in enumerate(x_labels)]
    parts.append(_text(left + (width - left - right) / 2, height - 8, x_title, "middle", "axis"))
    ends = []
    for i, line in enumerate(drawn):
        places = [place(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        kind = "dashed" if line.dashed else f"c{i % COLOURS}"
        parts.append(f'<polyline class="line {kind}" points="{path}"/>')
        if not line.dashed:
            for (x, y), (_, value) in zip(places, line.points, strict=True):
                parts.append(
                    f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(line.name)}: {value:.3g}</title></circle>'
                )
        ends.append((places[-1], line.name, kind))
    spread = _spread([y for (_, y), _, _ in ends], LINE_HEIGHT, top, height - bottom)
    for ((x, y), name, kind), at in zip(ends, spread, strict=True):
        parts.append(f'<line class="leader" x1="{x + 5:.1f}" y1="{y:.1f}" x2="{x + 14:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(x + 17, at, name, "start", f"label {kind}"))
    return _svg("chart", width, height, parts, title)


def scatter(
    points: Sequence[Point],
    *,
    x_title: str,
    y_title: str,
    title: str,
    level: tuple[str, float] | None = None,
    width: int = 900,
    height: int = 420,
) -> str:
    """Named points on a logarithmic y-axis; a line along those that no other beats in both x and y; `level` is a line to compare with."""
    left, right, top, bottom = 62, 24, 12, 46
    shown = [point for point in points if 0 < point.y < math.inf]
    lowest, highest = _decades([point.y for point in shown] + ([level[1]] if level and level[1] > 0 else []))
    fewest, greatest = min((point.x for point in shown), default=4.0), max((point.x for point in shown), default=8.0)
    least, most = math.floor(fewest - 0.3), math.ceil(greatest + 0.4 * (greatest - fewest) + 0.5)  # room for labels on the right

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - least) / (most - least) * (width - left - right)
        return across, _on_log(y, lowest, highest, height - bottom, top)

    parts = _y_axis(lowest, highest, left, width - right, height - bottom, top, y_title)
    parts += [_text(place(tick, lowest)[0], height - bottom + 16, str(tick), "middle") for tick in range(least, most + 1)]
    parts.append(_text(left + (width - left - right) / 2, height - 8, x_title, "middle", "axis"))
    if level and level[1] > 0:
        y = place(least, level[1])[1]
        parts.append(f'<polyline class="line dashed" points="{left},{y:.1f} {width - right},{y:.1f}"/>')
        parts.append(_text(width - right, y - 8, level[0], "end", "axis"))
    corners: list[str] = []
    for before, point in zip([None, *frontier(shown)], frontier(shown), strict=False):
        x, y = place(point.x, point.y)
        corners += [f"{x:.1f},{place(before.x, before.y)[1]:.1f}"] if before else []
        corners.append(f"{x:.1f},{y:.1f}")
    parts.append(f'<polyline class="frontier" points="{" ".join(corners)}"/>')
    for _, group in itertools.groupby(sorted(shown, key=lambda point: (point.x, point.y)), key=lambda point: round(2 * point.x)):
        members = sorted(group, key=lambda point: -point.y)
        places = [place(point.x, point.y) for point in members]
        column = max(x for x, _ in places) + 22
        for point, (x, y), at in zip(members, places, _spread([y for _, y in places], LINE_HEIGHT, top, height - bottom), strict=True):
            kind, tip = "strong" if point.strong else "weak", escape(f"{point.name}: {point.x:g}, {point.y:.3g}")
            parts.append(f'<line class="leader" x1="{x + 5:.1f}" y1="{y:.1f}" x2="{column - 3:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{tip}</title></circle>')
            parts.append(_text(column, at, point.name, "start", f"label {kind}"))
    return _svg("chart", width, height, parts, title)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats with less of x and less of y, by x."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        if not kept or point.y < kept[-1].y:
            kept.append(point)
    return kept


def bar(share: float) -> str:
    """A small bar for a table cell, 0 to 1 of its width."""
    return f'<span class="bar" style="--share:{100 * min(1.0, max(0.0, share)):.0f}%"></span>'


def _svg(kind: str, width: float, height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg class="{kind}" role="img" aria-label="{escape(title)}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    shown = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" dominant-baseline="central"{shown}>{escape(text)}</text>'


def _share(value: float, low: float, high: float, log: bool) -> float:
    """Where a value lies between the ends of a scale, 0 to 1."""
    if log:
        floor = max(low, high * 1e-6, 1e-300)
        low, high, value = math.log(floor), math.log(max(high, floor)), math.log(max(value, floor))
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """A range for a logarithmic axis around the positive values, from and to 1, 2 or 5 times a power of ten."""
    known = [value for value in values if value > 0 and math.isfinite(value)] or [0.1, 1.0]
    low, high = 10 ** math.floor(math.log10(min(known) / 1.2)), 10 ** math.ceil(math.log10(max(known) * 1.2))
    return next(low * m for m in (5, 2, 1) if low * m <= min(known) / 1.2), next(
        high * m for m in (0.2, 0.5, 1) if high * m >= max(known) * 1.2
    )


def _on_log(y: float, low: float, high: float, bottom: float, top: float) -> float:
    return bottom - (math.log(max(y, low)) - math.log(low)) / (math.log(high) - math.log(low)) * (bottom - top)


def _y_axis(low: float, high: float, left: float, right: float, bottom: float, top: float, title: str) -> list[str]:
    """Grid lines at powers of ten, and at 2 and 5 times them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    parts = []
    for value in (m * 10.0**exponent for exponent in range(first, last + 1) for m in steps):
        if low * 0.999 <= value <= high * 1.001:
            y = _on_log(value, low, high, bottom, top)
            parts.append(f'<line class="grid" x1="{left:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}"/>')
            parts.append(_text(left - 7, y, f"{value:.12f}".rstrip("0").rstrip(".") if value >= 1e-6 else f"{value:g}", "end"))
    middle = (top + bottom) / 2
    parts.append(
        f'<text class="axis" x="12" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 12 {middle:.1f})">{escape(title)}</text>'
    )
    return parts


def _spread(wanted: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Places near the wanted ones, at least `gap` apart, so that labels do not cover each other."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [wanted[i] for i in order]
    for _ in range(200):
        moved = False
        for i in range(1, len(places)):
            overlap = gap - (places[i] - places[i - 1])
            if overlap > 0.01:
                places[i - 1] -= overlap / 2
                places[i] += overlap / 2
                moved = True
        if not moved:
            break
    shift = max(0.0, top - places[0]) if places else 0.0
    shift -= max(0.0, places[-1] + shift - bottom) if places else 0.0
    result = [0.0] * len(wanted)
    for i, place in zip(order, places, strict=True):
        result[i] = place + shift
    return result
