"""Whole-model times of the arena kernels: decode, mixes, prompts, loading, merging, memory."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional

from kernels import serving
from kernels.arena import ArenaSpec, DeltaArena
from kernels.bench.models import Layout as RecipeLayout
from kernels.bench.models import ModelShape, Pool
from kernels.bench.timing import time_calls, time_graph
from kernels.dense import Unfolder, merge_site, multiply_prompt
from kernels.image import Image, build_image
from kernels.plan import StepPlan

MEMORY_BYTES: Final = 80 * 10**9
KEY_VALUE_BYTES: Final = 16 * 10**9
_WARM_ROUNDS: Final = 10
_PREFILL_ROUNDS: Final = 9


@dataclass(slots=True, kw_only=True)
class Bench:
    """A backbone's weights, an arena full of deltas of one layout, and inputs."""

    model: ModelShape
    layout: RecipeLayout
    image: Image
    arena: DeltaArena
    weights: list[torch.Tensor]

    @property
    def base_bytes(self) -> int:
        return sum(weight.numel() * weight.element_size() for weight in self.weights)

    def inputs(self, n_tokens: int) -> dict[int, torch.Tensor]:
        """bf16 [tokens, in] for each width of input."""
        widths = {site.in_features for site in self.arena.spec.sites}
        return {width: torch.randn(n_tokens, width, device="cuda").bfloat16() for width in widths}


def build_bench(
    model: ModelShape,
    layout: RecipeLayout,
    *,
    n_slots: int,
    weights: list[torch.Tensor] | None = None,
) -> Bench:
    """Draw weights and one delta, and copy its slab to all slots: equal numbers, distinct bytes.

    Args:
        model: sizes.
        layout: recipe of the deltas.
        n_slots: resident deltas.
        weights: of the backbone, drawn where they are None.

    Returns:
        The bench.
    """
    sites = model.sites()
    image = build_image(sites, Pool(0).delta(sites, layout), pin=True)
    spec = ArenaSpec.covering(sites, [image])
    arena = DeltaArena(spec, n_slots=n_slots, device="cuda")
    fill_slots(arena, image)
    # Weights of a real model spread like this; their values do not matter to a time.
    weights = weights or [
        torch.empty(site.total_out, site.in_features, device="cuda", dtype=torch.bfloat16).normal_(
            std=0.02
        )
        for site in sites
    ]
    return Bench(model=model, layout=layout, image=image, arena=arena, weights=weights)


def fill_slots(arena: DeltaArena, image: Image) -> None:
    """Load an image into the first slot and copy it to the others on the device."""
    first = arena.load(image)
    torch.cuda.synchronize()
    for slot in range(arena.n_slots):
        if slot != first:
            arena.copy_slot(first, slot)
    torch.cuda.synchronize()


def base_step(bench: Bench, inputs: dict[int, torch.Tensor]) -> Callable[[], None]:
    """All linear layers of the backbone."""

    def run() -> None:
        for weight in bench.weights:
            functional.linear(inputs[weight.shape[1]], weight)

    return run


def delta_step(bench: Bench, inputs: dict[int, torch.Tensor], plan: StepPlan) -> Callable[[], None]:
    """All linear layers with their tokens' deltas."""

    def run() -> None:
        for site, weight in enumerate(bench.weights):
            serving.delta_linear(inputs[weight.shape[1]], weight, bench.arena, site, plan)

    return run


def term_step(bench: Bench, inputs: dict[int, torch.Tensor], plan: StepPlan) -> Callable[[], None]:
    """The delta terms alone, added to buffers that stand for the backbone's outputs."""
    outputs = {
        site.total_out: torch.zeros(plan.n_tokens, site.total_out, device="cuda")
        for site in bench.arena.spec.sites
    }

    def run() -> None:
        for number, site in enumerate(bench.arena.spec.sites):
            serving.add_delta(outputs[site.total_out], inputs[site.in_features], plan, number)

    return run


def time_decode(bench: Bench, slots: Sequence[int], *, planes: int) -> dict[str, Any]:
    """One step of decode over the whole model.

    Args:
        bench: the bench.
        slots: slot of each token.
        planes: 4 for exact, 3 for fast.

    Returns:
        Times in microseconds, bytes, and the factor over the backbone alone.
    """
    inputs = bench.inputs(len(slots))
    base_us = time_graph(base_step(bench, inputs))
    plan = StepPlan(bench.arena, n_tokens=len(slots), planes=planes)
    plan.assign(slots)
    step_us = time_graph(delta_step(bench, inputs, plan))
    term_us = time_graph(term_step(bench, inputs, plan))
    n_tenants = len(set(slots) - {-1})
    moved = bench.base_bytes + n_tenants * bench.image.slab_bytes
    return {
        "n_tokens": len(slots),
        "n_tenants": n_tenants,
        "planes": planes,
        "base_us": base_us,
        "term_us": term_us,
        "step_us": step_us,
        "factor": step_us / base_us,
        "moved_bytes": moved,
        "gbps": moved / step_us / 1e3,
        "term_gbps": n_tenants * bench.image.slab_bytes / term_us / 1e3,
    }


