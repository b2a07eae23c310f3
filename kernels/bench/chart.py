"""The bars of a report as a drawing: `python -m kernels.bench.chart REPORT SVG`."""

import html
import json
import sys
from typing import Any, Final

from kernels.bench import svg

_ROW_HEIGHT: Final = 24
_LABEL_WIDTH: Final = 400
_PLOT_WIDTH: Final = 300
_VALUE_WIDTH: Final = 200
_TOP: Final = 44
# Twice the target fills the plot: what is far beyond a bar needs no more room.
_FULL: Final = 2.0
_RULE: Final = "#999999"


def measure_reach(bar: dict[str, Any], *, more_is_better: bool) -> float:
    """How far a bar was reached: 1 is the target, more is better.

    Args:
        bar: of the report, measured.
        more_is_better: of the bar.

    Returns:
        measured / target, or target / measured where less is better.
    """
    ratio = float(bar["measured"]) / float(bar["target"])
    return ratio if more_is_better else 1 / ratio


def _draw_row(number: int, bar: dict[str, Any], *, more_is_better: bool) -> list[str]:
    y = _TOP + number * _ROW_HEIGHT
    name = html.escape(bar["name"])
    sign = "≥" if more_is_better else "≤"
    lines = [f'<text x="{_LABEL_WIDTH - 8}" y="{y + 15}" text-anchor="end">{name}</text>']
    shown = "not measured"
    if bar["measured"] is not None:
        shown = f"{bar['measured']:.4g}"
        width = min(measure_reach(bar, more_is_better=more_is_better), _FULL) / _FULL * _PLOT_WIDTH
        colour = svg.GREEN if bar["met"] else svg.RUST
        lines.append(
            f'<rect x="{_LABEL_WIDTH}" y="{y + 3}" width="{width:.1f}" height="16" '
            f'fill="{colour}"/>'
        )
    x = _LABEL_WIDTH + _PLOT_WIDTH + 8
    lines.append(f'<text x="{x}" y="{y + 15}">{shown} (bar {sign} {bar["target"]:g})</text>')
    return lines


def draw(report: dict[str, Any]) -> str:
    """Draw the bars of a report.

    Args:
        report: of `python -m kernels.bench`.

    Returns:
        An SVG document.
    """
    from kernels.bench.bars import TARGETS

    bars = report["bars"]
    height = _TOP + len(bars) * _ROW_HEIGHT + 12
    width = _LABEL_WIDTH + _PLOT_WIDTH + _VALUE_WIDTH
    target_x = _LABEL_WIDTH + _PLOT_WIDTH / _FULL
    title = f"Arena kernels on {report['device']}: how far each bar was reached"
    lines = [f'<text x="{target_x}" y="38" text-anchor="middle">bar</text>']
    for number, bar in enumerate(bars):
        lines += _draw_row(number, bar, more_is_better=TARGETS[bar["name"]][1])
    lines.append(
        f'<path d="M{target_x} {_TOP} V{height - 8}" stroke="{_RULE}" stroke-dasharray="3 3"/>'
    )
    return svg.compose(lines, title=title, width=width, height=height)


def main() -> int:
    """Draw a report."""
    report, drawing = svg.read_paths("python -m kernels.bench.chart", "report")
    drawing.write_text(draw(json.loads(report.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
