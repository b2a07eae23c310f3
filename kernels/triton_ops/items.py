"""Tuples of registers: Triton has no assignment to one of their items."""

import triton
import triton.language as tl


@triton.jit
def replace_items(items, new, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """`items` with COUNT of them, from FIRST on, replaced by `new`."""
    return items[:FIRST] + new + items[FIRST + COUNT :]
