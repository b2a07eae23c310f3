"""Reading the directory of an arena in a kernel; its fields are those of kernels/directory.py."""

import triton
import triton.language as tl

from kernels import directory
from kernels.triton_ops.codes import load_ahead, locate_blocks
from kernels.triton_ops.mma import multiply_band

MAX_RECORDS = tl.constexpr(directory.MAX_RECORDS)
RECORD_INTS = tl.constexpr(directory.RECORD_INTS)
PART_INTS = tl.constexpr(directory.PART_INTS)
SHRINK_RECORDS = tl.constexpr(directory.SHRINK_RECORDS)
EXPAND_SIZES = tl.constexpr(directory.EXPAND_SIZES)
EXPAND_PARTS = tl.constexpr(directory.EXPAND_PARTS)
EXPAND_RECORDS = tl.constexpr(directory.EXPAND_RECORDS)
N_WIDTHS = tl.constexpr(len(directory.WIDTHS))
UNIT_BYTES = tl.constexpr(128)
# What GROUPING says where every band has scales for tiles.
ALL = tl.constexpr(2)


@triton.jit
def find_block(sizes_ptr, block, ROWS: tl.constexpr):
    """Which entry of a list of row counts a block of ROWS rows falls into.

    Args:
        sizes_ptr: int32 [32], rows of each entry, 0 beyond the last.
        block: Number of the block over all entries.
        ROWS: Rows of a block.

    Returns:
        Number of the entry, 32 beyond the last, and the block's number within it.
    """
    entry = tl.arange(0, MAX_RECORDS)
    blocks = (tl.load(sizes_ptr + entry) + ROWS - 1) // ROWS
    end = tl.cumsum(blocks, axis=0)
    before = end <= block
    return tl.sum(before.to(tl.int32), axis=0), block - tl.max(tl.where(before, end, 0), axis=0)


@triton.jit
def load_pointer(slab, units, TYPE: tl.constexpr):
    """Pointer into a slab; offsets count units of 128 bytes."""
    return (slab + units.to(tl.int64) * UNIT_BYTES).to(tl.pointer_type(TYPE))


@triton.jit
def load_record(record_ptr):
    """The fields of a record that `start_record` takes, in its order."""
    fields = ()
    for i in tl.static_range(1, 11):
        fields += (tl.load(record_ptr + i),)
    return fields


@triton.jit
def start_record(
    fields,
    slab,
    first_block,
    wk,
    lane,
    BITS: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
    PAST_L1: tl.constexpr,
):
    """Start the first loads of a record's codes.

    Args:
        fields: Of `load_record`.
        slab: Address of the tenant's slab.
        first_block: Of `multiply_band`, and so all that are not named here.
        wk: Same.
        lane: Same.
        BITS: Same.
        R: Same.
        U: Same, for the two-bit codes; wider ones are loaded fewer at a time.
        PAST_L1: Same.

    Returns:
        What `finish_record` takes.
    """
    codes, high, _, n_blocks, n_steps, _, group, first_step, bound, marker = fields
    codes_ptr = load_pointer(slab, codes, tl.int32)
    high_ptr = load_pointer(slab, high, tl.int32)
    pairs: tl.constexpr = pairs_ahead(BITS, U)
    places = locate_blocks(
        codes_ptr, high_ptr, first_block, n_blocks, n_steps, wk * pairs, lane, BITS, R
    )
    ahead = load_ahead(places, n_steps - 2 * pairs * wk, BITS, pairs, PAST_L1)
    return ahead, places, marker, n_blocks, n_steps, group, first_step, bound


