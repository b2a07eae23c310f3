"""The tokens that a step chose, and the step after it, which can begin before they are read."""

from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

import numpy as np
import torch

from kernels.streams import send
from workers.engine.executor import Executor
from workers.engine.generate import Sequence
from workers.engine.sampling import choose_tokens

if TYPE_CHECKING:
    # It has the answers whose steps these are.
    from workers.engine.lanes import Due


class Chosen:
    """The next token of each of some answers, on its way from the device."""

    def __init__(self, sequences: list[Sequence], logits: torch.Tensor, ids: torch.Tensor) -> None:
        """Begin to copy them.

        Args:
            sequences: the answers.
            logits: f32 [answers, vocabulary] that they were chosen from.
            ids: int64 [answers] on the device of the logits.
        """
        self.sequences = sequences
        self.logits = logits
        self.ids = ids
        self._host = ids
        self._copied: torch.cuda.Event | None = None
        if ids.device.type == "cuda":
            self._host = torch.empty(len(ids), dtype=ids.dtype, pin_memory=True)
            self._host.copy_(ids, non_blocking=True)
            self._copied = torch.cuda.current_stream(ids.device).record_event()

    def read(self) -> list[int]:
        """Wait for them, and not for what the device was given to do since."""
        if self._copied is not None:
            self._copied.synchronize()
        found: list[int] = self._host.tolist()
        return found


def choose_next(work: Many["Due"], logits: torch.Tensor) -> Chosen | None:
    """Hand each answer its rows, and choose the tokens of those that are due.

    Args:
        work: of the step.
        logits: f32 [sum of rows, vocabulary].

    Returns:
        None when none is due: all were pieces of prompts.
    """
    due: list[tuple[Sequence, int]] = []
    row = 0
    for item in work:
        own = logits[row : row + item.rows]
        row += item.rows
        if item.sequence.advance(own, item.count):
            due.append((item.sequence, row - 1))
    if not due:
        return None
    sequences, rows = [sequence for sequence, _ in due], [at for _, at in due]
    # Mostly the rows are all there are, in their order.
    if rows != list(range(len(logits))):
        logits = logits[send(np.array(rows), logits.device)]
    return Chosen(sequences, logits, choose_tokens(logits, [one.draw for one in sequences]))


def step_ahead(executor: Executor, work: Many["Due"], places: Many[int], chosen: Chosen) -> Chosen:
    """Run the step of single tokens that are chosen, but not read.

    Args:
        executor: of the answers; it takes tokens from the device.
        work: one token of each answer that goes on.
        places: where its token is among those chosen.
        chosen: by the step before.

    Returns:
        What this step chose.
    """
    tokens = chosen.ids
    if len(places) < len(tokens):
        tokens = tokens[send(np.array(places), tokens.device)]
    logits = executor.forward(work, tokens)
    sequences = [item.sequence for item in work]
    ids = choose_tokens(logits, [one.draw for one in sequences])
    for sequence in sequences:
        sequence.go_on_unseen()
    return Chosen(sequences, logits, ids)
