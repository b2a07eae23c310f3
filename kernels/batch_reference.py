"""The ops on an arena in plain torch: the truth for their kernels, and what runs on a CPU."""

import torch

from deltacome_core.packed import PackedDirect
from kernels.plan import StepPlan


def add_delta(y: torch.Tensor, x: torch.Tensor, plan: StepPlan, site: int) -> torch.Tensor:
    """Add each token's delta at a site to the backbone's outputs, in place.

    Args:
        y: bf16, fp16 or fp32 [tokens, out of all parts].
        x: bf16, fp16 or fp32 [tokens, in].
        plan: of the step; a token of slot -1 keeps its y exactly.
        site: number of the site.

    Returns:
        y, each sum rounded once.
    """
    where = plan.arena.spec.sites[site]
    for slot in sorted(set(plan.token_slots) - {-1}):
        image = plan.arena.images[slot]
        tokens = [token for token, own in enumerate(plan.token_slots) if own == slot]
        first = 0
        for name, out in zip(where.parts, where.out_features, strict=True):
            matrix = None if image is None else image.matrices.get(name)
            if matrix is not None:
                matrix = matrix.to(x.device)
                rows = x[tokens].float()
                if isinstance(matrix, PackedDirect):
                    term = rows @ matrix.dequantise().T
                else:
                    left, right = matrix.factors()
                    term = rows @ right.T @ left.T
                columns = slice(first, first + out)
                y[tokens, columns] = (y[tokens, columns].float() + term).to(y.dtype)
            first += out
    return y
