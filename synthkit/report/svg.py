"""Charts as inline SVG: lines with bands, a heat map of class balance, bars. Colours come from the page's style.

A chart is drawn in a box of 460 units that scales with its column; so text stays readable on a telephone. Points carry
a `<title>`, which a browser shows on hovering; there is no script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from synthkit.report.markup import Markup, clean, el
from synthkit.report.numbers import short

WIDTH, HEIGHT = 460, 240
TOP, RIGHT, BOTTOM = 12, 14, 36
MOST_POINTS = 240
COLOURS = 8


@dataclass
class Line:
    """One curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False


@dataclass
class Band:
    """The area between two curves."""

    name: str
    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: int = 0


@dataclass
class Level:
    """A horizontal line, such as the teacher's accuracy."""

    name: str
    y: float
    colour: int = 4


@dataclass
class Axes:
    """Maps values to the box."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    left: float = 44
    percent: bool = False
    log: bool = False
    y_ticks: list[float] = field(default_factory=list)

    def px(self, x: float) -> float:
        """Horizontal place of `x`."""
        return self.left + (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - self.left - RIGHT)

    def py(self, y: float) -> float:
        """Vertical place of `y`."""
        low, high, at = (math.log(v) if self.log else v for v in (self.y_low, self.y_high, y))
        return TOP + (high - at) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def label(self, y: float) -> str:
        """`y` as the axis and the points name it."""
        return f"{100 * y:.4g} %" if self.percent else short(y)


def line_chart(
    title: str, lines: Sequence[Line], *, x_label: str, note: str = "", percent: bool = False,
    bands: Sequence[Band] = (), levels: Sequence[Level] = (), zero: bool = False, wide: bool = False,
) -> Markup | None:  # fmt: skip
    """A figure of curves; None where no curve has two points (a single value belongs in a table).

    Args:
        note: what is measured and on what, below the title.
        percent: values are shares, shown in percent.
        zero: the vertical axis begins at 0.
        wide: positive values that span more than a factor of 20 get a logarithmic axis.
    """
    lines = [thin(line) for line in lines if len(line.x)]
    if not any(len(line.x) > 1 for line in lines):
        return None
    values = [y for line in lines for y in line.y]
    if wide and min(values) > 0 and max(values) > 20 * min(values):
        axes, note = _log_axes(lines), f"{note} Logarithmic axis.".strip()
    else:
        axes = _axes(lines, bands, levels, percent, zero)
    parts: list[Markup] = _frame(axes, x_label)
    for band in bands:
        there = [(axes.px(x), axes.py(y)) for x, y in zip(band.x, band.high, strict=True)]
        back = [(axes.px(x), axes.py(y)) for x, y in zip(band.x, band.low, strict=True)]
        parts.append(el("path", d=_path([*there, *back[::-1]]) + "Z", class_=f"band f{band.colour % COLOURS}"))
    for level in levels:
        y = f"{axes.py(level.y):.1f}"
        kind = f"level s{level.colour % COLOURS}"
        parts.append(el("line", x1=axes.left, x2=WIDTH - RIGHT, y1=y, y2=y, class_=kind))
    for line in lines:
        places = [(axes.px(x), axes.py(y)) for x, y in zip(line.x, line.y, strict=True)]
        style = f"line s{line.colour % COLOURS}" + (" dashed" if line.dashed else "")
        parts.append(el("path", d=_path(places), class_=style))
        if len(places) <= 60:
            parts += _dots(line, places, axes, x_label)
    legend = [_key(line.name, line.colour, axes.label(line.y[-1]), line.dashed) for line in lines]
    legend += [_key(b.name, b.colour, "", kind="area deep" if i else "area") for i, b in enumerate(bands)]
    legend += [_key(level.name, level.colour, axes.label(level.y), kind="level") for level in levels]
    return _figure(title, note, legend, parts, HEIGHT)


def thin(line: Line) -> Line:
    """The line with at most `MOST_POINTS` points (means of equal runs of points)."""
    count = len(line.x)
    if count <= MOST_POINTS:
        return line
    cuts = np.linspace(0, count, MOST_POINTS + 1).astype(int)
    x, y = (np.add.reduceat(np.asarray(v, dtype=float), cuts[:-1]) / np.diff(cuts) for v in (line.x, line.y))
    return Line(line.name, x.tolist(), y.tolist(), line.colour, line.dashed)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover low..high: 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.75)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _axes(lines: Sequence[Line], bands: Sequence[Band], levels: Sequence[Level], percent: bool, zero: bool) -> Axes:
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y] + [level.y for level in levels]
    ys += [y for band in bands for y in (*band.low, *band.high)]
    low, high = min(ys), max(ys)
    if zero or 0 <= low < 0.4 * high:
        low = min(0.0, low)
    space = (high - low) or abs(high) or 1.0
    y_low = low if low == 0 else low - 0.06 * space
    y_high = high + 0.06 * space
    if percent and low >= 0 and high <= 1:
        y_low, y_high = max(0.0, y_low), min(1.02, y_high)
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    axes = Axes(x_low, x_high, y_low, y_high, percent=percent, y_ticks=ticks(y_low, y_high))
    axes.left = 12 + 6.4 * max((len(axes.label(y)) for y in axes.y_ticks), default=3)
    return axes


def _log_axes(lines: Sequence[Line]) -> Axes:
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y]
    low, high = min(ys) / 1.2, max(ys) * 1.2
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < 300 * low else (1,)
    every = max(1, len(powers) // 6)
    marks = [m * 10.0**p for p in powers[::every] for m in factors]
    x_high = max(xs) if max(xs) > min(xs) else min(xs) + 1
    axes = Axes(min(xs), x_high, low, high, log=True, y_ticks=[m for m in marks if low <= m <= high])
    axes.left = 12 + 6.4 * max((len(axes.label(y)) for y in axes.y_ticks), default=3)
    return axes


def _frame(axes: Axes, x_label: str) -> list[Markup]:
    """Grid lines and labels of both axes."""
    parts = []
    for y in axes.y_ticks:
        at = f"{axes.py(y):.1f}"
        kind = "grid zero" if y == 0 else "grid"
        parts.append(el("line", x1=f"{axes.left:.1f}", x2=WIDTH - RIGHT, y1=at, y2=at, class_=kind))
        parts.append(el("text", axes.label(y), x=f"{axes.left - 6:.1f}", y=at, dy="0.35em", text_anchor="end"))
    for x in ticks(axes.x_low, axes.x_high, 6):
        text = el("text", f"{x:,.6g}", x=f"{axes.px(x):.1f}", y=HEIGHT - BOTTOM + 15, text_anchor="middle")
        parts.append(text)
    middle = (axes.left + WIDTH - RIGHT) / 2
    parts.append(el("text", x_label, x=f"{middle:.1f}", y=HEIGHT - 4, text_anchor="middle", class_="axis"))
    return parts


def _dots(line: Line, places: list[tuple[float, float]], axes: Axes, x_label: str) -> list[Markup]:
    """A place to hover for each point; a lone point is drawn."""
    kind = f"dot f{line.colour % COLOURS}" + (" lone" if len(places) == 1 else "")
    found = []
    for x, y, place in zip(line.x, line.y, places, strict=True):
        text = f"{line.name}: {axes.label(y)} at {x_label} {x:,.6g}"
        found.append(el("circle", el("title", text), cx=f"{place[0]:.1f}", cy=f"{place[1]:.1f}", r=4, class_=kind))
    return found


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _key(name: str, colour: int, value: str, dashed: bool = False, kind: str = "") -> Markup:
    mark = el("i", class_=" ".join(filter(None, ["key", f"k{colour % COLOURS}", kind, "dashed" if dashed else ""])))
    return el("span", mark, name, el("b", value) if value else None)


def _figure(title: str, note: str, legend: Sequence[Markup], parts: Sequence[Markup], height: float) -> Markup:
    drawing = el("svg", *parts, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=title)
    return el(
        "figure",
        el("figcaption", el("h4", title), el("p", note) if note else None),
        drawing,
        el("div", *legend, class_="legend") if legend else None,
        class_="chart",
    )


def heat_map(title: str, names: Sequence[str], counts: np.ndarray, *, x_label: str, note: str = "") -> Markup | None:
    """Class balance: one row per class, one column per part; colour says how far from an even share.

    Args:
        counts: (parts, classes) images.
    """
    parts_count, classes = counts.shape
    totals = counts.sum(axis=1)
    if parts_count == 0 or classes < 2 or not totals.all():
        return None
    ratio = counts / totals[:, None] * classes
    left = 16 + 6.2 * min(14, max(len(clean(n, 14)) for n in names))
    height_cell = max(7.0, min(18.0, 190 / classes))
    width_cell = (WIDTH - left - RIGHT) / parts_count
    height = TOP + classes * height_cell + BOTTOM
    drawn: list[Markup] = []
    for row, name in enumerate(names):
        y = TOP + row * height_cell
        if height_cell >= 10 or row % 2 == 0:
            middle = f"{y + height_cell / 2:.1f}"
            drawn.append(el("text", clean(name, 14), x=f"{left - 6:.1f}", y=middle, dy="0.35em", text_anchor="end"))
        for column in range(parts_count):
            distance = math.log2(max(ratio[column, row], 1 / 16)) / 2
            text = f"{clean(name, 60)}, {x_label} {column}: {int(counts[column, row]):,} images, "
            text += f"{ratio[column, row]:.2g} times an even share"
            drawn.append(el(
                "rect", el("title", text), x=f"{left + column * width_cell:.2f}", y=f"{y:.2f}",
                width=f"{max(0.5, width_cell - 1):.2f}", height=f"{height_cell - 1:.2f}",
                class_="more" if distance > 0 else "less", fill_opacity=f"{min(1.0, 0.06 + abs(distance)):.2f}",
            ))  # fmt: skip
    for column in ticks(0, parts_count - 1, 6):
        if column == int(column):
            x = f"{left + (column + 0.5) * width_cell:.1f}"
            drawn.append(el("text", f"{int(column)}", x=x, y=f"{height - BOTTOM + 15:.1f}", text_anchor="middle"))
    middle = f"{(left + WIDTH - RIGHT) / 2:.1f}"
    drawn.append(el("text", x_label, x=middle, y=f"{height - 4:.1f}", text_anchor="middle", class_="axis"))
    legend = [el("span", el("i", class_="key more"), "4 times an even share or more"),
              el("span", el("i", class_="key even"), "even"),
              el("span", el("i", class_="key less"), "a quarter or less")]  # fmt: skip
    return _figure(title, note, legend, drawn, height)


def bars(
    title: str, rows: Sequence[tuple[str, float]], *, note: str = "", marks: dict[str, float] | None = None,
    mark_name: str = "",
) -> Markup | None:  # fmt: skip
    """Horizontal bars of shares from 0 to 1, each with its percentage; `marks` puts a tick into the bars by name."""
    if not rows:
        return None
    step = max(13.0, min(20.0, 200 / len(rows)))
    left = 16 + 6.2 * min(16, max(len(clean(name, 16)) for name, _ in rows))
    wide = WIDTH - left - 58
    drawn: list[Markup] = []
    for i, (name, share) in enumerate(rows):
        y, share = TOP + i * step, min(1.0, max(0.0, share))
        middle = f"{y + step / 2 - 1:.1f}"
        drawn.append(el("text", clean(name, 16), x=f"{left - 6:.1f}", y=middle, dy="0.35em", text_anchor="end"))
        size = {"height": f"{step - 4:.1f}", "y": f"{y + 1:.1f}", "x": f"{left:.1f}"}
        drawn.append(el("rect", width=f"{wide:.1f}", class_="rail", rx=2, **size))
        drawn.append(el("rect", width=f"{wide * share:.1f}", class_="f0", rx=2, **size))
        if marks and name in marks:
            x = f"{left + wide * min(1.0, max(0.0, marks[name])):.1f}"
            text = el("title", f"{mark_name}: {100 * marks[name]:.1f} %")
            drawn.append(el("rect", text, x=x, y=f"{y - 1:.1f}", width=2.5, height=f"{step:.1f}", class_="f1"))
        drawn.append(el("text", f"{100 * share:.1f} %", x=WIDTH - 8, y=middle, dy="0.35em", text_anchor="end"))
    legend = [_key(mark_name, 1, "", kind="mark")] if marks and mark_name else []
    return _figure(title, note, legend, drawn, TOP + len(rows) * step + 8)
