"""Reading, device work and writing at the same time, on one device or several."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from queue import PriorityQueue
from typing import Any, TypeVar

import torch

_Job = TypeVar("_Job")
_Item = TypeVar("_Item")
_Loaded = TypeVar("_Loaded")

# Does a job's work on a device; what it returns stores the result and needs no device.
Prepare = Callable[[_Job, torch.device], Callable[[], None]]


def read_ahead(
    items: Iterable[_Item], load: Callable[[_Item], _Loaded], *, depth: int = 1
) -> Iterator[_Loaded]:
    """Load items in another thread while the caller works on those before.

    Args:
        items: what to load, in order.
        load: loads one.
        depth: how many may be loaded or loading beyond the one that the caller has.

    Yields:
        What load returned, in order; it raises here what load raised.
    """
    waiting: deque[Future[_Loaded]] = deque()
    with ThreadPoolExecutor(1) as reader:
        try:
            for item in items:
                waiting.append(reader.submit(load, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class _Lane:
    """A device at work on a job while the result of its job before is being stored."""

    def __init__(self, device: torch.device, writer: ThreadPoolExecutor) -> None:
        self.device = device
        self.turn = threading.Lock()
        self._writer = writer
        self._stored: Future[None] | None = None

    def run(self, job: _Job, prepare: Prepare[_Job]) -> None:
        with self.turn:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            store = prepare(job, self.device)
        self.settle()
        self._stored = self._writer.submit(store)

    def settle(self) -> None:
        """Wait until the last result is stored; raises what storing it raised."""
        if self._stored is not None:
            self._stored.result()


def run_jobs(
    jobs: Iterator[_Job],
    prepare: Prepare[_Job],
    *,
    devices: Sequence[torch.device],
    made_on_first: bool,
) -> None:
    """Do independent jobs, each on whichever device is free.

    Results are stored one at a time, by a thread of their own.

    Args:
        jobs: made in the calling thread, one ahead of the devices at most.
        prepare: the work of a job on a device.
        devices: one or more; on one, jobs are done in order in the calling thread.
        made_on_first: making the jobs needs the first device. It then works either on a job or on
            making the next one, so that its memory holds one of them; the others are served first.

    Raises:
        Exception: the first that a job, or storing it, raised; jobs not begun are left.
    """
    with ThreadPoolExecutor(1) as writer:
        lanes = [_Lane(device, writer) for device in devices]
        if len(lanes) == 1:
            for job in jobs:
                # Blocks left from making the job fit nothing of its work, and would add to it.
                torch.cuda.empty_cache()
                lanes[0].run(job, prepare)
                # Not to be held while the next one is made.
                del job
        else:
            _spread(jobs, prepare, lanes, lanes[0].turn if made_on_first else nullcontext())
        for lane in lanes:
            lane.settle()


def _spread(
    jobs: Iterator[_Job],
    prepare: Prepare[_Job],
    lanes: Sequence[_Lane],
    making: AbstractContextManager[Any],
) -> None:
    # The smallest entry is taken first: the lane of the last device.
    free: PriorityQueue[int] = PriorityQueue()
    for index in range(len(lanes)):
        free.put(-index)
    running: list[Future[None]] = []

    def run(index: int, job: _Job) -> None:
        try:
            lanes[index].run(job, prepare)
        finally:
            free.put(-index)

    with ThreadPoolExecutor(len(lanes)) as pool:
        while True:
            with making:
                job = next(jobs, None)
            index = -free.get()
            if job is None or any(future.done() and future.exception() for future in running):
                break
            running.append(pool.submit(run, index, job))
            del job
    for future in running:
        future.result()