def draw_zipf(n_tokens: int, n_slots: int, *, seed: int) -> list[int]:
    """Slots of a batch whose tenants are asked for by Zipf's law with exponent 1."""
    weights = 1 / np.arange(1, n_slots + 1)
    generator = np.random.default_rng(seed)
    return [int(slot) for slot in generator.choice(n_slots, n_tokens, p=weights / weights.sum())]


def time_prefill(bench: Bench, *, n_tokens: int) -> dict[str, float]:
    """A prompt of one tenant over the whole model."""
    unfolder = Unfolder(bench.arena, dtype=torch.bfloat16)
    # Layers are alike: the first four of them, one after the other, stand for all.
    n_sites = 16
    inputs = bench.inputs(n_tokens)

    def base() -> None:
        for weight in bench.weights[:n_sites]:
            functional.linear(inputs[weight.shape[1]], weight)

    def with_delta() -> None:
        for site, weight in enumerate(bench.weights[:n_sites]):
            x = inputs[weight.shape[1]]
            multiply_prompt(functional.linear(x, weight), x, unfolder, 0, site)

    scale = len(bench.weights) / n_sites
    # Products of this size heat a device until it slows down: both are timed in turns, warm.
    for work in (base, with_delta) * _WARM_ROUNDS:
        work()
    base_times, delta_times = [], []
    for _ in range(_PREFILL_ROUNDS):
        base_times.append(time_calls(base, n_calls=1))
        delta_times.append(time_calls(with_delta, n_calls=1))
    base_us = statistics.median(base_times) * scale
    delta_us = statistics.median(delta_times) * scale
    return {
        "n_tokens": float(n_tokens),
        "base_us": base_us,
        "step_us": delta_us,
        "factor": delta_us / base_us,
    }


def time_merge(bench: Bench) -> dict[str, float]:
    """Merging the whole model from the pristine backbone into other memory."""
    unfolder = Unfolder(bench.arena, dtype=torch.bfloat16)
    room = {tuple(weight.shape): torch.empty_like(weight) for weight in bench.weights}

    def merge() -> None:
        for site, weight in enumerate(bench.weights):
            merge_site(weight, unfolder, 0, site, out=room[tuple(weight.shape)])

    merge()
    return {
        "merge_graph_us": time_graph(merge, n_calls=5),
        "merge_us": time_calls(merge, n_calls=3),
    }


def time_loading(bench: Bench) -> dict[str, float]:
    """Page-locked memory to a resident delta, repacking included."""
    slot = bench.arena.n_slots - 1

    def load() -> None:
        bench.arena.evict(slot)
        bench.arena.load(bench.image)

    load()
    torch.cuda.synchronize()
    load_us = time_calls(load, n_calls=7)
    size = bench.image.source_bytes
    return {"load_us": load_us, "source_bytes": float(size), "gbps": size / load_us / 1e3}


def count_resident(bench: Bench, *, embedding_bytes: int) -> dict[str, Any]:
    """What is allocated, and how many deltas of its size 80 GB hold.

    Args:
        bench: the bench, its slabs allocated and filled.
        embedding_bytes: embeddings and head of one delta, and of the backbone twice that ratio.

    Returns:
        Bytes, and the number of deltas without and with 16 GB of keys and values.
    """
    vocabulary_bytes = 2 * 32000 * bench.model.hidden * 2
    room = torch.empty(
        bench.arena.n_slots * embedding_bytes + vocabulary_bytes, dtype=torch.uint8, device="cuda"
    )
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    del room
    per_delta = bench.arena.spec.slab_bytes + embedding_bytes
    entry = bench.arena.directory[0].numel() * 4
    # Context, workspaces of cuBLAS and the plan's buffers.
    fixed = bench.base_bytes + vocabulary_bytes + (1 << 30)
    return {
        "allocated_bytes": allocated,
        "is_within_80_gb": allocated <= MEMORY_BYTES,
        "slots_allocated": bench.arena.n_slots,
        "slab_bytes": bench.arena.spec.slab_bytes,
        "embedding_bytes": embedding_bytes,
        "fits": (MEMORY_BYTES - fixed) // (per_delta + entry),
        "fits_beside_kv": (MEMORY_BYTES - KEY_VALUE_BYTES - fixed) // (per_delta + entry),
    }
