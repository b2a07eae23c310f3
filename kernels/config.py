"""Block sizes of the Triton kernels, chosen in Python so that every path runs the same code."""

from dataclasses import dataclass, replace
from typing import Final, Literal

Op = Literal["dequantise", "shrink", "expand", "merge", "multiply", "merge_direct"]
# Shared memory one block may use. CUDA C programming guide, table of compute capabilities.
SHARED_LIMIT_BYTES: Final = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
# tl.dot takes no fewer rows, columns or terms.
DOT_MINIMUM: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Tile sizes of one launch; `reduction` divides the 128 codes of a packed tile."""

    tokens: int
    rows: int
    reduction: int
    columns: int = 0
    num_warps: int = 4
    num_stages: int = 2


# Decode sums whole packed tiles over few rows, so that a small matrix still fills the device.
_DECODE: Final[dict[Op, Blocks]] = {
    "dequantise": Blocks(tokens=1, rows=32, reduction=128),
    "shrink": Blocks(tokens=1, rows=8, reduction=128),
    "expand": Blocks(tokens=1, rows=16, reduction=128),
    "merge": Blocks(tokens=1, rows=64, reduction=32, columns=64),
    "multiply": Blocks(tokens=1, rows=16, reduction=128),
    "merge_direct": Blocks(tokens=1, rows=32, reduction=128),
}
_PREFILL: Final[dict[Op, Blocks]] = _DECODE | {
    "shrink": Blocks(tokens=16, rows=32, reduction=64),
    "expand": Blocks(tokens=16, rows=64, reduction=32),
    "multiply": Blocks(tokens=16, rows=64, reduction=32),
}
# The 8-bit band of a recipe holds one or two ranks: wide tiles along the rank would be padding.
_WIDE_CODES: Final = 8


def choose_blocks(op: Op, *, bits: int, n_tokens: int = 1) -> Blocks:
    """Tile sizes of `op`, the same on every architecture until one is measured to want its own.

    Args:
        op: The kernel.
        bits: Code width of the factor that is unpacked.
        n_tokens: Rows of the activations; one is decode, more are prefill.

    Returns:
        The tile sizes.
    """
    blocks = (_DECODE if n_tokens <= 1 else _PREFILL)[op]
    if bits == _WIDE_CODES and op in {"expand", "merge"}:
        return replace(blocks, reduction=DOT_MINIMUM)
    return blocks
