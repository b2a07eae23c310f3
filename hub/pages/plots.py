"""Geometry of the server-rendered plots; the templates only place what is computed here."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hub.models import Evaluation

# Rows in the order the matrices work in a decoder layer.
MATRIX_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEAT_STEPS = 9
CELL_PX = 18
LABEL_PX = 72
AXIS_PX = 18
# Deeper models get a number under every fourth layer.
MAX_NUMBERED_LAYERS = 8

BAR_WIDTH_PX = 230
BAR_LABEL_PX = 62
BAR_HEIGHT_PX = 16
BAR_STEP_PX = 24
BAR_VALUE_PX = 58
# Standard errors on each side of a 95 % interval.
Z_95 = 1.96
_SHARE_DIGITS = 12

BYTE_CLASSES = ("codes", "scales", "embeddings", "exact", "coded", "header")
BYTES_WIDTH_PX = 600

_LAYER = re.compile(r"\.(\d+)\.(?:.*\.)?(\w+)\.weight$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    x: int
    y: int
    step: int
    name: str
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    x: int
    y: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorMap:
    cells: tuple[Cell, ...]
    rows: tuple[Label, ...]
    columns: tuple[Label, ...]
    width: int
    height: int
    low: float
    high: float
    cell_px: int = CELL_PX - 2


def _split_name(name: str) -> tuple[int, str] | None:
    match = _LAYER.search(name)
    return (int(match[1]), match[2]) if match else None


def _order(matrix: str) -> tuple[int, str]:
    known = MATRIX_ORDER.index(matrix) if matrix in MATRIX_ORDER else len(MATRIX_ORDER)
    return (known, matrix)


def plot_error_map(errors: Mapping[str, float]) -> ErrorMap | None:
    """Lay out layers by matrices; `errors` is the relative error of each packed matrix."""
    placed = {key: (name, errors[name]) for name in errors if (key := _split_name(name))}
    if not placed:
        return None
    matrices = sorted({matrix for _, matrix in placed}, key=_order)
    n_layers = max(layer for layer, _ in placed) + 1
    values = [error for _, error in placed.values()]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    cells = tuple(
        Cell(
            x=LABEL_PX + layer * CELL_PX,
            y=matrices.index(matrix) * CELL_PX,
            step=round((error - low) / span * (HEAT_STEPS - 1)),
            name=name,
            error=error,
        )
        for (layer, matrix), (name, error) in sorted(placed.items())
    )
    bottom = len(matrices) * CELL_PX
    stride = 1 if n_layers <= MAX_NUMBERED_LAYERS else 4
    return ErrorMap(
        cells=cells,
        rows=tuple(
            Label(x=LABEL_PX - 6, y=index * CELL_PX + 12, text=matrix.removesuffix("_proj"))
            for index, matrix in enumerate(matrices)
        ),
        columns=tuple(
            Label(x=LABEL_PX + layer * CELL_PX + CELL_PX // 2, y=bottom + 13, text=str(layer))
            for layer in range(0, n_layers, stride)
        ),
        width=LABEL_PX + n_layers * CELL_PX,
        height=bottom + AXIS_PX,
        low=low,
        high=high,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    subject: str
    label: str
    y: int
    text_y: int
    middle_y: int
    width: int
    accuracy: float
    low: float
    high: float
    n: int
    whisker_from: int
    whisker_to: int
    value_x: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityBars:
    task: str
    bars: tuple[Bar, ...]
    width: int
    height: int
    left: int = BAR_LABEL_PX
    track: int = BAR_WIDTH_PX
    bar_px: int = BAR_HEIGHT_PX


_SUBJECT_LABELS = {
    Evaluation.Subject.BACKBONE: "backbone",
    Evaluation.Subject.FINETUNE: "fine-tune",
    Evaluation.Subject.DELTA: "delta",
}


def bound_share(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n items, by Wilson's score: not empty where all are right.

    Args:
        share: 0 to 1.
        n: items, at least one.

    Returns:
        Its lower and upper end.
    """
    spread = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n))
    middle = share + Z_95**2 / (2 * n)
    scale = 1 + Z_95**2 / n
    # Rounded, so that the end at 0 or 1 is met and not missed by the last bit.
    low, high = (round((middle + side) / scale, _SHARE_DIGITS) for side in (-spread, spread))
    return max(0.0, low), min(1.0, high)


def _place_bar(score: Evaluation, index: int) -> Bar:
    low, high = bound_share(score.accuracy, score.n)
    top = index * BAR_STEP_PX
    return Bar(
        subject=score.subject,
        label=_SUBJECT_LABELS[Evaluation.Subject(score.subject)],
        y=top,
        text_y=top + 12,
        middle_y=top + BAR_HEIGHT_PX // 2,
        width=round(score.accuracy * BAR_WIDTH_PX),
        accuracy=score.accuracy,
        low=low,
        high=high,
        n=score.n,
        whisker_from=BAR_LABEL_PX + round(low * BAR_WIDTH_PX),
        whisker_to=BAR_LABEL_PX + round(high * BAR_WIDTH_PX),
        value_x=BAR_LABEL_PX + round(high * BAR_WIDTH_PX) + 8,
    )


def plot_quality(scores: Sequence[Evaluation]) -> list[QualityBars]:
    """One group of bars a task: backbone, fine-tune, delta, with 95 % intervals."""
    order = list(_SUBJECT_LABELS)
    groups: dict[str, list[Evaluation]] = {}
    for score in scores:
        groups.setdefault(score.task, []).append(score)
    plots = []
    for task, group in sorted(groups.items()):
        group.sort(key=lambda score: order.index(Evaluation.Subject(score.subject)))
        plots.append(
            QualityBars(
                task=task,
                bars=tuple(_place_bar(score, index) for index, score in enumerate(group)),
                width=BAR_LABEL_PX + BAR_WIDTH_PX + BAR_VALUE_PX,
                height=len(group) * BAR_STEP_PX,
            )
        )
    return plots


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    name: str
    x: float
    width: float
    size_bytes: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteBar:
    slices: tuple[Slice, ...]
    total_bytes: int
    width: int = BYTES_WIDTH_PX

    @property
    def has_payload(self) -> bool:
        """Whether anything is stored beside delta.json: not where a fine-tune is its backbone."""
        return any(slice_.name != "header" for slice_ in self.slices)


def plot_bytes(sizes: Mapping[str, int], *, order: Sequence[str] = BYTE_CLASSES) -> ByteBar | None:
    """Stack what bytes are made of, those of a delta's files by default; slices add up to all."""
    total = sum(sizes.get(name, 0) for name in order)
    if not total:
        return None
    slices, x = [], 0.0
    for name in filter(sizes.get, order):
        share = sizes[name] / total
        width = share * BYTES_WIDTH_PX
        slices.append(
            Slice(
                name=name,
                x=round(x, 1),
                width=round(width, 1),
                size_bytes=sizes[name],
                share=share,
            )
        )
        x += width
    return ByteBar(slices=tuple(slices), total_bytes=total)
