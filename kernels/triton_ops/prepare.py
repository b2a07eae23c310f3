"""What precedes all products of a step: activations as the bits of whole numbers."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import directory, fragments
from kernels.triton_ops.bits import transpose_bits, vote_negative
from kernels.triton_ops.mma import words_of_pair

ENTRY_INTS = tl.constexpr(directory.ENTRY_INTS)
ENTRY_ROOM = tl.constexpr(2048)
LEAST = tl.constexpr(1e-20)
SIGN_BITS = tl.constexpr(fragments.SIGN_BITS)


@triton.constexpr_function
def largest_number(n_planes):
    """Largest whole number of an activation or hidden value of so many bytes, its sign aside."""
    return 1 << (8 * n_planes - 2)


@triton.jit
def round_to_int(value) -> tl.tensor:
    """Nearest whole number, halves away from zero; |value| < 2^31."""
    return (value + tl.where(value < 0, -0.5, 0.5)).to(tl.int32)


@triton.jit
def place_words(word, plane, N_PLANES: tl.constexpr):
    """Where the words of a source's bits lie, int32 of them: two steps side by side in a pair.

    Args:
        word: int32, number of the word in the source: four a step.
        plane: int32, number of the bit.
        N_PLANES: Bytes of a number.
    """
    pair = word // 8
    return (pair * words_of_pair(N_PLANES) + plane * 4 + word % 4) * 2 + word // 4 % 2


@triton.jit(
    do_not_specialize=["n_cols", "n_words", "x_stride", "slot_stride", "site_offset", "n_cleared"]
)
def prepare_kernel(
    x_ptr,
    x_stride,
    token_ptr,
    slot_ptr,
    planes_ptr,
    planes_stride,
    step_ptr,
    norm_ptr,
    sums_ptr,
    n_cols,
    n_words,
    directory_ptr,
    slot_stride,
    site_offset,
    cleared_ptr,
    n_cleared,
    N_PLANES: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    USE_PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """THREADS CHUNKS columns of a token: x [n_cols] as bits, the worth of a unit, and its length.

    Numbers are multiples of SMALLEST: the lowest bit of a code reads them so many times smaller.

    The first program of a token also clears n_cleared elements of it, and touches the directory so
    that the kernels that follow find it in the cache.
    """
    if OVERLAP:
        # A kernel that starts early reads the plan before it waits: nothing may still write it.
        gdc_wait()
        gdc_launch_dependents()
    place = tl.program_id(0)
    token = tl.load(token_ptr + place)
    if token >= 0:
        x_at = x_ptr + token.to(tl.int64) * x_stride
        col = tl.arange(0, BLOCK)
        x = tl.load(x_at + col, mask=col < n_cols, other=0.0).to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(x), axis=0), LEAST)
        if tl.program_id(1) == 0:
            slot = tl.load(slot_ptr + place)
            entry = tl.arange(0, ENTRY_ROOM)
            entry_ptr = directory_ptr + slot.to(tl.int64) * slot_stride + site_offset
            tl.load(entry_ptr + entry, mask=entry < ENTRY_INTS, other=0, volatile=True)
            for start in range(0, n_cleared, BLOCK):
                at = cleared_ptr + token.to(tl.int64) * n_cleared + start + col
                tl.store(at, tl.zeros_like(x), mask=start + col < n_cleared)
            # Zeros must not divide by zero: a token of them has the length of the least one.
            norm = largest * tl.sqrt(tl.sum((x / largest) * (x / largest), axis=0))
            tl.store(step_ptr + place, largest / largest_number(N_PLANES))
            tl.store(norm_ptr + place, tl.maximum(norm, LEAST))
        thread = tl.arange(0, THREADS)
        lane = thread % 32
        target_ptr = planes_ptr + place.to(tl.int64) * planes_stride
        total = tl.zeros((THREADS,), dtype=tl.int64)
        for chunk in tl.static_range(CHUNKS):
            own = (tl.program_id(1) * CHUNKS + chunk) * THREADS + thread
            value = tl.load(x_at + own, mask=own < n_cols, other=0.0).to(tl.float32)
            number = (
                round_to_int(value * (largest_number(N_PLANES) / SMALLEST / largest)) * SMALLEST
            )
            total += number.to(tl.int64)
            word = own // 32
            bits = transpose_bits(number, lane, USE_PTX)
            tl.store(target_ptr + place_words(word, lane, N_PLANES), bits, mask=word < n_words)
            # A number of three bytes has its sign in all bits above them.
            if N_PLANES == 4:  # noqa: PLR2004 bytes
                sign = vote_negative(number, USE_PTX)
                at = target_ptr + place_words(word, 32 + lane, N_PLANES)
                tl.store(at, sign, mask=(word < n_words) & (lane < SIGN_BITS))
        share_at = sums_ptr + place.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(share_at, tl.sum(total, axis=0))
