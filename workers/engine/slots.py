"""Matrices of resident deltas in slots, and their terms for the rows of a step, in plain torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional

from deltacome_core.errors import UserError
from deltacome_core.packed import PackedDirect, PackedLinear
from kernels import expand, multiply, shrink
from kernels.image import Site
from workers.engine.parts import TenantParts

# A lock of threads, which has no public class.
Lock = Any


class Slots(Protocol):
    """Where the deltas of one backbone are resident; -1 is the backbone itself."""

    @property
    def n_slots(self) -> int: ...

    def load(self, parts: TenantParts, *, lock: Lock, factor_bytes: int) -> int:
        """Take a delta in; returns its slot. Up to `factor_bytes` may go to plain numbers.

        No step runs while `lock` is held.

        Raises:
            UserError: arena_full, arena_recipe_unknown.
        """
        ...

    def evict(self, slot: int) -> None: ...

    def size_bytes(self, slot: int) -> int: ...

    @property
    def graph_key(self) -> tuple[int, bool]: ...

    @property
    def example_slot(self) -> int | None:
        """A slot whose rows the next steps may be like; -1 while no delta was ever resident."""
        ...

    def begin(self, spans: Sequence["Span"], *, n_rows: int, n_single: int) -> None:
        """Say whose the rows of the next step are; the first `n_single` are single tokens."""
        ...

    def linear(self, x: torch.Tensor, weight: torch.Tensor, site: int) -> torch.Tensor:
        """Products with the backbone's weight plus each row's own delta, [rows, out]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Rows first .. last of a step, all of one slot."""

    first: int
    last: int
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A matrix and, where there was room, its factors as plain numbers."""

    matrix: PackedLinear
    factors: tuple[torch.Tensor, ...] | None

    def term(self, x: torch.Tensor) -> torch.Tensor:
        if self.factors is not None:
            for factor in reversed(self.factors):
                x = x @ factor.T
            return x
        if isinstance(self.matrix, PackedDirect):
            return multiply(x, self.matrix)
        return expand(shrink(x, self.matrix), self.matrix)


class FactorSlots:
    """Slots on a CPU. Factors are kept dequantised while they fit, since codes are slow to read."""

    def __init__(self, sites: Sequence[Site], *, n_slots: int) -> None:
        self._sites = sites
        self._held: list[dict[str, _Held] | None] = [None] * n_slots
        self._spans: Sequence[Span] = ()

    @property
    def n_slots(self) -> int:
        return len(self._held)

    def load(self, parts: TenantParts, *, lock: Lock, factor_bytes: int) -> int:
        del lock
        if None not in self._held:
            raise UserError("arena_full", n_slots=self.n_slots)
        slot = self._held.index(None)
        held: dict[str, _Held] = {}
        left = factor_bytes
        for name, matrix in parts.matrices.items():
            fits = matrix.factors_size_bytes <= left
            left -= matrix.factors_size_bytes if fits else 0
            held[name] = _Held(matrix=matrix, factors=matrix.factors() if fits else None)
        self._held[slot] = held
        return slot

    def evict(self, slot: int) -> None:
        self._held[slot] = None

    def size_bytes(self, slot: int) -> int:
        """Bytes of codes and factors of a resident delta."""
        return sum(
            held.matrix.size_bytes + (0 if held.factors is None else held.matrix.factors_size_bytes)
            for held in (self._held[slot] or {}).values()
        )

    @property
    def graph_key(self) -> tuple[int, bool]:
        return 0, True

    @property
    def example_slot(self) -> int | None:
        return next((at for at, held in enumerate(self._held) if held is not None), -1)

    def begin(self, spans: Sequence[Span], *, n_rows: int, n_single: int) -> None:
        del n_rows, n_single
        for span in spans:
            if span.slot >= 0 and self._held[span.slot] is None:
                raise UserError("arena_slot_unknown", slot=span.slot, n_slots=self.n_slots)
        self._spans = [span for span in spans if span.slot >= 0]

    def linear(self, x: torch.Tensor, weight: torch.Tensor, site: int) -> torch.Tensor:
        y = functional.linear(x, weight)
        where = self._sites[site]
        for span in self._spans:
            held = self._held[span.slot] or {}
            rows = slice(span.first, span.last)
            first = 0
            for name, out in zip(where.parts, where.out_features, strict=True):
                if name in held:
                    y[rows, first : first + out] += held[name].term(x[rows])
                first += out
        return y
