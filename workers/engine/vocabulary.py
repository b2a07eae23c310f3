"""Embeddings and heads of many tenants: the backbone's tables, and whole ones of who has others."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn import functional

from deltacome_core.packed import PackedRows
from workers.engine.parts import TenantParts
from workers.engine.slots import Span


class Vocabulary(Protocol):
    """Rows of tokens, and logits of hidden states, each by its tenant's own tables."""

    keeps_packed: bool

    def load(self, slot: int, parts: TenantParts) -> None: ...
    def evict(self, slot: int) -> None: ...
    def size_bytes(self, slot: int) -> int: ...
    def embed(self, ids: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor: ...
    def logits(self, hidden: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor: ...


class DenseVocabulary:
    """Each tenant with a changed table keeps it whole; the way of a CPU, where memory is plenty."""

    keeps_packed = False

    def __init__(self, embedding: torch.Tensor, head: torch.Tensor, *, n_slots: int) -> None:
        self._embedding = embedding
        self._head = head
        self._embeddings: list[torch.Tensor | None] = [None] * n_slots
        self._heads: list[torch.Tensor | None] = [None] * n_slots

    def load(self, slot: int, parts: TenantParts) -> None:
        self._embeddings[slot] = self._dense(parts.embedding)
        # Tied tables stay one.
        is_tied = parts.head is parts.embedding
        self._heads[slot] = self._embeddings[slot] if is_tied else self._dense(parts.head)

    def evict(self, slot: int) -> None:
        self._embeddings[slot] = self._heads[slot] = None

    def size_bytes(self, slot: int) -> int:
        tables = {id(t): t for t in (self._embeddings[slot], self._heads[slot]) if t is not None}
        return sum(table.numel() * table.element_size() for table in tables.values())

    def _dense(self, part: PackedRows | torch.Tensor | None) -> torch.Tensor | None:
        if not isinstance(part, torch.Tensor):
            return None
        return part.to(self._embedding)

    def embed(self, ids: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """Rows of the tokens, [rows, hidden]; spans cover all rows."""
        # Ids that only a tenant has are looked up in its own table below.
        rows = functional.embedding(ids.clamp_max(len(self._embedding) - 1), self._embedding)
        for span in spans:
            table = self._embeddings[span.slot] if span.slot >= 0 else None
            if table is not None:
                rows[span.first : span.last] = table[ids[span.first : span.last]]
        return rows

    def logits(self, hidden: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """f32 [rows, largest vocabulary], minus infinity beyond a tenant's own."""
        tables = [self._heads[span.slot] if span.slot >= 0 else None for span in spans]
        width = max(len(self._head if table is None else table) for table in tables)
        found = torch.full((len(hidden), width), -torch.inf, device=hidden.device)
        for span, table in zip(spans, tables, strict=True):
            used = self._head if table is None else table
            rows = functional.linear(hidden[span.first : span.last], used)
            found[span.first : span.last, : len(used)] = rows
        return found
