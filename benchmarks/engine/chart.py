"""Where a step of decoding goes: `python -m benchmarks.engine.chart engine.json engine.svg`."""

import html
import json
from typing import Any

from kernels.bench import svg

_LABEL, _PLOT, _ROW, _TOP = 190, 520, 34, 64
_PARTS = (
    ("linear layers with their deltas", svg.GREEN),
    ("attention, norms, and the rest of the captured step", "#5b7db1"),
    ("between two captured steps", svg.RUST),
)
_ROWS = (
    ("decode_1", "32 rows of one tenant"),
    ("decode_32", "32 rows of 32 tenants"),
    ("all_tenants", "64 rows of 64 tenants"),
)


def split_step(row: dict[str, Any]) -> list[float]:
    """Milliseconds of each part; without the layers alone, the captured step is the second part."""
    layers = float(row.get("layers_ms", 0.0))
    return [layers, row["graph_ms"] - layers, row["step_ms"] - row["graph_ms"]]


def draw(report: dict[str, Any]) -> str:
    rows = [(label, report["rows"]["cuda"][name]) for name, label in _ROWS]
    scale = _PLOT / max(row["step_ms"] for _, row in rows)
    height = _TOP + _ROW * len(rows) + 12
    title = f"A step of decoding, 7B on {report['device']['cuda']}, ms"
    lines = []
    x = 8.0
    for name, colour in _PARTS:
        lines.append(f'<rect x="{x}" y="34" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 17}" y="45">{html.escape(name)}</text>')
        x += 40 + 6.3 * len(name)
    for number, (label, row) in enumerate(rows):
        y = _TOP + number * _ROW
        lines.append(f'<text x="{_LABEL - 8}" y="{y + 16}" text-anchor="end">{label}</text>')
        x = float(_LABEL)
        for part, (_, colour) in zip(split_step(row), _PARTS, strict=True):
            width = part * scale
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="22" fill="{colour}"/>'
            )
            x += width
        shown = f"{row['step_ms']:.1f} ms, {row['tokens_per_s']:,.0f} tokens/s"
        lines.append(f'<text x="{x + 8:.1f}" y="{y + 16}">{shown}</text>')
    return svg.compose(lines, title=title, width=_LABEL + _PLOT + 170, height=height)


def main() -> None:
    report, drawing = svg.read_paths("python -m benchmarks.engine.chart", "report", about=__doc__)
    drawing.write_text(draw(json.loads(report.read_text())))


if __name__ == "__main__":
    main()
