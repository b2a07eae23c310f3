"""Sequences run by a scheduler without HTTP, for tests of what is inside the engine."""

import time

from workers.engine.generate import Failure, Finish, Piece, Sampling, Sequence
from workers.engine.scheduler import Limits, Scheduler

PROMPT = (40, 41, 42)


class Heard:
    """What one sequence sent."""

    def __init__(self):
        self.events = []

    @property
    def pieces(self):
        return [event for event in self.events if isinstance(event, Piece)]

    @property
    def ids(self):
        return [piece.token_id for piece in self.pieces]

    @property
    def ended(self):
        return bool(self.events) and isinstance(self.events[-1], (Finish, Failure))

    @property
    def end(self):
        assert self.ended
        return self.events[-1]


def make_sequence(
    model, heard, *, prompt=PROMPT, max_tokens=12, tenant=None, echo=False, **sampling
):
    return Sequence(
        model,
        tuple(prompt),
        sampling=Sampling(**{"temperature": 0.0} | sampling),
        max_tokens=max_tokens,
        score_prompt=echo,
        emit=heard.events.append,
        tenant=tenant,
    )


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def answer(models, *, limits=None, **options):
    """Run one sequence of each model in the same scheduler to the end; return what was heard."""
    scheduler = Scheduler(limits or Limits())
    heard = [Heard() for _ in models]
    scheduler.submit(
        [make_sequence(model, one, **options) for model, one in zip(models, heard, strict=True)]
    )
    scheduler.start()
    try:
        wait_for(lambda: scheduler.running == 0)
    finally:
        scheduler.stop()
    return heard
