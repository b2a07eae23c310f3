"""Reading the directory of an arena in a kernel; its fields are those of kernels/directory.py."""

import triton
import triton.language as tl

from kernels import directory, fragments
from kernels.triton_ops.mma import load_codes, load_planes, words_of_pair

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
def place_threads(block, R: tl.constexpr, WK: tl.constexpr, WR: tl.constexpr):
    """Lane of each thread, which of WK shares is its warp's, and the warp's first row block.

    Args:
        block: Number of the program's first block of 16 R WR rows.
        R: Row blocks of a warp.
        WK: Warps that share steps.
        WR: Warps that do not.

    Returns:
        Three int32 [threads].
    """
    thread = tl.arange(0, 32 * WK * WR)
    warp = thread // 32
    return thread % 32, warp % WK, (block * WR + warp // WK) * R


@triton.jit
def count_turns(fields, own, R: tl.constexpr, WR: tl.constexpr, TURNS: tl.constexpr):
    """Blocks of 16 R WR rows that a record has for its program `own`, at most TURNS."""
    blocks = (fields[3] + R * WR - 1) // (R * WR)
    return tl.minimum(blocks - own * TURNS, TURNS)


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

    Each points at two words of a pair of steps.

    Args:
        fields: Of `load_record`.
        slab: Address of the tenant's slab.
        first_block: int32 [threads], first row block of this warp.
        lane: int32 [threads], 0..31.
        R: Row blocks.
    """
    codes_ptr = load_pointer(slab, fields[1], tl.int64)
    # Whole pairs.
    steps = (fields[0] * fields[4] + 1) // 2 * 2
    at = ()
    for r in tl.static_range(R):
        block = tl.minimum(first_block + r, fields[3] - 1)
        at += (codes_ptr + (block * steps).to(tl.int64) * 32 + 2 * lane,)
    return at


@triton.jit
def start_record(
    fields, slab, first_block, wk, lane, R: tl.constexpr, U: tl.constexpr, USE_PTX: tl.constexpr
):
    """Start the first loads of a record's codes: those of `multiply_columns`'s `begun`.

    Arguments are those of `finish_record`.
    """
    at = locate_codes(fields, slab, first_block, lane, R)
    first = wk * U
    places = ()
    for r in tl.static_range(R):
        places += (at[r] + 64 * first,)
    left = tl.where(fields[0] > 0, (fields[4] + 1) // 2 - first, 0)
    return load_codes(places, left, U, R, False, USE_PTX)


@triton.jit
def locate_source(fields, source_ptr, lane, P: tl.constexpr):
    """This lane's word of the first pair of a record's source."""
    return source_ptr + fields[8].to(tl.int64) * words_of_pair(P) + lane


@triton.jit
def begin_products(
    ahead,
    fields,
    sources,
    wk,
    P: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
):
    """`begun` of `multiply_columns`: `ahead` of `start_record`, and activations if they are too."""
    planes = ()
    if X_AHEAD:
        first = wk * U
        left = (fields[4] + 1) // 2 - first
        planes = load_planes(sources, first * words_of_pair(P), left, 0, U, P, False)
    return ahead, planes


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
def load_bound(fields):
    """fp32, what the products of a record are over."""
    return fields[7].to(tl.float32, bitcast=True)
