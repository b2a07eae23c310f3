"""Who is in this step: the tokens of a batch, grouped by the delta they use."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch

from deltacome_core.errors import InternalError
from kernels.arena import DeltaArena
from kernels.fragments import (
    PLANES,
    PRECISIONS,
    STEP_COLUMNS,
    STEP_ROWS,
    UNIT_COLUMNS,
    count_unit_tokens,
)
from kernels.streams import send


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Tokens by slot: slot, count and tokens of each group, -1 where there is none."""

    slots: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]


def count_groups(n_tokens: int, *, units_per_group: int, planes: int = PLANES) -> int:
    """Groups that hold so many tokens of one slot."""
    return -(-n_tokens // (units_per_group * count_unit_tokens(planes)))


def group_tokens(slots: Sequence[int], *, group_size: int, n_groups: int | None = None) -> Groups:
    """Put the tokens of one slot together, up to `group_size` in a group.

    Args:
        slots: slot of each token, -1 for the backbone.
        group_size: most tokens that one group holds.
        n_groups: how many groups there are; None is as many as tokens.

    Returns:
        The groups, those that are needed first, in rising order of slots.

    Raises:
        InternalError: more groups are needed.
    """
    n_groups = len(slots) if n_groups is None else n_groups
    groups = Groups(
        slots=np.full(n_groups, -1, dtype=np.int32),
        counts=np.zeros(n_groups, dtype=np.int32),
        tokens=np.full((n_groups, group_size), -1, dtype=np.int32),
    )
    known = np.asarray(slots, dtype=np.int64)
    order = np.argsort(known, kind="stable")
    tokens = order[known[order] >= 0]
    if not len(tokens):
        return groups
    own = known[tokens]
    is_first = np.concatenate(([True], own[1:] != own[:-1]))
    firsts = np.flatnonzero(is_first)
    lanes = (np.arange(len(tokens)) - firsts[np.cumsum(is_first) - 1]) % group_size
    numbers = np.cumsum(lanes == 0) - 1
    n_used = int(numbers[-1]) + 1
    if n_used > n_groups:
        raise InternalError(f"{n_used} groups of tokens where {n_groups} have room")
    groups.slots[:n_used] = own[lanes == 0]
    groups.counts[:n_used] = np.bincount(numbers)
    groups.tokens[numbers, lanes] = tokens
    return groups


# An operator of torch takes no objects of ours: it names a plan by its handle.
PLANS: "WeakValueDictionary[int, StepPlan]" = WeakValueDictionary()
_HANDLES = count()


class StepPlan:
    """The groups of one step on the device, and room for what its kernels hand to each other.

    All layers of a step share it; `assign` fills it for the next step in place, so that a captured
    graph sees the new tokens. units_per_group: a unit is two tokens, or four of two planes; more of
    them let the tokens of a busy tenant read its codes once. planes: int8 planes that x and the
    hidden values are cut into, four (exact) or two (fast).
    """

    def __init__(
        self,
        arena: DeltaArena,
        *,
        n_tokens: int = 0,
        units_per_group: int = 1,
        planes: int = PLANES,
        n_groups: int = 0,
    ) -> None:
        if planes not in PRECISIONS.values() or units_per_group < 1:
            raise InternalError(f"{planes} planes, {units_per_group} units a group")
        self.handle = next(_HANDLES)
        PLANS[self.handle] = self
        self.arena = arena
        self.n_tokens = n_tokens
        self.units_per_group = units_per_group
        self.planes = planes
        self.n_groups = n_tokens or n_groups
        self.group_size = units_per_group * count_unit_tokens(planes)
        n_units = self.n_groups * units_per_group
        n_places = self.n_groups * self.group_size
        device = arena.device
        # Side by side, so that a step is one copy; each where a kernel may take 16 bytes at once.
        self._width = -(-self.n_groups // 4) * 4
        self._groups = torch.full(
            (2 * self._width + n_places,), -1, dtype=torch.int32, device=device
        )
        self.group_slots = self._groups[: self.n_groups]
        self.group_counts = self._groups[self._width : self._width + self.n_groups].zero_()
        self.group_tokens = self._groups[2 * self._width :]
        self.token_slots: list[int] = [-1] * n_tokens
        sites = range(len(arena.spec.sites))
        steps = max(site.input_steps for site in arena.spec.sites)
        hidden = max(1, *(arena.spec.hidden_steps(site) for site in sites))
        width = UNIT_COLUMNS * STEP_COLUMNS
        self.x_planes = torch.empty((n_units, steps * width), dtype=torch.int8, device=device)
        self.h_planes = torch.empty((n_units, hidden * width), dtype=torch.int8, device=device)
        # Delta and backbone's product of a lone token, and who of them has been to which rows.
        widest = max(site.total_out for site in arena.spec.sites)
        self.terms = torch.empty(widest if n_tokens == 1 else 0, device=device)
        self.products = torch.empty_like(self.terms)
        n_blocks = -(-widest // STEP_ROWS)
        self.arrivals = torch.zeros((1, n_blocks), dtype=torch.int32, device=device)
        self.x_step = torch.empty(n_places, device=device)
        self.x_norm = torch.empty(n_places, device=device)

    def assign(self, slots: Sequence[int]) -> None:
        """Say which delta each token of the next step uses.

        Args:
            slots: one a token, -1 for the backbone.

        Raises:
            UserError: arena_slot_unknown.
            InternalError: not as many as the plan has tokens, or more groups than it has room for.
        """
        if self.n_tokens and len(slots) != self.n_tokens:
            raise InternalError(f"{len(slots)} slots for {self.n_tokens} tokens")
        self.arena.check_slots(slots)
        groups = group_tokens(slots, group_size=self.group_size, n_groups=self.n_groups)
        self.token_slots = list(slots)
        numbers = np.zeros(len(self._groups), dtype=np.int32)
        numbers[: self.n_groups] = groups.slots
        numbers[self._width : self._width + self.n_groups] = groups.counts
        numbers[2 * self._width :] = groups.tokens.ravel()
        self._groups.copy_(send(numbers, self._groups.device))
