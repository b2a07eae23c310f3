"""Products of the records of a directory and a token, and where a program's threads have them."""

import triton
import triton.language as tl

from kernels.triton_ops.bits import deal_rows
from kernels.triton_ops.masks import mask_if
from kernels.triton_ops.mma import multiply_columns
from kernels.triton_ops.records import (
    RECORD_INTS,
    begin_products,
    load_bound,
    load_pointer,
    load_record,
    load_sums,
    locate_codes,
    locate_source,
    split_warps,
    start_record,
)
from kernels.triton_ops.tiles import multiply_tiles


@triton.jit
def count_read(shares, readings):
    """Sum of all numbers that were read, int64: each reading has half of those before.

    Args:
        shares: Of `load_sums`.
        readings: How often the source is read.

    Returns:
        A number; of [warps, SUMS] shares [32 warps], the same for all lanes of a warp.
    """
    most = (1 << readings).to(tl.int64) - 1
    WARPS: tl.constexpr = shares.shape[0] if len(shares.shape) > 1 else 0
    if WARPS > 0:
        whole = tl.sum(shares, axis=1)[:, None] + tl.zeros((WARPS, 32), dtype=tl.int64)
        total = tl.reshape(whole, (32 * WARPS,))
    else:
        total = tl.sum(shares, axis=0)
    return (total * most) >> (readings - 1).to(tl.int64)


@triton.jit
def add_shares(totals, WK: tl.constexpr, WR: tl.constexpr):
    """Products of one token, summed over the warps that shared the steps.

    Args:
        totals: [threads], of `deal_rows`.
        WK: Warps that shared the steps.
        WR: Warps that did not.

    Returns:
        [32 WR]; `row_of_share` says which rows these are.
    """
    shares = totals
    if WK > 1:
        shares = tl.sum(tl.reshape(shares, (WR, WK, 32)), axis=1)
        shares = tl.reshape(shares, (32 * WR,))
    return shares


