"""Products of packed codes and whole numbers, bit by bit.

With m = 2^b - 1 the value of a code u of b bits is u - m / 2, so that twice a product with whole
numbers x is 2 sum(u x) - m sum(x). The k-th highest bit of u counts 2^(b-1-k): instead of the sum
its source is divided, by reading its bits k further on: its lowest bits are 0, so that nothing is
lost. With c_p the bits that the codes and bit p of x have in common, twice the product is
2^(b-1) (2 sum(2^p c_p) - n), where n is the sum of all x that were read. All are whole numbers.
"""

import triton
import triton.language as tl

from kernels.triton_ops.bits import multiply_pair, read_fourth
from kernels.triton_ops.items import four_items, replace_items


@triton.constexpr_function
def words_of_pair(n_planes):
    """int64 words of a pair of steps: half of fragments.words_of_pair, which no kernel can call."""
    return (8 * n_planes + 8) * 4


@triton.jit
def load_codes(at, left, R: tl.constexpr, U: tl.constexpr):
    """Words of U pairs of steps of R row blocks, int64 [threads] each: two for a pair and block.

    Args:
        at: R int64 pointers [threads], this lane's first word.
        left: int32 [threads], pairs that exist from there on.
        R: Row blocks.
        U: Pairs.

    Returns:
        2 R U words. Those of a second step that does not exist are any words: its source is 0.
    """
    words = ()
    for u in tl.static_range(U):
        for r in tl.static_range(R):
            for step in tl.static_range(2):
                words += (tl.load(at[r] + 64 * u + 32 * step, mask=left > u, other=0),)
    return words


@triton.jit
def load_planes(at, left, FIRST: tl.constexpr, COUNT: tl.constexpr, P: tl.constexpr):
    """Bits of a token for COUNT pairs from the FIRST one on, those of a pair together.

    Args:
        at: int64 pointers [threads], this lane's word of the first byte.
        left: int32 [threads], pairs that exist from there on.
        FIRST: Same.
        COUNT: Same.
        P: Bytes of a number.

    Returns:
        COUNT x P int64 [threads].
    """
    planes = ()
    for u in tl.static_range(FIRST, FIRST + COUNT):
        for byte in tl.static_range(P):
            place = at + u * words_of_pair(P) + 32 * byte
            planes += (tl.load(place, mask=left > u, other=0),)
    return planes


@triton.jit
def add_pair(acc, words, planes, R: tl.constexpr, HAS_ONES: tl.constexpr, USE_PTX: tl.constexpr):
    """Sums of one pair of steps, with HAS_ONES also those of codes that are all ones.

    Args:
        acc: int32 [threads], 4 (R + HAS_ONES) for each byte.
        words: 2 R int64 [threads] of `load_codes`.
        planes: int64 [threads] of `load_planes`, one for each byte.
        R: Row blocks.
        HAS_ONES: Same.
        USE_PTX: Of `multiply_pair`.

    Returns:
        acc.
    """
    for n in tl.static_range(len(planes)):
        b0 = planes[n].to(tl.int32)
        b1 = (planes[n] >> 32).to(tl.int32)
        for r in tl.static_range(R + HAS_ONES):
            if r < R:
                first, second = words[2 * r], words[2 * r + 1]
                a = (
                    first.to(tl.int32),
                    (first >> 32).to(tl.int32),
                    second.to(tl.int32),
                    (second >> 32).to(tl.int32),
                )
            else:
                a = (tl.zeros_like(b0) - 1,) * 4
            d = multiply_pair(a, b0, b1, four_items(acc, n * (R + HAS_ONES) + r), USE_PTX)
            acc = replace_items(acc, d, 4 * (n * (R + HAS_ONES) + r), 4)
    return acc


