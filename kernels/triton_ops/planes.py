"""The shared unpackers: bit planes to codes, codes to values. The layout is bitpack's."""

import triton
import triton.language as tl

from deltacome_core.layout import TILE_CODES
from kernels.triton_ops.masks import mask_if

TILE = tl.constexpr(TILE_CODES)
# Terms of one running fp32 sum: over a whole row of 18,944 rounding alone would cost 2e-6.
SPAN = tl.constexpr(512)


@triton.jit
def count_words(n_codes, WIDTH: tl.constexpr) -> tl.tensor:
    """Words of one plane of `n_codes` codes."""
    return (n_codes * WIDTH + 31) // 32


@triton.jit
def load_plane(plane_ptr, field, n_codes, mask, WIDTH: tl.constexpr) -> tl.tensor:
    """Codes of one plane: code k is in word k % n at bit WIDTH * (k // n), n words in the plane.

    Args:
        plane_ptr: Pointers to the plane's first word, broadcastable with `field`.
        field: int32 code numbers within the tile, each below `n_codes`.
        n_codes: Codes of this tile, 128 but in the last.
        mask: Which codes exist; the others read as 0.
        WIDTH: Bits of the plane: 1, 2 or 8.

    Returns:
        int32 codes in the broadcast shape.
    """
    n_words = count_words(n_codes, WIDTH)
    words = tl.load(plane_ptr + field % n_words, mask=mask, other=0)
    return (words >> (field // n_words * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def load_codes(codes_ptr, row, col, tile, n_cols, row_words, mask, BITS: tl.constexpr) -> tl.tensor:
    """Codes [row, col] of one packed tile, all planes put together.

    Args:
        codes_ptr: int32 words [rows, row_words].
        row: int64 row numbers, broadcastable with `col`.
        col: int32 column numbers, all of one tile of 128.
        tile: The tile's number.
        n_cols: Codes of a row.
        row_words: Words of a row.
        mask: Which codes exist; the others read as 0.
        BITS: 1, 2, 3, 4 or 8.

    Returns:
        int32 codes in the broadcast shape.
    """
    n_codes = tl.minimum(n_cols - tile * TILE, TILE)
    # Masked columns must not shift by 32 bits or more, which is undefined.
    field = tl.minimum(col - tile * TILE, n_codes - 1)
    low_ptr = codes_ptr + row * row_words + tile * (TILE * BITS // 32)
    return join_planes(low_ptr, field, n_codes, mask, BITS)


@triton.jit
def join_planes(low_ptr, field, n_codes, mask, BITS: tl.constexpr) -> tl.tensor:
    """Codes of one packed tile, its planes put together.

    Args:
        low_ptr: int32 words of the tile, its lowest plane first.
        field: int32 code numbers within the tile, each below `n_codes`.
        n_codes: Codes of this tile, 128 but in the last.
        mask: Which codes exist; the others read as 0.
        BITS: 1, 2, 3, 4 or 8.

    Returns:
        int32 codes in the broadcast shape.
    """
    if BITS == 8:  # noqa: PLR2004 the interpreter cannot shift by a named tl.constexpr
        codes = load_plane(low_ptr, field, n_codes, mask, 8)
    elif BITS == 1:
        codes = load_plane(low_ptr, field, n_codes, mask, 1)
    else:
        codes = load_plane(low_ptr, field, n_codes, mask, 2)
        if BITS > 2:  # noqa: PLR2004 same
            high_ptr = low_ptr + count_words(n_codes, 2)
            codes |= load_plane(high_ptr, field, n_codes, mask, BITS - 2) << 2
    return codes


@triton.jit
def load_values(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    row,
    col,
    tile,
    n_rows,
    n_cols,
    row_words,
    group_rows,
    group_cols,
    row_groups,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
) -> tl.tensor:
    """Values (code - zero) * scale of one packed tile; exact in fp32, since 8 + 11 bits fit 24.

    Args:
        codes_ptr: int32 words [n_rows, row_words].
        scale_ptr: fp16 [ceil(n_rows / group_rows), row_groups].
        zero_ptr: uint8 of the scale's shape; unread without HAS_ZERO.
        row: int32 row numbers, broadcastable with `col`.
        col: int32 column numbers, all of one tile of 128.
        tile: The tile's number.
        n_rows: Rows of the factor.
        n_cols: Columns of the factor.
        row_words: Words of a packed row.
        group_rows: Rows that share a scale.
        group_cols: Columns that share a scale.
        row_groups: Scales of one row of groups.
        BITS: 1, 2, 3, 4 or 8.
        HAS_ZERO: Asymmetric; without it the zero is the middle of the code range.

    Returns:
        fp32 values in the broadcast shape, 0 outside the factor.
    """
    # In `gather_kernel` the row is a scalar.
    mask = mask_if(col < n_cols, row < n_rows)
    row = row.to(tl.int64)
    codes = load_codes(codes_ptr, row, col, tile, n_cols, row_words, mask, BITS)
    group = (row // group_rows) * row_groups + col // group_cols
    scale = tl.load(scale_ptr + group, mask=mask, other=0.0).to(tl.float32)
    if HAS_ZERO:
        centred = (codes - tl.load(zero_ptr + group, mask=mask, other=0).to(tl.int32)).to(
            tl.float32
        )
    else:
        centred = codes.to(tl.float32) - ((1 << BITS) - 1) * 0.5
    return centred * scale


@triton.jit
def multiply_rows(left, right, BLOCK_T: tl.constexpr) -> tl.tensor:
    """Multiply left [BLOCK_T, K] by right [N, K] transposed, in full fp32."""
    if BLOCK_T == 1:
        product = tl.sum(left * right, axis=1)[None, :]
    else:
        product = tl.dot(left, tl.trans(right), input_precision="ieee")
    return product
