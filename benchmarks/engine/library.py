"""transformers' continuous batching on the same weights, alone and with a delta in each layer."""

import time
from typing import Any

import torch
import transformers
from torch.nn import functional

from benchmarks.engine.loop import Heard, best_of, rate
from kernels.dense import Unfolder, multiply_prompt
from kernels.plan import StepPlan
from kernels.serving import delta_linear
from workers.engine.layers import SharedSite, SiteLinear

# Rows above which the factors of a delta are unfolded once, as in the engine's own steps.
_PROMPT_ROWS = 64


def time_library(
    module: Any, prompts: list[list[int]], new_tokens: int, *, repeats: int = 3
) -> tuple[dict[str, Any], list[list[int]]]:
    """One batch of greedy answers; its rate, and the answers in the order of the prompts."""
    config = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    runs: list[dict[str, Any]] = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        found = module.generate_batch(
            inputs=prompts,
            generation_config=config,
            record_timestamps=True,
            progress_bar=False,
            warmup=False,
        )
        ordered = sorted(found.values(), key=lambda one: int(one.request_id.rsplit("_", 1)[-1]))
        answers = [list(one.generated_tokens) for one in ordered]
        heard = [
            Heard(submitted_s=started, ids=ids, times=list(one.timestamps))
            for one, ids in zip(ordered, answers, strict=True)
        ]
        runs.append(rate(heard))
    # The first run finds kernels and sizes.
    best = best_of(runs[1:], "tokens_per_s")
    best["attention"] = str(module.config._attn_implementation)  # noqa: SLF001
    return best, answers


class OneTenant:
    """Every row of a step is of one slot: all that a loop which knows no tenants can be told."""

    def __init__(self, arena: Any, slot: int, dtype: torch.dtype) -> None:
        self._arena = arena
        self._slot = slot
        self._plans: dict[int, StepPlan] = {}
        is_cuda = arena.device.type == "cuda"
        self._unfolder = Unfolder(arena, dtype=dtype) if is_cuda else None

    def linear(self, x: torch.Tensor, weight: torch.Tensor, site: int) -> torch.Tensor:
        if self._unfolder is not None and len(x) > _PROMPT_ROWS:
            y = functional.linear(x, weight)
            return multiply_prompt(y, x, self._unfolder, self._slot, site)
        plan = self._plans.get(len(x))
        if plan is None:
            plan = self._plans[len(x)] = StepPlan(self._arena, n_tokens=len(x))
            plan.assign([self._slot] * len(x))
        return delta_linear(x.contiguous(), weight, self._arena, site, plan)


def list_shared(executor: Any) -> dict[str, SiteLinear]:
    """The layers of the shared model that stand where the library has linear ones, by name."""
    parts = executor.module.named_modules()
    return {name: part for name, part in parts if isinstance(part, SiteLinear)}


def find_sites(executor: Any) -> list[SharedSite]:
    """All sites of the shared model, in the order of their numbers."""
    sites = {id(part._site): part._site for part in list_shared(executor).values()}  # noqa: SLF001
    return sorted(sites.values(), key=lambda site: site._number)  # noqa: SLF001


def put_delta_in_library(module: Any, executor: Any, slot: int) -> None:
    """Let the library's own model multiply by the shared weights, and add one tenant's delta."""
    arena = executor.slots._arena  # noqa: SLF001
    find_sites(executor)[0]._link.slots = OneTenant(arena, slot, module.dtype)  # type: ignore[assignment]  # noqa: SLF001
    for name, layer in list_shared(executor).items():
        module.set_submodule(name, layer)
