"""Resident factors as numbers: for matrix products of many tokens, and for merging."""

import sys

import torch
import triton
import triton.language as tl

from kernels.triton_ops.codes import load_pair, locate_pair, unpack_step
from kernels.triton_ops.fold import spare_bits
from kernels.triton_ops.keys import settle_keys
from kernels.triton_ops.masks import mask_if
from kernels.triton_ops.records import (
    EXPAND_PARTS,
    EXPAND_RECORDS,
    N_WIDTHS,
    PART_INTS,
    RECORD_INTS,
    SHRINK_RECORDS,
    load_pointer,
)

# Programs that walk over one factor: the largest fill a device, the small ones end at once.
_PROGRAMS = 264
_WARPS = 4


@triton.jit
def double_codes(left, right, twice_zero, BITS: tl.constexpr):
    """Twice the codes of eight columns less twice their zero point.

    Args:
        left: int32 [threads] of `unpack_step`, four columns.
        right: int32 [threads], the four columns that follow.
        twice_zero: int32 [threads], twice the zero point.
        BITS: 1, 2, 3, 4 or 8.

    Returns:
        fp32 [threads, 8], whole numbers times 2^`spare_bits`.
    """
    # Signed bytes plus 128.
    words = tl.join(left, right) ^ -0x7F7F7F80
    even = tl.join(words & 0xFF, (words >> 16) & 0xFF)
    odd = tl.join((words >> 8) & 0xFF, (words >> 24) & 0xFF)
    codes = tl.reshape(tl.join(even, odd), (left.shape[0], 8))
    # The lowest bits of 2^23 count ones: putting a byte there is cheaper than converting it.
    floats = (codes | 0x4B000000).to(tl.float32, bitcast=True)
    if BITS == 8:  # noqa: PLR2004 bits of a byte
        doubles = (floats - (1 << 23)) * 2 - twice_zero.to(tl.float32)[:, None]
    else:
        zero = (twice_zero - ((1 << BITS) - 1)) << spare_bits(BITS)
        doubles = floats - (zero + ((1 << 23) + 128)).to(tl.float32)[:, None]
    return doubles


@triton.jit
def unfold_record(
    record_ptr,
    slab,
    out_ptr,
    out_stride,
    n_out_rows,
    n_out_cols,
    BITS: tl.constexpr,
    GROUPING: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    WARPS: tl.constexpr,
) -> None:
    """Write one factor, twice its values, this program's share.

    Args:
        record_ptr: int32 [16].
        slab: Address of the tenant's slab.
        out_ptr: First element of the factor's place.
        out_stride: Elements between its rows.
        n_out_rows: Rows to write, those beyond the factor's as 0.
        n_out_cols: Columns to write; columns of a last step beyond the factor's hold any number.
        BITS: 1, 2, 3, 4 or 8.
        GROUPING: 0 where no factor has scales for tiles.
        IS_ALIGNED: Rows and columns begin and end at multiples of eight elements.
        WARPS: Of the program.
    """
    codes_ptr = load_pointer(slab, tl.load(record_ptr + 1), tl.int32)
    high_ptr = load_pointer(slab, tl.load(record_ptr + 2), tl.int32)
    n_rows = tl.load(record_ptr + 3)
    n_blocks = tl.load(record_ptr + 4)
    n_steps = tl.load(record_ptr + 5)
    factors = tl.load(record_ptr + 6)
    factors_ptr = load_pointer(slab, factors, tl.float32)
    group = tl.load(record_ptr + 7)
    group_ptr = load_pointer(slab, group, tl.int32)
    marker = tl.load(record_ptr + 10)
    n_pairs = (n_steps + 1) // 2
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    eight = tl.arange(0, 8)[None, :]
    n_items = (n_out_rows + 15) // 16 * n_pairs
    for start in range(tl.program_id(0) * WARPS, n_items, tl.num_programs(0) * WARPS):
        item = start + thread // 32
        block = item // n_pairs
        pair = item % n_pairs
        exists = block < n_blocks
        places = locate_pair(codes_ptr, high_ptr, block, pair, n_steps, lane, BITS)
        words = load_pair(places, tl.where(exists, n_steps - 2 * pair, 0), 0, BITS, False)
        for half in tl.static_range(2):
            row = block * 16 + lane // 4 + 8 * half
            factor = tl.load(factors_ptr + row, mask=mask_if(row < n_rows, factors > 0), other=1.0)
            twice_zero = tl.zeros_like(lane) + ((1 << BITS) - 1)
            if GROUPING > 0:
                at = group_ptr + pair // 2 * (n_blocks * 16) + row
                word = tl.load(at, mask=mask_if(exists, group > 0), other=0)
                scale = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                twice_zero = tl.where(group > 0, (word >> 16) & 511, twice_zero)
                factor *= tl.where(group > 0, scale, 1.0)
            # Exact unless a factor is below 1e-36.
            factor = tl.where(row < n_rows, factor, 0.0) * (1.0 / (1 << spare_bits(BITS)))
            row_at = out_ptr + row.to(tl.int64) * out_stride
            for step in tl.static_range(2):
                codes = unpack_step(words, marker, step, BITS)
                doubles = double_codes(codes[half], codes[half + 2], twice_zero, BITS)
                values = (doubles * factor[:, None]).to(out_ptr.dtype.element_ty)
                col = ((2 * pair + step) * 32 + lane % 4 * 8)[:, None]
                # A mask that is one for all eight leaves their store whole.
                last = col if IS_ALIGNED else col + eight
                inside = (row < n_out_rows)[:, None] & (last < n_out_cols)
                tl.store(row_at[:, None] + col + eight, values, mask=inside)


