"""Plots as SVG text, for reports and docs: heat maps, lines, points, bars.

Colours are CSS variables (plots.css), so one drawing serves light mode, dark mode and print. Each mark has its value as
a tooltip. docs/decisions/0018-pages.md says why there is no plotting library. Over 400 lines: seven plots, one function
each.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib import resources

COLOURS = 6
"""Number of colours for lines. Further lines repeat them."""
LINE_HEIGHT = 15
LEGEND_BELOW = 600
"""Drawings narrower than this have their legend below."""


@dataclass(frozen=True)
class Point:
    """A named point. `strong` points have the accent colour."""

    name: str
    x: float
    y: float
    strong: bool = False


@dataclass(frozen=True)
class Line:
    """A named line through (x, y).

    Attributes:
        dashed: drawn dashed, for a level to compare with.
        dotted: drawn dotted, for the lesser of two related lines.
        colour: number of its colour; None is its place in the list.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    dotted: bool = False
    colour: int | None = None


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
    width: int = 900,
    widest: int = 58,
) -> str:
    """A grid of cells, darker for larger values.

    Args:
        values: [rows][columns]; NaN is an empty cell.
        rows, columns: labels.
        show: a value as text, shown in the tooltip, and in the cells if all texts fit.
        title: text for screen readers.
        column_title: text under the column labels.
        low, high: ends of the colour scale; None takes the extremes of the values.
        log: whether the scale is logarithmic.
        width: of the drawing, in pixels.
        widest: largest width of a cell, in pixels.
    """
    known = [value for row in values for value in row if math.isfinite(value)]
    low = min(known, default=0.0) if low is None else low
    high = max(known, default=1.0) if high is None else high
    left = 12 + max((len(row) for row in rows), default=0) * 7
    width = max(3, min(widest, (width - left) // max(1, len(columns))))
    height = 26 if width >= 40 else 20
    fits = all(7.5 * len(show(value)) <= width - 4 for value in known)  # all cells have their text, or none
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
                f'<rect x="{x}" y="{y}" width="{width - 1}" height="{height - 1}" rx="2"'
                f' style="--heat:{100 * share:.0f}%"/>'
            )
            if fits:
                parts.append(_text(x + width / 2, y + height / 2, label, "middle", "over" if share > 0.55 else "under"))
            parts.append("</g>")
    every = max(1, math.ceil(max((len(column) for column in columns), default=0) * 7.5 / width))
    bottom = len(values) * height
    parts += [
        _text(left + j * width + width / 2, bottom + 11, column, "middle")
        for j, column in enumerate(columns)
        if j % every == 0
    ]
    if column_title:
        parts.append(_text(left + len(columns) * width / 2, bottom + 28, column_title, "middle", "axis"))
    middle = left + len(columns) * width / 2
    return _svg(
        "heat",
        max(left + len(columns) * width, middle + 3.5 * len(column_title)),
        bottom + (36 if column_title else 20),
        parts,
        title,
    )


def line_chart(
    lines: Sequence[Line],
    *,
    x_labels: Sequence[str],
    x_title: str,
    y_title: str,
    title: str,
    width: int = 900,
) -> str:
    """Lines over places 0, 1, ... with a logarithmic y-axis, each labelled at its end."""
    lines = [replace(line, points=[(x, y) for x, y in line.points if 0 < y < math.inf]) for line in lines]
    drawn = [line for line in lines if line.points]
    below = width < LEGEND_BELOW
    height, left, right, top, bottom = 320, 62, 14 if below else 200, 12, 46
    lowest, highest = _decades([y for line in drawn for _, y in line.points])
    step = (width - left - right) / max(1, len(x_labels) - 1)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x * step, _on_log(y, lowest, highest, height - bottom, top)

    parts = _y_axis(lowest, highest, left, width - right, height - bottom, top, y_title)
    every = max(1, math.ceil(max((7 * len(label) for label in x_labels), default=0) / step)) if step else 1
    parts += [
        _text(left + i * step, height - bottom + 16, label, "middle")
        for i, label in enumerate(x_labels)
        if i % every == 0
    ]
    parts.append(_text(left + (width - left - right) / 2, height - 8, x_title, "middle", "axis"))
    ends = []
    for i, line in enumerate(drawn):
        places = [place(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        kind = (
            "dashed"
            if line.dashed
            else f"{'dotted ' if line.dotted else ''}c{(i if line.colour is None else line.colour) % COLOURS}"
        )
        parts.append(f'<polyline class="line {kind}" points="{path}"/>')
        kind = kind.removeprefix("dotted ")
        if not line.dashed:
            for (x, y), (_, value) in zip(places, line.points, strict=True):
                parts.append(
                    f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(line.name)}:'
                    f" {value:.3g}</title></circle>"
                )
        ends.append((places[-1], line.name, kind))
    if below:
        parts += _legend([(name, kind) for _, name, kind in ends], left, height)
        return _svg("chart", width, height + 4 + LEGEND_STEP * len(ends), parts, title)
    spread = _spread([y for (_, y), _, _ in ends], LINE_HEIGHT, top, height - bottom)
    for ((x, y), name, kind), at in zip(ends, spread, strict=True):
        parts.append(f'<line class="leader" x1="{x + 5:.1f}" y1="{y:.1f}" x2="{x + 14:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(x + 17, at, name, "start", f"label {kind}"))
    return _svg("chart", width, height, parts, title)


LEGEND_STEP = 19


def _legend(entries: Sequence[tuple[str, str]], left: float, top: float) -> list[str]:
    """Names, one per line, each with a dot in the colour of its class."""
    parts = []
    for i, (name, kind) in enumerate(entries):
        y = top + 8 + LEGEND_STEP * i
        if kind == "dashed":
            parts.append(f'<line class="dashed" x1="{left - 10:.1f}" y1="{y:.1f}" x2="{left + 8:.1f}" y2="{y:.1f}"/>')
        else:
            parts.append(f'<circle class="{kind}" cx="{left:.1f}" cy="{y:.1f}" r="4"/>')
        parts.append(_text(left + 14, y, name, "start", "row"))
    return parts


def scatter(
    points: Sequence[Point],
    *,
    x_title: str,
    y_title: str,
    title: str,
    level: tuple[str, float] | None = None,
    width: int = 900,
) -> str:
    """Named points over a logarithmic y-axis, with a line through the Pareto frontier, and a line at `level`."""
    height, left, right, top, bottom = 420, 62, 24, 12, 46
    shown = [point for point in points if 0 < point.y < math.inf]
    lowest, highest = _decades([point.y for point in shown] + ([level[1]] if level and level[1] > 0 else []))
    fewest, greatest = min((point.x for point in shown), default=4.0), max((point.x for point in shown), default=8.0)
    below = width < LEGEND_BELOW
    room = 0.0 if below else 0.4 * (greatest - fewest)  # for labels on the right
    least, most = math.floor(fewest - 0.3), math.ceil(greatest + room + 0.5)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - least) / (most - least) * (width - left - right)
        return across, _on_log(y, lowest, highest, height - bottom, top)

    parts = _y_axis(lowest, highest, left, width - right, height - bottom, top, y_title)
    parts += [
        _text(place(tick, lowest)[0], height - bottom + 16, str(tick), "middle") for tick in range(least, most + 1)
    ]
    parts.append(_text(left + (width - left - right) / 2, height - 8, x_title, "middle", "axis"))
    if level and level[1] > 0:
        y = place(least, level[1])[1]
        parts.append(f'<polyline class="line dashed" points="{left},{y:.1f} {width - right},{y:.1f}"/>')
        parts.append(_text(width - right, y - 8, level[0], "end", "axis label"))
    corners: list[str] = []
    for before, point in zip([None, *frontier(shown)], frontier(shown), strict=False):
        x, y = place(point.x, point.y)
        corners += [f"{x:.1f},{place(before.x, before.y)[1]:.1f}"] if before else []
        corners.append(f"{x:.1f},{y:.1f}")
    parts.append(f'<polyline class="frontier" points="{" ".join(corners)}"/>')
    numbered = sorted(shown, key=lambda point: (point.x, point.y))
    for _, group in itertools.groupby(numbered, key=lambda point: math.floor(2 * point.x + 0.5)):
        members = sorted(group, key=lambda point: -point.y)
        places = [place(point.x, point.y) for point in members]
        column = max(x for x, _ in places) + 22
        for point, (x, y), at in zip(
            members, places, _spread([y for _, y in places], LINE_HEIGHT, top, height - bottom), strict=True
        ):
            kind, tip = "strong" if point.strong else "weak", escape(f"{point.name}: {point.x:g}, {point.y:.3g}")
            parts.append(f'<line class="leader" x1="{x + 5:.1f}" y1="{y:.1f}" x2="{column - 3:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{tip}</title></circle>')
            name = _letter(numbered.index(point)) if below else point.name
            parts.append(_text(column, at, name, "start", f"label {kind}"))
    if below:
        parts += _legend(
            [(f"{_letter(i)}: {point.name}", "strong" if point.strong else "weak") for i, point in enumerate(numbered)],
            left,
            height,
        )
        return _svg("chart", width, height + 4 + LEGEND_STEP * len(numbered), parts, title)
    return _svg("chart", width, height, parts, title)


def frontier(points: Sequence[Point]) -> list[Point]:
    """The Pareto frontier: points for which no other has less of both x and y, by x."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        if not kept or point.y < kept[-1].y:
            kept.append(point)
    return kept


def _letter(number: int) -> str:
    return chr(ord("a") + number % 26) + (str(number // 26) if number >= 26 else "")


def bars(
    groups: Sequence[tuple[str, Sequence[float]]],
    names: Sequence[str],
    *,
    show: Callable[[float], str],
    title: str,
    colour: int = 0,
    width: int = 900,
) -> str:
    """Horizontal bars from 0 in groups, with a line at 1, for ratios.

    Args:
        groups: a name, and a value for each of `names`; NaN is a missing bar.
        names: of the bars in each group.
        show: a value as text, at the bar's end.
        title: above the drawing.
        colour: number of the first name's colour; the others' follow.
        width: in pixels.
    """
    left, right, thick = 12 + max((len(name) for name, _ in groups), default=0) * 7, 56, 13
    greatest = max((value for _, values in groups for value in values if math.isfinite(value)), default=1.0)
    scale = (width - left - right) / max(greatest, 1.0)
    parts, y = [_text(left, 10, title, "start", "title")], 30.0
    x = left
    for i, name in enumerate(names):
        swatch = f'x="{x:.1f}" y="{y - 6:.1f}" width="12" height="12" rx="2"'
        parts.append(f'<rect class="c{(colour + i) % COLOURS}" {swatch}/>')
        parts.append(_text(x + 17, y, name, "start", "row"))
        x += 34 + 7 * len(name)
    y, first = y + 20, y + 14
    level = len(parts)  # below the bars and their labels
    for name, values in groups:
        parts.append(_text(left - 8, y + thick * len(values) / 2, name, "end", "row"))
        for i, value in enumerate(values):
            if math.isfinite(value):
                tip = escape(f"{name}, {names[i]}: {show(value)}")
                parts.append(
                    f'<rect class="c{(colour + i) % COLOURS}" x="{left}" y="{y:.1f}" width="{value * scale:.1f}"'
                    f' height="{thick - 2}" rx="2"><title>{tip}</title></rect>'
                )
                parts.append(_text(left + value * scale + 5, y + thick / 2 - 1, show(value), "start", "label"))
            y += thick
        y += 10
    parts.insert(
        level,
        f'<line class="dashed" x1="{left + scale:.1f}" y1="{first:.1f}" x2="{left + scale:.1f}" y2="{y - 6:.1f}"/>',
    )
    return _svg("chart", width, y, parts, title)


def cloud(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    level: tuple[str, float],
    x_title: str,
    y_title: str,
    title: str,
) -> str:
    """Points of named series over a logarithmic x-axis. The y-axis runs from 0 to a little above `level`, a named
    dashed line.
    """
    width, height, left, right, top, bottom = 900, 420, 76, 20, 52, 46
    xs = [x for _, points in series for x, _ in points]
    low, high = _decades(xs)
    most = 1.15 * max([level[1], *(y for _, points in series for _, y in points)])

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (math.log(x) - math.log(low)) / (math.log(high) - math.log(low)) * (width - left - right)
        return across, height - bottom - y / most * (height - bottom - top)

    parts = [_text(left, 10, title, "start", "title")]
    unit = 10 ** math.floor(math.log10(most / 2))
    for tick in range(0, math.floor(most / unit) + 1, max(1, round(most / unit / 6))):
        y = place(low, tick * unit)[1]
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}"/>')
        parts.append(_text(left - 7, y, f"{tick * unit:,.0f}", "end"))
    for exponent in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1):
        parts.append(_text(place(10.0**exponent, 0)[0], height - bottom + 16, f"{10.0**exponent:,g}", "middle"))
    parts.append(_text(left + (width - left - right) / 2, height - 8, x_title, "middle", "axis"))
    parts.append(_upright(14, (top + height - bottom) / 2, y_title))
    y = place(low, level[1])[1]
    parts.append(f'<line class="dashed" x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}"/>')
    parts.append(_text(width - right, y - 9, level[0], "end", "axis"))
    x = float(left)
    for i, (name, points) in enumerate(series):
        parts.append(f'<circle class="c{i % COLOURS}" cx="{x + 5:.1f}" cy="32" r="4"/>')
        parts.append(_text(x + 14, 32, name, "start", "row"))
        x += 32 + 7 * len(name)
        for point in points:
            px, py = place(*point)
            tip = escape(f"{name}: {point[0]:,.3g}, {point[1]:,.0f}")
            parts.append(
                f'<circle class="c{i % COLOURS}" cx="{px:.1f}" cy="{py:.1f}" r="4"><title>{tip}</title></circle>'
            )
    return _svg("chart", width, height, parts, title)


def column(drawings: Sequence[str], titles: Sequence[str]) -> str:
    """Drawings of equal width below each other, each below its title."""
    parts, y, width = [], 0.0, 0.0
    for drawing, title in zip(drawings, titles, strict=True):
        size = re.search(r' width="(\d+)" height="(\d+)"', drawing)
        if size is None:
            raise ValueError(f"expected a drawing with a size, got {drawing[:60]}")
        parts.append(_text(0, y + 12, title, "start", "title"))
        parts.append(drawing.replace("<svg ", f'<svg y="{y + 24:.0f}" ', 1))
        y, width = y + 34 + float(size[2]), max(width, float(size[1]))
    return _svg("column", width, y, parts, "; ".join(titles))


def standalone(drawing: str) -> str:
    """The drawing as an SVG file, with colours for light and dark mode on a transparent background."""
    style = resources.files("sawkv.page").joinpath("plots.css").read_text(encoding="utf-8")
    return (
        drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
            ">", f"><style>\n{style}</style>", 1
        )
        + "\n"
    )


def _svg(kind: str, width: float, height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg class="{kind}" role="img" aria-label="{escape(title)}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    shown = f' class="{kind}"' if kind else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" dominant-baseline="central"{shown}>{escape(text)}</text>'
    )


def _share(value: float, low: float, high: float, log: bool) -> float:
    """Place of a value between the ends of a scale, 0 to 1."""
    if log:
        floor = max(low, high * 1e-6, 1e-300)
        low, high, value = math.log(floor), math.log(max(high, floor)), math.log(max(value, floor))
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis around the positive values: 1, 2 or 5 times a power of ten."""
    known = [value for value in values if value > 0 and math.isfinite(value)] or [0.1, 1.0]
    low, high = 10 ** math.floor(math.log10(min(known) / 1.2)), 10 ** math.ceil(math.log10(max(known) * 1.2))
    return next(low * m for m in (5, 2, 1) if low * m <= min(known) / 1.2), next(
        high * m for m in (0.2, 0.5, 1) if high * m >= max(known) * 1.2
    )


def log_scale(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic scale around the positive values: powers of ten."""
    low, high = _decades(values)
    return 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))


def on_scale(value: float, scale: tuple[float, float]) -> float:
    """Place of a value on a logarithmic scale, 0 to 1."""
    return _share(value, *scale, log=True)


def _on_log(y: float, low: float, high: float, bottom: float, top: float) -> float:
    return bottom - (math.log(max(y, low)) - math.log(low)) / (math.log(high) - math.log(low)) * (bottom - top)


def _y_axis(low: float, high: float, left: float, right: float, bottom: float, top: float, title: str) -> list[str]:
    """Grid lines at powers of ten; also at 2 and 5 times them if there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    parts = []
    for value in (m * 10.0**exponent for exponent in range(first, last + 1) for m in steps):
        if low * 0.999 <= value <= high * 1.001:
            y = _on_log(value, low, high, bottom, top)
            parts.append(f'<line class="grid" x1="{left:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}"/>')
            parts.append(
                _text(left - 7, y, f"{value:.12f}".rstrip("0").rstrip(".") if value >= 1e-6 else f"{value:g}", "end")
            )
    middle = (top + bottom) / 2
    parts.append(_upright(12, middle, title))
    return parts


def _upright(x: float, y: float, text: str) -> str:
    """The title of a y-axis."""
    return (
        f'<text class="axis" x="{x}" y="{y:.1f}" text-anchor="middle" transform="rotate(-90 {x}'
        f' {y:.1f})">{escape(text)}</text>'
    )


def _spread(wanted: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Places near the wanted ones and at least `gap` apart, so that labels do not overlap."""
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
