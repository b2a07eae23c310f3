"""Slots on a GPU: packed matrices in an arena that the kernels read, heads and embeddings too."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from deltacome_core.errors import UserError
from deltacome_core.packed import PackedMatrix, PackedRows
from kernels.arena import ArenaSpec, DeltaArena
from kernels.dense import Unfolder, multiply_prompt
from kernels.image import Image, Site, build_image
from kernels.plan import StepPlan
from kernels.serving import add_delta, delta_linear
from kernels.vocabulary import EmbeddingTable, head_matrix
from workers.engine.parts import TenantParts
from workers.engine.slots import Lock, Span

log = logging.getLogger(__name__)

HEAD = "head"
# Rows of single tokens: graphs are captured, and plans made, for these sizes.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Rows of one tenant above which its factors are unfolded once instead of read for each row.
_PROMPT_ROWS = 128
# Deltas of one recipe differ a little in size and ranks.
_SLACK = 1.02
_RANK_SLACK = 1.25


class ArenaSlots:
    """Slots of one arena, which is made when the first delta comes and its recipe is known."""

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        head_shape: tuple[int, ...],
        n_slots: int,
        device: torch.device,
        dtype: torch.dtype,
        delta_bytes: int,
    ) -> None:
        self._n_slots = n_slots
        self._dtype = dtype
        self._device = device
        self._delta_bytes = delta_bytes
        head = Site(
            name=HEAD, parts=(HEAD,), out_features=(head_shape[0],), in_features=head_shape[1]
        )
        self._sites = (*sites, head)
        self._head = len(sites)
        self._arena: DeltaArena | None = None
        self._unfolder: Unfolder | None = None
        self._plans: dict[tuple[str, int], StepPlan] = {}
        self._plan: StepPlan | None = None
        self._segments: list[Span] = []
        self._generation = 0
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def n_slots(self) -> int:
        return self._n_slots if self._arena is None else self._arena.n_slots

    @property
    def graph_key(self) -> tuple[int, bool]:
        """Graphs of a step live as long as the arena, and leave deltas out where there is none."""
        return self._generation, self._plan is not None

    def size_bytes(self, slot: int) -> int:
        del slot
        return 0 if self._arena is None else self._arena.spec.slab_bytes

    def load(self, parts: TenantParts, *, lock: Lock, factor_bytes: int) -> int:
        del factor_bytes
        for table in (parts.embedding, parts.head):
            if isinstance(table, PackedRows) and table.basis is not None:
                # No kernel reads rows as coordinates yet.
                reason = "its rows are coordinates in a basis"
                raise UserError("arena_recipe_unknown", name=table.name, reason=reason)
        matrices = dict(parts.matrices)
        if isinstance(parts.head, PackedRows) and parts.head.factor is not None:
            matrices[HEAD] = head_matrix(parts.head)
        image = build_image(self._sites, matrices, pin=self._device.type == "cuda")
        with lock:
            arena = self._fit(image)
            if self._stream is None:
                slot = arena.load(image)
            else:
                # The steps of others go on meanwhile, on their own stream.
                with torch.cuda.stream(self._stream):
                    slot = arena.load(image)
        if self._stream is not None:
            self._stream.synchronize()
            # Its bytes are on the device now; what stays on the host says how they lie there.
            arena.images[slot] = replace(
                image,
                source=torch.empty(0, dtype=torch.uint8),
                matrices={name: matrix.to("meta") for name, matrix in matrices.items()},
            )
        return slot

    def evict(self, slot: int) -> None:
        if self._arena is not None:
            self._arena.evict(slot)

    def _fit(self, image: Image) -> DeltaArena:
        """An arena that takes the image; an empty one may be made anew for another recipe.

        Raises:
            UserError: arena_recipe_unknown, and deltas of other recipes are resident.
        """
        arena = self._arena
        if arena is not None:
            try:
                arena.spec.check(image)
            except UserError:
                if arena.resident_slots:
                    raise
            else:
                return arena
        spec = self._widen(image)
        # The old slabs go before the new ones come.
        self._arena = self._unfolder = arena = None
        self._plans.clear()
        n_slots = min(self._n_slots, self._delta_bytes // spec.slab_bytes)
        if n_slots < 1:
            raise UserError("arena_full", n_slots=0)
        self._arena = DeltaArena(spec, n_slots=n_slots, device=self._device)
        self._generation += 1
        if self._device.type == "cuda":
            self._unfolder = Unfolder(self._arena, dtype=self._dtype)
        log.info("arena_made: %d slots of %d bytes", n_slots, spec.slab_bytes)
        return self._arena

    def _widen(self, image: Image) -> ArenaSpec:
        """A spec for this delta, for others of its kind, and for all that came before."""
        before = () if self._arena is None else (self._arena.spec,)
        ranks = [
            matrix.rank for matrix in image.matrices.values() if isinstance(matrix, PackedMatrix)
        ]
        slab_bytes = int(max(image.slab_bytes, *(s.slab_bytes for s in before), 0) * _SLACK)
        specs = [*before, ArenaSpec.covering(self._sites, [image])]
        if ranks:
            widths = frozenset(
                band.bits
                for matrix in image.matrices.values()
                if isinstance(matrix, PackedMatrix)
                for band in matrix.bands
            )
            specs.append(
                ArenaSpec.allowing(
                    self._sites,
                    slab_bytes=slab_bytes,
                    max_rank=int(max(ranks) * _RANK_SLACK),
                    widths=widths,
                )
            )
        needs = tuple(
            tuple(dict.fromkeys(need for spec in specs for need in spec.needs[site]))
            for site in range(len(self._sites))
        )
        # The head is a direct matrix or nothing: ranks there would only cost programs.
        head = tuple(
            dict.fromkeys(need for spec in specs[: len(before) + 1] for need in spec.needs[-1])
        )
        aligned = ArenaSpec.allowing(
            self._sites, slab_bytes=slab_bytes, max_rank=1, widths=frozenset({2})
        ).slab_bytes
        return ArenaSpec(sites=self._sites, slab_bytes=aligned, needs=(*needs[:-1], head))

    def begin(self, spans: Sequence[Span], *, n_rows: int, n_single: int) -> None:
        del n_rows
        self._plan = None
        self._segments = [span for span in spans if span.slot >= 0 and span.first >= n_single]
        slots = _slots_of(spans, n_single)
        if any(slot >= 0 for slot in slots):
            self._plan = self._take_plan("step", slots)
        self._check([span.slot for span in self._segments])

    def _check(self, slots: Sequence[int]) -> None:
        if self._arena is not None:
            self._arena.check_slots(slots)
        elif any(slot >= 0 for slot in slots):
            raise UserError("arena_slot_unknown", slot=max(slots), n_slots=0)

    def _take_plan(self, use: str, slots: list[int]) -> StepPlan:
        self._check(slots)
        if self._arena is None:
            raise UserError("arena_slot_unknown", slot=max(slots), n_slots=0)
        key = (use, len(slots))
        if key not in self._plans:
            self._plans[key] = StepPlan(self._arena, n_tokens=len(slots))
        self._plans[key].assign(slots)
        return self._plans[key]

    def linear(self, x: torch.Tensor, weight: torch.Tensor, site: int) -> torch.Tensor:
        plan, arena = self._plan, self._arena
        if arena is None or (plan is None and not self._segments):
            return functional.linear(x, weight)
        if plan is not None and plan.n_tokens == len(x):
            return delta_linear(x, weight, arena, site, plan)
        y = functional.linear(x, weight)
        if plan is not None:
            add_delta(y[: plan.n_tokens], x[: plan.n_tokens], plan, site)
        for span in self._segments:
            self._add_segment(y, x, span, site)
        return y

    def _add_segment(self, y: torch.Tensor, x: torch.Tensor, span: Span, site: int) -> None:
        rows = slice(span.first, span.last)
        if self._unfolder is not None:
            multiply_prompt(y[rows], x[rows], self._unfolder, span.slot, site)
        elif self._arena is not None:
            plan = self._take_plan("segment", [span.slot] * (span.last - span.first))
            add_delta(y[rows], x[rows], plan, site)

    def add_head(self, y: torch.Tensor, x: torch.Tensor, spans: Sequence[Span]) -> None:
        """Add each row's delta of the head, in place; spans cover all rows."""
        if self._arena is None or all(span.slot < 0 for span in spans):
            return
        if len(x) > _PROMPT_ROWS and self._unfolder is not None:
            for span in spans:
                if span.slot >= 0:
                    self._add_segment(y, x, span, self._head)
            return
        slots = _slots_of(spans, len(x))
        slots += [-1] * (len(x) - len(slots))
        add_delta(y, x, self._take_plan("head", slots), self._head)


