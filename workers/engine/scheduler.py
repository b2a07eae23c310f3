"""One thread computes: each step holds tokens of many answers, shared out among their tenants."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch

from workers.engine.errors import ApiError, stopping, too_many
from workers.engine.fairness import DeficitRoundRobin
from workers.engine.generate import Sequence
from workers.engine.lanes import Due, Lane, Limits
from workers.engine.metrics import EngineMetrics
from workers.engine.paging import PAGE_TOKENS, pages_for
from workers.engine.quiet import QuietWork
from workers.engine.steps import Chosen, choose_next, step_ahead

__all__ = ["Limits", "Scheduler"]

log = logging.getLogger(__name__)

_IDLE_S = 0.02
# Without anything to do for so long, a step is prepared that may come later.
_QUIET_S = 0.05
_MIN_RETRY_S, _MAX_RETRY_S = 1, 60


class Scheduler:
    """Continuous batching: answers join and leave between steps."""

    def __init__(self, limits: Limits, metrics: EngineMetrics | None = None) -> None:
        self._limits = limits
        self._metrics = metrics or EngineMetrics()
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[Sequence]] = {}
        self._lanes: dict[int, Lane] = {}
        self._admit_turns = DeficitRoundRobin(quantum=1)
        self._closing = False
        self._draining = False
        self._quiet = QuietWork()
        self._thread = threading.Thread(target=self._run, name="engine-compute", daemon=True)
        # Deliveries of the step before, done while the device works on the next one.
        self._undelivered: list[tuple[Sequence, Callable[[], None]]] = []

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End at once; what still runs is told that the engine stops."""
        with self._changed:
            self._closing = self._draining = True
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            for sequence in self._everyone():
                sequence.fail(stopping())
            self._waiting = {}
            self._collect_finished()

    def drain(self, timeout_s: float) -> bool:
        """Take nothing new and wait for what there is.

        Returns:
            Whether everything was answered in time.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._draining = True
            while self._count() and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return not self._count()

    def stop_admitting(self) -> None:
        with self._changed:
            self._draining = True

    @property
    def is_draining(self) -> bool:
        return self._draining

    @property
    def is_prepared(self) -> bool:
        """Whether nothing runs, and nothing is left to prepare for what may come."""
        with self._changed:
            return not self._count() and not self._quiet

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Answers in the making, waiting ones included."""
        with self._changed:
            return self._count()

    @property
    def waiting(self) -> int:
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def submit(self, sequences: list[Sequence]) -> None:
        """Take all of them or none: a request of several prompts is one request.

        Raises:
            ApiError: 503 while draining; 429 when the queue or the tenant's part of it is full;
                400 for an answer that the cache can never hold.
        """
        for sequence in sequences:
            self._check_size(sequence)
        with self._changed:
            if self._draining:
                raise stopping()
            self._check_queue(sequences)
            for sequence in sequences:
                self._waiting.setdefault(sequence.tenant, deque()).append(sequence)
            self._changed.notify_all()

    def _check_size(self, sequence: Sequence) -> None:
        capacity = sequence.model.executor.pages.capacity
        if pages_for(sequence.max_length) > capacity:
            raise ApiError(
                400,
                "context_length_exceeded",
                f"Prompt and answer may reach {sequence.max_length} tokens; the engine's memory"
                f" for one answer holds {capacity * PAGE_TOKENS}.",
            )

    def _check_queue(self, sequences: list[Sequence]) -> None:
        waiting = sum(map(len, self._waiting.values()))
        own = len(self._waiting.get(sequences[0].tenant, ())) if sequences else 0
        # A request larger than the queue is still taken when nothing is before it.
        if own and own + len(sequences) > self._limits.max_waiting_tenant:
            self._metrics.refused.add(1, reason="tenant")
            raise too_many(
                "Too many requests for this model are waiting already; try again in a moment.",
                code="model_busy",
                retry_after_s=self._retry_after_s(own),
            )
        if waiting and waiting + len(sequences) > self._limits.max_waiting:
            self._metrics.refused.add(1, reason="queue")
            raise too_many(
                "Every place of the engine is taken; try again in a moment.",
                code="engine_busy",
                retry_after_s=self._retry_after_s(waiting),
            )

    def _retry_after_s(self, waiting: int) -> int:
        """Time until that many have had their turn, by how long the last ones took."""
        each_s = self._metrics.answer_seconds.mean / max(1, self._limits.max_sequences)
        return min(_MAX_RETRY_S, max(_MIN_RETRY_S, round(waiting * each_s)))

    def _count(self) -> int:
        lanes = sum(len(lane.running) for lane in self._lanes.values())
        return lanes + sum(map(len, self._waiting.values()))

    def _everyone(self) -> Iterator[Sequence]:
        for lane in self._lanes.values():
            yield from lane.running
        for queue in self._waiting.values():
            yield from queue

    def _run(self) -> None:
        while True:
            if self._is_quiet():
                self._quiet.do_one()
                continue
            with self._changed:
                if self._closing:
                    return
                self._drop_cancelled()
                if not any(lane.chosen for lane in self._lanes.values()):
                    self._admit()
                lanes = [lane for lane in self._lanes.values() if lane.running]
                if not lanes and not self._undelivered:
                    # Nothing can move until somebody cancels or a model's pages come free.
                    self._changed.wait(_IDLE_S)
            if not lanes:
                self._deliver()
            for lane in lanes:
                self._step(lane)
            with self._changed:
                self._collect_finished()
                self._update_gauges()
                self._changed.notify_all()

    def _is_quiet(self) -> bool:
        """Wait for something to do; True when there is none, and time to prepare a step."""
        with self._changed:
            while not (self._count() or self._undelivered or self._closing):
                self._changed.notify_all()
                may_prepare = bool(self._quiet) and not self._draining
                if not self._changed.wait(_QUIET_S if may_prepare else None):
                    return True
        return False

    def _drop_cancelled(self) -> None:
        for queue in self._waiting.values():
            for sequence in [item for item in queue if item.cancelled]:
                queue.remove(sequence)
        for lane in self._lanes.values():
            for sequence in lane.running:
                # One that is still being told its last tokens is let go by its delivery.
                sequence.finished |= sequence.cancelled
        self._collect_finished()

    def _collect_finished(self) -> None:
        for lane in self._lanes.values():
            for sequence in [item for item in lane.running if item.finished]:
                lane.remove(sequence)
                elapsed_s = time.monotonic() - sequence.submitted_s
                self._metrics.answer_seconds.observe(elapsed_s)
        self._waiting = {name: queue for name, queue in self._waiting.items() if queue}
        self._lanes = {key: lane for key, lane in self._lanes.items() if lane.running}

    def _admit(self) -> None:
        """Let waiting answers into the cache, tenants in turn, as far as pages and places reach."""
        while self._waiting:
            room = self._has_place()
            ready = [
                name
                for name, queue in self._waiting.items()
                if room and self._lane(queue[0]).missing_pages(queue[0]) <= 0
            ]
            turn = self._admit_turns.pick({name: [1] for name in ready}, budget=1)
            name = turn[0] if turn else self._make_way()
            if name is None:
                return
            queue = self._waiting[name]
            sequence = queue.popleft()
            if not queue:
                del self._waiting[name]
            self._lane(sequence).running.append(sequence)
            waited_s = time.monotonic() - sequence.submitted_s
            self._metrics.queue_seconds.observe(waited_s, tenant=name)

    def _has_place(self) -> bool:
        running = sum(len(lane.running) for lane in self._lanes.values())
        return running < self._limits.max_running

    def _make_way(self) -> str | None:
        """A tenant with nothing in the cache may push out one that holds more than its share.

        Returns:
            The tenant whose next answer has room now.
        """
        present = {item.tenant for lane in self._lanes.values() for item in lane.running}
        for name in [name for name in self._waiting if name not in present]:
            sequence = self._waiting[name][0]
            lane = self._lane(sequence)
            while lane.missing_pages(sequence) > 0 or not self._has_place():
                victim = lane.find_excess(self._limits)
                if victim is None:
                    break
                self._preempt(lane, victim)
            else:
                return name
        return None

    def _preempt(self, lane: Lane, victim: Sequence) -> None:
        lane.remove(victim)
        self._waiting.setdefault(victim.tenant, deque()).appendleft(victim)
        self._metrics.preemptions.add(1)

    def _push_out(self, lane: Lane, victim: Sequence) -> None:
        with self._changed:
            self._preempt(lane, victim)

    def _lane(self, sequence: Sequence) -> Lane:
        executor = sequence.model.executor
        self._quiet.expect(executor)
        return self._lanes.setdefault(id(executor), Lane(executor))

    def _step(self, lane: Lane) -> None:
        started_s = time.monotonic()
        if lane.chosen is None:
            work = lane.compose(self._limits, lambda victim: self._push_out(lane, victim))
            self._metrics.found_tokens.add(lane.take_found())
            if not work:
                self._deliver()
                return
            self._run_step(lane, work)
        else:
            work = self._go_on(lane, lane.chosen)
        if work:
            self._metrics.observe_step(
                n_sequences=len(work),
                n_tenants=len({item.sequence.tenant for item in work}),
                prefill_tokens=sum(item.count for item in work if item.count > 1),
                seconds=time.monotonic() - started_s,
            )

    def _run_step(self, lane: Lane, work: list[Due]) -> None:
        try:
            logits = lane.executor.forward(work)
        except Exception:
            log.exception("step_failed")
            self._step_alone(lane, work)
        else:
            self._apply(lane, work, logits)

    def _go_on(self, lane: Lane, chosen: Chosen) -> list[Due]:
        """Give the device its next step, if that can be known, and read the last one's tokens.

        An answer that turns out to have ended has one step too many: nothing of it is sent.
        """
        lane.chosen = None
        ahead = None if self._somebody_may_enter() else lane.compose_ahead(chosen)
        work: list[Due] = []
        if ahead is not None:
            work, places = ahead
            try:
                lane.chosen = step_ahead(lane.executor, work, places, chosen)
            except Exception:
                # It is composed again when the tokens are known, and fails again if it must.
                log.exception("step_ahead_failed")
                work = []
        self._read(chosen)
        if lane.chosen is not None:
            self._deliver()
        return work

    def _somebody_may_enter(self) -> bool:
        """Whether a waiting answer should be looked at before the next step."""
        with self._changed:
            present = {item.tenant for lane in self._lanes.values() for item in lane.running}
            return bool(self._waiting) and (
                self._has_place() or bool(self._waiting.keys() - present)
            )

    def _read(self, chosen: Chosen) -> None:
        """Give each answer its token; what is left to do for it waits until `_deliver`."""
        try:
            ids = chosen.read()
        except Exception as error:
            log.exception("step_lost")
            for sequence in chosen.sequences:
                if not sequence.finished:
                    sequence.fail(error)
            return
        n_taken = 0
        for sequence, token, own in zip(chosen.sequences, ids, chosen.logits, strict=True):
            if not sequence.finished:
                self._undelivered.append((sequence, sequence.take(token, own)))
                n_taken += 1
        self._metrics.generated_tokens.add(n_taken)

    def _step_alone(self, lane: Lane, work: list[Due]) -> None:
        """Find whose tokens broke the step: one answer's failure must not end the others."""
        for item in work:
            try:
                logits = lane.executor.forward([item])
            except Exception as error:
                log.exception("sequence_failed")
                item.sequence.fail(error)
            else:
                self._apply(lane, [item], logits, reads_now=True)

    def _apply(
        self, lane: Lane, work: list[Due], logits: torch.Tensor, *, reads_now: bool = False
    ) -> None:
        """Hand each sequence its rows, and choose the tokens of those that are due."""
        chosen = None
        try:
            chosen = choose_next(work, logits)
        except Exception as error:
            # Rows that were not handed out are lost: nobody in this step can go on.
            log.exception("step_lost")
            for item in work:
                if not item.sequence.finished:
                    item.sequence.fail(error)
        # Of the step before: it could wait until the device had something to do.
        self._deliver()
        if chosen is None:
            return
        if lane.executor.is_async and not reads_now:
            lane.chosen = chosen
        else:
            self._read(chosen)
            self._deliver()

    def _deliver(self) -> None:
        undelivered, self._undelivered = self._undelivered, []
        for sequence, deliver in undelivered:
            if sequence.cancelled:
                continue
            try:
                deliver()
            except Exception as error:
                log.exception("delivery_failed")
                sequence.fail(error)

    def _update_gauges(self) -> None:
        self._metrics.running.set(sum(len(lane.running) for lane in self._lanes.values()))
        self._metrics.waiting.set(sum(map(len, self._waiting.values())))
        used = sum(lane.executor.pages.used for lane in self._lanes.values())
        self._metrics.kv_pages_used.set(used)
