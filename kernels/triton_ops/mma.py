"""Products of packed codes and whole numbers, bit by bit.

With m = 2^b - 1 the value of a code u of b bits is u - m / 2, so that twice a product with whole
numbers x is 2 sum(u x) - m sum(x). The k-th highest bit of u counts 2^(b-1-k): instead of the sum
its source is divided, by reading its bits k further on: its lowest bits are 0, so that nothing is
lost. With c_p the bits that the codes and bit p of x have in common, twice the product is
2^(b-1) (2 sum(2^p c_p) - n), where n is the sum of all x that were read. All are whole numbers.
"""

import triton
import triton.language as tl

from kernels import fragments
from kernels.triton_ops.bits import (
    deal_rows,
    load_four,
    multiply_pair,
    multiply_plainly,
    read_fourth,
)
from kernels.triton_ops.items import replace_items

MOST_AHEAD = tl.constexpr(fragments.MOST_AHEAD)


@triton.constexpr_function
def words_of_pair(n_planes):
    """int64 words of a pair of steps: half of fragments.words_of_pair, which no kernel can call."""
    return (8 * n_planes + 8) * 4


@triton.constexpr_function
def words_of_operand(use_ptx):
    """Words of `load_four`."""
    return 4 if use_ptx else 2


@triton.jit
def load_codes(
    at, FIRST: tl.constexpr, COUNT: tl.constexpr, R: tl.constexpr, USE_PTX: tl.constexpr
):
    """Words of COUNT pairs of steps of R row blocks, whether they exist or not.

    Args:
        at: R int64 pointers [threads], this lane's first two words.
        FIRST: The first of the pairs.
        COUNT: Pairs; with those before no more than fragments.MOST_AHEAD, for which slabs go on.
        R: Row blocks.
        USE_PTX: Of `load_four`.

    Returns:
        Of `load_four`, for each pair and block in turn. Those that do not exist are any words:
        their source is 0.
    """
    tl.static_assert(FIRST + COUNT <= MOST_AHEAD)
    words = ()
    for u in tl.static_range(FIRST, FIRST + COUNT):
        for r in tl.static_range(R):
            words += load_four(at[r] + 64 * u, USE_PTX)
    return words


@triton.jit
def load_planes(source, offset, left, FIRST: tl.constexpr, COUNT: tl.constexpr, P: tl.constexpr):
    """Bits of a token for COUNT pairs from the FIRST one on, those of a pair together.

    Args:
        source: int64 pointers [threads], this lane's word of the first byte, and of zeros.
        offset: Words from there on.
        left: int32 [threads], pairs that exist from there on; others are zeros.
        FIRST: Same.
        COUNT: Same.
        P: Bytes of a number.

    Returns:
        COUNT x P int64 [threads].
    """
    source_at, zeros_at = source
    planes = ()
    for u in tl.static_range(FIRST, FIRST + COUNT):
        # Zeros are read, not made: a load under a condition takes two instructions more.
        at = tl.where(left > u, source_at + offset + u * words_of_pair(P), zeros_at)
        for byte in tl.static_range(P):
            planes += (tl.load(at + 32 * byte),)
    return planes


@triton.jit
def add_pair(acc, words, planes, R: tl.constexpr, HAS_ONES: tl.constexpr, USE_PTX: tl.constexpr):
    """Sums of one pair of steps, with HAS_ONES also those of codes that are all ones.

    Args:
        acc: int32 [threads], 4 (R + HAS_ONES) for each byte.
        words: Of `load_codes`, of one pair.
        planes: int64 [threads] of `load_planes`, one for each byte.
        R: Row blocks.
        HAS_ONES: Same.
        USE_PTX: `multiply_pair`; without it `multiply_plainly`.

    Returns:
        acc.
    """
    # Four bytes are multiplied at once: of those that do not exist nothing is added.
    fours = planes if USE_PTX else planes + (tl.zeros_like(planes[0]),) * (4 - len(planes))
    W: tl.constexpr = words_of_operand(USE_PTX)
    for r in tl.static_range(R + HAS_ONES):
        if r < R:
            a = words[W * r : W * (r + 1)]
        else:
            a = (tl.full(words[0].shape, -1, dtype=words[0].dtype),) * W
        if not USE_PTX:
            found = multiply_plainly(a[0], a[1], fours)
        for n in tl.static_range(len(planes)):
            c = acc[4 * (n * (R + HAS_ONES) + r) : 4 * (n * (R + HAS_ONES) + r + 1)]
            if USE_PTX:
                d = multiply_pair(a, planes[n].to(tl.int32), (planes[n] >> 32).to(tl.int32), c)
            else:
                own = found[4 * n : 4 * n + 4]
                d = (c[0] + own[0], c[1] + own[1], c[2] + own[2], c[3] + own[3])
            acc = replace_items(acc, d, 4 * (n * (R + HAS_ONES) + r), 4)
    return acc


