"""Charts as SVG text. Colours come from the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Sequence

from lctrain.report.ticks import number, ticks
from lctrain.tracking.series import thin

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 42
MOST_POINTS = 500
"""Points per line; longer ones keep the lows and highs of every stretch."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve. points: each value gets a dot; faint: behind the next line, in its colour, with no entry in the legend."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    points: bool = False
    faint: bool = False


@dataclasses.dataclass(frozen=True)
class LineChart:
    """Lines over a common x axis.

    note: what is shown, in a sentence. marks: (x, text) of vertical lines. powers: x is an exponent of 2, shown as the power.
    zero: the y axis starts at 0.
    """

    title: str
    note: str
    y_label: str
    lines: Sequence[Line]
    marks: Sequence[tuple[float, str]] = ()
    x_label: str = "step"
    powers: bool = False
    zero: bool = False

    def svg(self) -> str:
        """The chart, and beside it the values that appear under the pointer."""
        lines = [line for line in self.lines if line.xs]
        xs = [x for line in lines for x in line.xs]
        low_x, high_x = min(xs), max(xs)
        whole = all(x == round(x) for x in xs)
        low_y, high_y = _range([y for line in lines for y in line.ys], self.zero)
        if low_x == high_x:
            low_x, high_x = low_x - 1, high_x + 1

        def place(x: float, y: float) -> tuple[float, float]:
            return (
                round(LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT), 1),
                round(HEIGHT - BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM), 1),
            )

        parts = []
        for tick in ticks(low_y, high_y):
            _, y = place(low_x, tick)
            parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{number(tick)}</text>')
        for tick in ticks(low_x, high_x, 8):
            if tick == round(tick) or not whole:
                x, _ = place(tick, low_y)
                parts.append(f'<path class="tick" d="M{x} {HEIGHT - BOTTOM}v4"/>')
                label = _power(tick) if self.powers else number(tick)
                parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{label}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
        parts += labels(self.x_label, self.y_label)
        for x, text in self.marks:
            at, _ = place(x, low_y)
            title = f"<title>{html.escape(text)}</title>"
            parts.append(f'<path class="mark" d="M{at} {TOP}V{HEIGHT - BOTTOM}">{title}</path>')
        shown = []
        for colour, line in _coloured(lines):
            points = [place(x, y) for x, y in zip(*thin(list(line.xs), list(line.ys), MOST_POINTS), strict=True)]
            style = f"{colour}{' faint' if line.faint else ''}"
            path = "M" + "L".join(f"{x} {y}" for x, y in points)
            parts.append(f'<path class="line {style}" d="{path}"/>')
            if line.points or len(points) == 1:
                parts += [f'<circle class="dot {style}" cx="{x}" cy="{y}" r="2.6"/>' for x, y in points]
            kept = thin(list(line.xs), list(line.ys), MOST_POINTS)
            shown.append(
                {
                    "label": line.label,
                    "points": [
                        [x, y, _power(value) if self.powers else f"{value:,.10g}", number(amount, 5)]
                        for (x, y), value, amount in zip(points, *kept, strict=True)
                    ],
                }
            )
        data = html.escape(json.dumps({"x": self.x_label, "lines": shown}, separators=(",", ":")))
        return _svg(self.title, parts, f' data-values="{data}"')

    def legend(self) -> list[tuple[str, str]]:
        """(class of the colour, label) of every line, if there is more than one, and the sort of marks."""
        shown = [line for line in self.lines if line.xs]
        lines = [(colour, line.label) for colour, line in _coloured(shown) if not line.faint]
        return [*(lines if len(lines) > 1 else []), *([("m", "restart")] if self.marks else [])]


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """Rows of cells; 0 is the background's colour and `high` the full one; with `middle`, the full colours lie on both sides.
    Values below 0 without a middle have the other colour.

    first_column, last_column: labels of those, and evenly between them. row_labels: instead of numbers from 0 on. unit: with
    its space; of values that cannot be above `high`.
    """

    title: str
    note: str
    rows: Sequence[Sequence[float | None]]
    x_label: str
    y_label: str
    first_column: float
    last_column: float
    high: float
    middle: float | None = None
    row_name: str = "row"
    row_labels: Sequence[str] = ()
    unit: str = ""

    def svg(self) -> str:
        """The chart; every cell tells its value under the pointer."""
        columns = max(len(row) for row in self.rows)
        wide, tall = (WIDTH - LEFT - RIGHT) / columns, (HEIGHT - TOP - BOTTOM) / len(self.rows)
        span = (self.last_column - self.first_column) / max(1, columns - 1)
        parts = []
        for index, row in enumerate(self.rows):
            for column, value in enumerate(row):
                if value is None:
                    continue
                side, strength = self._strength(value)
                x, y = round(LEFT + column * wide, 2), round(TOP + index * tall, 2)
                at = number(self.first_column + span * column)
                name = self.row_labels[index] if self.row_labels else index
                title = html.escape(f"{self.row_name} {name}, {self.x_label} {at}: {number(value)}{self.unit}")
                parts.append(
                    f'<rect class="{side}" x="{x}" y="{y}" width="{wide + 0.3:.2f}" height="{tall + 0.3:.2f}"'
                    f' fill-opacity="{strength:.2f}"><title>{title}</title></rect>'
                )
        for tick in ticks(0, len(self.rows) - 1, 8):
            if tick == round(tick):
                y = TOP + (tick + 0.5) * tall + 4
                label = html.escape(self.row_labels[round(tick)]) if self.row_labels else number(tick)
                parts.append(f'<text x="{LEFT - 6}" y="{y:.1f}" text-anchor="end">{label}</text>')
        for tick in ticks(self.first_column, self.last_column, 8):
            if tick == round(tick) and span:
                x = LEFT + ((tick - self.first_column) / span + 0.5) * wide
                parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{number(tick)}</text>')
        if not span:
            x = LEFT + (WIDTH - LEFT - RIGHT) / 2
            parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{number(self.first_column)}</text>')
        parts.append(
            f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/>'
        )
        parts += labels(self.x_label, self.y_label)
        return _svg(self.title, parts, "")

    def legend(self) -> list[tuple[str, str]]:
        """(class of the colour, label)."""
        if self.middle is None:
            return [("hot", f"{number(self.high)}{self.unit or ' or more'}"), ("none", f"0{self.unit}")]
        return [("cold", "0"), ("none", number(self.middle)), ("hot", f"{number(self.high)} or more")]

    def _strength(self, value: float) -> tuple[str, float]:
        middle = self.middle or 0.0
        if value >= middle:
            return "hot", min(1.0, (value - middle) / max(1e-30, self.high - middle))
        return "cold", min(1.0, (middle - value) / max(1e-30, middle or self.high))


Chart = LineChart | HeatMap


def labels(x_label: str, y_label: str) -> list[str]:
    """The names of both axes."""
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    return [
        f'<text class="name" x="{LEFT + (WIDTH - LEFT - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{html.escape(x_label)}</text>",
        f'<text class="name" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>',
    ]


def _coloured(lines: Sequence[Line]) -> list[tuple[str, Line]]:
    """Every line with its colour's class."""
    found, colour = [], 0
    for line in lines:
        found.append((f"c{colour % 8}", line))
        colour += not line.faint
    return found


def _svg(title: str, parts: list[str], attributes: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}"{attributes}>'
    return head + "".join(parts) + "</svg>"


def _range(values: list[float], zero: bool) -> tuple[float, float]:
    """The y axis: a little more than the values, and never empty."""
    low, high = min(values), max(values)
    if zero:
        low = min(0.0, low)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return (low if zero else low - margin), high + margin
    margin = (high - low) * 0.05
    return (low if zero else low - margin), high + margin


def _power(exponent: float) -> str:
    value = 2 ** math.floor(exponent)
    return f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else str(value)
