"""When each part of a load begins and ends, seen from outside: its functions are wrapped."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from deltacome_core import held_files
from deltacome_core.held_files import HeldFiles
from kernels.arena import DeltaArena
from kernels.plan import StepPlan
from workers.engine import arena_slots, model
from workers.engine.arena_slots import ArenaSlots
from workers.engine.graphs import DecodeGraphs
from workers.engine.layers import RowTables
from workers.engine.packed_vocabulary import PackedVocabulary
from workers.engine.preparation import KernelPreparation
from workers.engine.shared import SharedExecutor

# Owner and name of a function, and what it does in a load.
_PLACES: tuple[tuple[Any, str, str], ...] = (
    (model, "open_delta", "open"),
    (HeldFiles, "__init__", "take_page_locked"),
    (held_files, "read_into", "read_blocks"),
    (HeldFiles, "check", "hash"),
    (model, "load_tokenizer", "tokenizer"),
    (model, "read_parts", "read_vocabulary"),
    (arena_slots, "build_image", "describe_matrices"),
    (ArenaSlots, "_find_spec", "find_spec"),
    (KernelPreparation, "compile", "compile_kernels"),
    (ArenaSlots, "_fit", "make_arena"),
    (DeltaArena, "load", "queue_copies"),
    # Returns when the last copy has ended and the codes are in order.
    (ArenaSlots, "load", "fill_slot"),
    (RowTables, "put", "put_norms"),
    (PackedVocabulary, "load", "put_vocabulary"),
    (SharedExecutor, "forward", "forward"),
    (StepPlan, "__init__", "make_plans"),
    (DecodeGraphs, "_capture", "capture_graphs"),
)


@dataclass(slots=True)
class Span:
    """All calls of one function: from the first one's begin to the last one's end, in seconds."""

    begun_s: float
    ended_s: float = 0.0
    busy_s: float = 0.0
    calls: int = 0


@dataclass(slots=True)
class Timeline:
    """Spans by name, and moments; begins when it is made."""

    started_s: float = field(default_factory=time.perf_counter)
    _spans: dict[str, Span] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        begun_s = time.perf_counter()
        try:
            yield
        finally:
            ended_s = time.perf_counter()
            with self._lock:
                span = self._spans.setdefault(name, Span(begun_s))
                span.begun_s = min(span.begun_s, begun_s)
                span.ended_s = max(span.ended_s, ended_s)
                span.busy_s += ended_s - begun_s
                span.calls += 1

    def to_json(self) -> dict[str, dict[str, float]]:
        """Milliseconds since the beginning, in the order in which the spans began.

        `busy_ms` counts all threads; several at once may be busy longer than the span is.
        """
        with self._lock:
            spans = sorted(self._spans.items(), key=lambda item: item[1].begun_s)
        return {
            name: {
                "begins_ms": round(1e3 * (span.begun_s - self.started_s), 1),
                "ends_ms": round(1e3 * (span.ended_s - self.started_s), 1),
                "busy_ms": round(1e3 * span.busy_s, 1),
                "calls": span.calls,
            }
            for name, span in spans
        }


@contextmanager
def watching() -> Iterator[Timeline]:
    """Note all parts of the loads and steps in here."""
    timeline = Timeline()
    with ExitStack() as undo:
        for owner, attribute, name in _PLACES:
            original = getattr(owner, attribute)
            undo.callback(setattr, owner, attribute, original)
            setattr(owner, attribute, _noting(original, timeline, name))
        yield timeline


def _noting(function: Any, timeline: Timeline, name: str) -> Any:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with timeline.span(name):
            return function(*args, **kwargs)

    return call
