"""Masks that depend on a scalar."""

import triton
import triton.language as tl


@triton.jit
def mask_if(mask, condition) -> tl.tensor:
    """`mask` where a scalar condition holds, else nothing.

    Not `mask & condition`: Triton 3.9's interpreter makes whole numbers of it, and refuses them.
    """
    return tl.where(condition, x=mask, y=False)
