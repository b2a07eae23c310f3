"""The walk of GPTQ over columns: encode one, move its error to those that follow.

A column is a few launches on a GPU, so a block of them is recorded as one CUDA graph. Recording
costs more than running: walks are kept from matrix to matrix.
"""

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from deltacome_core.grids import VectorGrids, invert
from deltacome_core.replay import record

# Columns whose corrections are applied to the rest at once (GPTQ's lazy batches).
_BLOCK = 128
# Rows of V are rounded up to this many, so that matrices of unlike rank share a recording.
_ROW_STEP = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnFeedback:
    """How errors spread over columns.

    order int64 [batch, cols]; spread float32 [batch, cols, cols] is the upper Cholesky factor of
    the inverse of the permuted Hessian, each row divided by its diagonal: what an error of one
    takes from each later column.
    """

    order: torch.Tensor
    spread: torch.Tensor


class _Block(ABC):
    """The columns whose turn it is, [batch, columns, rows], in memory that stays where it is."""

    def __init__(self, batch: int, rows: int, device: torch.device) -> None:
        shape = (batch, _BLOCK, rows)
        self.values, self.codes, self.errors = (torch.zeros(shape, device=device) for _ in range(3))
        self.spread = torch.zeros((batch, _BLOCK, _BLOCK), device=device)
        self._run = record(self._steps, device)

    @abstractmethod
    def _encode(self, at: int) -> None:
        """Write code and error of the column `at` in place."""

    def _steps(self) -> None:
        for at in range(_BLOCK):
            self._encode(at)
            spread = self.spread[:, at, at + 1 :, None]
            self.values[:, at + 1 :].addcmul_(spread, self.errors[:, at, None], value=-1)

    @abstractmethod
    def start(self, start: int, stop: int) -> None:
        """Prepare for the columns start to stop."""

    @abstractmethod
    def end(self, start: int, stop: int) -> None:
        """Keep what was found for them."""

    def walk(self, values: torch.Tensor, spread: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Do the columns values [batch, n, rows] with spread [batch, n, n]; give codes, errors."""
        _, n, rows = values.shape
        if n < _BLOCK or rows < self.values.shape[2]:
            self.values.zero_()
            self.spread.zero_()
        self.values[:, :n, :rows] = values
        self.spread[:, :n, :n] = spread
        self._run()
        return self.codes[:, :n, :rows], self.errors[:, :n, :rows]


class _RowBlock(_Block):
    """Codes of V, whose values come in units of their row's scale, counted from its lowest level.

    The error of a row stays in the row, so it needs no other unit.
    """

    def __init__(self, batch: int, rows: int, device: torch.device) -> None:
        self._top = torch.zeros((batch, rows), device=device)
        self._zero = torch.zeros_like(self._top)
        super().__init__(batch, rows, device)

    def begin(self, top: torch.Tensor) -> None:
        """Take the largest codes float32 [batch, rows]; the block may have room for more rows."""
        self._top.zero_()
        self._top[:, : top.shape[1]] = top

    def start(self, start: int, stop: int) -> None:
        """Nothing to prepare: the rows are the same for all columns."""

    def end(self, start: int, stop: int) -> None:
        """Nothing to keep."""

    def _encode(self, at: int) -> None:
        x, code = self.values[:, at], self.codes[:, at]
        torch.round(x, out=code)
        torch.clamp(code, self._zero, self._top, out=code)
        torch.sub(x, code, out=self.errors[:, at])


class _ColumnBlock(_Block):
    """Codes of U: the grid of a column is fitted when its turn comes.

    scale float32 [batch, cols] in the order of the walk.
    """

    def __init__(self, batch: int, rows: int, device: torch.device) -> None:
        widths = torch.ones((batch, _BLOCK), dtype=torch.int64, device=device)
        self._block = VectorGrids.of(widths)
        self._fitted = torch.zeros_like(self._block.top)
        self._zero = torch.zeros_like(self._block.top[:, :1])
        super().__init__(batch, rows, device)

    def begin(self, grids: VectorGrids) -> None:
        """Take the grids of all columns, in the order of the walk."""
        self._grids, self.scale = grids, torch.zeros_like(grids.top)

    def start(self, start: int, stop: int) -> None:
        self._block.columns(0, stop - start).copy_from(self._grids.columns(start, stop))

    def end(self, start: int, stop: int) -> None:
        self.scale[:, start:stop] = self._fitted[:, : stop - start]

    def _encode(self, at: int) -> None:
        x, code = self.values[:, at], self.codes[:, at]
        grid, scale = self._block.columns(at, at + 1), self._fitted[:, at : at + 1]
        scale.copy_(grid.scale(x[:, None]))
        places = torch.addcmul(grid.top / 2, x, invert(scale))
        torch.round(places, out=code)
        torch.clamp(code, self._zero, grid.top, out=code)
        torch.mul(places - code, scale, out=self.errors[:, at])


class Walks(threading.local):
    """Recorded blocks by their shape and device, for one run of a compression.

    A block holds the columns of one walk at a time, so every thread has blocks of its own.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int, torch.device], _RowBlock] = {}
        self._columns: dict[tuple[int, int, torch.device], _ColumnBlock] = {}

    def rows(self, batch: int, rows: int, device: torch.device) -> _RowBlock:
        """Give a block for the V of a batch, with room for at least so many rows."""
        shape = batch, -(-rows // _ROW_STEP) * _ROW_STEP, device
        if shape not in self._rows:
            self._rows[shape] = _RowBlock(*shape)
        return self._rows[shape]

    def columns(self, batch: int, rows: int, device: torch.device) -> _ColumnBlock:
        """Give a block for the U of a batch, of just so many rows: they share a scale."""
        shape = batch, rows, device
        if shape not in self._columns:
            self._columns[shape] = _ColumnBlock(*shape)
        return self._columns[shape]


def walk_rows(
    values: torch.Tensor, top: torch.Tensor, feedback: ColumnFeedback, walks: Walks
) -> torch.Tensor:
    """Encode V, each row on a grid that is known.

    Args:
        values: float32 [batch, rows, cols], in units of the row's scale from its lowest level.
        top: float32 [batch, rows], the largest code of each row.
        feedback: of the columns.
        walks: where blocks come from.

    Returns:
        Codes as float32 [batch, rows, cols].
    """
    batch, rows, _ = values.shape
    block = walks.rows(batch, rows, values.device)
    block.begin(top)
    return _walk(values, feedback, block)


def walk_columns(
    values: torch.Tensor, grids: VectorGrids, feedback: ColumnFeedback, walks: Walks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode U, fitting each column's scale once all its corrections have arrived.

    Args:
        values: float32 [batch, rows, cols].
        grids: of the columns in the order of the walk.
        feedback: of the columns.
        walks: where blocks come from.

    Returns:
        Codes as float32 [batch, rows, cols] and scales float32 [batch, cols] in the order of the
        walk.
    """
    batch, rows, _ = values.shape
    block = walks.columns(batch, rows, values.device)
    block.begin(grids)
    return _walk(values, feedback, block), block.scale


def _walk(values: torch.Tensor, feedback: ColumnFeedback, block: _Block) -> torch.Tensor:
    batch, rows, cols = values.shape
    order = feedback.order[:, :, None].expand(batch, cols, rows)
    # Transposed, so that a column of the paper is contiguous here.
    pending = values.mT.gather(1, order)
    codes = torch.empty_like(pending)
    for start in range(0, cols, _BLOCK):
        stop = min(start + _BLOCK, cols)
        block.start(start, stop)
        found, errors = block.walk(
            pending[:, start:stop], feedback.spread[:, start:stop, start:stop]
        )
        block.end(start, stop)
        codes[:, start:stop] = found
        if stop < cols:
            spread = feedback.spread[:, start:stop, stop:].mT
            pending[:, stop:].baddbmm_(spread, errors, alpha=-1)
    return pending.scatter_(1, order, codes).mT
