"""The rows of a quality table as a drawing: `python -m benchmarks.quality.chart CSV SVG`.

One panel for each fine-tune: KL on its task over whole-file bytes, both in decades. Lower and
further left is better.
"""

import csv
import html
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kernels.bench import svg

_RULE: Final = "#cccccc"
# Drawn in this order, so that what the project chose lies on top.
_COLOURS: Final = {
    "lowrank": "#8c8c8c",
    "bitdelta": "#b9a07a",
    "bitdelta-row": "#8a6d3b",
    "lora": "#7b4fa3",
    "come": "#b4552d",
    "datafree": "#4a90c2",
    "hub": "#1a7f5a",
    # Twice the rate that it trains with now.
    "distilled-6e-3": "#6fae94",
    "distilled": "#0b3d2e",
}
# A calibration is told by the shape of its mark. Rows of others, and of other methods, are earlier
# ones that the table keeps and the drawing leaves out.
_MARKS: Final = {
    "own": "circle",
    "none": "circle",
    "trained": "circle",
    "general": "square",
    "self": "diamond",
}
_PANEL_WIDTH: Final = 330
_PANEL_HEIGHT: Final = 250
_MARGIN_LEFT: Final = 58
_MARGIN_TOP: Final = 30
_PLOT_WIDTH: Final = 252
_PLOT_HEIGHT: Final = 170
_COLUMNS: Final = 3
_HEADER: Final = 74


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One row of the table: whole-file bytes and KL to the fine-tune in nats per token."""

    finetune: str
    method: str
    calibration: str
    n_bytes: int
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Decades onto pixels: `start` is where `low` lies, `stop` where `high` lies."""

    low: float
    high: float
    start: float
    stop: float

    def place(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def read_points(path: Path) -> tuple[Point, ...]:
    """Read the rows that are drawn: known methods and texts, with bytes and a KL above zero.

    Args:
        path: quality.csv.

    Returns:
        The points, in the order of the table.
    """
    with path.open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["total_bytes"]]
    return tuple(
        Point(
            finetune=row["finetune"],
            method=row["method"],
            calibration=row["calibration"],
            n_bytes=int(row["total_bytes"]),
            kl=float(row["kl_task"]),
        )
        for row in rows
        if float(row["kl_task"]) > 0 and row["method"] in _COLOURS and row["calibration"] in _MARKS
    )


def _span(values: Sequence[float], *, margin: float) -> tuple[float, float]:
    logs = [math.log10(value) for value in values]
    return min(logs) - margin, max(logs) + margin


def _mark(shape: str, x: float, y: float, colour: str, label: str) -> str:
    title = f"<title>{html.escape(label)}</title>"
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">{title}</circle>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if shape == "diamond" else ""
    return (
        f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" fill="{colour}"{turn}>'
        f"{title}</rect>"
    )


def _draw_grid(x_axis: Axis, y_axis: Axis) -> list[str]:
    lines = []
    for decade in range(math.ceil(y_axis.low), math.floor(y_axis.high) + 1):
        y = y_axis.place(10.0**decade)
        lines.append(f'<path d="M{x_axis.start} {y:.1f} H{x_axis.stop}" stroke="{_RULE}"/>')
        lines.append(
            f'<text x="{x_axis.start - 6}" y="{y + 4:.1f}" text-anchor="end">1e{decade}</text>'
        )
    for megabytes in (8, 16, 32, 64, 128):
        if x_axis.low <= math.log10(megabytes * 1e6) <= x_axis.high:
            x = x_axis.place(megabytes * 1e6)
            lines.append(f'<path d="M{x:.1f} {y_axis.stop} V{y_axis.start}" stroke="{_RULE}"/>')
            label = f'<text x="{x:.1f}" y="{y_axis.start + 16}" text-anchor="middle">'
            lines.append(f"{label}{megabytes} MB</text>")
    return lines


def _draw_panel(points: Sequence[Point], number: int, x_span: tuple[float, float]) -> list[str]:
    left = number % _COLUMNS * _PANEL_WIDTH + _MARGIN_LEFT
    top = number // _COLUMNS * _PANEL_HEIGHT + _HEADER + _MARGIN_TOP
    low, high = _span([point.kl for point in points], margin=0.15)
    x_axis = Axis(low=x_span[0], high=x_span[1], start=left, stop=left + _PLOT_WIDTH)
    y_axis = Axis(low=low, high=high, start=top + _PLOT_HEIGHT, stop=top)
    name = html.escape(points[0].finetune)
    lines = [f'<text x="{left}" y="{top - 8}" font-weight="bold">{name}</text>']
    lines += _draw_grid(x_axis, y_axis)
    for method, colour in _COLOURS.items():
        own = [point for point in points if point.method == method]
        for calibration in dict.fromkeys(point.calibration for point in own):
            some = sorted(
                (point for point in own if point.calibration == calibration),
                key=lambda point: point.n_bytes,
            )
            places = [(x_axis.place(p.n_bytes), y_axis.place(p.kl)) for p in some]
            path = " L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            lines.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            lines += [
                _mark(
                    _MARKS[calibration],
                    x,
                    y,
                    colour,
                    f"{method}, {calibration}: {point.n_bytes} bytes, KL {point.kl:.3g}",
                )
                for point, (x, y) in zip(some, places, strict=True)
            ]
    return lines


def _draw_legend(points: Sequence[Point]) -> list[str]:
    methods = [name for name in _COLOURS if any(point.method == name for point in points)]
    lines = []
    step = min(110, (_COLUMNS * _PANEL_WIDTH - _MARGIN_LEFT) // max(1, len(methods)))
    for number, name in enumerate(methods):
        x = _MARGIN_LEFT + number * step
        lines.append(_mark("circle", x, 42, _COLOURS[name], name))
        lines.append(f'<text x="{x + 9}" y="46">{html.escape(name)}</text>')
    note = "circle: own text or none; square: general text; diamond: sampled from the fine-tune"
    lines.append(f'<text x="{_MARGIN_LEFT - 4}" y="66">{note}</text>')
    return lines


def draw(points: Sequence[Point]) -> str:
    """Draw KL over bytes, a panel for each fine-tune.

    Args:
        points: at least one.

    Returns:
        An SVG document.
    """
    tasks = tuple(dict.fromkeys(point.finetune for point in points))
    x_span = _span([point.n_bytes for point in points], margin=0.06)
    width = _COLUMNS * _PANEL_WIDTH
    height = _HEADER + math.ceil(len(tasks) / _COLUMNS) * _PANEL_HEIGHT
    title = "KL to the fine-tune on its task (nats per token) over whole-file bytes"
    lines = _draw_legend(points)
    for number, task in enumerate(tasks):
        lines += _draw_panel([point for point in points if point.finetune == task], number, x_span)
    return svg.compose(lines, title=title, width=width, height=height, left=_MARGIN_LEFT - 4)


def main() -> int:
    """Draw a table."""
    table, drawing = svg.read_paths("python -m benchmarks.quality.chart", "table")
    drawing.write_text(draw(read_points(table)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
