"""Reading the directory of an arena in a kernel; its fields are those of kernels/directory.py."""

import triton
import triton.language as tl

from kernels import directory, fragments
from kernels.triton_ops.masks import mask_if
from kernels.triton_ops.mma import load_codes, multiply_columns, multiply_staged, words_of_pair
from kernels.triton_ops.tiles import multiply_tiles

MAX_RECORDS = tl.constexpr(directory.MAX_RECORDS)
MAX_OUTPUTS = tl.constexpr(directory.MAX_OUTPUTS)
RECORD_INTS = tl.constexpr(directory.RECORD_INTS)
PART_INTS = tl.constexpr(directory.PART_INTS)
SHRINK_RECORDS = tl.constexpr(directory.SHRINK_RECORDS)
EXPAND_SIZES = tl.constexpr(directory.EXPAND_SIZES)
EXPAND_PARTS = tl.constexpr(directory.EXPAND_PARTS)
EXPAND_RECORDS = tl.constexpr(directory.EXPAND_RECORDS)
UNIT_BYTES = tl.constexpr(fragments.UNIT_BYTES)


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
    """The eleven fields that every record has, in the order of kernels/directory.py."""
    fields = ()
    for i in tl.static_range(11):
        fields += (tl.load(record_ptr + i),)
    return fields


@triton.jit
def locate_codes(fields, slab, first_block, lane, R: tl.constexpr):
    """R int64 pointers [threads]: this lane's words of R row blocks, of the last for those beyond.

    Args:
        fields: Of `load_record`.
        slab: Address of the tenant's slab.
        first_block: int32 [threads], first row block of this warp.
        lane: int32 [threads], 0..31.
        R: Row blocks.
    """
    codes_ptr = load_pointer(slab, fields[1], tl.int64)
    steps = fields[0] * fields[4]
    at = ()
    for r in tl.static_range(R):
        block = tl.minimum(first_block + r, fields[3] - 1)
        at += (codes_ptr + (block * steps).to(tl.int64) * 32 + lane,)
    return at


