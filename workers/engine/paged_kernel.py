"""Attention of single tokens over a paged cache, in Triton: what a step of decoding is made of."""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from workers.engine.paging import PAGE_TOKENS

if TYPE_CHECKING:
    from workers.engine.attention import DecodeRows

_BLOCK_TOKENS = 64
# A matrix instruction takes 16 rows; heads that share keys fill as many of them as there are.
_LEAST_ROWS = 16


# Steps differ in how many pages there is room for: one kernel serves all of them.
@triton.jit(do_not_specialize=["pages_row"])  # type: ignore[untyped-decorator]
def decode_kernel(  # type: ignore[no-untyped-def]
    query_ptr, keys_ptr, values_ptr, pages_ptr, lengths_ptr, out_ptr,
    scale, window,
    query_row, query_head, place_stride, head_stride, value_place, value_head,
    pages_row, out_row, out_head,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1)
    length = tl.load(lengths_ptr + row)
    member = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = column < WIDTH
    heads = head * GROUP + member
    used = (member < GROUP)[:, None] & inside[None, :]
    query = tl.load(
        query_ptr + row * query_row + heads[:, None] * query_head + column[None, :],
        mask=used, other=0.0,
    )  # fmt: skip
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.maximum(length - window, 0) // BLOCK * BLOCK
    for start in range(first, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        seen = (at < length) & (at >= length - window)
        page = tl.load(pages_ptr + row * pages_row + at // PAGE, mask=at < length, other=0)
        place = page.to(tl.int64) * PAGE + at % PAGE
        wanted = seen[:, None] & inside[None, :]
        keys = tl.load(
            keys_ptr + place[:, None] * place_stride + head * head_stride + column[None, :],
            mask=wanted, other=0.0,
        )  # fmt: skip
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        peak = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - peak[:, None])
        kept = tl.exp(highest - peak)
        values = tl.load(
            values_ptr + place[:, None] * value_place + head * value_head + column[None, :],
            mask=wanted, other=0.0,
        )  # fmt: skip
        total = total * kept + tl.sum(weights, 1)
        summed = summed * kept[:, None]
        summed += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        highest = peak
    found = summed / total[:, None]
    tl.store(
        out_ptr + row * out_row + heads[:, None] * out_head + column[None, :],
        found.to(out_ptr.dtype.element_ty), mask=used,
    )  # fmt: skip


def attend_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: "DecodeRows",
    *,
    scaling: float | None,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """Attention of one token of each sequence over its pages.

    Args:
        query: [rows, heads, width], columns adjacent.
        keys: [places, key heads, width].
        values: [places, key heads, width].
        rows: pages and lengths, at least 1.
        scaling: of the scores; 1 / sqrt(width) where it is None.
        window: most positions a row looks back, itself included; None is all.
        out: [rows, heads, width], overwritten.
    """
    n_rows, n_heads, width = query.shape
    group = n_heads // keys.shape[1]
    kernel: Any = decode_kernel
    kernel[(n_rows, keys.shape[1])](
        query, keys, values, rows.pages, rows.lengths, out,
        width**-0.5 if scaling is None else scaling, 2**30 if window is None else window,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1),
        values.stride(0), values.stride(1), rows.pages.stride(0), out.stride(0), out.stride(1),
        GROUP=group, ROWS=max(_LEAST_ROWS, triton.next_power_of_2(group)),
        WIDTH=width, COLUMNS=max(16, triton.next_power_of_2(width)), PAGE=PAGE_TOKENS,
        BLOCK=_BLOCK_TOKENS, num_warps=4,
    )  # fmt: skip
