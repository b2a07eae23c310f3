"""Launches of the kernels that work on an arena."""

from functools import cache
from typing import Any

import torch
import triton
from triton.runtime import driver

from kernels.fragments import PAIR_COLUMNS, STEP_ROWS, STEP_WORDS, WORD_COLUMNS
from kernels.plan import MOST_SHARES, StepPlan
from kernels.triton_ops import batch_expand, batch_shrink, layer, prepare, repack
from kernels.triton_ops.batch_expand import batch_expand_kernel
from kernels.triton_ops.batch_shrink import batch_shrink_kernel
from kernels.triton_ops.keys import settle_keys
from kernels.triton_ops.layer import layer_kernel
from kernels.triton_ops.prepare import prepare_kernel
from kernels.triton_ops.repack import repack_kernel
from kernels.tuning import Shape

settle_keys(prepare, batch_shrink, batch_expand, layer, repack)

# Columns of a token that a thread of `prepare` turns into bits: few where few tokens fill a device.
_FEW_TOKENS = 8
_MOST_CHUNKS = 4
_PREPARE_THREADS = 512
# One number for most models, so that their kernels are the same.
_LEAST_SUMS = 128
# Of so many codes the sums of two bytes fit into 32 bits.
_NARROW_CODES = 1 << 16
LAYER_ROWS = 16
# Row blocks of a warp of a layer's programs that do what `shrink` does.
_SHRINK_BLOCKS = 2


def is_compiled() -> bool:
    """Whether kernels become machine code, not calls of the interpreter."""
    return not triton.knobs.runtime.interpret


def overlaps() -> bool:
    """Whether a launch may start before the one before it ends: from Hopper on."""
    return is_compiled() and current_arch() >= 90  # noqa: PLR2004 compute capability


def _sum_widths(widths: frozenset[int]) -> int:
    return sum(1 << bits for bits in widths)


def launch_repack(
    jobs: torch.Tensor,
    staged: torch.Tensor,
    slab: torch.Tensor,
    *,
    widths: frozenset[int],
    programs: int,
    block: int,
) -> None:
    """Run the jobs of a chunk.

    Args:
        jobs: int64 [n, 16] on the device.
        staged: uint8, the chunk's bytes.
        slab: uint8, where the jobs write.
        widths: bits that may occur.
        programs: programs of each job.
        block: elements of a program at a time.
    """
    if len(jobs):
        grid = (programs, len(jobs))
        repack_kernel[grid](
            jobs,
            staged.data_ptr(),
            slab.data_ptr(),
            WIDTHS=_sum_widths(widths),
            BLOCK=block,
            COLUMNS=1 if is_compiled() else WORD_COLUMNS,
            num_warps=4,
        )


def launch_prepare(
    x: torch.Tensor,
    plan: StepPlan,
    site: int,
    *,
    cleared: torch.Tensor | None = None,
    overlap: bool = False,
) -> None:
    """Write the bits of the tokens that use a delta.

    Args:
        x: bf16, fp16 or fp32 [tokens, in], columns adjacent.
        plan: of the step.
        site: number of the site.
        cleared: 32-bit elements [tokens, n], adjacent: rows of tokens that use a delta become 0.
        overlap: be launched while the kernel before it on this stream ends, where a device can.
    """
    arena = plan.arena
    columns = arena.spec.sites[site].input_pairs * PAIR_COLUMNS
    threads, chunks, shares = _share_columns(plan, site)
    prepare_kernel[(plan.n_places, shares)](
        x,
        x.stride(0),
        plan.place_tokens,
        plan.place_slots,
        plan.x_planes,
        plan.x_planes.stride(0),
        plan.x_step,
        plan.x_norm,
        plan.x_sums,
        x.shape[1],
        columns // WORD_COLUMNS,
        arena.directory,
        arena.directory.stride(0),
        site * arena.directory.stride(1),
        plan.x_norm if cleared is None else cleared.view(torch.float32),
        0 if cleared is None else cleared.shape[1],
        N_PLANES=plan.planes,
        SMALLEST=1 << (max(arena.spec.widths(site), default=1) - 1),
        BLOCK=triton.next_power_of_2(columns),
        THREADS=threads,
        CHUNKS=chunks,
        USE_PTX=is_compiled(),
        OVERLAP=overlaps(),
        num_warps=threads // 32,
        **_overlapping(overlap and overlaps()),
    )


