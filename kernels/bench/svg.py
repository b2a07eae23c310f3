"""What every drawing of a report shares: its head, its colours, and how it is asked for."""

import argparse
import html
from collections.abc import Iterable
from pathlib import Path
from typing import Final

INK: Final = "#333333"
PAPER: Final = "#ffffff"
GREEN: Final = "#1a7f5a"
RUST: Final = "#b4552d"


def compose(body: Iterable[str], *, title: str, width: int, height: int, left: int = 8) -> str:
    """Put a titled sheet under what was drawn.

    Args:
        body: elements, in the order in which they are painted.
        title: any text.
        width: pixels.
        height: pixels.
        left: pixels before the title.

    Returns:
        An SVG document.
    """
    shown = html.escape(title)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        f' font-family="sans-serif" font-size="12" fill="{INK}" role="img">',
        f"<title>{shown}</title>",
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        f'<text x="{left}" y="20" font-size="14">{shown}</text>',
    ]
    return "\n".join([*lines, *body, "</svg>"]) + "\n"


def read_paths(program: str, source: str, *, about: str | None = None) -> tuple[Path, Path]:
    """Read the two arguments of a chart's command line.

    Args:
        program: how it is called.
        source: what its first argument holds.
        about: a line for --help.

    Returns:
        The file to read and the SVG to write.
    """
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument(source, type=Path)
    parser.add_argument("svg", type=Path)
    arguments = parser.parse_args()
    return getattr(arguments, source), arguments.svg
