"""The parts of the benchmark on a large model, in their order."""

import gc
import threading
from collections.abc import Callable
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.cold import time_colds
from benchmarks.engine.decode import spread, time_decode, time_flatness, time_layers, time_prompt
from benchmarks.engine.large import Large, Size, fill, open_large, write_files
from benchmarks.engine.library import put_delta_in_library, time_library
from benchmarks.engine.loop import Loop, draw_prompts, endless
from benchmarks.engine.rivals import count_dense_copies, serve_by_swapping, time_adapters
from benchmarks.engine.timing import used_bytes
from benchmarks.engine.trace import Request, draw_trace, serve
from deltacome_core.manifest import read_manifest
from deltacome_core.memory import forecast
from workers.engine.model import load_shared
from workers.engine.rooms import BUCKETS

BUDGET_BYTES = 80e9
# Share of the measured throughput that the trace asks for.
_LOAD = 0.5
_MEAN_ANSWER = 64
_STOP_S = 5
Part = tuple[str, int, Callable[[], Any]]


class Session:
    """One backbone, its tenants and a loop; each part leaves them as the next one wants them."""

    def __init__(self, size: Size, device: str, scratch: Path) -> None:
        self._size = size
        self._device = device
        self._scratch = scratch
        self._large: Large | None = None
        self._loop: Loop | None = None
        self._decoded: dict[int, float] = {}

    @property
    def large(self) -> Large:
        if self._large is None:
            raise RuntimeError("the setup did not end")
        return self._large

    @property
    def loop(self) -> Loop:
        if self._loop is None:
            self._loop = Loop()
        return self._loop

    def close(self) -> None:
        self.renew_loop()

    def renew_loop(self) -> None:
        """Go on with another scheduler; the old one fails what it still has when it can."""
        if self._loop is not None:
            stopping = threading.Thread(target=self._loop.scheduler.stop, daemon=True)
            stopping.start()
            # A step ends in milliseconds, unless it never does.
            stopping.join(_STOP_S)
        self._loop = None

    def parts(self) -> list[Part]:
        few, batch = min(8, self._size.n_tenants), self._size.batch
        return [
            ("cold", 160, lambda: time_colds(self.large, self.loop)),
            ("fill", 40, self.fill),
            *[
                (f"decode_{n}", 60, lambda n=n: self.decode(n))
                for n in dict.fromkeys((min(batch, self._size.n_tenants), 1))
            ],
            ("all_tenants", 60, self.ask_everyone),
            ("flatness", 80, lambda: time_flatness(self.large, self.loop, self.tenants, few)),
            ("decode_0", 40, lambda: time_decode(self.large, self.loop, spread(0, batch))),
            ("prompt", 40, self.time_prompts),
            ("trace", 80, self.serve_trace),
            (f"decode_{few}", 60, lambda: self.decode(few)),
            ("dense_copies", 40, self.copy_dense),
            ("library", 60, lambda: self.time_library(with_delta=False)),
            ("adapters", 60, lambda: time_adapters(self.large, self.loop, few)),
            ("swapping", 50, self.swap),
            ("library_delta", 100, lambda: self.time_library(with_delta=True)),
        ]

    @property
    def tenants(self) -> list[int]:
        return list(range(self.large.slots.n_slots))

    def set_up(self) -> dict[str, Any]:
        self._large, check = open_large(self._scratch, self._size, self._device)
        return {"delta_file_bytes": write_files(self.large), "check_of_the_shared_model": check}

    def fill(self) -> dict[str, Any]:
        """All tenants resident, and what that was to take by the files alone."""
        model = load_shared(self.large.model, self.large.base, self.large.delta, factor_bytes=0)
        if model is None:
            raise RuntimeError("the delta is not shared")
        seconds = fill(self.large, model.slot)
        arena = self.large.slots._arena  # noqa: SLF001
        return {
            "tenants": arena.n_slots,
            "slab_bytes": arena.spec.slab_bytes,
            "bytes_each": self.large.executor.size_bytes(model.slot),
            "copy_s": seconds,
        }

    def decode(self, n_tenants: int) -> dict[str, Any]:
        slots = spread(n_tenants, self._size.batch)
        found = time_decode(self.large, self.loop, slots)
        self._decoded[n_tenants] = found["tokens_per_s"]
        return found | {"layers_ms": time_layers(self.large, slots)}

    def ask_everyone(self) -> dict[str, Any]:
        """An answer of every tenant in the same steps, and the peak of memory so far."""
        found = time_decode(self.large, self.loop, self.tenants, repeats=1)
        manifest = read_manifest(self.large.delta)
        stored = sum(manifest.files[name].size_bytes for name in manifest.data_files)
        expected = forecast(
            [stored],
            backbone_bytes=self.large.model.size_bytes,
            n_deltas=len(self.tenants),
            kv_bytes=self._size.kv_bytes,
        )
        memory = {"forecast": expected.to_json(), "device_used_bytes": used_bytes(self._device)}
        if self._device == "cuda":
            memory["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            memory["reserved_bytes"] = torch.cuda.memory_reserved()
        return found | {"tenants": len(self.tenants), "memory": memory}

    def time_prompts(self) -> dict[str, float]:
        return {
            "backbone_s": time_prompt(self.large, self.loop, -1),
            "delta_s": time_prompt(self.large, self.loop, 0),
        }

    def draw_trace(self) -> list[Request]:
        rate = _LOAD * self._decoded[min(self._size.batch, self._size.n_tenants)] / _MEAN_ANSWER
        return draw_trace(
            rate_per_s=max(rate, 2.0),
            seconds=self._size.trace_s,
            n_tenants=len(self.tenants),
            vocabulary=self._size.vocabulary,
        )

    def serve_trace(self) -> dict[str, Any]:
        warm_up(self.large, self.loop, [size for size in BUCKETS if size <= len(self.tenants)])
        trace = self.draw_trace()
        asked = len(trace) / self._size.trace_s
        return serve(self.large, self.loop, trace) | {"requests_per_s_asked": asked}

    def let_deltas_go(self) -> None:
        """Give the memory of all deltas back to the device."""
        executor: Any = self.large.executor
        slots = executor.slots
        for slot in list(slots._arena.resident_slots if slots._arena else ()):  # noqa: SLF001
            executor.evict(slot)
        slots._arena = slots._unfolder = None  # noqa: SLF001
        slots._plans.clear()  # noqa: SLF001
        if executor._graphs is not None:  # noqa: SLF001
            executor._graphs.forget()  # noqa: SLF001
        for rows in executor.vocabulary._kinds:  # noqa: SLF001
            rows._table = None  # noqa: SLF001
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def copy_dense(self) -> dict[str, Any]:
        self._trace = self.draw_trace()
        self.let_deltas_go()
        return count_dense_copies(self.large, self.loop, budget_bytes=BUDGET_BYTES)

    def swap(self) -> dict[str, Any]:
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()
        warm_up(self.large, self.loop, [1, 2, 4, 8], slots=[-1])
        return serve_by_swapping(self.large, self.loop, self._trace, limit_s=30)

    def time_library(self, *, with_delta: bool) -> dict[str, Any]:
        """The library's loop on the same batch, with all memory for its cache."""
        large, executor = self.large, self.large.executor
        if with_delta:
            large.slots._n_slots = 1  # noqa: SLF001
            model = load_shared(large.model, large.base, large.delta, factor_bytes=0)
            if model is None:
                raise RuntimeError("the delta is not shared")
            put_delta_in_library(large.module, executor, model.slot)
        prompts = draw_prompts(self._size.batch, self._size.vocabulary, self._size.prompt)
        found, _ = time_library(large.module, prompts, self._size.new_tokens, repeats=1)
        return found


def warm_up(large: Large, loop: Loop, sizes: Many[int], *, slots: Many[int] | None = None) -> None:
    """Capture the graphs of steps of these sizes, and compile what they need."""
    slots = slots or list(range(large.slots.n_slots))
    for size in sizes:
        models = [endless(large.model, slots[at % len(slots)]) for at in range(size)]
        prompts = draw_prompts(size, large.size.vocabulary, 17, seed=-size)
        loop.answer(list(zip(models, prompts, strict=True)), 4)
