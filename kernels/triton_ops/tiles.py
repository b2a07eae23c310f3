"""Products of codes that have scales and zero points for tiles of 128 columns."""

import triton
import triton.language as tl

from kernels.triton_ops.bits import split_word
from kernels.triton_ops.items import replace_items
from kernels.triton_ops.masks import mask_if
from kernels.triton_ops.mma import add_pair, join_bits, words_of_pair

# Rounds of loads that are under way to shared memory.
STAGES = tl.constexpr(4)


@triton.jit
def load_step(source_at, step, shift, exists, P: tl.constexpr):
    """Bits of a token for one step, as `load_planes` with the second step of the pair 0."""
    at = (source_at + step // 2 * words_of_pair(P) + shift * 4).to(tl.pointer_type(tl.int32))
    planes = ()
    for byte in tl.static_range(P):
        word = tl.load(at + 64 * byte + step % 2, mask=exists, other=0)
        planes += (word.to(tl.int64) & 0xFFFFFFFF,)
    return planes


@triton.jit
def load_scales(group_ptr, tile, first_block, n_blocks, lane, exists, R: tl.constexpr):
    """fp16 scale and twice the zero point of this lane's 2 R rows, int32 [threads] each.

    Args:
        group_ptr: int32 [tiles, rows].
        tile: int32 [threads].
        first_block: int32 [threads], first row block of this warp.
        n_blocks: Row blocks.
        lane: int32 [threads], 0..31.
        exists: bool [threads], whether the tile does and its scales are asked for.
        R: Row blocks of a warp.
    """
    scales = ()
    for r in tl.static_range(R):
        for half in tl.static_range(2):
            row = (first_block + r) * 16 + lane // 4 + 8 * half
            mask = exists & (first_block + r < n_blocks)
            scales += (tl.load(group_ptr + tile * n_blocks * 16 + row, mask=mask, other=0),)
    return scales


@triton.jit
def add_tile(
    totals, acc, scales, bits, lane, R: tl.constexpr, P: tl.constexpr, USE_PTX: tl.constexpr
):
    """`totals` of `multiply_tiles` plus the sums of one tile, times its scales.

    Args:
        totals: 2 R fp32 [threads].
        acc: Of `add_pair`.
        scales: Of `load_scales`.
        bits: Of the codes.
        lane: int32 [threads], 0..31.
        R: Row blocks of a warp.
        P: Bytes of a number.
        USE_PTX: Of `join_bits`.

    Returns:
        The totals.
    """
    found = join_bits(acc, lane, R, P, USE_PTX)
    ones = found[2 * R]
    most = ((1 << bits) - 1).to(tl.float32)
    for i in tl.static_range(2 * R):
        scale = scales[i].to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        zero = ((scales[i] >> 16) & 511).to(tl.float32)
        centred = (2 * found[i] - ones).to(tl.float32)
        # Zero points lie near the middle: what the whole numbers leave is small.
        term = scale * (centred + (1.0 - zero / most) * ones.to(tl.float32))
        totals = replace_items(totals, (totals[i] + term,), i, 1)
    return totals


@triton.jit
def multiply_tiles(
    codes_at,
    readings,
    n_steps,
    tile_steps,
    bits,
    group_ptr,
    first_block,
    n_blocks,
    source_at,
    wk,
    lane,
    R: tl.constexpr,
    P: tl.constexpr,
    WK: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Products of R blocks of 16 rows and a token, this warp's share of the tiles.

    Args:
        codes_at: R int64 pointers [threads], this lane's words of the first step.
        readings: How often the source is read: of plain columns as often as there are bits.
        n_steps: Steps of a reading.
        tile_steps: Steps that share scales, of hidden values all their words.
        bits: Of the codes.
        group_ptr: Of `load_scales`.
        first_block: Same.
        n_blocks: Same.
        source_at: Of `multiply_columns`, and so all that are not named here.
        wk: Same.
        lane: Same.
        R: Same.
        P: Same.
        WK: Same.
        USE_PTX: Same.

    Returns:
        2 R fp32 [threads], without the sum of a token's four lanes.
    """
    totals = (tl.zeros_like(lane).to(tl.float32),) * (2 * R)
    # A source of plain columns is read `readings` times at one step, hidden values step by step.
    is_read_again = readings > 1
    n_tiles = (readings * n_steps + tile_steps - 1) // tile_steps
    acc = (tl.zeros_like(lane),) * (P * (R + 1) * 4)
    n_rounds = (n_tiles + WK - 1) // WK
    for turn in tl.range(0, n_rounds * tile_steps, num_stages=STAGES):
        tile = turn // tile_steps * WK + wk
        inner = turn % tile_steps
        exists = tile < n_tiles
        place = tile * tile_steps + inner
        # Asked for once a tile, with its last step.
        asked = mask_if(exists, inner == tile_steps - 1)
        scales = load_scales(group_ptr, tile, first_block, n_blocks, lane, asked, R)
        words = ()
        for r in tl.static_range(R):
            word = tl.load(codes_at[r] + place // 2 * 64 + place % 2, mask=exists, other=0)
            words += split_word(word, USE_PTX)
        step = tl.where(is_read_again, tile, place)
        shift = tl.where(is_read_again, inner, 0)
        planes = load_step(source_at, step, shift, exists, P)
        acc = add_pair(acc, words, planes, R, True, USE_PTX)
        if inner == tile_steps - 1:
            totals = add_tile(totals, acc, scales, bits, lane, R, P, USE_PTX)
            acc = (tl.zeros_like(lane),) * (P * (R + 1) * 4)
    return totals
