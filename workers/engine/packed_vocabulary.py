"""Vocabularies on a GPU: packed rows beside the backbone's, heads as sites of the arena."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from deltacome_core.errors import UserError
from deltacome_core.packed import PackedRows
from kernels.streams import send
from kernels.vocabulary import EmbeddingTable, pad_ranks
from workers.engine.arena_slots import ArenaSlots, slots_of
from workers.engine.parts import TenantParts
from workers.engine.rooms import BUCKETS
from workers.engine.slots import Span


class _Rows:
    """Rows of one kind, as they are or as coordinates, of the deltas that keep theirs that way."""

    def __init__(self, slots: ArenaSlots, device: torch.device) -> None:
        self._slots = slots
        self._device = device
        self._table: EmbeddingTable | None = None
        self._used: set[int] = set()

    def put(self, slot: int, rows: PackedRows, *, basis_only: bool = False) -> None:
        """Take a delta's rows; the first delta says how those of all others are packed."""
        rows = rows.to(self._device)
        if rows.basis is not None:
            rows = pad_ranks(rows, self._slots.n_coordinates)
        if self._table is None or not self._used:
            self._table = EmbeddingTable(
                n_slots=self._slots.n_slots, like=rows, device=self._device
            )
        if basis_only:
            self._table.put_basis(slot, rows)
        else:
            self._table.put(slot, rows)
        self._used.add(slot)

    def drop(self, slot: int) -> None:
        if self._table is not None and slot in self._used:
            self._used.remove(slot)
            self._table.drop(slot)

    def size_bytes(self, slot: int) -> int:
        return 0 if self._table is None or slot not in self._used else self._table.size_bytes(slot)

    def find(self, slots: Sequence[int]) -> tuple[EmbeddingTable, torch.Tensor] | None:
        """The table and, int32 on the device, whose rows of it each token reads; None for nobody's.

        Tokens of deltas that keep their rows another way, or unchanged, read none.
        """
        own = [slot if slot in self._used else -1 for slot in slots]
        if self._table is None or max(own, default=-1) < 0:
            return None
        return self._table, send(np.array(own, dtype=np.int32), self._device)


class _Scales:
    """By how much deltas multiply the backbone's rows before they add to them."""

    def __init__(self) -> None:
        self._by_slot: dict[int, float] = {}

    def put(self, slot: int, rows: PackedRows) -> None:
        if rows.base_scale is not None:
            self._by_slot[slot] = float(rows.base_scale)

    def drop(self, slot: int) -> None:
        self._by_slot.pop(slot, None)

    def multiply(self, values: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """Multiply the rows float [rows, any] of who has a scale; rounded once."""
        slots = slots_of(spans, len(values))
        found = [self._by_slot.get(slot, 1.0) for slot in slots]
        if all(scale == 1.0 for scale in found):
            return values
        found += [1.0] * (len(values) - len(found))
        scales = send(np.array(found, dtype=np.float32), values.device)
        return (values.float() * scales[:, None]).to(values.dtype)


class PackedVocabulary:
    """Embeddings and heads of the deltas in an arena."""

    keeps_packed = True

    def __init__(self, embedding: torch.Tensor, head: torch.Tensor, slots: ArenaSlots) -> None:
        self._embedding = embedding
        self._head = head
        self._slots = slots
        self._plain = _Rows(slots, embedding.device)
        self._coordinates = _Rows(slots, embedding.device)
        # Of heads that are not the embedding.
        self._bases = _Rows(slots, embedding.device)
        self._new_embeddings: dict[int, torch.Tensor] = {}
        self._new_heads: dict[int, torch.Tensor] = {}
        self._embedding_scales = _Scales()
        self._head_scales = _Scales()

    @property
    def _kinds(self) -> tuple[_Rows, ...]:
        return self._plain, self._coordinates, self._bases

    def load(self, slot: int, parts: TenantParts) -> None:
        for part in (parts.embedding, parts.head):
            if isinstance(part, torch.Tensor):
                raise UserError("arena_recipe_unknown", name="a table", reason="it is not packed")
        try:
            if isinstance(parts.embedding, PackedRows):
                self._load_embedding(slot, parts.embedding)
            if isinstance(parts.head, PackedRows):
                self._load_head(slot, parts.head)
        except BaseException:
            self.evict(slot)
            raise

    def _load_embedding(self, slot: int, rows: PackedRows) -> None:
        if rows.factor is not None:
            kind = self._plain if rows.basis is None else self._coordinates
            kind.put(slot, rows)
        self._embedding_scales.put(slot, rows)
        if rows.new_rows is not None:
            self._new_embeddings[slot] = rows.new_rows.to(self._embedding)

    def _load_head(self, slot: int, rows: PackedRows) -> None:
        if rows.basis is not None:
            self._bases.put(slot, rows, basis_only=True)
        self._head_scales.put(slot, rows)
        if rows.new_rows is not None:
            self._new_heads[slot] = rows.new_rows.to(self._head)

    def evict(self, slot: int) -> None:
        for kind in self._kinds:
            kind.drop(slot)
        for scales in (self._embedding_scales, self._head_scales):
            scales.drop(slot)
        for held in (self._new_embeddings, self._new_heads):
            held.pop(slot, None)

    def size_bytes(self, slot: int) -> int:
        tables = [held[slot] for held in (self._new_embeddings, self._new_heads) if slot in held]
        new = sum(table.numel() * table.element_size() for table in tables)
        return new + sum(kind.size_bytes(slot) for kind in self._kinds)

    def embed(self, ids: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """Rows of the tokens, [rows, hidden]; spans cover all rows."""
        known = len(self._embedding)
        inside = ids.clamp_max(known - 1)
        rows = functional.embedding(inside, self._embedding)
        rows = self._embedding_scales.multiply(rows, spans)
        slots = slots_of(spans, len(ids))
        for kind in (self._plain, self._coordinates):
            found = kind.find(slots)
            if found is not None:
                table, owners = found
                table.add_rows(rows, inside.int(), owners)
        for span in spans:
            new = self._new_embeddings.get(span.slot)
            if new is not None:
                own = ids[span.first : span.last]
                chosen = new[(own - known).clamp_min(0)]
                part = rows[span.first : span.last]
                part.copy_(torch.where((own >= known)[:, None], chosen, part))
        return rows

    def logits(self, hidden: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """f32 [rows, largest vocabulary], minus infinity beyond a tenant's own."""
        n_rows = len(hidden)
        if any(span.slot >= 0 for span in spans):
            # Plans are made for few sizes; rows beyond the last one are nobody's.
            size = next((size for size in BUCKETS if size >= n_rows), n_rows)
            hidden = functional.pad(hidden, (0, 0, 0, size - n_rows))
        y = self._head_scales.multiply(functional.linear(hidden, self._head), spans)
        slots = slots_of(spans, n_rows)
        found = self._bases.find([*slots, *[-1] * (len(hidden) - len(slots))])
        coordinates = None if found is None else found[0].project(hidden, found[1])
        self._slots.add_head(y, hidden, coordinates, spans)
        y = y[:n_rows]
        grown = {s.slot: self._new_heads[s.slot] for s in spans if s.slot in self._new_heads}
        if not grown:
            return y.float()
        width = max(map(len, grown.values()))
        wide = functional.pad(y.float(), (0, width), value=-torch.inf)
        for span in spans:
            new = grown.get(span.slot)
            if new is not None:
                rows = hidden[span.first : span.last]
                first = len(self._head)
                wide[span.first : span.last, first : first + len(new)] = rows @ new.T
        return wide
