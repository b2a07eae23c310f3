"""The drawing of the quality table."""

import csv
import xml.etree.ElementTree as ET
from pathlib import Path

from benchmarks.quality.chart import draw, read_points

_SVG = "{http://www.w3.org/2000/svg}"
_FIELDS = ("finetune", "method", "calibration", "total_bytes", "kl_task")


def _write(path: Path, rows: list[tuple[str, ...]]) -> None:
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerows([_FIELDS, *rows])


def test_rows_without_bytes_are_not_drawn(tmp_path: Path) -> None:
    table = tmp_path / "quality.csv"
    _write(
        table,
        [
            ("code", "backbone", "none", "", "1.8"),
            ("code", "hub", "own", "16000000", "1e-4"),
            ("code", "come", "own", "16000000", "0.0"),
        ],
    )
    points = read_points(table)
    assert [(point.method, point.n_bytes, point.kl) for point in points] == [
        ("hub", 16_000_000, 1e-4)
    ]


def test_a_smaller_and_closer_delta_lies_further_left_and_lower(tmp_path: Path) -> None:
    table = tmp_path / "quality.csv"
    _write(
        table,
        [
            ("<code>", "hub", "own", "8000000", "1e-4"),
            ("<code>", "come", "own", "16000000", "1e-2"),
        ],
    )
    root = ET.fromstring(draw(read_points(table)))  # noqa: S314 - our own drawing
    places = {
        title.split(",")[0]: (float(circle.attrib["cx"]), float(circle.attrib["cy"]))
        for circle in root.findall(f"{_SVG}circle")
        if "bytes" in (title := circle.findtext(f"{_SVG}title") or "")
    }
    assert places["hub"][0] < places["come"][0]
    assert places["hub"][1] > places["come"][1]  # y grows downwards
    assert "<code>" in [text.text for text in root.findall(f"{_SVG}text")]


def test_rows_of_earlier_methods_and_texts_are_left_out(tmp_path: Path) -> None:
    table = tmp_path / "quality.csv"
    _write(
        table,
        [
            ("code", "hub", "own", "16000000", "1e-4"),
            ("code", "hub", "own 512", "16000000", "1e-3"),
            ("code", "distilled-100", "own", "16000000", "1e-3"),
        ],
    )
    assert [(p.method, p.calibration) for p in read_points(table)] == [("hub", "own")]