@triton.jit
def join_bits(acc, lane, R: tl.constexpr, P: tl.constexpr, USE_PTX: tl.constexpr):
    """Whole numbers of the sums of single bits, with ones: those of 2 R rows, then of ones.

    The highest bit counts below 0. It is taken off every other one, where a number near 0 has the
    same: so a lane's share is no larger than the numbers are.

    Args:
        acc: Of `add_pair`.
        lane: int32 [threads], 0..31.
        R: Row blocks.
        P: Bytes of a number.
        USE_PTX: Of `read_fourth`.

    Returns:
        2 R + 1 int64 [threads], of this lane's bits: rows g and g + 8 of each
        block, then ones.
    """
    shift = (lane % 4 * 2).to(tl.int64)
    totals = ()
    for i in tl.static_range(2 * R + 1):
        # A lane has its two bits of a byte side by side, rows g and g + 8 after each other.
        highest = acc[(P - 1) * (R + 1) * 4 + 2 * i + 1]
        highest = read_fourth(highest, lane, USE_PTX)
        total = tl.where(lane % 4 == 0, -highest, 0).to(tl.int64)
        for byte in tl.static_range(P):
            first = acc[byte * (R + 1) * 4 + 2 * i] - highest
            second = acc[byte * (R + 1) * 4 + 2 * i + 1] - highest
            total += (first + 2 * second).to(tl.int64) * (1 << 8 * byte)
        totals += (total << shift,)
    return totals


@triton.jit
def join_rows(
    acc, lane, R: tl.constexpr, P: tl.constexpr, NARROW: tl.constexpr, USE_PTX: tl.constexpr
):
    """Whole numbers of the sums of single bits, those of rows dealt to the lanes.

    A row's bits are summed over its lanes before they are joined, in 32 bits: two bytes at once of
    at most 2^16 codes, readings counted, one by one of fewer than 2^23.

    Args:
        acc: Of `add_pair`, without ones.
        lane: int32 [threads], 0..31.
        R: Row blocks.
        P: Bytes of a number.
        NARROW: Whether there are at most 2^16 codes.
        USE_PTX: Of `deal_rows`.

    Returns:
        int64 [threads], rows as of `deal_rows`.
    """
    place = lane % 4
    # The highest bit counts below 0.
    highest = tl.where(place == 3, -2, 2)  # noqa: PLR2004 the last of four
    TOGETHER: tl.constexpr = 2 if NARROW else 1
    total = tl.zeros_like(lane).to(tl.int64)
    for lowest in tl.static_range(0, P, TOGETHER):
        shares = ()
        for i in tl.static_range(2 * R):
            share = tl.zeros_like(lane)
            for byte in tl.static_range(lowest, min(lowest + TOGETHER, P)):
                first = acc[byte * R * 4 + 2 * i]
                second = acc[byte * R * 4 + 2 * i + 1]
                own = first + second * (highest if byte == P - 1 else 2)
                share += own << 8 * (byte - lowest)
            shares += (share << 2 * place,)
        dealt = deal_rows(shares, lane, R, USE_PTX)
        if lowest + TOGETHER < P:
            dealt = dealt.to(tl.uint32, bitcast=True)
        total += dealt.to(tl.int64) << 8 * lowest
    return total


