"""Tokens that nobody asked for: they show whether the shared model is right."""

from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch

from deltacome_core.errors import UserError
from workers.engine.executor import Executor, Work
from workers.engine.paging import pages_for

# Two prompts of different length, cut in different places, show that rows do not mix.
_CHECK_TOKENS = (21, 13)
_CHECK_CHUNKS = (16, 5)
# Largest error of the logits against the model's own code, relative to their norm.
CHECK_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class Probe:
    """Tokens of a slot as an executor takes them, -1 is the backbone."""

    def __init__(
        self, tokens: list[int], *, slot: int = -1, pages: list[int] | None = None
    ) -> None:
        self.model: Any = SimpleNamespace(slot=slot)
        self.tokens = tokens
        self.fed = 0
        self.pages = pages or []
        self.cache: Any = None


@torch.inference_mode()
def check_against(reference: Any, executor: Executor) -> None:
    """Hold the shared model against the model's own code.

    Args:
        reference: the model by its own code.
        executor: of the shared model.

    Raises:
        UserError: architecture_unknown; this architecture needs what the shared model lacks.
    """
    width = int(reference.config.get_text_config().vocab_size)
    probes, truth = [], []
    for number, length in enumerate(_CHECK_TOKENS):
        ids = [(17 * (number + 1) * at + 5 * at * at + number) % width for at in range(length)]
        probes.append(Probe(ids))
        with_own = reference(input_ids=torch.tensor([ids], device=reference.device))
        truth.append(with_own.logits[0].float())
    try:
        ours = _read(probes, executor)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = f"the shared model cannot run it: {str(error)[:200]}"
        raise UserError("architecture_unknown", reason=reason) from error
    for own, expected in zip(ours, truth, strict=True):
        apart = float((own - expected).norm() / expected.norm())
        if not apart <= CHECK_TOLERANCE[reference.dtype]:
            reason = f"the shared model departs from its own code by {apart:.1e}"
            raise UserError("architecture_unknown", reason=reason)


def _read(probes: list[Probe], executor: Executor) -> list[torch.Tensor]:
    """Logits of each probe, read in chunks that share their steps."""
    for one in probes:
        pages = executor.pages.take(pages_for(len(one.tokens)))
        if pages is None:
            raise UserError("architecture_unknown", reason="the cache holds no two answers")
        one.pages = pages
    found: list[list[torch.Tensor]] = [[] for _ in probes]
    while any(one.fed < len(one.tokens) for one in probes):
        work: list[Work] = []
        whose: list[int] = []
        for number, (one, chunk) in enumerate(zip(probes, _CHECK_CHUNKS, strict=True)):
            # The last two tokens come one by one, as in decoding.
            left = len(one.tokens) - one.fed
            count = min(chunk, max(1, left - 2)) if left else 0
            if count:
                work.append(Work(sequence=one, start=one.fed, count=count, rows=count))
                whose.append(number)
        logits = executor.forward(work)
        ends = accumulate(item.rows for item in work)
        for number, item, end in zip(whose, work, ends, strict=True):
            found[number].append(logits[end - item.rows : end])
            probes[number].fed += item.count
    for one in probes:
        executor.pages.give_back(one.pages)
    return [torch.cat(rows) for rows in found]