@triton.jit
def join_bits(
    acc,
    lane,
    R: tl.constexpr,
    P: tl.constexpr,
    HAS_ONES: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Whole numbers of the sums of single bits: those of 2 R rows, then of ones.

    The highest bit counts below 0. It is taken off every other one, where a number near 0 has the
    same: so a lane's share is no larger than the numbers are.

    Args:
        acc: Of `add_pair`.
        lane: int32 [threads], 0..31.
        R: Row blocks.
        P: Bytes of a number.
        HAS_ONES: Of `add_pair`.
        USE_PTX: Of `read_fourth`.

    Returns:
        2 R + HAS_ONES int64 [threads], of this lane's bits: rows g and g + 8 of each
        block, then ones.
    """
    shift = (lane % 4 * 2).to(tl.int64)
    totals = ()
    for i in tl.static_range(2 * R + HAS_ONES):
        # A lane has its two bits of a byte side by side, rows g and g + 8 after each other.
        highest = acc[(P - 1) * (R + HAS_ONES) * 4 + 2 * i + 1]
        highest = read_fourth(highest, lane, USE_PTX)
        total = tl.where(lane % 4 == 0, -highest, 0).to(tl.int64)
        for byte in tl.static_range(P):
            first = acc[byte * (R + HAS_ONES) * 4 + 2 * i] - highest
            second = acc[byte * (R + HAS_ONES) * 4 + 2 * i + 1] - highest
            total += (first + 2 * second).to(tl.int64) * (1 << 8 * byte)
        totals += (total << shift,)
    return totals


@triton.jit
def multiply_columns(
    ahead,
    codes_at,
    readings,
    n_steps,
    source_at,
    wk,
    lane,
    R: tl.constexpr,
    P: tl.constexpr,
    WK: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Products of R blocks of 16 rows and a token, this warp's share of the pairs of steps.

    Args:
        ahead: Of `load_codes` at this warp's first pair: loads that were started before others.
        codes_at: R int64 pointers [threads], this lane's words of the first pair of all.
        readings: How often the source is read, each time one bit further on.
        n_steps: Steps of a reading.
        source_at: int64 pointers [threads], this lane's word of the source's first pair.
        wk: int32 [threads], which of the WK shares is this warp's.
        lane: int32 [threads], 0..31.
        R: Row blocks of a warp.
        P: Bytes of a number.
        WK: Warps that share the pairs.
        U: Pairs loaded ahead.
        X_AHEAD: Whether their activations are loaded ahead too.
        USE_PTX: Of `multiply_pair`.

    Returns:
        Of `join_bits`.
    """
    n_pairs = (n_steps + 1) // 2
    n_rounds = (n_pairs + WK * U - 1) // (WK * U)
    acc = (tl.zeros_like(lane),) * (P * R * 4)
    reading = 0
    number = 0
    first = wk * U
    planes = ()
    if X_AHEAD:
        at = source_at + first * words_of_pair(P)
        planes = load_planes(at, n_pairs - first, 0, U, P)
    for _ in range(readings * n_rounds):
        words = ahead
        present = planes
        at = source_at + first * words_of_pair(P) + reading * 4
        left = n_pairs - first
        number += 1
        if number == n_rounds:
            number = 0
            reading += 1
        first = (number * WK + wk) * U
        next_left = tl.where(reading < readings, n_pairs - first, 0)
        next_at = ()
        for r in tl.static_range(R):
            next_at += (codes_at[r] + (reading * n_steps + 2 * first) * 32,)
        ahead = load_codes(next_at, next_left, R, U)
        if X_AHEAD:
            place = source_at + first * words_of_pair(P) + reading * 4
            planes = load_planes(place, next_left, 0, U, P)
        for u in tl.static_range(U):
            if X_AHEAD:
                own = present[u * P : (u + 1) * P]
            else:
                own = load_planes(at, left, u, 1, P)
            acc = add_pair(acc, words[2 * R * u : 2 * R * (u + 1)], own, R, False, USE_PTX)
    return join_bits(acc, lane, R, P, False, USE_PTX)


@triton.jit
def multiply_staged(
    codes_at,
    readings,
    n_steps,
    source_at,
    wk,
    lane,
    R: tl.constexpr,
    P: tl.constexpr,
    WK: tl.constexpr,
    U: tl.constexpr,
    STAGES: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """What `multiply_columns` gives, its loads on their way to shared memory STAGES rounds ahead.

    Arguments are those of `multiply_columns`. More bytes are under way than registers could take.
    """
    n_pairs = (n_steps + 1) // 2
    n_rounds = (n_pairs + WK * U - 1) // (WK * U)
    acc = (tl.zeros_like(lane),) * (P * R * 4)
    for turn in tl.range(0, readings * n_rounds, num_stages=STAGES):
        reading = turn // n_rounds
        first = (turn % n_rounds * WK + wk) * U
        at = source_at + first * words_of_pair(P) + reading * 4
        left = n_pairs - first
        places = ()
        for r in tl.static_range(R):
            places += (codes_at[r] + (reading * n_steps + 2 * first) * 32,)
        words = load_codes(places, left, R, U)
        planes = load_planes(at, left, 0, U, P)
        for u in tl.static_range(U):
            acc = add_pair(
                acc, words[2 * R * u : 2 * R * (u + 1)],
                planes[u * P : (u + 1) * P], R, False, USE_PTX,
            )  # fmt: skip
    return join_bits(acc, lane, R, P, False, USE_PTX)