@triton.constexpr_function
def pairs_ahead(bits, ahead):
    """Pairs of steps to load at a time: about the same bytes at any width."""
    return max(1, ahead * 2 // bits)


@triton.jit
def finish_record(
    started,
    slab,
    first_block,
    planes_ptr,
    unit_stride,
    columns,
    weights,
    wk,
    lane,
    BITS: tl.constexpr,
    GROUPING: tl.constexpr,
    R: tl.constexpr,
    NT: tl.constexpr,
    WK: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PAST_L1: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """`multiply_band` of a started record.

    Args:
        started: Of `start_record`.
        slab: Address of the tenant's slab.
        first_block: Of `multiply_band`, and so all that are not named here.
        planes_ptr: int64 planes at the first step of the band's source.
        unit_stride: Same.
        columns: Same.
        weights: Same.
        wk: Same.
        lane: Same.
        BITS: Same.
        GROUPING: 0 where no band has scales for tiles, ALL where each has, 1 where some have.
        R: Same.
        NT: Same.
        WK: Same.
        U: Of `start_record`.
        X_AHEAD: Of `multiply_band`.
        IN_PLACE: Same.
        PAST_L1: Same.
        USE_PTX: Same.

    Returns:
        NT x R x 2 fp32 [threads].
    """
    ahead, places, marker, n_blocks, n_steps, group, _, _ = started
    group_ptr = load_pointer(slab, group, tl.int32)
    if GROUPING == 1:
        if group > 0:
            totals = multiply_band(
                ahead, places, marker, group_ptr, n_blocks * 16, first_block, n_blocks,
                n_steps, planes_ptr, unit_stride, columns, weights, wk, lane,
                BITS, True, R, NT, WK, pairs_ahead(BITS, U), X_AHEAD, IN_PLACE, PAST_L1, USE_PTX,
            )  # fmt: skip
        else:
            totals = multiply_band(
                ahead, places, marker, group_ptr, n_blocks * 16, first_block, n_blocks,
                n_steps, planes_ptr, unit_stride, columns, weights, wk, lane,
                BITS, False, R, NT, WK, pairs_ahead(BITS, U), X_AHEAD, IN_PLACE, PAST_L1, USE_PTX,
            )  # fmt: skip
    else:
        totals = multiply_band(
            ahead, places, marker, group_ptr, n_blocks * 16, first_block, n_blocks,
            n_steps, planes_ptr, unit_stride, columns, weights, wk, lane,
            BITS, GROUPING == ALL, R, NT, WK, pairs_ahead(BITS, U), X_AHEAD,
            IN_PLACE, PAST_L1, USE_PTX,
        )  # fmt: skip
    return totals


@triton.jit
def add_shares(
    totals,
    UNIT: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    WK: tl.constexpr,
    WR: tl.constexpr,
) -> tl.tensor:
    """Products of one unit, summed over planes and over the warps that shared the steps.

    Args:
        totals: Of `multiply_band`.
        UNIT: The unit.
        P: Planes of a token.
        R: Row blocks of a warp, 1, 2 or 4.
        WK: Warps that shared the steps.
        WR: Warps that did not.

    Returns:
        fp32 [WR, 8, 8 / P tokens, 2 R]; `row_of_share` says which rows these are.
    """
    if R == 1:
        joined = tl.join(totals[UNIT * R * 2], totals[UNIT * R * 2 + 1])
    elif R == 2:  # noqa: PLR2004 same as in mma.py
        joined = tl.join(
            tl.join(totals[UNIT * R * 2], totals[UNIT * R * 2 + 1]),
            tl.join(totals[UNIT * R * 2 + 2], totals[UNIT * R * 2 + 3]),
        )
    else:
        joined = tl.join(
            tl.join(
                tl.join(totals[UNIT * R * 2], totals[UNIT * R * 2 + 1]),
                tl.join(totals[UNIT * R * 2 + 2], totals[UNIT * R * 2 + 3]),
            ),
            tl.join(
                tl.join(totals[UNIT * R * 2 + 4], totals[UNIT * R * 2 + 5]),
                tl.join(totals[UNIT * R * 2 + 6], totals[UNIT * R * 2 + 7]),
            ),
        )
    # A lane holds two planes: of two lanes those of a token of four.
    shares = tl.reshape(joined, (WR, WK, 8, 8 // P, P // 2, 2 * R))
    return tl.sum(tl.sum(shares, axis=4), axis=1)


@triton.jit
def row_of_share(block, R: tl.constexpr, WR: tl.constexpr):
    """Row numbers of `add_shares`, int32 [WR, 8, 1, 2 R], for the block's number in its band."""
    share = tl.arange(0, 2 * R)
    half = share // R
    if R == 4:  # noqa: PLR2004 same
        number = share % 4 // 2 + 2 * (share % 2)
    else:
        number = share % R
    warp = block * WR + tl.arange(0, WR)
    row = (warp * 16 * R)[:, None, None, None] + tl.arange(0, 8)[None, :, None, None]
    return row + (16 * number + 8 * half)[None, None, None, :]