def _slots_of(spans: Sequence[Span], n_rows: int) -> list[int]:
    slots = [slot for s in spans for slot in [s.slot] * (s.last - s.first)]
    return slots[:n_rows]


class PackedVocabulary:
    """Embeddings as packed rows beside the backbone's, heads as a site of the arena."""

    keeps_packed = True

    def __init__(self, embedding: torch.Tensor, head: torch.Tensor, slots: ArenaSlots) -> None:
        self._embedding = embedding
        self._head = head
        self._slots = slots
        self._table: EmbeddingTable | None = None
        self._packed: dict[int, bool] = {}
        self._new_embeddings: dict[int, torch.Tensor] = {}
        self._new_heads: dict[int, torch.Tensor] = {}

    def load(self, slot: int, parts: TenantParts) -> None:
        for part in (parts.embedding, parts.head):
            if isinstance(part, torch.Tensor):
                raise UserError("arena_recipe_unknown", name="a table", reason="it is not packed")
        if isinstance(parts.embedding, PackedRows):
            self._load_rows(slot, parts.embedding)
        if isinstance(parts.head, PackedRows) and parts.head.new_rows is not None:
            self._new_heads[slot] = parts.head.new_rows.to(self._head)

    def _load_rows(self, slot: int, rows: PackedRows) -> None:
        if rows.factor is not None:
            if self._table is None or not self._packed:
                self._table = EmbeddingTable(
                    n_slots=self._slots.n_slots, like=rows, device=self._embedding.device
                )
            self._table.put(slot, rows)
            self._packed[slot] = True
        if rows.new_rows is not None:
            self._new_embeddings[slot] = rows.new_rows.to(self._embedding)

    def evict(self, slot: int) -> None:
        for held in (self._packed, self._new_embeddings, self._new_heads):
            held.pop(slot, None)

    def size_bytes(self, slot: int) -> int:
        tables = [held[slot] for held in (self._new_embeddings, self._new_heads) if slot in held]
        return sum(table.numel() * table.element_size() for table in tables)

    def embed(self, ids: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """Rows of the tokens, [rows, hidden]; spans cover all rows."""
        known = len(self._embedding)
        inside = ids.clamp_max(known - 1)
        rows = functional.embedding(inside, self._embedding)
        slots = [slot if slot in self._packed else -1 for slot in _slots_of(spans, len(ids))]
        if self._table is not None and any(slot >= 0 for slot in slots):
            owners = torch.tensor(slots, dtype=torch.int32, device=ids.device)
            self._table.add_rows(rows, inside.int(), owners)
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
        y = functional.linear(hidden, self._head)
        self._slots.add_head(y, hidden, spans)
        y = y[:n_rows]
        grown = {s.slot: self._new_heads[s.slot] for s in spans if s.slot in self._new_heads}
        if not grown:
            return y.float()
        width = max(map(len, grown.values()))
        found = functional.pad(y.float(), (0, width), value=-torch.inf)
        for span in spans:
            new = grown.get(span.slot)
            if new is not None:
                rows = hidden[span.first : span.last]
                first = len(self._head)
                found[span.first : span.last, first : first + len(new)] = rows @ new.T
        return found
