"""All rank bands of one output block together, and the columns of activations they meet."""

import triton
import triton.language as tl

from kernels.triton_ops.masks import mask_if
from kernels.triton_ops.records import (
    N_WIDTHS,
    RECORD_INTS,
    finish_record,
    load_pointer,
    load_record,
    start_record,
)


@triton.jit
def mask_columns(lane, count, NT: tl.constexpr, P: tl.constexpr):
    """NT masks [threads] of `multiply_band`: planes of tokens that exist."""
    columns = ()
    for unit in tl.static_range(NT):
        columns += (8 // P * unit + lane // (4 * P) < count,)
    return columns


@triton.jit
def weigh_planes(lane, P: tl.constexpr):
    """Two fp32 [threads], what a unit of this lane's planes is worth."""
    if P == 4:  # noqa: PLR2004 planes
        low = lane % 2 == 1
        weights = (tl.where(low, 256.0, 16777216.0), tl.where(low, 1.0, 65536.0))
    else:
        one = tl.full(lane.shape, 1.0, tl.float32)
        weights = (256 * one, one)
    return weights


@triton.constexpr_function
def width_of(number):
    """Bits of the number-th record of a part."""
    return (8, 4, 3, 2, 1)[number]


@triton.constexpr_function
def count_widths(widths, number):
    """How many of the records before the number-th can occur."""
    return sum(widths >> bits & 1 for bits in (8, 4, 3, 2, 1)[:number])


@triton.jit
def add_scaled(items, others, scale):
    """Items of a tuple, plus `scale` times those of another."""
    sums = ()
    for i in tl.static_range(len(items)):
        sums += (items[i] + others[i] * scale,)
    return sums


@triton.jit
def scale_rows(products, factors_ptr, exist, first_block, n_rows, lane, R: tl.constexpr):
    """`products` of `multiply_band` times a factor a row, 1 where there are none."""
    scaled = ()
    for i in tl.static_range(len(products)):
        row = (first_block + i // 2 % R) * 16 + lane // 4 + 8 * (i % 2)
        factor = tl.load(factors_ptr + row, mask=mask_if(row < n_rows, exist), other=1.0)
        scaled += (products[i] * factor,)
    return scaled


@triton.jit
def start_part(
    record_ptr,
    slab,
    first_block,
    wk,
    lane,
    WIDTHS: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
    PAST_L1: tl.constexpr,
):
    """`start_record` of each width that may occur: all start before the first is finished."""
    started = ()
    for i in tl.static_range(N_WIDTHS):
        if (WIDTHS >> width_of(i)) & 1:
            fields = load_record(record_ptr + i * RECORD_INTS)
            record = start_record(fields, slab, first_block, wk, lane, width_of(i), R, U, PAST_L1)
            started += (record,)
    return started


@triton.jit
def finish_part(
    started,
    record_ptr,
    slab,
    first_block,
    n_rows,
    source_ptr,
    stride,
    columns,
    weights,
    wk,
    lane,
    WIDTHS: tl.constexpr,
    GROUPING: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    R: tl.constexpr,
    NT: tl.constexpr,
    WK: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PAST_L1: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Sums of `finish_record` over the widths, each times its bound; `started` of `start_part`."""
    totals = (tl.zeros_like(lane).to(tl.float32),) * (NT * R * 2)
    for i in tl.static_range(N_WIDTHS):
        if (WIDTHS >> width_of(i)) & 1:
            band = started[count_widths(WIDTHS, i)]
            products = finish_record(
                band, slab, first_block, source_ptr + band[6].to(tl.int64) * 32, stride,
                columns, weights, wk, lane, width_of(i), GROUPING, R, NT, WK, U,
                X_AHEAD, IN_PLACE, PAST_L1, USE_PTX,
            )  # fmt: skip
            if HAS_FACTORS:
                factors = tl.load(record_ptr + i * RECORD_INTS + 6)
                factors_ptr = load_pointer(slab, factors, tl.float32)
                products = scale_rows(
                    products, factors_ptr, factors > 0, first_block, n_rows, lane, R
                )
            totals = add_scaled(totals, products, band[7].to(tl.float32, bitcast=True))
    return totals
