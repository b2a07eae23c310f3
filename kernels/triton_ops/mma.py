"""Products of packed codes and whole numbers, bit by bit.

With m = 2^b - 1 the value of a code u of b bits is u - m / 2, so that twice a product with whole
numbers x is 2 sum(u x) - m sum(x). The k-th highest bit of u counts 2^(b-1-k): instead of the sum
its source is divided, by reading its bits k further on: its lowest bits are 0, so that nothing is
lost. With c_p the bits that the codes and bit p of x have in common, twice the product is
2^(b-1) (2 sum(2^p c_p) - n), where n is the sum of all x that were read. All are whole numbers.
"""

import triton
import triton.language as tl

from kernels.triton_ops.bits import (
    deal_rows,
    load_two,
    multiply_pair,
    multiply_plainly,
    read_fourth,
)
from kernels.triton_ops.items import replace_items


@triton.constexpr_function
def words_of_pair(n_planes):
    """int64 words of a pair of steps: half of fragments.words_of_pair, which no kernel can call."""
    return (8 * n_planes + 8) * 4


@triton.jit
def load_codes(
    at,
    left,
    COUNT: tl.constexpr,
    R: tl.constexpr,
    ALL_EXIST: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Words of COUNT pairs of steps of R row blocks.

    Args:
        at: R int64 pointers [threads], this lane's first two words.
        left: int32 [threads], pairs that exist from there on.
        COUNT: Same.
        R: Row blocks.
        ALL_EXIST: `left` is not asked.
        USE_PTX: Of `load_two`.

    Returns:
        2 R COUNT int64 [threads]: two for a pair and block. Those that do not exist are any words:
        their source is 0.
    """
    words = ()
    for u in tl.static_range(COUNT):
        for r in tl.static_range(R):
            words += load_two(at[r] + 64 * u, left, u, ALL_EXIST, USE_PTX)
    return words


@triton.jit
def load_planes(
    sources,
    offset,
    left,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    P: tl.constexpr,
    ALL_EXIST: tl.constexpr,
):
    """Bits of tokens for COUNT pairs from the FIRST one on, those of a pair together.

    Args:
        sources: int64 pointers [threads] of each token, this lane's word of the first byte.
        offset: Words from there on.
        left: int32 [threads], pairs that exist from there on.
        FIRST: Same.
        COUNT: Same.
        P: Bytes of a number.
        ALL_EXIST: `left` is not asked.

    Returns:
        COUNT x tokens x P int64 [threads].
    """
    planes = ()
    for u in tl.static_range(FIRST, FIRST + COUNT):
        for token in tl.static_range(len(sources)):
            at = sources[token] + offset
            for byte in tl.static_range(P):
                place = at + u * words_of_pair(P) + 32 * byte
                if ALL_EXIST:
                    planes += (tl.load(place),)
                else:
                    planes += (tl.load(place, mask=left > u, other=0),)
    return planes


@triton.jit
def add_pair(acc, words, planes, R: tl.constexpr, HAS_ONES: tl.constexpr, USE_PTX: tl.constexpr):
    """Sums of one pair of steps, with HAS_ONES also those of codes that are all ones.

    Args:
        acc: int32 [threads], 4 (R + HAS_ONES) for each byte.
        words: 2 R int64 [threads] of `load_codes`.
        planes: int64 [threads] of `load_planes`, one for each byte of each token.
        R: Row blocks.
        HAS_ONES: Same.
        USE_PTX: `multiply_pair`; without it `multiply_plainly`.

    Returns:
        acc.
    """
    if not USE_PTX:
        # Four bytes are multiplied at once: of those that do not exist nothing is added.
        fours = planes + (tl.zeros_like(planes[0]),) * (-len(planes) % 4)
    for r in tl.static_range(R + HAS_ONES):
        if r < R:
            first, second = words[2 * r], words[2 * r + 1]
        else:
            first = tl.full(planes[0].shape, -1, dtype=tl.int64)
            second = first
        found = ()
        if not USE_PTX:
            for n in tl.static_range(0, len(fours), 4):
                found += multiply_plainly(first, second, fours[n : n + 4])
        for n in tl.static_range(len(planes)):
            c = acc[4 * (n * (R + HAS_ONES) + r) : 4 * (n * (R + HAS_ONES) + r + 1)]
            if USE_PTX:
                a = (
                    first.to(tl.int32),
                    (first >> 32).to(tl.int32),
                    second.to(tl.int32),
                    (second >> 32).to(tl.int32),
                )
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
def join_rows(acc, lane, R: tl.constexpr, P: tl.constexpr, USE_PTX: tl.constexpr):
    """Whole numbers of the sums of single bits, as `join_bits`, those of rows dealt to the lanes.

    A row's bits of a byte are summed before its bytes are joined, in 32 bits: of fewer than 2^23
    codes, readings counted, no sum is larger.

    Args:
        acc: Of `add_pair`, without ones.
        lane: int32 [threads], 0..31.
        R: Row blocks.
        P: Bytes of a number.
        USE_PTX: Of `deal_rows`.

    Returns:
        int64 [threads], rows as of `deal_rows`.
    """
    place = lane % 4
    weight = 1 << 2 * place
    twice = 2 * weight
    highest = ()
    for i in tl.static_range(2 * R):
        highest += (read_fourth(acc[(P - 1) * R * 4 + 2 * i + 1], lane, USE_PTX),)
    total = tl.zeros_like(lane).to(tl.int64)
    for byte in tl.static_range(P):
        shares = ()
        for i in tl.static_range(2 * R):
            share = acc[byte * R * 4 + 2 * i] * weight
            share += acc[byte * R * 4 + 2 * i + 1] * twice
            # The highest bit itself counts once below 0.
            taken = 3 * weight + (place == 0).to(tl.int32) if byte == 0 else 3 * weight
            shares += (share - highest[i] * taken,)
        total += deal_rows(shares, lane, R, USE_PTX).to(tl.int64) * (1 << 8 * byte)
    return total


@triton.jit
def multiply_columns(
    begun,
    codes_at,
    following,
    readings,
    n_steps,
    sources,
    wk,
    lane,
    R: tl.constexpr,
    P: tl.constexpr,
    WK: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    HAS_FOLLOWING: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Products of R blocks of 16 rows and tokens, this warp's share of the pairs of steps.

    Args:
        begun: Of `load_codes` and, with X_AHEAD, of `load_planes` at this warp's first pair: loads
            that were started before others.
        codes_at: R int64 pointers [threads], this lane's words of the first pair of all.
        following: With HAS_FOLLOWING those of the rows that come after these, and whether any do:
            their first loads are started with the last products of these.
        readings: How often the source is read, each time one bit further on.
        n_steps: Steps of a reading.
        sources: int64 pointers [threads] of each token, this lane's word of its first pair.
        wk: int32 [threads], which of the WK shares is this warp's.
        lane: int32 [threads], 0..31.
        R: Row blocks of a warp.
        P: Bytes of a number.
        WK: Warps that share the pairs.
        U: Pairs of a round; their loads are under way during the round before.
        X_AHEAD: Whether their activations are loaded ahead too.
        HAS_FOLLOWING: Same.
        USE_PTX: Of `add_pair`.

    Returns:
        Of `join_rows` for each token, and `begun` of the rows that follow.
    """
    n_pairs = (n_steps + 1) // 2
    n_rounds = (n_pairs + WK * U - 1) // (WK * U)
    # Bytes of all tokens.
    N: tl.constexpr = P * len(sources)
    acc = (tl.zeros_like(lane),) * (N * R * 4)
    reading = 0
    number = 0
    first = wk * U
    ahead, planes = begun
    for _ in range(readings * n_rounds):
        offset = first * words_of_pair(P) + reading * 4
        left = n_pairs - first
        number += 1
        if number == n_rounds:
            number = 0
            reading += 1
        first = (number * WK + wk) * U
        is_over = reading == readings
        next_at = ()
        for r in tl.static_range(R):
            next_at += (codes_at[r] + (reading * n_steps + 2 * first) * 32,)
        if HAS_FOLLOWING:
            places, exist = following
            goes_on = (is_over == 0) | (exist != 0)
            rows_at = next_at
            next_at = ()
            for r in tl.static_range(R):
                next_at += (tl.where(is_over, places[r] + 64 * first, rows_at[r]),)
        else:
            goes_on = is_over == 0
        next_left = n_pairs - first
        next_offset = first * words_of_pair(P) + tl.where(is_over, 0, reading) * 4
        for u in tl.static_range(U):
            words = ahead[2 * R * u : 2 * R * (u + 1)]
            if X_AHEAD:
                own = planes[u * N : (u + 1) * N]
            else:
                own = load_planes(sources, offset, left, u, 1, P, False)
            acc = add_pair(acc, words, own, R, False, USE_PTX)
        # Loads that are asked one by one whether they exist take twice the instructions.
        is_whole = (number + 1) * (WK * U) <= n_pairs
        if goes_on & is_whole:
            ahead = load_codes(next_at, next_left, U, R, True, USE_PTX)
            if X_AHEAD:
                planes = load_planes(sources, next_offset, next_left, 0, U, P, True)
        elif goes_on:
            ahead = load_codes(next_at, next_left, U, R, False, USE_PTX)
            if X_AHEAD:
                planes = load_planes(sources, next_offset, next_left, 0, U, P, False)
    totals = ()
    for token in tl.static_range(len(sources)):
        own = acc[token * P * R * 4 : (token + 1) * P * R * 4]
        totals += (join_rows(own, lane, R, P, USE_PTX),)
    return totals, (ahead, planes)