# Addresses of every second slot lie at no multiple of 16: one kernel serves all slots.
@triton.jit(
    do_not_specialize=[
        "entry_ptr",
        "table_ptr",
        "n_shrink",
        "n_cols",
        "left_stride",
        "right_stride",
    ]
)
def unfold_kernel(
    entry_ptr,
    table_ptr,
    left_ptr,
    left_stride,
    right_ptr,
    right_stride,
    n_cols,
    n_shrink,
    WIDTHS: tl.constexpr,
    GROUPING: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    WARPS: tl.constexpr,
) -> None:
    """All factors of a tenant's delta at a site, one for each column of the grid."""
    slab = tl.load(table_ptr)
    if IS_ALIGNED:
        # What a compiler must know to make one store of a thread's eight values.
        left_stride = left_stride // 8 * 8
        right_stride = right_stride // 8 * 8
        n_cols = n_cols // 8 * 8
    item = tl.program_id(1)
    if item < n_shrink:
        record_ptr = entry_ptr + SHRINK_RECORDS + item * RECORD_INTS
        n_out_rows = (tl.load(record_ptr + 3) + 31) // 32 * 32
        n_out_cols = n_cols
        out_ptr = right_ptr + (tl.load(record_ptr + 8) * 32).to(tl.int64) * right_stride
        out_stride = right_stride
    else:
        number = item - n_shrink
        record_ptr = entry_ptr + EXPAND_RECORDS + number * RECORD_INTS
        part_ptr = entry_ptr + EXPAND_PARTS + number // N_WIDTHS * PART_INTS
        n_out_rows = tl.load(record_ptr + 3)
        n_out_cols = tl.load(record_ptr + 5) * 32
        column = (tl.load(record_ptr + 8) - tl.load(part_ptr + 2)) * 32
        out_ptr = left_ptr + tl.load(part_ptr).to(tl.int64) * left_stride + column
        out_stride = left_stride
    bits = tl.load(record_ptr)
    for width in tl.static_range(1, 9):
        if (WIDTHS >> width) & 1:
            if bits == width:
                unfold_record(
                    record_ptr, slab, out_ptr, out_stride, n_out_rows, n_out_cols,
                    width, GROUPING, IS_ALIGNED, WARPS,
                )  # fmt: skip


def unfold(
    entry: torch.Tensor,
    address: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    n_shrink: int,
    n_parts: int,
    widths: frozenset[int],
    grouping: int,
) -> None:
    """Write twice the values of all factors of a resident delta at a site.

    Args:
        entry: int32 [ENTRY_INTS], its directory entry on the device.
        address: int64 [1], its slab's.
        left: bf16, fp16 or fp32 [outputs of all parts, at least the widest part's columns]; each
            band of a part begins at a multiple of 32 columns, a direct matrix at 0.
        right: [at least 32 for each step of hidden values, in] in the same dtype; rows that fill a
            band's last step are 0.
        n_shrink: its shrink records.
        n_parts: parts of the site.
        widths: bits that may occur.
        grouping: scales for tiles, 0 in no delta.
    """
    # The eight values of a thread become one store of 16 bytes, or two.
    sizes = (right.shape[1], left.stride(0), right.stride(0))
    places = left.data_ptr() | right.data_ptr()
    aligned = not any(size % 8 for size in sizes) and not places % 16
    unfold_kernel[(_PROGRAMS, n_shrink + n_parts * int(N_WIDTHS))](
        entry,
        address,
        left,
        left.stride(0),
        right,
        right.stride(0),
        right.shape[1],
        n_shrink,
        WIDTHS=sum(1 << bits for bits in widths),
        GROUPING=grouping,
        IS_ALIGNED=aligned,
        WARPS=_WARPS,
        num_warps=_WARPS,
    )


settle_keys(sys.modules[__name__])
