"""Answers through the engine's own scheduler, with the time at which each token came."""

import statistics
import threading
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch

from workers.engine.generate import Event, Failure, Piece, Sampling, Sequence
from workers.engine.model import LoadedModel
from workers.engine.scheduler import Limits, Scheduler

PATIENCE_S = 120


@dataclass(slots=True)
class Heard:
    """Tokens of one answer and when they came; `done` when the last one has."""

    submitted_s: float = 0.0
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def emit(self, event: Event) -> None:
        if isinstance(event, Piece):
            self.ids.append(event.token_id)
            self.times.append(time.perf_counter())
            return
        if isinstance(event, Failure):
            self.error = event.error
        self.done.set()

    def wait(self) -> Self:
        if not self.done.wait(PATIENCE_S):
            raise RuntimeError(f"no answer in {PATIENCE_S} s")
        if self.error is not None:
            raise self.error
        return self


class Loop:
    """A scheduler of the engine, running."""

    def __init__(self, *, max_sequences: int = 64, prefill_tokens: int = 256) -> None:
        self.scheduler = Scheduler(
            Limits(
                max_sequences=max_sequences,
                max_running=256,
                max_waiting=99999,
                max_waiting_tenant=99999,
                prefill_tokens=prefill_tokens,
            )
        )
        self.scheduler.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.scheduler.stop()

    def settle(self) -> None:
        """Wait until it has prepared what it prepares in quiet: nothing else runs then."""
        ends = time.perf_counter() + PATIENCE_S
        while not self.scheduler.is_prepared:
            if time.perf_counter() > ends:
                raise RuntimeError(f"steps are still being prepared after {PATIENCE_S} s")
            time.sleep(0.01)

    def submit(self, asked: Many[tuple[LoadedModel, Many[int]]], max_tokens: int) -> list[Heard]:
        """Ask greedily; (model, prompt) each."""
        heard = [Heard(submitted_s=time.perf_counter()) for _ in asked]
        self.scheduler.submit(
            [
                Sequence(
                    model,
                    tuple(prompt),
                    sampling=Sampling(temperature=0.0),
                    max_tokens=max_tokens,
                    score_prompt=False,
                    emit=one.emit,
                )
                for (model, prompt), one in zip(asked, heard, strict=True)
            ]
        )
        return heard

    def answer(self, asked: Many[tuple[LoadedModel, Many[int]]], max_tokens: int) -> list[Heard]:
        return [one.wait() for one in self.submit(asked, max_tokens)]


def endless(model: LoadedModel, slot: int) -> LoadedModel:
    """The model of a slot, whose answers end at their length only."""
    return replace(model, slot=slot, key=f"t{slot}", eos_ids=frozenset())


def draw_prompts(count: int, vocabulary: int, length: int, *, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(5, vocabulary, (count, length), generator=generator)
    return [list(map(int, row)) for row in drawn]


def rate(heard: Many[Heard]) -> dict[str, float]:
    """Tokens per second between the moment all answers have begun and the first one's end."""
    begun = max(one.times[0] for one in heard)
    ended = min(one.times[-1] for one in heard)
    n_tokens = sum(begun < at <= ended for one in heard for at in one.times)
    started = min(one.submitted_s for one in heard)
    return {
        "tokens_per_s": n_tokens / (ended - begun),
        "step_ms": 1e3 * (ended - begun) * len(heard) / n_tokens,
        "whole_tokens_per_s": sum(len(one.ids) for one in heard)
        / (max(one.times[-1] for one in heard) - started),
        "first_token_ms": 1e3 * statistics.median(one.times[0] - started for one in heard),
    }


def percentiles(values: Many[float]) -> dict[str, float]:
    """Median and 99th percentile, milliseconds of seconds."""
    found = torch.tensor(list(values), dtype=torch.float64) * 1e3
    return {"p50_ms": float(found.quantile(0.5)), "p99_ms": float(found.quantile(0.99))}


def best_of(runs: Many[dict[str, Any]], key: str) -> dict[str, Any]:
    return max(runs, key=lambda run: run[key])
