"""How programs are cut, from a table per architecture that `python -m kernels.tune` measured."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal

Stage = Literal["shrink", "expand", "layer"]
FOLDER: Final = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a program is cut: row blocks a warp, warps along steps and rows, pairs loaded ahead.

    blocks: one or two.
    inputs_ahead: load the activations of those pairs ahead too.
    turns: blocks of rows that a program multiplies after each other, a power of two; the next one's
        loads are under way while it ends the one before.
    tokens: of a tenant, at most, that share a program: each has an equal part of the warps along
        rows, which multiply the same codes at the same time. A power of two.
    tokens_first: the first programs are those of all tokens for the first rows, not those of the
        first token: tokens of a tenant read the same codes at the same time.
    shrinks: a lone token's layer does what `shrink` does, in its first programs.
    streams_first: programs of a lone token's layer that stream weights before its delta starts.
    stream_columns, stream_stages: columns of a block of such weights, and blocks in flight.
    registers: most that a thread may use, so that more programs run at once; 0 is no limit.
    """

    blocks: int
    along_steps: int
    along_rows: int
    ahead: int
    inputs_ahead: bool = False
    turns: int = 1
    tokens: int = 1
    tokens_first: bool = False
    shrinks: bool = False
    streams_first: int = 0
    stream_columns: int = 256
    stream_stages: int = 4
    registers: int = 0

    @property
    def rows(self) -> int:
        return 16 * self.blocks * self.along_rows

    @property
    def warps(self) -> int:
        return self.along_steps * self.along_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A shape and the largest launch it was measured for."""

    stage: Stage
    tokens: int
    steps: int
    rows: int
    shape: Shape


# Where nothing was measured: many small programs for a lone tenant, larger ones for many.
_DEFAULTS: Final = (
    Choice(
        stage="shrink",
        tokens=2,
        steps=1 << 30,
        rows=1 << 30,
        shape=Shape(blocks=2, along_steps=8, along_rows=1, ahead=1),
    ),
    Choice(
        stage="shrink",
        tokens=1 << 30,
        steps=1 << 30,
        rows=1 << 30,
        shape=Shape(blocks=2, along_steps=4, along_rows=1, ahead=2),
    ),
    Choice(
        stage="expand",
        tokens=2,
        steps=1 << 30,
        rows=1 << 30,
        shape=Shape(blocks=1, along_steps=4, along_rows=1, ahead=1),
    ),
    Choice(
        stage="expand",
        tokens=1 << 30,
        steps=1 << 30,
        rows=1 << 30,
        shape=Shape(blocks=2, along_steps=2, along_rows=2, ahead=2),
    ),
    Choice(
        stage="layer",
        tokens=1,
        steps=1 << 30,
        rows=1 << 30,
        shape=Shape(blocks=2, along_steps=2, along_rows=2, ahead=2, streams_first=264),
    ),
)


def _everywhere(stage: Stage, shape: Shape) -> Choice:
    return Choice(stage=stage, tokens=1 << 30, steps=1 << 30, rows=1 << 30, shape=shape)


# The interpreter runs programs one after the other, their warps at once, and all that they load.
_INTERPRETED: Final = (
    _everywhere("shrink", Shape(blocks=1, along_steps=8, along_rows=2, ahead=1)),
    _everywhere("expand", Shape(blocks=1, along_steps=1, along_rows=16, ahead=1)),
    _everywhere("layer", Shape(blocks=2, along_steps=1, along_rows=1, ahead=1)),
)


@cache
def load_table(arch: int) -> tuple[Choice, ...]:
    """The measured choices of an architecture, smallest launches first.

    Args:
        arch: compute capability, 90 for Hopper; 0 in the interpreter.

    Returns:
        The choices of kernels/tuning/sm_<arch>.json, or the defaults.
    """
    if arch == 0:
        return _INTERPRETED
    path = FOLDER / f"sm_{arch}.json"
    if not path.exists():
        return _DEFAULTS
    rows = json.loads(path.read_text())["choices"]
    choices = [
        Choice(
            stage=row["stage"],
            tokens=row["tokens"],
            steps=row["steps"],
            rows=row["rows"],
            shape=Shape(**row["shape"]),
        )
        for row in rows
    ]
    return tuple(sorted(choices, key=lambda choice: (choice.tokens, choice.steps, choice.rows)))


@cache
def choose_shape(stage: Stage, *, tokens: int, steps: int, rows: int, arch: int) -> Shape:
    """The shape measured for the next larger launch, or for the largest.

    Args:
        stage: which kernel.
        tokens: of the launch.
        steps: steps of 32 codes along the rows that are read.
        rows: rows that all programs of a token read.
        arch: compute capability.

    Returns:
        The shape.
    """
    tables = (load_table(arch), _DEFAULTS)
    own = next(own for own in ([c for c in table if c.stage == stage] for table in tables) if own)
    for size, wanted in (("tokens", tokens), ("steps", steps), ("rows", rows)):
        sizes = sorted({getattr(choice, size) for choice in own})
        nearest = next((measured for measured in sizes if measured >= wanted), sizes[-1])
        own = [choice for choice in own if getattr(choice, size) == nearest]
    return own[0].shape
