"""Requests as users send them: Poisson arrivals, tenants by Zipf's law, answers of all lengths."""

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.engine.large import Large
from benchmarks.engine.loop import Heard, Loop, endless, percentiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Asked `at_s` after the start."""

    at_s: float
    tenant: int
    prompt: tuple[int, ...]
    new_tokens: int


def draw_trace(
    *, rate_per_s: float, seconds: float, n_tenants: int, vocabulary: int, seed: int = 0
) -> list[Request]:
    """Prompts of 16 to 128 tokens and answers of 32 to 96, evenly spread; Zipf's exponent is 1."""
    generator = np.random.default_rng(seed)
    shares = 1 / np.arange(1, n_tenants + 1)
    shares /= shares.sum()
    found: list[Request] = []
    at_s = 0.0
    while (at_s := at_s + generator.exponential(1 / rate_per_s)) < seconds:
        prompt = generator.integers(5, vocabulary, generator.integers(16, 129))
        found.append(
            Request(
                at_s=at_s,
                tenant=int(generator.choice(n_tenants, p=shares)),
                prompt=tuple(map(int, prompt)),
                new_tokens=int(generator.integers(32, 97)),
            )
        )
    return found


def summarise(trace: Many[Request], heard: Many[Heard]) -> dict[str, Any]:
    """Latencies from the moment each request was asked, and tokens over the whole time."""
    started = min(one.submitted_s for one in heard)
    ended = max(one.times[-1] for one in heard)
    firsts = [one.times[0] - one.submitted_s for one in heard]
    gaps = [b - a for one in heard for a, b in zip(one.times, one.times[1:], strict=False)]
    return {
        "requests": len(heard),
        "tenants": len({request.tenant for request in trace}),
        "seconds": ended - started,
        "tokens_per_s": sum(len(one.ids) for one in heard) / (ended - started),
        "first_token": percentiles(firsts),
        "per_token": percentiles(gaps),
    }


def serve(large: Large, loop: Loop, trace: Many[Request]) -> dict[str, Any]:
    """The engine answers the trace as it comes."""
    heard: list[Heard] = []
    started = time.perf_counter()
    for request in trace:
        time.sleep(max(0.0, started + request.at_s - time.perf_counter()))
        model = endless(large.model, request.tenant)
        heard += loop.submit([(model, request.prompt)], request.new_tokens)
    for one in heard:
        one.wait()
    return summarise(trace, heard)
