"""Steps of single tokens as CUDA graphs, so that a step costs one launch and not a thousand."""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch

from workers.engine.attention import Chunk, DecodeRows

log = logging.getLogger(__name__)

_WARM_UPS = 2
_NO_MEMORY = "ALLOC_FAILED"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What a step reads: embeds [1, rows, hidden], positions [1, rows], the others [rows]."""

    embeds: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    owners: torch.Tensor
    chunks: tuple[Chunk, ...]
    decode: DecodeRows | None


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: Any
    inputs: StepInputs
    hidden: torch.Tensor


class DecodeGraphs:
    """Captures a step when its size first comes; who the tenants are is data, not shape."""

    def __init__(self, run: Callable[[StepInputs], torch.Tensor], *, n_pages: int) -> None:
        self._run = run
        self._n_pages = n_pages
        self._captured: dict[tuple[int, Hashable], _Captured] = {}
        self._generation: Hashable = None
        self._pool: Any = None
        self._is_refused = False

    def run(self, inputs: StepInputs, *, key: tuple[Hashable, Hashable]) -> torch.Tensor:
        """Hidden states [rows, hidden] of single tokens.

        Args:
            inputs: of the step, without chunks.
            key: what the captured work depends on beside the size. With another first part all
                graphs are captured anew: the memory that they read is gone.
        """
        if key[0] != self._generation:
            self.forget()
            self._generation = key[0]
        place = (inputs.embeds.shape[1], key[1])
        captured = self._captured.get(place)
        if captured is None and not self._is_refused:
            captured = self._try_capture(place, inputs)
        if captured is None:
            return self._run(inputs)
        _copy(captured.inputs, inputs)
        captured.graph.replay()
        return captured.hidden

    def lacks(self, n_rows: int, *, key: tuple[Hashable, Hashable]) -> bool:
        """Whether the first step of so many rows, with a key as `run` takes it, would wait."""
        is_there = key[0] == self._generation and (n_rows, key[1]) in self._captured
        return not self._is_refused and not is_there

    def forget(self) -> None:
        """Let all graphs go. Their pool of memory dies with the last one: the next is another."""
        self._captured.clear()
        self._pool = None

    def _try_capture(self, place: tuple[int, Hashable], inputs: StepInputs) -> _Captured | None:
        try:
            captured = self._captured[place] = self._capture(self._widen(inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if _NO_MEMORY in str(error):
                # A library asks the device itself, and finds that torch keeps all that is free.
                free = torch.cuda.mem_get_info()[0]
                kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
                log.warning("step_not_captured: %d bytes free, %d kept for later", free, kept)
                torch.cuda.empty_cache()
                return None
            # Slower, and just as right; this model or this driver will not do otherwise later.
            log.exception("step_not_captured")
            self._is_refused = True
            return None
        return captured

    def _widen(self, inputs: StepInputs) -> StepInputs:
        """Buffers of the graph's own, with room for the longest answer's pages."""
        if inputs.decode is None:
            raise ValueError("a step of single tokens has rows to decode")
        pages = inputs.decode.pages.new_zeros((len(inputs.decode.pages), self._n_pages))
        return replace(
            inputs,
            embeds=inputs.embeds.clone(),
            positions=inputs.positions.clone(),
            places=inputs.places.clone(),
            owners=inputs.owners.clone(),
            decode=DecodeRows(pages=pages, lengths=torch.ones_like(inputs.decode.lengths)),
        )

    def _capture(self, inputs: StepInputs) -> _Captured:
        # Warming up writes where the step will write anyway, and reads page 0 only.
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._run(inputs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads load deltas meanwhile; their calls are not part of this.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = self._run(inputs)
        self._pool = graph.pool()
        return _Captured(graph, inputs, hidden)


def _copy(to: StepInputs, inputs: StepInputs) -> None:
    if to.decode is None or inputs.decode is None:
        raise ValueError("a step of single tokens has rows to decode")
    to.embeds.copy_(inputs.embeds)
    to.positions.copy_(inputs.positions)
    to.places.copy_(inputs.places)
    to.owners.copy_(inputs.owners)
    to.decode.lengths.copy_(inputs.decode.lengths)
    to.decode.pages[:, : inputs.decode.pages.shape[1]].copy_(inputs.decode.pages)