@triton.jit
def row_of_share(block, count, R: tl.constexpr, WR: tl.constexpr):
    """Row numbers of `add_shares`, int32 [32 WR].

    With R = 1 every other lane has the row of the one before it.

    Args:
        block: Number of the block in its band.
        count: Of `split_warps`.
        R: Row blocks of a warp.
        WR: Of `split_warps`.
    """
    lane = tl.arange(0, 32 * WR)
    _, own = split_warps(lane // 32, count, WR)
    row = (block * (WR // count) + own) * 16 * R + lane % 32 // 4
    if R == 1:
        row += lane // 2 % 2 * 8
    else:
        row += lane // 2 % 2 * 16 + lane % 2 * 8
    return row


@triton.jit
def order_shares(shares, R: tl.constexpr, WR: tl.constexpr):
    """`shares` of `add_shares` in the order of rows, [16 R WR]."""
    lanes = tl.reshape(shares, (WR, 8, 2, 2))
    if R == 1:
        ordered = tl.permute(tl.max(lanes, axis=3), (0, 2, 1))
    else:
        ordered = tl.permute(lanes, (0, 2, 3, 1))
    return tl.reshape(ordered, (16 * R * WR,))


@triton.jit
def finish_record(
    fields,
    sums,
    slab,
    first_block,
    source_ptr,
    zeros_ptr,
    wk,
    lane,
    R: tl.constexpr,
    P: tl.constexpr,
    WK: tl.constexpr,
    WR: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    NARROW: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Twice the products of a record and a token, over its bound, where records differ in kind.

    Args:
        fields: Of `load_record`.
        sums: Of `load_sums`; unread where the record has scales for tiles.
        slab: Address of the tenant's slab.
        first_block: int32 [threads], first row block of this warp.
        source_ptr: Of `locate_source`.
        zeros_ptr: Same.
        wk: Of `multiply_columns`, and so all that are not named here.
        lane: Same.
        R: Same.
        P: Same.
        WK: Same.
        WR: Warps that share no steps.
        U: Same.
        X_AHEAD: Same.
        NARROW: Same.
        USE_PTX: Same.

    Returns:
        fp32 [32 WR] of `add_shares`.
    """
    source = locate_source(fields, source_ptr, zeros_ptr, lane, P)
    found = tl.zeros((32 * WR,), dtype=tl.float32)
    group = fields[6]
    if group > 0:
        codes_at = locate_codes(fields, slab, first_block, lane, R)
        group_ptr = load_pointer(slab, group, tl.int32)
        tiles = multiply_tiles(
            codes_at, fields[0], fields[4], fields[9], fields[10], group_ptr,
            first_block, fields[3], source[0], wk, lane,
            R, P, WK, USE_PTX,
        )  # fmt: skip
        found = add_shares(deal_rows(tiles, lane, R, USE_PTX), WK, WR)
    else:
        started = start_record(fields, slab, first_block, wk, lane, R, U, USE_PTX)
        found = finish_plain(
            started, fields, sums, slab, first_block, source, wk, lane,
            R, P, WK, WR, U, X_AHEAD, NARROW, USE_PTX,
        )  # fmt: skip
    return found


@triton.jit
def finish_plain(
    started,
    fields,
    sums,
    slab,
    first_block,
    source,
    wk,
    lane,
    R: tl.constexpr,
    P: tl.constexpr,
    WK: tl.constexpr,
    WR: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    NARROW: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """`finish_record` of one without scales for tiles.

    `started` is of `start_record`, source that of `multiply_columns`.
    """
    begun = begin_products(started, fields, source, wk, P, U, X_AHEAD)
    products, _ = finish_turn(
        begun, 0, 1, fields, sums, slab, first_block, R * WR, source, wk, lane,
        R, P, WK, WR, U, X_AHEAD, NARROW, False, USE_PTX,
    )  # fmt: skip
    return products


@triton.jit
def finish_turn(
    begun,
    turn,
    n_turns,
    fields,
    sums,
    slab,
    first_block,
    width,
    source,
    wk,
    lane,
    R: tl.constexpr,
    P: tl.constexpr,
    WK: tl.constexpr,
    WR: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    NARROW: tl.constexpr,
    HAS_FOLLOWING: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """`finish_record` of one of the blocks of rows that a program multiplies after each other.

    Args:
        begun: Of `begin_products`, or what the turn before returned.
        turn: Number of the block.
        n_turns: Of them; the loads of the next start with the last products of this.
        fields: Of `load_record`, and all others of `finish_record`; no scales for tiles.
        sums: Of `load_sums`; with HAS_FOLLOWING of `count_read`.
        slab: Same.
        first_block: Of the first turn.
        width: Row blocks from one turn to the next.
        source: Of `multiply_columns`.
        wk: Same.
        lane: Same.
        R: Same.
        P: Same.
        WK: Same.
        WR: Same.
        U: Same.
        X_AHEAD: Same.
        NARROW: Same.
        HAS_FOLLOWING: Whether there is more than one turn.
        USE_PTX: Same.

    Returns:
        fp32 [32 WR] of `add_shares`, and `begun` of the next turn.
    """
    following = ()
    if HAS_FOLLOWING:
        # After the last turn its own once more, which are near; nothing reads them.
        following_turn = tl.minimum(turn + 1, n_turns - 1)
        following = locate_codes(fields, slab, first_block + following_turn * width, lane, R)
    total, begun = multiply_columns(
        begun, following, fields[0], fields[4], source, wk, lane,
        R, P, WK, U, X_AHEAD, NARROW, HAS_FOLLOWING, USE_PTX,
    )  # fmt: skip
    # One sum for all turns; where there is one turn, it is taken while nothing waits for it.
    count = sums if HAS_FOLLOWING else count_read(sums, fields[0])
    # Of codes around 0, not of whole ones.
    return (2 * add_shares(total, WK, WR) - count).to(tl.float32), begun


@triton.jit
def sum_part(
    started,
    first,
    record_ptr,
    n_records,
    sums_ptr,
    n_inputs,
    slab,
    block,
    first_block,
    source_ptr,
    zeros_ptr,
    wk,
    lane,
    SUMS: tl.constexpr,
    IS_PLAIN: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    WK: tl.constexpr,
    WR: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    NARROW: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Twice the outputs of a part for a token, fp32 [32 WR].

    Args:
        started: Of `start_record`, for the part's first record; unread unless IS_PLAIN.
        first: Of `load_record`, of the same; unread unless IS_PLAIN.
        record_ptr: int32, the part's records.
        n_records: How many those are; one if IS_PLAIN.
        sums_ptr: Of `load_sums`.
        n_inputs: Same.
        slab: Of `finish_record`, and so all that are not named here.
        block: Number of the program's block of rows in the part.
        first_block: Same.
        source_ptr: Same.
        zeros_ptr: Same.
        wk: Same.
        lane: Same.
        SUMS: Of `load_sums`.
        IS_PLAIN: Same.
        HAS_FACTORS: Whether a record may have a factor a row.
        R: Same.
        P: Same.
        WK: Same.
        WR: Same.
        U: Same.
        X_AHEAD: Same.
        NARROW: Same.
        USE_PTX: Same.
    """
    row = row_of_share(block, 1, R, WR)
    if IS_PLAIN:
        shares = load_sums(sums_ptr, n_inputs, first, SUMS)
        products = finish_plain(
            started, first, shares, slab, first_block,
            locate_source(first, source_ptr, zeros_ptr, lane, P), wk, lane,
            R, P, WK, WR, U, X_AHEAD, NARROW, USE_PTX,
        )  # fmt: skip
        sums = scale_shares(products, first, slab, row, HAS_FACTORS)
    else:
        sums = tl.zeros((32 * WR,), dtype=tl.float32)
        for number in range(n_records):
            fields = load_record(record_ptr + number * RECORD_INTS)
            shares = load_sums(sums_ptr, n_inputs, fields, SUMS)
            products = finish_record(
                fields, shares, slab, first_block, source_ptr, zeros_ptr, wk, lane,
                R, P, WK, WR, U, X_AHEAD, NARROW, USE_PTX,
            )  # fmt: skip
            sums += scale_shares(products, fields, slab, row, HAS_FACTORS)
    return sums


@triton.jit
def scale_shares(products, fields, slab, row, HAS_FACTORS: tl.constexpr):
    """`products` of `finish_record` times the record's bound, and its rows' factors if any."""
    scaled = products * load_bound(fields)
    if HAS_FACTORS:
        factors_ptr = load_pointer(slab, fields[5], tl.float32)
        mask = mask_if(row < fields[2], fields[5] > 0)
        scaled *= tl.load(factors_ptr + row, mask=mask, other=1.0)
    return scaled
