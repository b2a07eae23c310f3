"""The kernels of the correctness cases that take long to compile, each to be compiled alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch

from kernels import serving
from kernels.arena import DeltaArena
from kernels.bench.correctness import BatchCase, cover_case
from kernels.plan import StepPlan
from kernels.triton_ops.launch_batch import launch_expand, launch_layer, launch_shrink
from kernels.tuning import Shape, Stage

# Scales of some bands for rows and of some for tiles: every loop is compiled for both.
_SOME_GROUPS: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What the machine code of a kernel depends on: equal ones are compiled once.

    dtype: of what it writes.
    overlap: it may start before `shrink` ends.
    """

    stage: Stage
    dtype: torch.dtype
    overlap: bool
    shape: Shape
    units: int
    planes: int
    widths: frozenset[int]
    grouping: int
    has_direct: bool
    has_factors: bool

    @property
    def cost(self) -> int:
        """Roughly how long it takes to compile: sums and loads that each width's loop lays out."""
        loops = len(self.widths) * (2 if self.grouping == _SOME_GROUPS else 1)
        return loops * self.shape.blocks * self.shape.ahead * self.units


def plan_case(case: BatchCase, device: torch.device | str) -> StepPlan:
    """A plan of a case whose arena holds nothing: what it launches finds no work.

    Args:
        case: the case.
        device: of the arena.

    Returns:
        The plan; its kernels are those of the case.
    """
    arena = DeltaArena(cover_case(case), n_slots=1, device=device, operand_order=True)
    return StepPlan(arena, n_tokens=len(case.slots), units_per_group=case.units, planes=case.planes)


def list_products(plan: StepPlan, site: int) -> Iterator[Product]:
    """What a batch launches: deltas added to fp32, to bf16, and to a whole layer's bf16.

    Args:
        plan: of the batch.
        site: number of the site.

    Returns:
        Each product once.
    """
    spec = plan.arena.spec
    where = spec.sites[site]
    # Without hidden values no shrink is launched, and nothing can overlap it.
    has_hidden = spec.hidden_steps(site) > 0
    if has_hidden:
        yield _describe("shrink", plan, site, dtype=torch.int8, overlap=True)
    yield _describe("expand", plan, site, dtype=torch.float32, overlap=has_hidden)
    yield _describe("expand", plan, site, dtype=torch.bfloat16, overlap=has_hidden)
    # Only its sizes are asked for.
    weight = torch.empty(where.total_out, where.in_features, device="meta")
    if serving.choose_layer(weight, plan, site) is not None:
        yield _describe("layer", plan, site, dtype=torch.bfloat16, overlap=True)
    elif has_hidden:
        yield _describe("expand", plan, site, dtype=torch.bfloat16, overlap=False)


def _describe(
    stage: Stage, plan: StepPlan, site: int, *, dtype: torch.dtype, overlap: bool
) -> Product:
    spec = plan.arena.spec
    is_shrink = stage == "shrink"
    has_direct = spec.has_direct(site) and not is_shrink
    return Product(
        stage=stage,
        dtype=dtype,
        overlap=overlap,
        shape=serving.shape_for(stage, plan, site),
        units=plan.units_per_group,
        planes=plan.planes,
        widths=spec.widths(site),
        grouping=spec.grouping(site),
        has_direct=has_direct,
        has_factors=spec.has_factors(site) and not is_shrink,
    )


def compile_product(product: Product, plan: StepPlan, site: int) -> None:
    """Compile a product into the cache on disk by launching it.

    Args:
        product: of `list_products`.
        plan: of an arena that holds nothing.
        site: number of the site.
    """
    where = plan.arena.spec.sites[site]
    device = plan.arena.device
    y = torch.zeros(plan.n_tokens, where.total_out, dtype=product.dtype, device=device)
    if product.stage == "shrink":
        launch_shrink(plan, site, product.shape)
    elif product.stage == "expand":
        launch_expand(y, plan, site, product.shape, overlap=product.overlap)
    else:
        x, weight = (
            torch.zeros(n, where.in_features, dtype=product.dtype, device=device)
            for n in (1, where.total_out)
        )
        launch_layer(x, weight, None, y, plan, site, product.shape)
