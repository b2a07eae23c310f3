"""Throughput of decoding: distinct tenants in a batch, registered ones beside them, and what the
kernels alone make of the same batch.
"""

from collections.abc import Sequence as Many
from itertools import count
from typing import Any

import torch

from benchmarks.engine.large import Large
from benchmarks.engine.library import find_sites
from benchmarks.engine.loop import Loop, best_of, draw_prompts, endless, rate
from benchmarks.engine.timing import capture, time_ms
from kernels.plan import StepPlan
from kernels.serving import delta_linear

_SEEDS = count(1)


def spread(n_tenants: int, n_rows: int) -> list[int]:
    """Slots of a batch: every tenant as often as any other; none is the backbone."""
    return [at % n_tenants if n_tenants else -1 for at in range(n_rows)]


def time_decode(large: Large, loop: Loop, slots: Many[int], *, repeats: int = 3) -> dict[str, Any]:
    """One answer for each slot, all at once."""
    size = large.size
    models = [endless(large.model, slot) for slot in slots]
    runs: list[dict[str, Any]] = []
    for _ in range(repeats + 1):
        # Prompts that were asked before would be found in the cache.
        prompts = draw_prompts(len(slots), size.vocabulary, size.prompt, seed=next(_SEEDS))
        runs.append(rate(loop.answer(list(zip(models, prompts, strict=True)), size.new_tokens)))
    # The first run captures graphs and compiles kernels.
    best = best_of(runs[1:], "tokens_per_s")
    best["tokens_per_s_of_runs"] = [run["tokens_per_s"] for run in runs[1:]]
    return best | time_step(large, slots)


def time_step(large: Large, slots: Many[int]) -> dict[str, float]:
    """The captured step alone: what the device does without the engine around it."""
    executor: Any = large.executor
    if executor._graphs is None:  # noqa: SLF001
        return {}
    key = (assign(large, slots), executor.slots.graph_key[1])
    captured = executor._graphs._captured.get(key)  # noqa: SLF001
    return {} if captured is None else {"graph_ms": time_ms(captured.graph.replay, large.device)}


def assign(large: Large, slots: Many[int]) -> int:
    """Tell the step whose its rows are, as `forward` does; how many rows it has."""
    executor: Any = large.executor
    with torch.inference_mode():
        layout = executor._lay_out([_Row(slot) for slot in sorted(slots)], len(slots))  # noqa: SLF001
        executor.slots.begin(layout.spans, n_rows=layout.n_rows, n_single=layout.n_single)
    return int(layout.n_rows)


class _Row:
    """A single token of a slot, as a layout sees it."""

    count = rows = 1

    def __init__(self, slot: int) -> None:
        self.sequence = self
        self.model = self
        self.slot = slot


@torch.inference_mode()
def time_layers(large: Large, slots: Many[int]) -> float:
    """Milliseconds of all linear layers with their deltas and nothing else."""
    arena: Any = large.slots._arena  # noqa: SLF001
    plan = StepPlan(arena, n_tokens=len(slots))
    plan.assign(sorted(slots))
    sites = find_sites(large.executor)
    inputs = {
        site.weight.shape[1]: torch.randn(
            len(slots), site.weight.shape[1], device=large.device, dtype=site.weight.dtype
        )
        for site in sites
    }

    def work() -> None:
        for number, site in enumerate(sites):
            delta_linear(inputs[site.weight.shape[1]], site.weight, arena, number, plan)

    return time_ms(capture(work, large.device).replay, large.device)


def time_flatness(
    large: Large, loop: Loop, registered: Many[int], n_distinct: int
) -> dict[str, Any]:
    """The same batch while all, and while few, tenants are resident; in turns, best of each."""
    arena: Any = large.slots._arena  # noqa: SLF001
    few = registered[:n_distinct]
    away = [slot for slot in registered if slot not in few]
    held = {slot: (arena.images[slot], arena.directory[slot].clone()) for slot in away}
    slots = [few[at % len(few)] for at in range(large.size.batch)]
    many_runs, few_runs = [], []
    for _ in range(2):
        many_runs.append(time_decode(large, loop, slots, repeats=1)["tokens_per_s"])
        for slot in away:
            large.slots.evict(slot)
        try:
            few_runs.append(time_decode(large, loop, slots, repeats=1)["tokens_per_s"])
        finally:
            for slot, (image, directory) in held.items():
                arena.images[slot] = image
                arena.directory[slot].copy_(directory)
    return {
        "registered": len(registered),
        "few": len(few),
        "distinct_in_a_batch": len(few),
        "tokens_per_s_many": many_runs,
        "tokens_per_s_few": few_runs,
        "ratio": max(many_runs) / max(few_runs),
    }


def time_prompt(large: Large, loop: Loop, slot: int) -> float:
    """Seconds to the first token of one long prompt."""
    size = large.size
    found = []
    for _ in range(3):
        prompt = draw_prompts(1, size.vocabulary, size.long_prompt, seed=next(_SEEDS))[0]
        heard = loop.answer([(endless(large.model, slot), prompt)], 1)[0]
        found.append(heard.times[0] - heard.submitted_s)
    return min(found)
