"""A few logits that verification stored prove that a delta is really applied once it is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltacome_core.canary import Canary, read_canary
from deltacome_core.verify import REPORT_NAME
from workers.engine.errors import broken, too_busy
from workers.engine.executor import Work
from workers.engine.paging import pages_for

# Rounding of a served model beside the one that was verified, relative to the logits' size: the
# largest seen on the tiny models was a fifth of these.
_NOISE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
_RETRY_S = 5
# A served model must be this much nearer to the reconstruction than the backbone is.
_NEARER = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryResult:
    """What was proven; errors in logits, root mean square over the stored ones.

    state: "applied" (the served model gives the stored logits), "absent" (the delta brings none, or
    the model is a backbone), "indistinct" (the stored logits are as near to the backbone's as
    rounding is, so they prove nothing).
    """

    state: str
    error: float | None = None
    backbone_error: float | None = None

    @property
    def header(self) -> str:
        if self.error is None or self.backbone_error is None:
            return self.state
        return f"{self.state}; error={self.error:.2e}; backbone={self.backbone_error:.2e}"


UNTESTED = CanaryResult(state="absent")


def find_canary(folder: Path) -> Canary | None:
    """The canary of a delta; None when its verification stored none.

    Raises:
        ApiError: canary_damaged.
    """
    report = folder / REPORT_NAME
    if not report.is_file():
        return None
    try:
        return read_canary(report)
    except ValueError as error:
        raise broken(
            "The verification report of this delta is damaged.", code="canary_damaged"
        ) from error


def judge(canary: Canary, logits: torch.Tensor, *, dtype: torch.dtype) -> CanaryResult:
    """Compare served logits with the stored ones.

    Args:
        canary: what was stored.
        logits: f32 [vocabulary] of the served model after the canary's tokens.
        dtype: of the served model.

    Raises:
        ApiError: canary_failed; this is not the model that was verified.
    """
    error = canary.measure_error(logits[list(canary.ids)].tolist())
    size = float(torch.tensor(canary.logits).square().mean().sqrt())
    noise = _NOISE[dtype] * size
    result = CanaryResult(
        state="applied" if canary.backbone_error > 2 * noise else "indistinct",
        error=error,
        backbone_error=canary.backbone_error,
    )
    if not error <= max(noise, _NEARER * canary.backbone_error):
        raise broken(
            "The loaded delta does not give the logits of its verification, so it is not served"
            f" ({result.header}).",
            code="canary_failed",
        )
    return result


class CanarySequence:
    """The canary's tokens as an executor takes them; nobody waits for its answer."""

    def __init__(self, model: Any, tokens: tuple[int, ...]) -> None:
        self.model = model
        self.tokens = list(tokens)
        self.pages: list[int] = []
        self.cache: Any = None


def prove(model: Any, folder: Path) -> CanaryResult:
    """Ask the loaded model for the logits that its verification stored.

    Raises:
        ApiError: canary_failed, canary_damaged; 503 when the cache has no page free.
    """
    canary = find_canary(folder)
    if canary is None:
        return UNTESTED
    pages = model.executor.pages.take(pages_for(len(canary.tokens)))
    if pages is None:
        raise too_busy(
            "There is no memory to check this model now; try again in a moment.",
            code="engine_full",
            retry_after_s=_RETRY_S,
        )
    try:
        sequence = CanarySequence(model, canary.tokens)
        sequence.pages = pages
        work = Work(sequence=sequence, start=0, count=len(canary.tokens), rows=1)
        logits = model.executor.forward([work])
    finally:
        model.executor.pages.give_back(pages)
    return judge(canary, logits[0].float().cpu(), dtype=model.module.dtype)
