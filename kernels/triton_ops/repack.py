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
def read_codes(
    codes_ptr, row, col, n_cols, row_words, mask, BITS: tl.constexpr, WHOLE: tl.constexpr
):
    """Codes [row, col] of a packed factor; WHOLE says that all lie in tiles of 128 codes."""
    tile = col // TILE
    if WHOLE:
        n_codes = TILE
        field = col % TILE
    else:
        n_codes = tl.minimum(n_cols - tile * TILE, TILE)
        field = tl.minimum(col - tile * TILE, n_codes - 1)
    low_ptr = codes_ptr + row.to(tl.int64) * row_words + tile * (TILE * BITS // 32)
    return join_planes(low_ptr, field, n_codes, mask, BITS)


@triton.jit
def repack_pair(
    codes_ptr,
    target_ptr,
    high_ptr,
    element,
    mask,
    first_pair,
    job_pairs,
    n_rows,
    n_cols,
    row_words,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Write the words of two steps of one lane; see kernels/fragments.py.

    The highest bit of each code is turned over, so that half of them are negative.

    Args:
        codes_ptr: int32 [n_rows, row_words] of the file.
        target_ptr: int32 words in operand order.
        high_ptr: Those of the third bit.
        element: int32, (row block, pair, lane) of the job counted through.
        mask: Which elements exist.
        first_pair: First pair of steps of the job.
        job_pairs: Pairs of the job.
        n_rows: Rows of the factor.
        n_cols: Columns of the factor.
        row_words: Words of a row of the file.
        BITS: 1, 2, 3, 4 or 8.
        WHOLE: Of `read_codes`.
    """
    lane = element % 32
    pair = first_pair + element // 32 % job_pairs
    block = element // 32 // job_pairs
    n_steps = (n_cols + 31) // 32
    n_pairs = (n_steps + 1) // 2
    high = tl.zeros_like(element)
    low = tl.zeros_like(element)
    byte = tl.arange(0, 4)[None, :]
    # A loop, not unrolled: ten variants of this body would take a minute to compile.
    for turn in range(4):
        step = turn // 2
        side = turn % 2
        col = ((2 * pair + step) * 32 + lane % 4 * 8 + 4 * side)[:, None] + byte
        words = ()
        for half in tl.static_range(2):
            row = block * 16 + lane // 4 + 8 * half
            exists = (mask & (row < n_rows))[:, None] & (col < n_cols)
            codes = read_codes(codes_ptr, row[:, None], col, n_cols, row_words, exists, BITS, WHOLE)
            words += (tl.sum(codes << (8 * byte), axis=1),)
        number = block * n_steps + 2 * pair + step
        inside = mask & (2 * pair + step < n_steps)
        if BITS == 8:  # noqa: PLR2004 same
            for half in tl.static_range(2):
                at = target_ptr + number * 128 + side * 64 + lane * 2 + half
                tl.store(at, words[half] ^ -0x7F7F7F80, mask=inside)
        elif BITS == 4:  # noqa: PLR2004 same
            at = target_ptr + number * 64 + lane * 2 + side
            tl.store(at, (words[0] | (words[1] << 4)) ^ -0x77777778, mask=inside)
        else:
            low = tl.where(side == 0, 0, low)
            for half in tl.static_range(2):
                field = 2 * side + half
                if BITS == 1:
                    high |= words[half] << (4 * step + field)
                else:
                    low |= (words[half] & 0x03030303) << (2 * field)
                    high |= ((words[half] >> 2) & 0x01010101) << (4 * step + field)
            if BITS > 1:
                # Three bits have their sign in the other plane.
                signed = low ^ -0x55555556 if BITS == 2 else low  # noqa: PLR2004 same
                tl.store(target_ptr + number * 32 + lane, signed, mask=mask_if(inside, side == 1))
    if BITS == 1:
        tl.store(target_ptr + (block * n_pairs + pair) * 32 + lane, ~high, mask=mask)
    elif BITS == 3:  # noqa: PLR2004 same
        tl.store(high_ptr + (block * n_pairs + pair) * 32 + lane, ~high, mask=mask)


@triton.jit
def repack_codes(job_ptr, source_ptr, slab_ptr, WIDTHS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """A job of codes: source, target and high place, rows, columns, words, bits, pairs, whole."""
    codes_ptr = (source_ptr + tl.load(job_ptr + 1)).to(tl.pointer_type(tl.int32))
    target_ptr = (slab_ptr + tl.load(job_ptr + 2)).to(tl.pointer_type(tl.int32))
    high_ptr = (slab_ptr + tl.load(job_ptr + 3)).to(tl.pointer_type(tl.int32))
    n_rows = tl.load(job_ptr + 4).to(tl.int32)
    n_cols = tl.load(job_ptr + 5).to(tl.int32)
    row_words = tl.load(job_ptr + 6)
    bits = tl.load(job_ptr + 7)
    first_pair = tl.load(job_ptr + 8).to(tl.int32)
    job_pairs = tl.load(job_ptr + 9).to(tl.int32)
    whole = tl.load(job_ptr + 10)
    total = (n_rows + 15) // 16 * job_pairs * 32
    for start in range(tl.program_id(0) * BLOCK, total, tl.num_programs(0) * BLOCK):
        element = start + tl.arange(0, BLOCK)
        for width in tl.static_range(1, 9):
            if (WIDTHS >> width) & 1:
                if bits == width:
                    if whole != 0:
                        repack_pair(
                            codes_ptr, target_ptr, high_ptr, element, element < total, first_pair,
                            job_pairs, n_rows, n_cols, row_words, width, True,
                        )  # fmt: skip
                    else:
                        repack_pair(
                            codes_ptr, target_ptr, high_ptr, element, element < total, first_pair,
                            job_pairs, n_rows, n_cols, row_words, width, False,
                        )  # fmt: skip


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
    jobs_ptr, source_ptr, slab_ptr, WIDTHS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """One job for all programs of a column of the grid."""
    job_ptr = jobs_ptr + tl.program_id(1) * JOB_FIELDS
    kind = tl.load(job_ptr)
    if kind == CODES:
        repack_codes(job_ptr, source_ptr, slab_ptr, WIDTHS, BLOCK)
    elif kind == FACTORS:
        repack_factors(job_ptr, source_ptr, slab_ptr, BLOCK)
    else:
        repack_groups(job_ptr, source_ptr, slab_ptr, BLOCK)
