"""Launches of the kernels that work on an arena."""

from dataclasses import dataclass

import torch
import triton

from kernels.plan import StepPlan
from kernels.triton_ops.batch import batch_expand_kernel, batch_shrink_kernel, prepare_kernel
from kernels.triton_ops.repack import repack_kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a program is cut: row blocks a warp, warps along steps and rows, pairs loaded ahead."""

    blocks: int
    along_steps: int
    along_rows: int
    ahead: int

    @property
    def rows(self) -> int:
        return 16 * self.blocks * self.along_rows

    @property
    def warps(self) -> int:
        return self.along_steps * self.along_rows


def is_compiled() -> bool:
    """Whether kernels become machine code, not calls of the interpreter."""
    return not triton.knobs.runtime.interpret


def launch_repack(
    jobs: torch.Tensor, staged: torch.Tensor, slab: torch.Tensor, programs: int, block: int
) -> None:
    """Run the jobs of a chunk.

    Args:
        jobs: int64 [n, 16] on the device.
        staged: uint8, the chunk's bytes.
        slab: uint8, where the jobs write.
        programs: programs of each job.
        block: elements of a program at a time.
    """
    if len(jobs):
        grid = (programs, len(jobs))
        repack_kernel[grid](jobs, staged.data_ptr(), slab.data_ptr(), BLOCK=block, num_warps=4)


def launch_prepare(x: torch.Tensor, plan: StepPlan, site: int) -> None:
    """Write the int8 planes of the tokens that use a delta.

    Args:
        x: bf16, fp16 or fp32 [tokens, in], columns adjacent.
        plan: of the step.
        site: number of the site.
    """
    steps = plan.arena.spec.sites[site].input_steps
    block = triton.next_power_of_2(steps * 32)
    prepare_kernel[(len(plan.group_tokens),)](
        x,
        x.stride(0),
        plan.group_tokens,
        plan.x_planes,
        plan.x_step,
        plan.x_norm,
        x.shape[1],
        steps,
        N_PLANES=plan.planes,
        BLOCK=block,
        num_warps=max(1, min(16, block // 512)),
    )


def _widths(plan: StepPlan) -> int:
    return sum(1 << bits for bits in plan.arena.spec.widths)


def launch_shrink(plan: StepPlan, site: int, shape: Shape) -> None:
    """Write the hidden planes of all groups at a site.

    Args:
        plan: of the step, prepared.
        site: number of the site.
        shape: how programs are cut.
    """
    arena = plan.arena
    blocks = arena.spec.shrink_blocks(site, shape.rows)
    if blocks == 0:
        return
    batch_shrink_kernel[(blocks, plan.n_tokens)](
        plan.x_planes.view(torch.int64),
        plan.x_step,
        plan.x_norm,
        arena.spec.sites[site].input_steps,
        plan.h_planes,
        arena.spec.hidden_steps(site),
        arena.table,
        arena.directory,
        arena.directory.stride(0),
        site * arena.directory.stride(1),
        plan.group_slots,
        plan.group_counts,
        P=plan.planes,
        WIDTHS=_widths(plan),
        HAS_GROUPS=arena.spec.has_groups,
        R=shape.blocks,
        NT=plan.units_per_group,
        WK=shape.along_steps,
        WR=shape.along_rows,
        U=shape.ahead,
        USE_PTX=is_compiled(),
        num_warps=shape.warps,
        num_stages=1,
    )


def launch_expand(y: torch.Tensor, plan: StepPlan, site: int, shape: Shape) -> None:
    """Add the deltas of all groups to the outputs of a site.

    Args:
        y: bf16, fp16 or fp32 [tokens, out], columns adjacent.
        plan: of the step, shrunk.
        site: number of the site.
        shape: how programs are cut.
    """
    arena = plan.arena
    blocks = sum(-(-out // shape.rows) for out in arena.spec.sites[site].out_features)
    batch_expand_kernel[(blocks, plan.n_tokens)](
        plan.x_planes.view(torch.int64),
        plan.x_step,
        plan.x_norm,
        arena.spec.sites[site].input_steps,
        plan.h_planes.view(torch.int64),
        arena.spec.hidden_steps(site),
        arena.table,
        arena.directory,
        arena.directory.stride(0),
        site * arena.directory.stride(1),
        plan.group_slots,
        plan.group_counts,
        plan.group_tokens,
        y,
        y.stride(0),
        P=plan.planes,
        WIDTHS=_widths(plan),
        HAS_GROUPS=arena.spec.has_groups,
        HAS_DIRECT=arena.spec.has_direct,
        R=shape.blocks,
        NT=plan.units_per_group,
        WK=shape.along_steps,
        WR=shape.along_rows,
        U=shape.ahead,
        USE_PTX=is_compiled(),
        num_warps=shape.warps,
        num_stages=1,
    )
