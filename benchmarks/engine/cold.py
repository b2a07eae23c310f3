"""From the files of a delta to its first token."""

import os
import time
from pathlib import Path
from typing import Any

from benchmarks.engine.large import Large
from benchmarks.engine.loop import Loop, endless
from workers.engine.model import load_shared


def drop_from_cache(folder: Path) -> None:
    """Let the next read of these files come from the disk."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_cold(large: Large, loop: Loop, *, from_disk: bool) -> dict[str, float]:
    """Load the delta into a free slot and answer; the slot is free again afterwards."""
    if from_disk:
        drop_from_cache(large.delta)
    started = time.perf_counter()
    model = load_shared(large.model, large.base, large.delta, factor_bytes=0)
    loaded = time.perf_counter()
    if model is None:
        raise RuntimeError("the delta is not shared")
    heard = loop.answer([(endless(model, model.slot), range(1, 17))], 1)[0]
    large.executor.evict(model.slot)
    return {"load_s": loaded - started, "first_token_s": heard.times[0] - started}


def time_colds(large: Large, loop: Loop) -> dict[str, Any]:
    """The first load makes the arena and compiles kernels; it is told apart."""
    first = time_cold(large, loop, from_disk=False)
    return {
        "first_of_the_process": first,
        "page_cache": [time_cold(large, loop, from_disk=False) for _ in range(3)],
        "disk": [time_cold(large, loop, from_disk=True) for _ in range(3)],
    }
