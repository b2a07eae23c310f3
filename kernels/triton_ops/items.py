"""Tuples of registers: Triton has no assignment to one of their items."""

import triton
import triton.language as tl


@triton.jit
def replace_items(items, new, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """`items` with COUNT of them, from FIRST on, replaced by `new`."""
    return items[:FIRST] + new + items[FIRST + COUNT :]


@triton.jit
def four_items(items, NUMBER: tl.constexpr):
    """The NUMBER-th four of `items`."""
    return (
        items[4 * NUMBER],
        items[4 * NUMBER + 1],
        items[4 * NUMBER + 2],
        items[4 * NUMBER + 3],
    )
