"""Who is in this step: the tokens of a batch, in the order of the deltas they use."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch

from deltacome_core.errors import InternalError
from kernels.arena import DeltaArena
from kernels.fragments import (
    PLANES,
    PRECISIONS,
    STEP_ROWS,
    STEP_WORDS,
    ZERO_WORDS,
    words_of_pair,
)
from kernels.streams import send

# Tokens of a slot that can stand together: a power of two.
MOST_TOGETHER: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Tokens that use a delta, those of a slot together: slot and token, -1 where there is none.

    counts, numbers: a slot's tokens stand together in as large powers of two as it has: how many
    do, and which of them each is. A program can multiply the same codes with all of them.
    """

    slots: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    numbers: npt.NDArray[np.int32]


def count_together(
    slots: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The `counts` and `numbers` of places.

    Args:
        slots: of places in rising order.

    Returns:
        As many of each.
    """
    _, first, sizes = np.unique(slots, return_index=True, return_counts=True)
    size = np.repeat(sizes, sizes)
    in_run = np.arange(len(slots)) - np.repeat(first, sizes)
    counts = np.full(len(slots), MOST_TOGETHER)
    while (alone := in_run >= size // counts * counts).any():
        counts[alone] //= 2
    return counts, in_run % counts


def place_tokens(slots: Sequence[int], *, n_places: int | None = None) -> Places:
    """Order the tokens of a batch by slot: a tenant's codes are in the cache for its next token.

    Args:
        slots: slot of each token, -1 for the backbone.
        n_places: how many places there are; None is as many as tokens.

    Returns:
        The places, those that are needed first, in rising order of slots.

    Raises:
        InternalError: more places are needed.
    """
    n_places = len(slots) if n_places is None else n_places
    places = Places(
        slots=np.full(n_places, -1, dtype=np.int32),
        tokens=np.full(n_places, -1, dtype=np.int32),
        counts=np.ones(n_places, dtype=np.int32),
        numbers=np.zeros(n_places, dtype=np.int32),
    )
    known = np.asarray(slots, dtype=np.int64)
    order = np.argsort(known, kind="stable")
    tokens = order[known[order] >= 0]
    if len(tokens) > n_places:
        raise InternalError(f"{len(tokens)} tokens where {n_places} have room")
    places.slots[: len(tokens)] = known[tokens]
    places.tokens[: len(tokens)] = tokens
    places.counts[: len(tokens)], places.numbers[: len(tokens)] = count_together(known[tokens])
    return places


# Programs that share the columns of a token in `prepare`.
MOST_SHARES: Final = 64

# An operator of torch takes no objects of ours: it names a plan by its handle.
PLANS: "WeakValueDictionary[int, StepPlan]" = WeakValueDictionary()
_HANDLES = count()


class StepPlan:
    """The tokens of one step on the device, and room for what its kernels hand to each other.

    All layers of a step share it; `assign` fills it for the next step in place, so that a captured
    graph sees the new tokens. n_places: tokens that there is room for where their number is not
    fixed. planes: bytes of the whole numbers that x and the hidden values become, four (exact) or
    three (fast).
    """

    def __init__(
        self,
        arena: DeltaArena,
        *,
        n_tokens: int = 0,
        planes: int = PLANES,
        n_places: int = 0,
    ) -> None:
        if planes not in PRECISIONS.values():
            raise InternalError(f"{planes} planes")
        self.handle = next(_HANDLES)
        PLANS[self.handle] = self
        self.arena = arena
        self.n_tokens = n_tokens
        self.planes = planes
        self.n_places = n_places = n_tokens or n_places
        device = arena.device
        # Side by side, so that a step is one copy; each where a kernel may take 16 bytes at once.
        self._width = -(-n_places // 4) * 4
        self._places = torch.full((4, self._width), -1, dtype=torch.int32, device=device)
        self.place_slots, self.place_tokens, self.place_counts, self.place_numbers = self._places[
            :, :n_places
        ]
        self.token_slots: list[int] = [-1] * n_tokens
        sites = range(len(arena.spec.sites))
        pairs = max(site.input_pairs for site in arena.spec.sites)
        hidden = max(1, *(arena.spec.hidden_pairs(site) for site in sites))
        width = words_of_pair(planes)
        # Zeros come before them: what kernels read in the place of pairs that do not exist.
        room = ZERO_WORDS + n_places * pairs * width
        planes_room = torch.zeros(room, dtype=torch.int32, device=device)
        self.x_planes = planes_room[ZERO_WORDS:].view(n_places, pairs * width)
        self.h_planes = torch.empty((n_places, hidden * width), dtype=torch.int32, device=device)
        # What they sum up to: in shares of a program of `prepare`, and of 32 hidden values.
        self.x_sums = torch.empty((n_places, MOST_SHARES), dtype=torch.int64, device=device)
        self.h_sums = torch.empty(
            (n_places, hidden * 2 * STEP_WORDS), dtype=torch.int64, device=device
        )
        # Delta and backbone's product of a lone token, who of them has been to which rows, and how
        # many programs have written hidden values.
        widest = max(site.total_out for site in arena.spec.sites)
        self.terms = torch.empty(widest if n_tokens == 1 else 0, device=device)
        self.products = torch.empty_like(self.terms)
        n_blocks = -(-widest // STEP_ROWS)
        self.arrivals = torch.zeros((1, n_blocks + 1), dtype=torch.int32, device=device)
        self.x_step = torch.empty(n_places, device=device)
        self.x_norm = torch.empty(n_places, device=device)

    def assign(self, slots: Sequence[int]) -> None:
        """Say which delta each token of the next step uses.

        Args:
            slots: one a token, -1 for the backbone.

        Raises:
            UserError: arena_slot_unknown.
            InternalError: not as many as the plan has tokens, or more than it has room for.
        """
        if self.n_tokens and len(slots) != self.n_tokens:
            raise InternalError(f"{len(slots)} slots for {self.n_tokens} tokens")
        self.arena.check_slots(slots)
        places = place_tokens(slots, n_places=self.n_places)
        self.token_slots = list(slots)
        numbers = np.full(self._places.shape, -1, dtype=np.int32)
        numbers[:, : self.n_places] = places.slots, places.tokens, places.counts, places.numbers
        self._places.copy_(send(numbers, self._places.device))
