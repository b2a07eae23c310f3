"""GPTQ: quantisation with error feedback through the inverse Hessian."""

from dataclasses import dataclass

import torch

from deltacome_core.errors import InternalError
from deltacome_core.quantize import QuantisedFactor, encode, fit_grid, invert_scale

# Damping grows tenfold per retry: 0.01 of the mean diagonal reaches 1e6 times it, where any finite
# symmetric matrix of rounding-level indefiniteness has become positive definite.
_DAMPING_RETRIES = 8
# Wider Hessians (28672 columns in a 70B model) are factored in single precision, which leaves an
# error far below the damping: twice 6.6 GB would not fit beside the layer.
_EXACT_COLUMNS = 16384
_PANEL = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """How an error in one column is spread over the columns not yet quantised.

    groups: column groups in the order they are visited, each an int64 [n] of original columns.
    inverse: float32 [cols, cols], upper Cholesky factor of the permuted inverse Hessian.
    """

    groups: tuple[torch.Tensor, ...]
    inverse: torch.Tensor
    group_size: int


def prepare_feedback(hessian: torch.Tensor, *, group_size: int, damping: float) -> Feedback:
    """Order the columns and factor the inverse Hessian, once for all matrices that share it.

    Whole groups are visited by descending mean diagonal and, inside a group, columns by descending
    diagonal: the benefit of act-order without a stored column index.

    Args:
        hessian: float32 [cols, cols], symmetric positive semidefinite.
        group_size: columns that share a scale.
        damping: added to the diagonal, as a share of its mean; raised tenfold until the Cholesky
            factorisation succeeds.

    Returns:
        The visiting order and the error spreading matrix.

    Raises:
        InternalError: the Hessian is not finite.

    Source: GPTQ (arXiv 2210.17323), section 3.3 and step 3 of its algorithm.
    """
    diagonal = hessian.diagonal()
    columns = torch.arange(hessian.shape[0], device=hessian.device)
    blocks = torch.split(columns, group_size)
    means = torch.stack([diagonal[block].mean() for block in blocks])
    order = torch.argsort(means, descending=True, stable=True).tolist()
    groups = tuple(
        blocks[i][torch.argsort(diagonal[blocks[i]], descending=True, stable=True)] for i in order
    )
    permutation = torch.cat(groups)
    inverse = upper_inverse_factor(hessian, damping, order=permutation)
    return Feedback(groups=groups, inverse=inverse, group_size=group_size)


def upper_inverse_factor(
    hessian: torch.Tensor, damping: float, *, order: torch.Tensor
) -> torch.Tensor:
    """Factor the inverse of a damped Hessian, in double precision up to 16384 columns.

    Args:
        hessian: float [cols, cols], symmetric; not changed.
        damping: added to the diagonal, as a share of its mean; raised tenfold until it suffices.
        order: int64 [cols], the order of the columns in the result.

    Returns:
        float32 [cols, cols], the upper Cholesky factor of the inverse.

    Raises:
        InternalError: the Hessian is not finite, or no damping made it positive definite.
    """
    diagonal = hessian.diagonal()[order].double()
    if not _is_finite(hessian):
        raise InternalError("A Hessian with NaN or infinity reached the quantiser.")
    # A column that was never active keeps a unit diagonal: it is rounded alone and spreads nothing.
    diagonal = torch.where(diagonal > 0, diagonal, 1.0)
    step = damping * diagonal.mean()
    dtype = torch.float64 if len(hessian) <= _EXACT_COLUMNS else torch.float32
    factor = torch.empty(hessian.shape, dtype=dtype, device=hessian.device)
    for attempt in range(_DAMPING_RETRIES):
        for start in range(0, len(factor), _PANEL):
            factor[start : start + _PANEL] = hessian[order[start : start + _PANEL]][:, order]
        factor.diagonal().copy_(diagonal + step * 10.0**attempt)
        if _factor_inverse(factor):
            return factor.float()
    raise InternalError("No damping made the Hessian positive definite.")