@triton.jit
def add_own(
    acc,
    ahead,
    planes,
    source,
    offset,
    left,
    PAIR: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    X_AHEAD: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """`add_pair` for one pair of a round; without X_AHEAD its activations are loaded here."""
    W: tl.constexpr = words_of_operand(USE_PTX) * R
    if X_AHEAD:
        own = planes[PAIR * P : (PAIR + 1) * P]
    else:
        own = load_planes(source, offset, left, PAIR, 1, P)
    return add_pair(acc, ahead[W * PAIR : W * (PAIR + 1)], own, R, False, USE_PTX)


@triton.jit
def multiply_columns(
    begun,
    following,
    readings,
    n_steps,
    source,
    wk,
    lane,
    R: tl.constexpr,
    P: tl.constexpr,
    WK: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    NARROW: tl.constexpr,
    HAS_FOLLOWING: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Products of R blocks of 16 rows and a token, this warp's share of the pairs of steps.

    Args:
        begun: R int64 pointers [threads], this lane's words of the first pair of all; and loads
            that were started before others: of `load_codes` and, with X_AHEAD, of `load_planes` at
            this warp's first pair.
        following: With HAS_FOLLOWING pointers to the rows whose first loads are started with the
            last products of these.
        readings: How often the source is read, each time one bit further on.
        n_steps: Steps of a reading.
        source: Of `load_planes`, at the token's first pair.
        wk: int32 [threads], which of the WK shares is this warp's.
        lane: int32 [threads], 0..31.
        R: Row blocks of a warp.
        P: Bytes of a number.
        WK: Warps that share the pairs.
        U: Pairs of a round; each is loaded once that of the round before is multiplied.
        X_AHEAD: Whether their activations are loaded ahead too.
        NARROW: Of `join_rows`.
        HAS_FOLLOWING: Same.
        USE_PTX: Of `add_pair`.

    Returns:
        Of `join_rows`, and `begun` of the rows that follow.
    """
    n_pairs = (n_steps + 1) // 2
    n_rounds = (n_pairs + WK * U - 1) // (WK * U)
    # What the last round would load is what comes first in rows that follow, or nothing.
    N_APART: tl.constexpr = 0 if HAS_FOLLOWING else 1
    acc = (tl.zeros_like(lane),) * (P * R * 4)
    reading = 0
    number = 0
    first = wk * U
    codes_at, ahead, planes = begun
    for _ in range(readings * n_rounds - N_APART):
        offset = first * words_of_pair(P) + reading * 4
        left = n_pairs - first
        number += 1
        if number == n_rounds:
            number = 0
            reading += 1
        first = (number * WK + wk) * U
        at = tl.minimum(first, n_pairs)
        is_over = reading == readings
        next_at = ()
        for r in tl.static_range(R):
            own_at = codes_at[r] + (reading * n_steps + 2 * at) * 32
            if HAS_FOLLOWING:
                own_at = tl.where(is_over, following[r] + 64 * at, own_at)
            next_at += (own_at,)
        next_offset = first * words_of_pair(P) + tl.where(is_over, 0, reading) * 4
        next_ahead = ()
        for u in tl.static_range(U):
            acc = add_own(acc, ahead, planes, source, offset, left, u, R, P, X_AHEAD, USE_PTX)
            next_ahead += load_codes(next_at, u, 1, R, USE_PTX)
        ahead = next_ahead
        if X_AHEAD:
            # Activations of a lone round are those of all rows.
            if readings * n_rounds > 1:
                planes = load_planes(source, next_offset, n_pairs - first, 0, U, P)
    if N_APART > 0:
        offset = first * words_of_pair(P) + reading * 4
        left = n_pairs - first
        for u in tl.static_range(U):
            acc = add_own(acc, ahead, planes, source, offset, left, u, R, P, X_AHEAD, USE_PTX)
    next_at = following if HAS_FOLLOWING else codes_at
    return join_rows(acc, lane, R, P, NARROW, USE_PTX), (next_at, ahead, planes)