def _share_columns(plan: StepPlan, site: int) -> tuple[int, int, int]:
    """Threads of a program of `prepare`, columns of a thread, and programs of a token."""
    pairs = plan.arena.spec.sites[site].input_pairs
    threads = min(_PREPARE_THREADS, PAIR_COLUMNS * min(pairs, 2))
    all_chunks = triton.cdiv(pairs * PAIR_COLUMNS, threads)
    least = triton.cdiv(all_chunks, MOST_SHARES)
    few = plan.n_places <= _FEW_TOKENS
    chunks = max(least, 1 if few else min(_MOST_CHUNKS, all_chunks))
    return threads, chunks, triton.cdiv(all_chunks, chunks)


def _count_sums(plan: StepPlan, site: int) -> int:
    """Shares of a source that a program adds up, at most."""
    hidden = 2 * STEP_WORDS * plan.arena.spec.hidden_pairs(site)
    return int(triton.next_power_of_2(max(_LEAST_SUMS, hidden)))


def _count_codes(plan: StepPlan, site: int) -> int:
    """Codes of a row that are multiplied, readings counted, at most."""
    spec = plan.arena.spec
    inputs = spec.sites[site].input_pairs * max(spec.widths(site), default=1)
    return PAIR_COLUMNS * int(max(inputs, spec.hidden_pairs(site)))


