"""Arrays of the file, as they arrived on the device, to the operand order of a slab."""

import triton
import triton.language as tl

from kernels.triton_ops.masks import mask_if
from kernels.triton_ops.planes import TILE, join_planes

# Jobs of `repack_kernel`, one row of int64 each.
CODES = tl.constexpr(0)
FACTORS = tl.constexpr(1)
GROUPS = tl.constexpr(2)
JOB_FIELDS = tl.constexpr(16)


@triton.jit
def read_codes(codes_ptr, row, col, n_cols, row_words, mask, BITS: tl.constexpr):
    """Codes [row, col] of a packed factor."""
    tile = col // TILE
    n_codes = tl.minimum(n_cols - tile * TILE, TILE)
    field = tl.minimum(col - tile * TILE, n_codes - 1)
    low_ptr = codes_ptr + row.to(tl.int64) * row_words + tile * (TILE * BITS // 32)
    return join_planes(low_ptr, field, n_codes, mask, BITS)


@triton.jit
def gather_ones(plane_ptr, quarter, mask):
    """The word of 32 codes of one bit: a byte of each of four words, their bits in turn.

    Args:
        plane_ptr: int32 pointers [elements], the plane of a whole tile; see `load_plane`.
        quarter: int32 [elements], which 32 codes of the tile.
        mask: Which elements exist.

    Returns:
        int32 [elements], the first code in the lowest bit.
    """
    gathered = tl.zeros_like(quarter)
    for word in tl.static_range(4):
        bits = (tl.load(plane_ptr + word, mask=mask, other=0) >> (8 * quarter)) & 0xFF
        # Bit i to bit 4 i.
        bits = (bits | (bits << 12)) & 0x000F000F
        bits = (bits | (bits << 6)) & 0x03030303
        bits = (bits | (bits << 3)) & 0x11111111
        gathered |= bits << word
    return gathered


@triton.jit
def gather_twos(plane_ptr, quarter, mask):
    """`gather_ones` for codes of two bits, of eight words: the higher bits, then the lower."""
    high = tl.zeros_like(quarter)
    low = tl.zeros_like(quarter)
    for word in tl.static_range(8):
        codes = tl.load(plane_ptr + word, mask=mask, other=0) >> (8 * quarter)
        # Bit 2 i to bit 8 i: what the product carries stays between them.
        high |= (((codes >> 1) & 0x55) * 0x41041 & 0x01010101) << word
        low |= ((codes & 0x55) * 0x41041 & 0x01010101) << word
    return high, low


@triton.jit
def gather_words(tile_ptr, quarter, mask, BITS: tl.constexpr):
    """A word for each bit of 32 codes of a whole tile, the highest first; of one to four bits."""
    if BITS == 1:
        words = (gather_ones(tile_ptr, quarter, mask),)
    else:
        words = gather_twos(tile_ptr, quarter, mask)
        if BITS == 3:  # noqa: PLR2004 bits of both planes
            words = (gather_ones(tile_ptr + 8, quarter, mask),) + words  # noqa: RUF005 no unpacking
        if BITS == 4:  # noqa: PLR2004 same
            words = gather_twos(tile_ptr + 8, quarter, mask) + words
    return words


@triton.jit
def repack_group(
    codes_ptr,
    target_ptr,
    element,
    mask,
    job_ptr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write the words of 32 codes of a row, one for each of their bits; see kernels/fragments.py.

    Args:
        codes_ptr: int32 [rows, words] of the file.
        target_ptr: int32 words in operand order.
        element: int32, (row block, eight groups, row, group of four, which four, half) of the job
            counted through: as the words of V lie, those of two steps side by side.
        mask: Which elements exist.
        job_ptr: int64 [16], the job.
        BITS: 1, 2, 3, 4 or 8.
        WHOLE: All codes lie in whole tiles.
        COLUMNS: Codes of a row that are read at a time, a divisor of 32.
    """
    n_steps = tl.load(job_ptr + 3).to(tl.int32)
    n_rows = tl.load(job_ptr + 4).to(tl.int32)
    n_cols = tl.load(job_ptr + 5).to(tl.int32)
    row_words = tl.load(job_ptr + 6)
    first_group = tl.load(job_ptr + 8).to(tl.int32)
    job_groups = tl.load(job_ptr + 9).to(tl.int32)
    eights = (job_groups + 7) // 8
    half = element % 2
    row = element // 128 // eights * 16 + element // 16 % 8 + 8 * half
    group = element // 128 % eights * 8 + element // 2 % 2 * 4 + element // 4 % 4
    inside = mask & (row < n_rows) & (group < job_groups)
    # A group that does not exist would be of a tile without columns.
    group = first_group + tl.minimum(group, job_groups - 1)
    if WHOLE and BITS <= 4:  # noqa: PLR2004 a byte has no planes
        tile_ptr = codes_ptr + row.to(tl.int64) * row_words + group // 4 * (4 * BITS)
        words = gather_words(tile_ptr, group % 4, inside, BITS)
    else:
        words = (tl.zeros_like(element),) * BITS
        # A loop, not unrolled: all variants of this body would take a minute to compile.
        for start in range(0, 32, COLUMNS):
            column = start + tl.arange(0, COLUMNS)[None, :]
            col = group[:, None] * 32 + column
            exists = inside[:, None] & (col < n_cols)
            code = read_codes(codes_ptr, row[:, None], col, n_cols, row_words, exists, BITS)
            found = ()
            for bit in tl.static_range(BITS):
                own = ((code >> (BITS - 1 - bit)) & 1) << column
                found += (words[bit] | tl.sum(own, axis=1),)
            words = found
    first = tl.load(job_ptr + 11).to(tl.int32)
    tile = tl.load(job_ptr + 12).to(tl.int32)
    step = tl.load(job_ptr + 13).to(tl.int32)
    next_bit = tl.load(job_ptr + 14).to(tl.int32)
    word = first + group // 4 * tile + group % 4 * step
    block_ptr = target_ptr + (row // 16).to(tl.int64) * n_steps * 64
    for bit in tl.static_range(BITS):
        number = word + bit * next_bit
        lane = row % 8 * 4 + number % 4
        at = block_ptr + (number // 8 * 64 + lane * 2 + number // 4 % 2) * 2 + half
        tl.store(at, words[bit], mask=inside)


@triton.jit
def repack_codes(
    job_ptr,
    source_ptr,
    slab_ptr,
    WIDTHS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """A job of codes.

    Its fields: source, target, steps of a row, rows, columns, words of a row, bits, first group of
    32 columns and number of them, whether they lie in whole tiles, and the four of a `WordOrder`.
    """
    codes_ptr = (source_ptr + tl.load(job_ptr + 1)).to(tl.pointer_type(tl.int32))
    target_ptr = (slab_ptr + tl.load(job_ptr + 2)).to(tl.pointer_type(tl.int32))
    n_rows = tl.load(job_ptr + 4).to(tl.int32)
    bits = tl.load(job_ptr + 7)
    job_groups = tl.load(job_ptr + 9).to(tl.int32)
    whole = tl.load(job_ptr + 10)
    total = (n_rows + 15) // 16 * ((job_groups + 7) // 8) * 128
    for start in range(tl.program_id(0) * BLOCK, total, tl.num_programs(0) * BLOCK):
        element = start + tl.arange(0, BLOCK)
        for width in tl.static_range(1, 9):
            if (WIDTHS >> width) & 1:
                if bits == width:
                    mask = element < total
                    if whole != 0:
                        repack_group(
                            codes_ptr, target_ptr, element, mask, job_ptr, width, True, COLUMNS
                        )
                    else:
                        repack_group(
                            codes_ptr, target_ptr, element, mask, job_ptr, width, False, COLUMNS
                        )


@triton.jit
def repack_factors(job_ptr, source_ptr, slab_ptr, BLOCK: tl.constexpr) -> None:
    """A job of row factors: the product of up to three arrays, each f32 or f16, fp32 [rows]."""
    target_ptr = (slab_ptr + tl.load(job_ptr + 2)).to(tl.pointer_type(tl.float32))
    n_rows = tl.load(job_ptr + 4).to(tl.int32)
    sigma = tl.load(job_ptr + 1)
    sigma_ptr = (source_ptr + sigma).to(tl.pointer_type(tl.float32))
    for start in range(tl.program_id(0) * BLOCK, n_rows, tl.num_programs(0) * BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < n_rows
        factor = tl.load(sigma_ptr + row, mask=mask_if(inside, sigma >= 0), other=1.0)
        for number in tl.static_range(2):
            scale = tl.load(job_ptr + 5 + 2 * number)
            group = tl.load(job_ptr + 6 + 2 * number).to(tl.int32)
            scale_ptr = (source_ptr + scale).to(tl.pointer_type(tl.float16))
            found = tl.load(scale_ptr + row // group, mask=mask_if(inside, scale >= 0), other=1.0)
            factor *= found.to(tl.float32)
        tl.store(target_ptr + row, factor, mask=inside)


@triton.jit
def repack_groups(job_ptr, source_ptr, slab_ptr, BLOCK: tl.constexpr) -> None:
    """A job of group words: fp16 scale and twice the zero point, int32 [tiles, padded rows]."""
    target_ptr = (slab_ptr + tl.load(job_ptr + 2)).to(tl.pointer_type(tl.int32))
    scale_ptr = (source_ptr + tl.load(job_ptr + 1)).to(tl.pointer_type(tl.int16))
    zero = tl.load(job_ptr + 3)
    zero_ptr = (source_ptr + zero).to(tl.pointer_type(tl.uint8))
    n_rows = tl.load(job_ptr + 4).to(tl.int32)
    n_cols = tl.load(job_ptr + 5).to(tl.int32)
    group_rows = tl.load(job_ptr + 6).to(tl.int32)
    group_cols = tl.load(job_ptr + 8).to(tl.int32)
    middle = (1 << tl.load(job_ptr + 7).to(tl.int32)) - 1
    row_groups = (n_cols + group_cols - 1) // group_cols
    padded = (n_rows + 15) // 16 * 16
    total = padded * ((n_cols + 127) // 128)
    for start in range(tl.program_id(0) * BLOCK, total, tl.num_programs(0) * BLOCK):
        element = start + tl.arange(0, BLOCK)
        row = element % padded
        group = row // group_rows * row_groups + element // padded * 128 // group_cols
        inside = (element < total) & (row < n_rows)
        scale = tl.load(scale_ptr + group, mask=inside, other=0).to(tl.int32) & 0xFFFF
        has_zero = mask_if(inside, zero >= 0)
        twice_zero = 2 * tl.load(zero_ptr + group, mask=has_zero, other=0).to(tl.int32)
        twice_zero = tl.where(zero >= 0, twice_zero, middle)
        tl.store(target_ptr + element, scale | (twice_zero << 16), mask=element < total)


@triton.jit(do_not_specialize=["source_ptr", "slab_ptr"])
def repack_kernel(
    jobs_ptr,
    source_ptr,
    slab_ptr,
    WIDTHS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One job for all programs of a column of the grid."""
    job_ptr = jobs_ptr + tl.program_id(1) * JOB_FIELDS
    kind = tl.load(job_ptr)
    if kind == CODES:
        repack_codes(job_ptr, source_ptr, slab_ptr, WIDTHS, BLOCK, COLUMNS)
    elif kind == FACTORS:
        repack_factors(job_ptr, source_ptr, slab_ptr, BLOCK)
    else:
        repack_groups(job_ptr, source_ptr, slab_ptr, BLOCK)