def _is_finite(matrix: torch.Tensor) -> bool:
    # Some rows at a time: the check takes seven bytes an element, 5.8 GB at 28672 columns.
    rows = torch.split(matrix, _PANEL)
    return bool(torch.stack([torch.isfinite(some).all() for some in rows]).all())


def _factor_inverse(matrix: torch.Tensor) -> bool:
    """Turn a matrix in place into R, upper, with R^T R its inverse; False: not positive definite.

    With the columns in reverse order the Cholesky factor of H itself becomes an upper U, H = U U^T,
    and R = U^-1: one factorisation and no explicit inverse. Panels keep all but a sliver of the
    work in matrix products, and the memory at one matrix.
    """
    n = len(matrix)
    starts = range(0, n, _PANEL)
    failures = []
    for start in reversed(starts):
        stop = min(start + _PANEL, n)
        own, above = slice(start, stop), matrix[:start, start:stop]
        lower, failed = torch.linalg.cholesky_ex(matrix[own, own].double().flip(0, 1))
        failures.append(failed)
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
        matrix[own, own] = inverse
        if start:
            above.copy_(above @ matrix[own, own].T)
            matrix[:start, :start].addmm_(above, above.T, alpha=-1)
    for start in starts:
        stop = min(start + _PANEL, n)
        own = slice(start, stop)
        matrix[stop:, own] = 0
        if start:
            above = matrix[:start, :start] @ matrix[:start, own]
            matrix[:start, own] = above.neg_() @ matrix[own, own]
    return not bool(torch.stack(failures).any())


def quantise_with_feedback(
    values: torch.Tensor, max_code: torch.Tensor, feedback: Feedback
) -> QuantisedFactor:
    """Quantise column by column, moving each column's error to the columns that follow.

    The grid of a group is fitted when the group is entered, from weights that already carry the
    errors of earlier groups. Rows are independent and run side by side.

    Args:
        values: float32 [rows, cols].
        max_code: float32 [rows], 2^bits - 1 of each row.
        feedback: of the Hessian [cols, cols] of the columns.

    Returns:
        The codes with one scale and zero per row and group; values is not changed.

    Source: GPTQ (arXiv 2210.17323), algorithm 1 with lazy batches of one group.
    """
    rows, cols = values.shape
    # Transposed, so that a column of the paper is a contiguous row here.
    pending = values.T[torch.cat(feedback.groups)].contiguous()  # [cols, rows]
    codes = torch.empty((cols, rows), dtype=torch.uint8, device=values.device)
    n_groups = len(feedback.groups)
    scales = torch.empty((n_groups, rows), device=values.device)
    zeros = torch.empty((n_groups, rows), device=values.device)
    start = 0
    for columns in feedback.groups:
        stop = start + columns.numel()
        block = pending[start:stop]
        scale, zero = fit_grid(block.T, max_code)
        group = int(columns.min()) // feedback.group_size
        scales[group], zeros[group] = scale, zero
        spread = feedback.inverse[start:stop, start:]
        block_codes, errors = _quantise_group(
            block, spread[:, : stop - start], scale, zero, max_code
        )
        codes[columns] = block_codes
        pending[stop:] -= spread[:, stop - start :].T @ errors
        start = stop
    return QuantisedFactor(
        codes=codes.T.contiguous(),
        scale=scales.T.half().contiguous(),
        zero=zeros.T.to(torch.uint8).contiguous(),
        group_size=feedback.group_size,
        max_code=max_code,
    )


def _quantise_group(
    block: torch.Tensor,
    spread: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    max_code: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(block.shape, dtype=torch.uint8, device=block.device)
    errors = torch.empty_like(block)
    pivots = spread.diagonal().tolist()
    inverse_scale = invert_scale(scale)
    for i, pivot in enumerate(pivots):
        column = block[i]
        code = encode(column, inverse_scale, zero, max_code=max_code)
        codes[i] = code.to(torch.uint8)
        errors[i] = (column - (code - zero) * scale) / pivot
        block[i + 1 :].addr_(spread[i, i + 1 :], errors[i], alpha=-1.0)
    return codes, errors