def _overlapping(overlap: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if overlap else {}


def _cut(plan: StepPlan, site: int, shape: Shape, *, overlap: bool) -> dict[str, Any]:
    """Say how both products are compiled for a site."""
    spec = plan.arena.spec
    return {
        "IS_PLAIN": spec.is_plain(site),
        "SUMS": _count_sums(plan, site),
        "R": shape.blocks,
        "WK": shape.along_steps,
        "WR": shape.along_rows,
        "U": shape.ahead,
        "X_AHEAD": shape.inputs_ahead,
        "NARROW": _count_codes(plan, site) <= _NARROW_CODES,
        "TURNS": _count_turns(plan, site, shape),
        "TOKENS": shape.tokens if spec.is_plain(site) else 1,
        "TOKENS_FIRST": shape.tokens_first,
        "USE_PTX": is_compiled(),
        "OVERLAP": overlap,
        "num_warps": shape.warps,
        "num_stages": 1,
        **_overlapping(overlap),
        **({"maxnreg": shape.registers} if shape.registers and is_compiled() else {}),
    }


def _cut_layer(plan: StepPlan, site: int, shape: Shape) -> dict[str, Any]:
    """Say how the layer of a lone token is compiled; only loads of weights are pipelined."""
    cut = _cut(plan, site, shape, overlap=overlaps())
    del cut["num_stages"], cut["TURNS"], cut["TOKENS"], cut["TOKENS_FIRST"]
    return cut | {
        "SHRINKS": _SHRINK_BLOCKS if shape.shrinks else 0,
        "ROWS": LAYER_ROWS,
        "BLOCK": shape.stream_columns,
        "STAGES": shape.stream_stages,
    }


def _grid(plan: StepPlan, blocks: int, shape: Shape) -> tuple[int, int]:
    """Programs of a launch, those that are numbered after each other first."""
    return (plan.n_places, blocks) if shape.tokens_first else (blocks, plan.n_places)


def _count_turns(plan: StepPlan, site: int, shape: Shape) -> int:
    """Blocks that a program multiplies after each other: one where a matrix has several records."""
    return shape.turns if plan.arena.spec.is_plain(site) else 1


def launch_shrink(plan: StepPlan, site: int, shape: Shape, *, overlap: bool | None = None) -> None:
    """Write the bits of the hidden values of all tokens at a site.

    Args:
        plan: of the step, prepared.
        site: number of the site.
        shape: how programs are cut.
        overlap: start while `prepare` ends, where the device can; None is where it can.
    """
    arena = plan.arena
    overlap = overlaps() if overlap is None else overlap
    blocks = arena.spec.shrink_blocks(site, shape.rows * _count_turns(plan, site, shape))
    if blocks == 0:
        return
    batch_shrink_kernel[_grid(plan, blocks, shape)](
        plan.x_planes.view(torch.int64),
        plan.x_planes.stride(0) // 2,
        plan.x_step,
        plan.x_norm,
        plan.x_sums,
        _share_columns(plan, site)[2],
        plan.h_planes,
        plan.h_planes.stride(0),
        plan.h_sums,
        arena.table,
        arena.directory,
        arena.directory.stride(0),
        site * arena.directory.stride(1),
        plan.place_slots,
        plan.place_counts,
        plan.place_numbers,
        P=plan.planes,
        **_cut(plan, site, shape, overlap=overlap),
    )


def launch_expand(
    y: torch.Tensor, plan: StepPlan, site: int, shape: Shape, *, overlap: bool = False
) -> None:
    """Add the deltas of all tokens to the outputs of a site.

    Args:
        y: bf16, fp16 or fp32 [tokens, out], columns adjacent.
        plan: of the step, shrunk.
        site: number of the site.
        shape: how programs are cut.
        overlap: start while the shrink ends, where that is the launch before on this stream.
    """
    arena = plan.arena
    overlap = overlap and overlaps()
    rows = shape.rows * _count_turns(plan, site, shape)
    blocks = sum(-(-out // rows) for out in arena.spec.sites[site].out_features)
    batch_expand_kernel[_grid(plan, blocks, shape)](
        plan.x_planes.view(torch.int64),
        plan.x_planes.stride(0) // 2,
        plan.x_step,
        plan.x_norm,
        plan.x_sums,
        _share_columns(plan, site)[2],
        plan.h_planes.view(torch.int64),
        plan.h_planes.stride(0) // 2,
        plan.h_sums,
        arena.table,
        arena.directory,
        arena.directory.stride(0),
        site * arena.directory.stride(1),
        plan.place_slots,
        plan.place_counts,
        plan.place_numbers,
        plan.place_tokens,
        y,
        y.stride(0),
        P=plan.planes,
        HAS_DIRECT=arena.spec.has_direct(site),
        HAS_FACTORS=arena.spec.has_factors(site),
        **_cut(plan, site, shape, overlap=overlap),
    )


def launch_layer(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    plan: StepPlan,
    site: int,
    shape: Shape,
) -> None:
    """Write the outputs of a site for a lone token, its delta included.

    Args:
        x: bf16, fp16 or fp32 [1, in], columns adjacent.
        weight: [out, in] of the backbone, contiguous; parts begin at multiples of shape.rows.
        bias: [out] or None.
        y: [1, out], overwritten.
        plan: of the step, of one token; prepared with its flags cleared, and shrunk just before
            unless shape.shrinks.
        site: number of the site.
        shape: how the programs of the delta are cut.
    """
    arena = plan.arena
    spec = arena.spec
    cut = _cut_layer(plan, site, shape)
    n_shrink = spec.shrink_blocks(site, STEP_ROWS * _SHRINK_BLOCKS) if shape.shrinks else 0
    n_delta = len(weight) // shape.rows
    n_base = len(weight) // LAYER_ROWS
    layer_kernel[(n_shrink + n_delta + n_base,)](
        x,
        weight,
        weight if bias is None else bias,
        x.shape[1],
        n_shrink,
        min(n_base, shape.streams_first),
        n_delta,
        plan.x_planes.view(torch.int64),
        plan.x_step,
        plan.x_norm,
        plan.x_sums,
        _share_columns(plan, site)[2],
        plan.h_planes.view(torch.int64),
        plan.h_sums,
        arena.table,
        arena.directory,
        arena.directory.stride(0),
        site * arena.directory.stride(1),
        plan.place_slots,
        plan.terms,
        plan.products,
        plan.arrivals,
        plan.arrivals.shape[1] - 1,
        y,
        P=plan.planes,
        HAS_DIRECT=spec.has_direct(site),
        HAS_FACTORS=spec.has_factors(site),
        HAS_BIAS=bias is not None,
        **cut,
    )


@cache
def current_arch() -> int:
    """Compute capability that kernels are compiled for, 90 for Hopper; 0 in the interpreter."""
    return int(driver.active.get_current_target().arch) if is_compiled() else 0
