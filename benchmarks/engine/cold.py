"""From the files of a delta to its first token."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.engine.large import Large
from benchmarks.engine.loop import Loop, endless
from deltacome_core.container import open_delta
from deltacome_core.held_files import HeldFiles
from workers.engine.model import READERS, load_shared


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


def time_files(large: Large) -> dict[str, float]:
    """What no load can be faster than: the files read from the disk, and then hashed."""
    drop_from_cache(large.delta)
    folder = open_delta(large.delta, verify_digests=False).folder
    started = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        held = HeldFiles(folder, pool, pin=large.device == "cuda")
    read = time.perf_counter()
    held.check()
    return {"read_s": read - started, "hash_s": time.perf_counter() - read}


def time_colds(large: Large, loop: Loop) -> dict[str, Any]:
    """The first load makes the arena and compiles kernels; it is told apart."""
    first = time_cold(large, loop, from_disk=False)
    return {
        "first_of_the_process": first,
        "page_cache": [time_cold(large, loop, from_disk=False) for _ in range(3)],
        "disk": [time_cold(large, loop, from_disk=True) for _ in range(3)],
        "files_alone": [time_files(large) for _ in range(3)],
    }
