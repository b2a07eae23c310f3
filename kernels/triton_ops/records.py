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
# int64 words before the bits of the first token.
ZERO_WORDS = tl.constexpr(fragments.ZERO_WORDS // 2)


@triton.jit
def find_block(sizes_ptr, block, count, ROWS: tl.constexpr):
    """Which entry of a list of row counts a block of ROWS / count rows falls into.

    Args:
        sizes_ptr: int32 [32], rows of each entry, 0 beyond the last.
        block: Number of the block over all entries.
        count: A divisor of ROWS.
        ROWS: Rows of `count` blocks.

    Returns:
        Number of the entry, 32 beyond the last, and the block's number within it.
    """
    entry = tl.arange(0, MAX_RECORDS)
    blocks = (tl.load(sizes_ptr + entry) * count + ROWS - 1) // ROWS
    end = tl.cumsum(blocks, axis=0)
    before = end <= block
    return tl.sum(before.to(tl.int32), axis=0), block - tl.max(tl.where(before, end, 0), axis=0)


@triton.jit
def split_warps(number, count, WR: tl.constexpr):
    """Whose rows a warp multiplies, where WR warps are those of `count` tokens.

    Args:
        number: int32, of the warp.
        count: Tokens, a divisor of WR.
        WR: Same.

    Returns:
        Number of the token, and of the warp among those of the token.
    """
    token = number * count // WR
    return token, number - token * (WR // count)


@triton.jit
def place_threads(block, count, R: tl.constexpr, WK: tl.constexpr, WR: tl.constexpr):
    """What each thread multiplies.

    Args:
        block: Number of the program's first block of rows: of 16 R WR, shared by its tokens.
        count: Tokens of the program.
        R: Row blocks of a warp.
        WK: Warps that share steps.
        WR: Warps that do not.

    Returns:
        Four int32 [threads]: its lane, which of WK shares is its warp's, the warp's first row
        block, and its token.
    """
    thread = tl.arange(0, 32 * WK * WR)
    warp = thread // 32
    token, own = split_warps(warp // WK, count, WR)
    return thread % 32, warp % WK, (block * (WR // count) + own) * R, token


@triton.jit
def load_group(count_ptr, number_ptr, TOKENS: tl.constexpr):
    """Tokens that the programs of a place multiply, at most TOKENS, and the place's number there.

    Args:
        count_ptr: int32, tokens that stand together, a power of two.
        number_ptr: int32, number of the place among them.
        TOKENS: A power of two.
    """
    count = 1
    number = 0
    if TOKENS > 1:
        count = tl.minimum(tl.load(count_ptr), TOKENS)
        number = tl.load(number_ptr) & (count - 1)
    return count, number


@triton.jit
def locate_tokens(place, count, WR: tl.constexpr, TOKENS: tl.constexpr):
    """Places of a program's tokens as `add_shares` has them, and as `load_sums` takes them.

    Args:
        place: Of the program's first token.
        count: Of `split_warps`.
        WR: Same.
        TOKENS: Most tokens of a program.

    Returns:
        The place twice if there is only one, else int64 [32 WR] and [WR, 1].
    """
    tl.static_assert(WR % TOKENS == 0)
    at = place
    sums_at = place
    if TOKENS > 1:
        token, _ = split_warps(tl.arange(0, 32 * WR) // 32, count, WR)
        at = place + token
        token, _ = split_warps(tl.arange(0, WR), count, WR)
        sums_at = (place + token)[:, None]
    return at, sums_at


@triton.jit
def count_turns(fields, own, width, TURNS: tl.constexpr):
    """Blocks of 16 x width rows that a record has for its program `own`, at most TURNS."""
    blocks = (fields[3] + width - 1) // width
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
    """Start the first loads of a record's codes: what `multiply_columns` takes as `begun`.

    Arguments are those of `finish_record`.

    Returns:
        Of `locate_codes`, and of `load_codes`.
    """
    at = locate_codes(fields, slab, first_block, lane, R)
    first = tl.minimum(wk * U, (fields[4] + 1) // 2)
    places = ()
    for r in tl.static_range(R):
        places += (at[r] + 64 * first,)
    return at, load_codes(places, 0, U, R, USE_PTX)


@triton.jit
def locate_source(fields, source_ptr, zeros_ptr, lane, P: tl.constexpr):
    """`source` of `load_planes` at the first pair of a record.

    Args:
        fields: Of `load_record`.
        source_ptr: int64, what the token is there.
        zeros_ptr: int64, words of a pair that are 0.
        lane: int32 [threads], 0..31.
        P: Bytes of a number.
    """
    return source_ptr + fields[8].to(tl.int64) * words_of_pair(P) + lane, zeros_ptr + lane


@triton.jit
def begin_products(
    started,
    fields,
    source,
    wk,
    P: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
):
    """`begun` of `multiply_columns`: of `start_record`, and activations if they are ahead too."""
    at, ahead = started
    planes = ()
    if X_AHEAD:
        first = wk * U
        left = (fields[4] + 1) // 2 - first
        planes = load_planes(source, first * words_of_pair(P), left, 0, U, P)
    return at, ahead, planes


@triton.jit
def load_sums(sums_ptr, n_inputs, fields, SUMS: tl.constexpr):
    """What a record's source sums up to, in shares, int64 [SUMS] or [warps, SUMS].

    Args:
        sums_ptr: int64, those of the token; or [warps, 1], those of each warp's.
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
