"""What the delta kernels are compared with, from this repository's own code.

PyTorch eager and compiled unpack and multiply the very same packed bytes; `bmm` multiplies factors
that were unpacked beforehand; `binary_kernel` is batched one-bit matrix products in the manner of
BitDelta's `binary_bmm_kernel` (FasterDecoding/BitDelta, bitdelta/binary_gemm_kernel.py): each word
is loaded once for each of its bits, the reduction is not split.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from deltacome_core.layout import PLANES, TILE_CODES
from deltacome_core.packed import PackedFactor, PackedMatrix
from kernels.bench.models import Layout, Pool
from kernels.bench.timing import time_calls, time_graph

# (out, in), and how many of such matrices a Llama-2-7B has.
SHAPES = (((4096, 4096), 128), ((11008, 4096), 64), ((4096, 11008), 32))


def _unpack_piece(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Codes of tiles of n codes: int32 [rows, tiles, words of one] to int32 [rows, tiles * n]."""
    rows, tiles, _ = words.shape
    codes = None
    first = shift = 0
    for width in PLANES[bits]:
        n_words = -(-n * width // 32)
        fields = torch.arange(0, 32, width, dtype=torch.int32, device=words.device)
        plane = words[:, :, None, first : first + n_words]
        values = (plane >> fields[:, None]) & ((1 << width) - 1)
        values = values.reshape(rows, tiles, -1)[:, :, :n] << shift
        codes = values if codes is None else codes | values
        first += n_words
        shift += width
    assert codes is not None  # noqa: S101 every width has a plane
    return codes.reshape(rows, tiles * n)


def _unpack(factor: PackedFactor) -> torch.Tensor:
    """Codes less their zero point, bf16 [rows, cols], of a symmetric factor."""
    whole = factor.cols // TILE_CODES
    n_words = whole * TILE_CODES * factor.bits // 32
    pieces = []
    if whole:
        words = factor.codes[:, :n_words].reshape(factor.rows, whole, -1)
        pieces.append(_unpack_piece(words, factor.bits, TILE_CODES))
    if factor.cols % TILE_CODES:
        words = factor.codes[:, n_words:].unsqueeze(1)
        pieces.append(_unpack_piece(words, factor.bits, factor.cols % TILE_CODES))
    return torch.cat(pieces, dim=1).to(torch.bfloat16) - ((1 << factor.bits) - 1) / 2


def eager_delta(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """The delta term of a layer in plain PyTorch, as lean as it gets: scales meet vectors only.

    Args:
        x: bf16 [tokens, in].
        matrix: on x's device, symmetric, one scale a row of V and a column of U.

    Returns:
        bf16 [tokens, out].
    """
    total = None
    first = 0
    for band in matrix.bands:
        scale = matrix.sigma[first : first + band.rank] * band.v.scale[:, 0] * band.u.scale[0]
        hidden = (x @ _unpack(band.v).T) * scale.to(x.dtype)
        term = hidden @ _unpack(band.u).T
        total = term if total is None else total + term
        first += band.rank
    return torch.zeros_like(x) if total is None else total


def draw_matrices(layout: Layout, *, seed: int) -> list[PackedMatrix]:
    """One matrix of each of SHAPES on the device."""
    pool = Pool(seed)
    drawn = [pool.matrix("baseline", out, width, layout) for (out, width), _ in SHAPES]
    return [matrix.to("cuda") for matrix in drawn if isinstance(matrix, PackedMatrix)]


def _sum_over_model(times: list[float]) -> float:
    return sum(time * count for time, (_, count) in zip(times, SHAPES, strict=True))


def time_eager(layout: Layout) -> dict[str, float]:
    """Microseconds of one token's delta over a whole 7B, eager and eager in a CUDA graph."""
    eager, graphed = [], []
    for matrix in draw_matrices(layout, seed=1):
        x = torch.randn(1, matrix.in_features, device="cuda").bfloat16()
        eager_delta(x, matrix)
        eager.append(time_calls(partial(eager_delta, x, matrix), n_calls=9))
        graphed.append(time_graph(partial(eager_delta, x, matrix), n_calls=9))
    return {"eager_us": _sum_over_model(eager), "eager_graph_us": _sum_over_model(graphed)}


def time_compiled(layout: Layout) -> dict[str, float]:
    """Microseconds of one token's delta over a whole 7B, torch.compile in a CUDA graph."""
    compiled = torch.compile(eager_delta, dynamic=False)
    times = []
    for matrix in draw_matrices(layout, seed=1):
        x = torch.randn(1, matrix.in_features, device="cuda").bfloat16()
        wanted = eager_delta(x, matrix).float()
        found = compiled(x, matrix).float()
        if float((found - wanted).norm() / wanted.norm()) > 2e-2:  # noqa: PLR2004 bf16 sums
            raise RuntimeError("the compiled baseline differs from the eager one")
        times.append(time_graph(partial(compiled, x, matrix), n_calls=9))
    return {"compiled_graph_us": _sum_over_model(times)}


def _multiply_both(x: torch.Tensor, right: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    return torch.bmm(torch.bmm(x, right), left)


def time_bmm(layout: Layout, *, n_tenants: int) -> float:
    """Microseconds of unpacked bf16 factors, batched, over a whole 7B."""
    times = []
    for (out, width), _ in SHAPES:
        rank = sum(band.rank for band in layout.bands(out, width))
        right = torch.randn(n_tenants, width, rank, device="cuda", dtype=torch.bfloat16)
        left = torch.randn(n_tenants, rank, out, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(n_tenants, 1, width, device="cuda", dtype=torch.bfloat16)
        times.append(time_graph(partial(_multiply_both, x, right, left)))
    return _sum_over_model(times)


@triton.jit
def binary_kernel(
    x_ptr,
    words_ptr,
    y_ptr,
    n_tokens,
    n_rows,
    n_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile of y [batch, n_tokens, n_rows] = x [batch, n_tokens, n_cols] times signs."""
    batch = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, n_cols, BLOCK_K):
        col = start + tl.arange(0, BLOCK_K)
        x_at = x_ptr + (batch * n_tokens + token[:, None]) * n_cols + col[None, :]
        x = tl.load(x_at, mask=token[:, None] < n_tokens, other=0.0)
        word_at = (batch.to(tl.int64) * (n_cols // 32) + col[:, None] // 32) * n_rows + row[None, :]
        bit = (tl.load(words_ptr + word_at) >> (col % 32)[:, None]) & 1
        total += tl.dot(x, (2 * bit - 1).to(x.dtype))
    y_at = y_ptr + (batch * n_tokens + token[:, None]) * n_rows + row[None, :]
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=token[:, None] < n_tokens)


def multiply_binary(x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Batched products with signs.

    Args:
        x: fp16 [batch, tokens, in].
        words: int32 [batch, in / 32, out], bit i of word w is the sign of input 32 w + i.

    Returns:
        fp16 [batch, tokens, out].
    """
    batch, n_tokens, n_cols = x.shape
    n_rows = words.shape[2]
    y = torch.empty(batch, n_tokens, n_rows, device=x.device, dtype=x.dtype)
    binary_kernel[(triton.cdiv(n_rows, 64), batch)](
        x, words, y, n_tokens, n_rows, n_cols, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, num_warps=4
    )
    return y


def time_binary(*, n_tenants: int) -> float:
    """Microseconds of the one-bit kernel over a whole 7B, checked on one shape first."""
    times = []
    for (out, width), _ in SHAPES:
        shape = (n_tenants, width // 32, out)
        words = torch.randint(-(1 << 31), (1 << 31) - 1, shape, device="cuda", dtype=torch.int32)
        x = torch.randn(n_tenants, 1, width, device="cuda").half()
        bits = torch.arange(32, device="cuda", dtype=torch.int32)
        signs = ((words[0][:, None, :] >> bits[:, None]) & 1).reshape(width, out).double() * 2 - 1
        wanted = x[0].double() @ signs
        found = multiply_binary(x, words)[0].double()
        if float((found - wanted).norm() / wanted.norm()) > 1e-3:  # noqa: PLR2004 fp16 result
            raise RuntimeError("the one-bit baseline is wrong")
        times.append(time_graph(partial(multiply_binary, x, words)))
    return _sum_over_model(times)
