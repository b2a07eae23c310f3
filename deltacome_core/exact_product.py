"""The product of two factors, bit for bit the same on every machine; see docs/format.md."""

import math

import torch

from deltacome_core.errors import InternalError

# Every whole number up to 2^53 is a float64.
EXACT_BITS = 53
# Bounds the float64 memory of one step; any cut gives the same bits.
_BLOCK_ELEMENTS = 1 << 24


def grid_bits(rank: int) -> tuple[int, int]:
    """Choose how finely the factors of a product are rounded.

    rank * 2^bits_u * 2^bits_v <= 2^53, so that no partial sum of the rounded product, in whatever
    order it is taken, leaves the whole numbers that float64 holds.

    Args:
        rank: terms of each sum, at least 1.

    Returns:
        (bits_u, bits_v): the largest magnitude of each factor becomes at most 2 to that power.
    """
    bits = EXACT_BITS - (rank - 1).bit_length()
    return bits // 2, bits - bits // 2


def round_to_grid(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, int]:
    """Round to whole multiples of a power of two, halves to even.

    Args:
        values: float64, not empty; the largest magnitude is 0 or from 2^-900 to 2^900.
        bits: the largest magnitude becomes at most 2^bits.

    Returns:
        float64 of whole numbers, and the power: values ~ whole * 2^power.
    """
    low, high = values.aminmax()
    power = math.frexp(max(-float(low), float(high)))[1] - bits
    return (values * math.ldexp(1.0, -power)).round_(), power


def multiply_factors(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply two factors so that neither threads, blocks nor devices change a bit.

    Both are rounded to fixed point. The sums are then whole numbers of at most 53 bits, which
    float64 adds without an error in any order, with or without fused multiply-add.

    Args:
        left: float64 [out, rank].
        right: float64 [rank, in], on the same device.

    Returns:
        float32 [out, in].

    Raises:
        InternalError: a factor is not float64.

    Source: docs/format.md, "From codes to numbers".
    """
    if left.dtype != torch.float64 or right.dtype != torch.float64:
        raise InternalError(f"factors are {left.dtype} and {right.dtype}")
    bits_left, bits_right = grid_bits(left.shape[1])
    whole_left, power_left = round_to_grid(left, bits_left)
    whole_right, power_right = round_to_grid(right, bits_right)
    step = math.ldexp(1.0, power_left + power_right)
    product = left.new_empty((left.shape[0], right.shape[1]), dtype=torch.float32)
    rows = max(1, _BLOCK_ELEMENTS // max(1, right.shape[1]))
    for start in range(0, left.shape[0], rows):
        product[start : start + rows] = (whole_left[start : start + rows] @ whole_right).mul_(step)
    return product
