"""Resident factors as numbers: for matrix products of many tokens, and for merging."""

import sys

import torch
import triton
import triton.language as tl

from kernels import directory
from kernels.triton_ops.keys import settle_keys
from kernels.triton_ops.masks import mask_if
from kernels.triton_ops.records import (
    EXPAND_PARTS,
    EXPAND_RECORDS,
    MAX_OUTPUTS,
    PART_INTS,
    RECORD_INTS,
    SHRINK_RECORDS,
    load_pointer,
    load_record,
)

INPUT = tl.constexpr(directory.SOURCE_INPUT)
# Programs that walk over one factor: the largest fill a device, the small ones end at once.
_PROGRAMS = 264
_WARPS = 4


@triton.constexpr_function
def halved(bits):
    """1 where twice a code does not fit a byte."""
    return int(bits == 8)  # noqa: PLR2004 bits of a byte


@triton.jit
def unfold_words(
    fields,
    order,
    slab,
    out_ptr,
    out_stride,
    n_groups,
    n_out_rows,
    n_out_cols,
    BITS: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    WARPS: tl.constexpr,
) -> None:
    """Write one factor, twice its values, this program's share.

    Args:
        fields: Of `load_record`.
        order: first, tile, group and bit of the factor's `WordOrder`.
        slab: Address of the tenant's slab.
        out_ptr: First element of the factor's place.
        out_stride: Elements between its rows.
        n_groups: Words that a bit of a row of the factor takes.
        n_out_rows: Rows to write, those beyond the factor's as 0.
        n_out_cols: Columns to write; those of a last word beyond the factor's hold any number.
        BITS: 1, 2, 3, 4 or 8.
        HAS_GROUPS: Whether the factor may have scales for tiles.
        IS_ALIGNED: Rows and columns begin and end at multiples of eight elements.
        WARPS: Of the program.
    """
    readings, codes, n_rows, n_blocks, n_steps, factors, group, _, _, _, _ = fields
    codes_ptr = load_pointer(slab, codes, tl.int64)
    factors_ptr = load_pointer(slab, factors, tl.float32)
    group_ptr = load_pointer(slab, group, tl.int32)
    # Whole pairs.
    steps = (readings * n_steps + 1) // 2 * 2
    lane = tl.arange(0, 32 * WARPS) % 32
    # Lanes of a row write next to each other: of four words each, they have the same eight columns.
    eighth = lane % 4 * 8
    column = tl.arange(0, 8)[None, :]
    fours = (n_groups + 3) // 4
    n_items = (n_out_rows + 15) // 16 * fours
    for start in range(tl.program_id(0) * WARPS, n_items, tl.num_programs(0) * WARPS):
        item = start + tl.arange(0, 32 * WARPS) // 32
        block = item // fours
        four = item % fours
        exists = block < n_blocks
        words = ()
        for bit in tl.static_range(BITS):
            for i in tl.static_range(4):
                word = order[0] + four * order[1] + i * order[2] + bit * order[3]
                at = (block * steps).to(tl.int64) * 32 + word // 8 * 64 + word // 4 % 2
                at += (lane // 4 * 4 + word % 4) * 2
                mask = exists & (four * 4 + i < n_groups)
                words += (tl.load(codes_ptr + at, mask=mask, other=0),)
        for half in tl.static_range(2):
            row = block * 16 + lane // 4 + 8 * half
            mask = mask_if(exists & (row < n_rows), factors > 0)
            factor = tl.load(factors_ptr + row, mask=mask, other=1.0)
            twice_zero = tl.zeros_like(lane) + ((1 << BITS) - 1)
            if HAS_GROUPS:
                at = group_ptr + four * (n_blocks * 16) + row
                scales = tl.load(at, mask=mask_if(exists, group > 0), other=0)
                scale = scales.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                twice_zero = tl.where(group > 0, (scales >> 16) & 511, twice_zero)
                factor *= tl.where(group > 0, scale, 1.0)
            factor = tl.where(row < n_rows, factor, 0.0)
            # A word's columns are in a byte of their own: one column of each at a time.
            fours_of = tl.zeros((32 * WARPS, 8), dtype=tl.int32)
            for bit in tl.static_range(BITS):
                own = tl.zeros_like(lane)
                for i in tl.static_range(4):
                    word = (words[4 * bit + i] >> (32 * half)).to(tl.int32)
                    own |= ((word >> eighth) & 0xFF) << (8 * i)
                fours_of |= ((own[:, None] >> column) & 0x01010101) << (BITS - bit - halved(BITS))
            at = out_ptr + row.to(tl.int64) * out_stride + four * 128 + eighth
            last = four * 128 + eighth
            for i in tl.static_range(4):
                whole = (fours_of >> (8 * i)) & 0xFF
                # The lowest bits of 2^23 count ones: cheaper than converting.
                floats = (whole | 0x4B000000).to(tl.float32, bitcast=True)
                if halved(BITS):
                    doubles = (floats - (1 << 23)) * 2 - twice_zero.to(tl.float32)[:, None]
                else:
                    doubles = floats - (twice_zero + (1 << 23)).to(tl.float32)[:, None]
                values = (doubles * factor[:, None]).to(out_ptr.dtype.element_ty)
                # A mask that is one for all eight leaves their store whole.
                own_last = (last + 32 * i)[:, None] + (0 if IS_ALIGNED else column)
                inside = (row < n_out_rows)[:, None] & (own_last < n_out_cols)
                tl.store((at + 32 * i)[:, None] + column, values, mask=inside)


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
    HAS_GROUPS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    WARPS: tl.constexpr,
) -> None:
    """All factors of a tenant's delta at a site, one for each column of the grid.

    First the right factors of all bands, then their left ones, then direct matrices.
    """
    slab = tl.load(table_ptr)
    if IS_ALIGNED:
        # What a compiler must know to make one store of a thread's eight values.
        left_stride = left_stride // 8 * 8
        right_stride = right_stride // 8 * 8
        n_cols = n_cols // 8 * 8
    item = tl.program_id(1)
    band_ptr = entry_ptr + SHRINK_RECORDS + item % n_shrink * RECORD_INTS
    is_right = item < n_shrink
    is_direct = item >= 2 * n_shrink
    part = tl.where(is_direct, item - 2 * n_shrink, tl.load(band_ptr + 17))
    number = part * MAX_OUTPUTS + tl.where(is_direct, 0, tl.load(band_ptr + 18))
    part_ptr = entry_ptr + EXPAND_PARTS + part * PART_INTS
    record_ptr = entry_ptr + EXPAND_RECORDS + number * RECORD_INTS
    record_ptr = tl.where(is_right, band_ptr, record_ptr)
    fields = load_record(record_ptr)
    n_out_rows = fields[2]
    if is_right | is_direct:
        # One bit of all columns after the other, or of a tile's.
        has_tiles = fields[6] > 0
        tile = tl.where(has_tiles, 4 * fields[10], 4)
        order = (0 * tile, tile, 1 + 0 * tile, tl.where(has_tiles, 4, 4 * fields[4]))
        bits = fields[10]
        n_groups = (n_cols + 31) // 32
        n_out_cols = n_cols
        out_ptr = left_ptr + tl.load(part_ptr).to(tl.int64) * left_stride
        out_stride = left_stride
        if is_right:
            n_out_rows = (n_out_rows + 31) // 32 * 32
            out_ptr = right_ptr + tl.load(band_ptr + 15).to(tl.int64) * right_stride
            out_stride = right_stride
        elif tl.load(part_ptr + 1) != INPUT:
            bits = 0 * bits
    else:
        bits = tl.load(band_ptr + 13)
        # Words count from the site's first hidden value, steps of U from the record's.
        first = tl.load(band_ptr + 11) - 8 * fields[8]
        order = (first, tl.load(band_ptr + 12), bits, 1 + 0 * bits)
        n_groups = (tl.load(band_ptr + 2) + 31) // 32
        n_out_cols = n_groups * 32
        # A compiler does not know that columns begin at multiples of 32.
        column = tl.load(band_ptr + 16) // 32 * 32
        out_ptr = left_ptr + tl.load(part_ptr).to(tl.int64) * left_stride + column
        out_stride = left_stride
    for width in tl.static_range(1, 9):
        if (WIDTHS >> width) & 1:
            if bits == width:
                unfold_words(
                    fields, order, slab, out_ptr, out_stride, n_groups, n_out_rows, n_out_cols,
                    width, HAS_GROUPS, IS_ALIGNED, WARPS,
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
    has_groups: bool,
) -> None:
    """Write twice the values of all factors of a resident delta at a site.

    Args:
        entry: int32 [ENTRY_INTS], its directory entry on the device.
        address: int64 [1], its slab's.
        left: bf16, fp16 or fp32 [outputs of all parts, at least the widest part's columns]; each
            band of a part begins at a multiple of 32 columns, a direct matrix at 0.
        right: [ranks of all bands, each rounded up to 32, in] in the same dtype; rows that round a
            band up are 0.
        n_shrink: its shrink records.
        n_parts: parts of the site.
        widths: bits that may occur.
        has_groups: whether any delta has scales for tiles.
    """
    # The eight values of a thread become one store of 16 bytes, or two.
    sizes = (right.shape[1], left.stride(0), right.stride(0))
    places = left.data_ptr() | right.data_ptr()
    aligned = not any(size % 8 for size in sizes) and not places % 16
    unfold_kernel[(_PROGRAMS, 2 * max(1, n_shrink) + n_parts)](
        entry,
        address,
        left,
        left.stride(0),
        right,
        right.stride(0),
        right.shape[1],
        max(1, n_shrink),
        WIDTHS=sum(1 << bits for bits in widths),
        HAS_GROUPS=has_groups,
        IS_ALIGNED=aligned,
        WARPS=_WARPS,
        num_warps=_WARPS,
    )


settle_keys(sys.modules[__name__])
