"""From the files of a delta to its first token, and what reading them takes alone."""

import json
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.large import Large
from benchmarks.engine.loop import Loop, endless
from benchmarks.engine.timeline import watching
from deltacome_core.canary import make_canary
from deltacome_core.container import open_delta
from deltacome_core.held_files import HeldFiles
from deltacome_core.verify import REPORT_NAME
from workers.engine.canary import CanarySequence, prove
from workers.engine.executor import Work
from workers.engine.model import READERS, LoadedModel, load_shared
from workers.engine.paging import pages_for

_PROMPT = tuple(range(1, 17))
_CANARY_PROMPT = tuple(range(1, 33))
_RAW_BLOCK = 8 << 20
_RAW_THREADS = (1, 2, 4, 8)


def drop_from_cache(folder: Path) -> None:
    """Let the next read of these files come from the disk."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_cold(large: Large, loop: Loop, *, from_disk: bool) -> dict[str, Any]:
    """Load the delta into a free slot, prove it and answer; the slot is free again afterwards."""
    if from_disk:
        drop_from_cache(large.delta)
    with watching() as timeline:
        with timeline.span("load"):
            model = load(large)
        with timeline.span("canary"):
            canary = prove(model, large.delta)
        with timeline.span("answer"):
            heard = loop.answer([(endless(model, model.slot), _PROMPT)], 1)[0]
    large.executor.evict(model.slot)
    spans = timeline.to_json()
    return {
        "load_s": spans["load"]["ends_ms"] / 1e3,
        "canary_s": spans["canary"]["ends_ms"] / 1e3,
        "first_token_s": heard.times[0] - timeline.started_s,
        "canary": canary.header,
        "timeline": spans,
    }


def load(large: Large) -> LoadedModel:
    model = load_shared(large.model, large.base, large.delta, factor_bytes=0)
    if model is None:
        raise RuntimeError("the delta is not shared")
    return model


def store_canary(large: Large) -> None:
    """Keep the delta's logits in its folder, as its verification would have."""
    model = load(large)
    rebuilt, backbone = (read_logits(one) for one in (model, large.model))
    large.executor.evict(model.slot)
    canary = make_canary([_CANARY_PROMPT], [rebuilt], [backbone])
    (large.delta / REPORT_NAME).write_text(json.dumps({"canary": asdict(canary)}))


def read_logits(model: LoadedModel) -> torch.Tensor:
    """Logits after the canary's prompt, f64 [vocabulary]."""
    sequence = CanarySequence(model, _CANARY_PROMPT)
    pages = model.executor.pages
    sequence.pages = pages.take(pages_for(len(_CANARY_PROMPT))) or []
    work = Work(sequence=sequence, start=0, count=len(_CANARY_PROMPT), rows=1)
    logits = model.executor.forward([work])[0].double().cpu()
    pages.give_back(sequence.pages)
    return logits


def time_files(large: Large) -> dict[str, float]:
    """The engine's own reading of the files from the disk with nothing beside, and hashing."""
    drop_from_cache(large.delta)
    folder = open_delta(large.delta, verify_digests=False).folder
    started = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        held = HeldFiles(folder, pool, pin=large.device == "cuda")
    read = time.perf_counter()
    held.check()
    return {"read_s": read - started, "hash_s": time.perf_counter() - read}


def time_raw(large: Large) -> dict[str, dict[str, float]]:
    """What no load can be faster than: the data files into memory that is there already."""
    files = sorted(large.delta.glob("*.safetensors"))
    with mmap.mmap(-1, max(file.stat().st_size for file in files)) as memory:
        # Pages are given when they are first written.
        memory.write(bytes(len(memory)))
        found = {}
        for n_threads in _RAW_THREADS:

            def read(n_threads: int = n_threads) -> None:
                for file in files:
                    read_raw(file, memory, n_threads)

            drop_from_cache(large.delta)
            from_disk_s = clock(read)
            found[str(n_threads)] = {"disk_s": from_disk_s, "page_cache_s": clock(read)}
    return found


def read_raw(file: Path, memory: mmap.mmap, n_threads: int) -> None:
    with (
        file.open("rb", buffering=0) as opened,
        memoryview(memory) as view,
        ThreadPoolExecutor(n_threads) as pool,
    ):
        handle, size = opened.fileno(), file.stat().st_size

        def read(start: int) -> None:
            end = min(start + _RAW_BLOCK, size)
            while start < end:
                n_read = os.preadv(handle, [view[start:end]], start)
                if not n_read:
                    raise RuntimeError(f"{file.name} has become shorter")
                start += n_read

        list(pool.map(read, range(0, size, _RAW_BLOCK)))


def clock(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def time_colds(large: Large, loop: Loop) -> dict[str, Any]:
    """The first load makes the arena and compiles kernels; it is told apart.

    Graphs of all sizes of steps are captured before the second one, as an engine does in quiet.
    """
    first = time_cold(large, loop, from_disk=False)
    model = load(large)
    loop.answer([(endless(model, model.slot), _PROMPT)], 1)
    prepare_s = clock(loop.settle)
    large.executor.evict(model.slot)
    store_canary(large)
    return {
        "first_of_the_process": first,
        "prepare_steps_s": prepare_s,
        "page_cache": [time_cold(large, loop, from_disk=False) for _ in range(3)],
        "disk": [time_cold(large, loop, from_disk=True) for _ in range(3)],
        "files_alone": [time_files(large) for _ in range(3)],
        "raw_by_threads": [time_raw(large) for _ in range(2)],
    }
