"""Attention of newest tokens over pages: the kernel and the plain way give what each row sees."""

from itertools import accumulate, pairwise

import pytest
import torch
from interpreters import run_here, run_interpreted

from workers.engine.attention import DecodeRows, _attend_chunk, _attend_together, put_together
from workers.engine.paging import PAGE_TOKENS

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from workers.engine.paged_kernel import decode_kernel

names = decode_kernel.arg_names
constants = {"GROUP": 4, "ROWS": 16, "WIDTH": 128, "COLUMNS": 128, "PAGE": 16, "BLOCK": 64}
pointers = dict.fromkeys(("query_ptr", "keys_ptr", "values_ptr", "out_ptr"), "*bf16")
pointers |= dict.fromkeys(("pages_ptr", "lengths_ptr"), "*i32")
kinds = {name: pointers.get(name, "fp32" if name == "scale" else "i32") for name in names}
kinds |= dict.fromkeys(constants, "constexpr")
places = {(names.index(name),): value for name, value in constants.items()}
source = ASTSource(fn=decode_kernel, signature=kinds, constexprs=places)
made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
assert made.metadata.shared < 100_000, made.metadata.shared
print("right")
"""
KERNEL = """
import torch
from workers.engine.attention import DecodeRows
from workers.engine.paged_kernel import attend_decode

torch.manual_seed(0)
lengths = [1, 16, 77, 130]
for heads, key_heads, width, window in ((4, 4, 16, None), (8, 2, 24, None), (8, 2, 32, 37)):
    keys, values = torch.randn(2, 32 * 16, key_heads, width).unbind()
    pages = torch.zeros(4, 12, dtype=torch.int32)
    order = (torch.randperm(31) + 1).int()
    for row, length in enumerate(lengths):
        count = -(-length // 16)
        pages[row, :count], order = order[:count], order[count:]
    query = torch.randn(4, heads, width)
    out = torch.full_like(query, float("nan"))
    rows = DecodeRows(pages=pages, lengths=torch.tensor(lengths, dtype=torch.int32))
    attend_decode(query, keys, values, rows, scaling=None, window=window, out=out)
    for row, length in enumerate(lengths):
        places = (pages[row].long()[:, None] * 16 + torch.arange(16)).flatten()[:length]
        places = places if window is None else places[-window:]
        near = keys[places].double().repeat_interleave(heads // key_heads, 1)
        far = values[places].double().repeat_interleave(heads // key_heads, 1)
        scores = torch.einsum("hd,lhd->hl", query[row].double(), near) * width**-0.5
        truth = torch.einsum("hl,lhd->hd", scores.softmax(-1), far)
        assert (out[row] - truth).norm() < 2e-6 * truth.norm(), (heads, row)
print("right")
"""


def test_the_attention_kernel_reads_pages_as_plain_attention_would():
    assert run_interpreted(KERNEL) == "right\n"


@pytest.mark.parametrize("arch", [80, 90])
def test_the_attention_kernel_compiles_without_a_gpu(arch):
    assert run_here(COMPILE, str(arch)) == "right\n"


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_newest_tokens_read_together_see_what_each_sees_alone(window, key_heads):
    lengths = [1, 3, 17, 40, 16, 300]
    counts = [-(-length // PAGE_TOKENS) for length in lengths]
    # Page 0 is nobody's, and what fills up.
    ends = list(accumulate(counts, initial=1))
    pages = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, (first, last) in enumerate(pairwise(ends)):
        pages[row, : last - first] = torch.arange(first, last)
    generator = torch.Generator().manual_seed(4)
    shape = ends[-1] * PAGE_TOKENS, key_heads, 8
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    query = torch.randn(len(lengths), 4, 8, generator=generator)
    groups = put_together(DecodeRows(pages=pages, lengths=torch.tensor(lengths).int()))
    assert sorted(row for group in groups for row in group.rows.tolist()) == list(range(6))
    assert all(2 * group.seen.sum(dim=1).min() > group.seen.shape[1] for group in groups)
    for group in groups:
        found = _attend_together(
            query[group.rows], keys, values, group, scaling=None, window=window
        )
        for row, one in zip(group.rows.tolist(), found, strict=True):
            at = torch.arange(lengths[row]) + ends[row] * PAGE_TOKENS
            alone = _attend_chunk(
                query[row][None, :, None], keys[at], values[at], scaling=None, window=window
            )
            assert torch.allclose(one, alone[0], atol=1e-5)
