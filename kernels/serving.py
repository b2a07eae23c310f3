"""A linear layer of many fine-tunes at once: one backbone product, and each token's own delta."""

from collections.abc import Callable

import torch
from torch.nn import functional

from deltacome_core.errors import InternalError, UserError
from kernels import batch_reference
from kernels.arena import ArenaSpec, DeltaArena
from kernels.fragments import count_steps
from kernels.plan import PLANS, StepPlan
from kernels.streams import running_beside
from kernels.tuning import Shape, Stage, choose_shape


def find_site(arena: DeltaArena, name: str) -> int:
    """Number of a site.

    Args:
        arena: where deltas are resident.
        name: of the site.

    Returns:
        Its number.

    Raises:
        UserError: arena_site_unknown.
    """
    for number, site in enumerate(arena.spec.sites):
        if site.name == name:
            return number
    known = [site.name for site in arena.spec.sites]
    raise UserError("arena_site_unknown", name=name, known=known)


def _check(x: torch.Tensor, out_features: int, plan: StepPlan, site: int) -> None:
    # A kernel trusts its sizes: a wrong one would read or write outside the tensors.
    if not 0 <= site < len(plan.arena.spec.sites):
        raise UserError("arena_site_unknown", name=str(site), known=[])
    wanted = plan.arena.spec.sites[site]
    shape = (len(plan.token_slots), wanted.in_features)
    if tuple(x.shape) != shape or x.stride(1) != 1 or x.device != plan.arena.table.device:
        raise InternalError(f"x is {tuple(x.shape)} on {x.device}, expected {shape} of the plan")
    if out_features != wanted.total_out:
        raise InternalError(f"{out_features} outputs at a site of {wanted.total_out}")


def shape_for(stage: Stage, plan: StepPlan, site: int) -> Shape:
    """The shape that a launch takes.

    Args:
        stage: which kernel.
        plan: of the step.
        site: number of the site.

    Returns:
        The measured shape.
    """
    from kernels.triton_ops.launch_batch import current_arch

    arch = current_arch()
    steps, rows = measure_stage(stage, plan.arena.spec, site)
    return choose_shape(stage, tokens=plan.n_places, steps=steps, rows=rows, arch=arch)


def measure_stage(stage: Stage, spec: ArenaSpec, site: int) -> tuple[int, int]:
    """Sizes that a shape is chosen by.

    Args:
        stage: which kernel.
        spec: of the arena.
        site: number of the site.

    Returns:
        Steps along the rows that are read, and how many rows those are.
    """
    where = spec.sites[site]
    rows = max(sum(needs.shrink_rows) for needs in spec.needs[site])
    inputs = count_steps(where.in_features)
    if stage == "shrink":
        return inputs, rows
    hidden = 2 * spec.hidden_pairs(site)
    return hidden if stage == "expand" else inputs, where.total_out


def _launch_first(
    x: torch.Tensor,
    plan: StepPlan,
    site: int,
    *,
    overlap: bool = False,
) -> None:
    from kernels.triton_ops.launch_batch import launch_prepare, launch_shrink

    launch_prepare(x, plan, site, overlap=overlap)
    launch_shrink(plan, site, shape_for("shrink", plan, site))


def _launch_last(y: torch.Tensor, plan: StepPlan, site: int, *, overlap: bool) -> None:
    from kernels.triton_ops.launch_batch import launch_expand

    shape = shape_for("expand", plan, site)
    # Without hidden values no shrink was launched that this could overlap.
    launch_expand(y, plan, site, shape, overlap=overlap and plan.arena.spec.hidden_pairs(site) > 0)


def add_delta(y: torch.Tensor, x: torch.Tensor, plan: StepPlan, site: int) -> torch.Tensor:
    """Add each token's delta at a site to the backbone's outputs, in place.

    Args:
        y: bf16, fp16 or fp32 [tokens, out of all parts], columns adjacent.
        x: bf16, fp16 or fp32 [tokens, in], columns adjacent.
        plan: of the step; a token of slot -1 keeps its y exactly.
        site: number of the site.

    Returns:
        y. The delta term is within 2e-6 of the exact one (relative L2) with four bytes, within
        1.5e-2 with three.

    Raises:
        UserError: arena_site_unknown.
        InternalError: a shape or device does not fit.
    """
    _check(x, y.shape[1], plan, site)
    if not plan.arena.operand_order:
        return batch_reference.add_delta(y, x, plan, site)
    _launch_first(x, plan, site, overlap=True)
    _launch_last(y, plan, site, overlap=True)
    return y