@triton.jit
def start_record(
    fields,
    slab,
    first_block,
    wk,
    lane,
    R: tl.constexpr,
    U: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Start the first loads of a record's codes; arguments are those of `finish_record`."""
    at = locate_codes(fields, slab, first_block, lane, R)
    ahead = ()
    if STAGES == 0:
        ahead = load_first(fields, at, wk, R, U)
    return at, ahead


@triton.jit
def load_first(fields, at, wk, R: tl.constexpr, U: tl.constexpr):
    """`ahead` of `multiply_columns`."""
    first = wk * U
    places = ()
    for r in tl.static_range(R):
        places += (at[r] + 64 * first,)
    left = tl.where(fields[0] > 0, (fields[4] + 1) // 2 - first, 0)
    return load_codes(places, left, R, U)


@triton.jit
def load_sums(sums_ptr, n_inputs, fields, SUMS: tl.constexpr):
    """What a record's source sums up to, in shares, int64 [SUMS].

    Args:
        sums_ptr: int64, those of the token.
        n_inputs: Shares of an input; 0 where the source are hidden values, a share for each word.
        fields: Of `load_record`.
        SUMS: No fewer than there are.
    """
    share = tl.arange(0, SUMS)
    n_shares = tl.where(n_inputs > 0, n_inputs, (fields[4] + 1) // 2 * 8)
    return tl.load(sums_ptr + fields[8] * 8 + share, mask=share < n_shares, other=0)


@triton.jit
def count_read(shares, readings):
    """Sum of all numbers that were read, int64: each reading has half of those before."""
    most = (1 << readings).to(tl.int64) - 1
    return (tl.sum(shares, axis=0) * most) >> (readings - 1).to(tl.int64)


@triton.jit
def add_shares(
    totals,
    R: tl.constexpr,
    WK: tl.constexpr,
    WR: tl.constexpr,
):
    """Products of one token, summed over its bits and over the warps that shared the steps.

    Args:
        totals: 2 R [threads].
        R: Row blocks of a warp, 1, 2 or 4.
        WK: Warps that shared the steps.
        WR: Warps that did not.

    Returns:
        [WR, 8, 2 R]; `row_of_share` says which rows these are.
    """
    joined = tl.join(totals[0], totals[1])
    if R >= 2:  # noqa: PLR2004 pairs of rows
        joined = tl.join(joined, tl.join(totals[2], totals[3]))
    if R == 4:  # noqa: PLR2004 same
        third = tl.join(totals[4], totals[5])
        joined = tl.join(joined, tl.join(third, tl.join(totals[6], totals[7])))
    # Four lanes have the bits of a row.
    shares = tl.reshape(joined, (WR, WK, 8, 4, 2 * R))
    return tl.sum(tl.sum(shares, axis=3), axis=1)


@triton.jit
def row_of_share(block, R: tl.constexpr, WR: tl.constexpr):
    """Row numbers of `add_shares`, int32 [WR, 8, 2 R], for the block's number in its band."""
    share = tl.arange(0, 2 * R)
    half = share // R
    if R == 4:  # noqa: PLR2004 the order in which `add_shares` joins
        number = share % 4 // 2 + 2 * (share % 2)
    else:
        number = share % R
    warp = block * WR + tl.arange(0, WR)
    row = (warp * 16 * R)[:, None, None] + tl.arange(0, 8)[None, :, None]
    return row + (16 * number + 8 * half)[None, None, :]


@triton.jit
def order_shares(shares, R: tl.constexpr, WR: tl.constexpr):
    """`shares` of `add_shares` in the order of rows, [16 R WR]."""
    if R == 1:
        ordered = tl.permute(tl.reshape(shares, (WR, 8, 2)), (0, 2, 1))
    elif R == 2:  # noqa: PLR2004 same
        ordered = tl.permute(tl.reshape(shares, (WR, 8, 2, 2)), (0, 3, 2, 1))
    else:
        ordered = tl.permute(tl.reshape(shares, (WR, 8, 2, 2, 2)), (0, 4, 3, 2, 1))
    return tl.reshape(ordered, (16 * R * WR,))


@triton.jit
def finish_record(
    started,
    fields,
    sums,
    slab,
    first_block,
    source_ptr,
    wk,
    lane,
    IS_PLAIN: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    WK: tl.constexpr,
    WR: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Twice the products of a record and a token, over its bound.

    Args:
        started: Of `start_record`.
        fields: Of `load_record`.
        sums: Of `load_sums`; unread where the record has scales for tiles.
        slab: Address of the tenant's slab.
        first_block: int32 [threads], first row block of this warp.
        source_ptr: int64, the token's source.
        wk: Of `multiply_columns`, and so all that are not named here.
        lane: Same.
        IS_PLAIN: No record has scales for tiles.
        R: Same.
        P: Same.
        WK: Same.
        WR: Warps that share no steps.
        U: Same.
        X_AHEAD: Same.
        STAGES: Of `multiply_staged`; 0 loads `ahead` to registers instead.
        USE_PTX: Same.

    Returns:
        fp32 [WR, 8, 2 R] of `add_shares`.
    """
    codes_at, _ = started
    source_at = source_ptr + fields[8].to(tl.int64) * words_of_pair(P) + lane
    if IS_PLAIN:
        found = finish_plain(
            started, fields, sums, source_at, wk, lane,
            R, P, WK, WR, U, X_AHEAD, STAGES, USE_PTX,
        )  # fmt: skip
    else:
        group = fields[6]
        found = tl.zeros((WR, 8, 2 * R), dtype=tl.float32)
        if group > 0:
            group_ptr = load_pointer(slab, group, tl.int32)
            tiles = multiply_tiles(
                codes_at, fields[0], fields[4], fields[9], fields[10], group_ptr,
                first_block, fields[3], source_at, wk, lane,
                R, P, WK, USE_PTX,
            )  # fmt: skip
            found = add_shares(tiles, R, WK, WR)
        else:
            found = finish_plain(
                started, fields, sums, source_at, wk, lane,
                R, P, WK, WR, U, X_AHEAD, STAGES, USE_PTX,
            )  # fmt: skip
    return found


@triton.jit
def finish_plain(
    started,
    fields,
    sums,
    source_at,
    wk,
    lane,
    R: tl.constexpr,
    P: tl.constexpr,
    WK: tl.constexpr,
    WR: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """`finish_record` of one without scales for tiles; source_at is that of `multiply_columns`."""
    codes_at, ahead = started
    if STAGES > 0:
        totals = multiply_staged(
            codes_at, fields[0], fields[4], source_at, wk, lane,
            R, P, WK, U, STAGES, USE_PTX,
        )  # fmt: skip
    else:
        totals = multiply_columns(
            ahead, codes_at, fields[0], fields[4], source_at, wk, lane,
            R, P, WK, U, X_AHEAD, USE_PTX,
        )  # fmt: skip
    twice = 2 * add_shares(totals, R, WK, WR)
    return (twice - count_read(sums, fields[0])).to(tl.float32)


@triton.jit
def load_bound(fields):
    """fp32, what the products of a record are over."""
    return fields[7].to(tl.float32, bitcast=True)


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
    STAGES: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Twice the outputs of a part for a token, fp32 [WR, 8, 2 R].

    Args:
        started: Of `start_record`, for the part's first record.
        first: Of `load_record`, of the same.
        record_ptr: int32, the part's records.
        n_records: How many those are; one if IS_PLAIN.
        sums_ptr: Of `load_sums`.
        n_inputs: Same.
        slab: Of `finish_record`, and so all that are not named here.
        block: Number of the program's block of rows in the part.
        first_block: Same.
        source_ptr: Same.
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
        STAGES: Same.
        USE_PTX: Same.
    """
    shares = load_sums(sums_ptr, n_inputs, first, SUMS)
    products = finish_record(
        started, first, shares, slab, first_block, source_ptr, wk, lane,
        IS_PLAIN, R, P, WK, WR, U, X_AHEAD, STAGES, USE_PTX,
    )  # fmt: skip
    sums = scale_shares(products, first, slab, block, HAS_FACTORS, R, WR)
    if not IS_PLAIN:
        for number in range(1, n_records):
            fields = load_record(record_ptr + number * RECORD_INTS)
            begun = start_record(fields, slab, first_block, wk, lane, R, U, STAGES)
            shares = load_sums(sums_ptr, n_inputs, fields, SUMS)
            products = finish_record(
                begun, fields, shares, slab, first_block, source_ptr, wk, lane,
                IS_PLAIN, R, P, WK, WR, U, X_AHEAD, STAGES, USE_PTX,
            )  # fmt: skip
            sums += scale_shares(products, fields, slab, block, HAS_FACTORS, R, WR)
    return sums


@triton.jit
def scale_shares(
    products, fields, slab, block, HAS_FACTORS: tl.constexpr, R: tl.constexpr, WR: tl.constexpr
):
    """`products` of `finish_record` times the record's bound, and its factors if it has any."""
    scaled = products * load_bound(fields)
    if HAS_FACTORS:
        factors_ptr = load_pointer(slab, fields[5], tl.float32)
        row = row_of_share(block, R, WR)
        mask = mask_if(row < fields[2], fields[5] > 0)
        scaled *= tl.load(factors_ptr + row, mask=mask, other=1.0)
    return scaled
