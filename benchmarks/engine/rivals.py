"""Other ways to serve many fine-tunes on one card, on the same weights and in the same run."""

import time
from collections.abc import Sequence as Many
from typing import Any

import torch
from torch.nn import functional

from benchmarks.engine.decode import time_decode, time_step
from benchmarks.engine.large import Large
from benchmarks.engine.library import find_sites
from benchmarks.engine.loop import Heard, Loop, endless
from benchmarks.engine.timing import time_ms
from benchmarks.engine.trace import Request, summarise

# Whole models go through page-locked memory in pieces of this size.
_PIECE_BYTES = 1 << 30


class Swapper:
    """Copies as many bytes as a fine-tune has to the device, beside the weights that answer."""

    def __init__(self, large: Large) -> None:
        self._large = large
        is_cuda = large.device == "cuda"
        self.size_bytes = sum(p.numel() * p.element_size() for p in large.module.parameters())
        piece = min(_PIECE_BYTES, self.size_bytes)
        self._host = torch.empty(piece, dtype=torch.uint8, pin_memory=is_cuda).random_()
        self._room = torch.empty(piece, dtype=torch.uint8, device=large.device)

    def swap(self) -> None:
        left = self.size_bytes
        while left > 0:
            n = min(len(self._room), left)
            self._room[:n].copy_(self._host[:n], non_blocking=True)
            left -= n
        self._large.synchronize()


def serve_by_swapping(
    large: Large, loop: Loop, trace: Many[Request], *, limit_s: float
) -> dict[str, Any]:
    """One fine-tune at a time on the device; who waits longest is next, with all who want the same.

    The trace is cut when `limit_s` has passed; nobody is asked for after that.
    """
    swapper = Swapper(large)
    swapper.swap()
    swap_ms = time_ms(swapper.swap, large.device, n_calls=5)
    started = time.perf_counter()
    waiting = list(trace)
    heard: list[Heard] = []
    answered: list[Request] = []
    resident, n_swaps = -1, 0
    while waiting and time.perf_counter() - started < limit_s:
        now = time.perf_counter() - started
        ready = [request for request in waiting if request.at_s <= now]
        if not ready:
            time.sleep(0.001)
            continue
        tenant = ready[0].tenant
        batch = [request for request in ready if request.tenant == tenant]
        waiting = [request for request in waiting if request not in batch]
        if tenant != resident:
            swapper.swap()
            resident, n_swaps = tenant, n_swaps + 1
        heard += _answer_batch(large, loop, batch, started)
        answered += batch
    return summarise(answered, heard) | {"swap_ms": swap_ms, "swaps": n_swaps}


def _answer_batch(large: Large, loop: Loop, batch: Many[Request], started: float) -> list[Heard]:
    model = endless(large.model, -1)
    heard = [
        one
        for request in batch
        for one in loop.submit([(model, request.prompt)], request.new_tokens)
    ]
    for one, request in zip(heard, batch, strict=True):
        one.wait()
        one.submitted_s = started + request.at_s
    return heard


class AdapterSlots:
    """bf16 factors of as many ranks as the deltas have; a tenant's rows lie side by side."""

    graph_key = ("adapters", True)
    # No step is prepared.
    example_slot = None

    def __init__(self, large: Large, n_tenants: int) -> None:
        self.n_tenants = n_tenants
        layout, arena = large.size.layout, large.slots._layers  # noqa: SLF001
        self._factors: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        for site, where in zip(arena, find_sites(large.executor), strict=True):
            options: Any = {"device": large.device, "dtype": where.weight.dtype}
            ranks = [
                sum(band.rank for band in layout.bands(out, site.in_features))
                for out in site.out_features
            ]
            right = torch.empty(n_tenants, site.in_features, sum(ranks), **options).normal_(
                std=1e-3
            )
            left = [
                torch.empty(n_tenants, rank, out, **options).normal_(std=1e-3)
                for rank, out in zip(ranks, site.out_features, strict=True)
            ]
            self._factors.append((right, left))

    @property
    def size_bytes(self) -> int:
        held = [t for right, left in self._factors for t in (right, *left)]
        return sum(t.numel() * t.element_size() for t in held)

    def begin(self, spans: Any, *, n_rows: int, n_single: int) -> None:
        del spans, n_rows, n_single

    def linear(self, x: torch.Tensor, weight: torch.Tensor, site: int) -> torch.Tensor:
        y = functional.linear(x, weight)
        right, left = self._factors[site]
        if len(x) % self.n_tenants:
            return y
        hidden = torch.bmm(x.view(self.n_tenants, -1, x.shape[1]), right)
        first_rank = first = 0
        for part in left:
            rank, out = part.shape[1:]
            term = torch.bmm(hidden[..., first_rank : first_rank + rank], part)
            y[:, first : first + out] += term.flatten(0, 1)
            first_rank, first = first_rank + rank, first + out
        return y


def time_adapters(large: Large, loop: Loop, n_tenants: int) -> dict[str, Any]:
    """Decoding of a batch by adapters; the arena must be gone."""
    adapters = AdapterSlots(large, n_tenants)
    executor: Any = large.executor
    link: Any = find_sites(executor)[0]._link  # noqa: SLF001
    kept = executor.slots
    executor.slots = link.slots = adapters
    try:
        found = time_decode(large, loop, [-1] * large.size.batch, repeats=2)
    finally:
        executor.slots = link.slots = kept
    each = adapters.size_bytes / n_tenants
    return found | {"tenants": n_tenants, "bytes_each": each}


def count_dense_copies(large: Large, loop: Loop, *, budget_bytes: float) -> dict[str, Any]:
    """How many whole fine-tunes a card holds, and decoding when each is run in turn."""
    size_bytes = sum(p.numel() * p.element_size() for p in large.module.parameters())
    n_copies = max(1, int((budget_bytes - large.size.kv_bytes) // size_bytes))
    rows_each = max(1, large.size.batch // n_copies)
    found = time_decode(large, loop, [-1] * rows_each, repeats=1)
    step_ms = time_step(large, [-1] * rows_each).get("graph_ms", found["step_ms"])
    return {
        "copies": n_copies,
        "rows_each": rows_each,
        "step_ms_each": step_ms,
        "tokens_per_s": 1e3 * rows_each / step_ms,
    }