def choose_layer(weight: torch.Tensor, plan: StepPlan, site: int) -> Shape | None:
    """How programs of `multiply_layer` are cut, where it is what a layer launches.

    Args:
        weight: [out of all parts, in] of the backbone.
        plan: of the step.
        site: number of the site.

    Returns:
        The shape; None where `multiply_beside` is to be launched.
    """
    # A lone token: its backbone's product is bound by memory like its delta, and leaves no gap.
    shape = shape_for("layer", plan, site)
    outs = plan.arena.spec.sites[site].out_features
    whole = all(out % shape.rows == 0 for out in outs)
    return shape if plan.n_tokens == 1 and whole and weight.is_contiguous() else None


def multiply_layer(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    plan: StepPlan,
    site: int,
    shape: Shape,
) -> torch.Tensor:
    """Backbone's product and delta of a lone token in one launch after the first stage.

    Args:
        x: bf16, fp16 or fp32 [1, in].
        weight: [out of all parts, in] in x's dtype, contiguous.
        bias: [out of all parts] or None.
        plan: of the step, of one token.
        site: number of the site, the outputs of whose parts are multiples of shape.rows.
        shape: how programs are cut.

    Returns:
        [1, out] in x's dtype, rounded once; the same with a delta that is 0 as without one.
    """
    from kernels.triton_ops.launch_batch import launch_layer, launch_prepare, launch_shrink

    y = torch.empty(1, len(weight), dtype=x.dtype, device=x.device)
    launch_prepare(x, plan, site, cleared=plan.arrivals, overlap=True)
    if not shape.shrinks:
        launch_shrink(plan, site, shape_for("shrink", plan, site))
    launch_layer(x, weight, bias, y, plan, site, shape)
    return y


def multiply_beside(
    x: torch.Tensor, plan: StepPlan, site: int, multiply: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Backbone's product of a whole step, and beside it the first stage of the deltas.

    Args:
        x: bf16, fp16 or fp32 [tokens, in], columns adjacent.
        plan: of the step.
        site: number of the site.
        multiply: queues the backbone's product and returns it, [tokens, out of all parts].

    Returns:
        The product with each token's delta added, in place.
    """
    with running_beside(x.device) as join:
        _launch_first(x, plan, site)
    y = multiply()
    join()
    _launch_last(y, plan, site, overlap=False)
    return y


@torch.library.custom_op("deltacome::delta_linear", mutates_args=())
def _delta_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, plan: int, site: int
) -> torch.Tensor:
    step = PLANS[plan]
    if not step.arena.operand_order:
        return add_delta(functional.linear(x, weight, bias), x, step, site)
    shape = choose_layer(weight, step, site)
    if shape is not None:
        return multiply_layer(x, weight, bias, step, site, shape)
    return multiply_beside(x, step, site, lambda: functional.linear(x, weight, bias))


@_delta_linear.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, plan: int, site: int
) -> torch.Tensor:
    del bias, plan, site
    return x.new_empty((x.shape[0], weight.shape[0]))


def delta_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    arena: DeltaArena,
    site: int,
    slots: StepPlan,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Backbone's product and each token's delta, x W^T + bias + x V^T diag(sigma) U^T.

    The first stage of the deltas runs beside the backbone's product; a lone token's layer is one
    launch after it (`multiply_layer`).

    The layer is one operator: torch.compile sees one call, and a CUDA graph may capture it. The
    tokens' slots are those the plan holds when the operator, or the graph, runs.

    Args:
        x: bf16, fp16 or fp32 [tokens, in], columns adjacent.
        weight: [out of all parts, in] of the backbone, in x's dtype.
        arena: where the deltas are resident.
        site: number of the site.
        slots: plan of the step, of this arena.
        bias: [out of all parts] in x's dtype, or None.

    Returns:
        [tokens, out] in x's dtype.

    Raises:
        UserError: arena_site_unknown.
        InternalError: a shape or device does not fit, or the plan is of another arena.
    """
    if slots.arena is not arena:
        raise InternalError("the plan belongs to another arena")
    _check(x, weight.shape[0], slots, site)
    y: torch.Tensor = _delta_linear(x, weight, bias, slots.handle, site)
    return y
