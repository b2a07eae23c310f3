"""Slots on a GPU: packed matrices in an arena that the kernels read, heads and embeddings too."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from deltacome_core.errors import UserError
from deltacome_core.packed import PackedLinear, PackedMatrix, PackedRows
from deltacome_core.rows import BASIS_BITS
from kernels.arena import ArenaSpec, DeltaArena, count_matrix_words
from kernels.dense import Unfolder, multiply_prompt
from kernels.fragments import PLANES, WORD_COLUMNS, FragmentShape, count_steps
from kernels.image import Image, Site, SiteNeeds, build_image
from kernels.plan import StepPlan
from kernels.serving import add_delta, delta_linear
from kernels.vocabulary import head_matrix, pad_ranks
from kernels.wanted import Wanted
from workers.engine.parts import TenantParts
from workers.engine.rooms import PROMPT_PLACES, PROMPT_ROWS, list_wanted
from workers.engine.slots import Lock, Span

log = logging.getLogger(__name__)

HEAD = "head"
# The head of a delta whose vocabulary lies in a basis: it reads its input's coordinates.
COORDINATES = "head.coordinates"
# Deltas of one recipe differ a little in size and ranks.
_SLACK = 1.02
_RANK_SLACK = 1.25
# Coordinates that the first arena has room for when its first delta does not say.
_COORDINATES = 256


def _usual_head(bits: int) -> SiteNeeds:
    """Rows of a vocabulary as recipes leave them: the first delta may have changed none."""
    return SiteNeeds(
        shrink_rows=(),
        hidden_pairs=0,
        widths=frozenset({bits}),
        has_groups=True,
        has_several=False,
        has_direct=True,
        has_factors=False,
    )


# Rows as they are, and coordinates.
_USUAL_HEADS = (_usual_head(4), _usual_head(BASIS_BITS))


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOptions:
    """prepare: compiles kernels before a delta is in its slot; planes: of each `StepPlan`."""

    prepare: Callable[[Sequence[Wanted]], None] | None = None
    planes: int = PLANES


EXACT = KernelOptions()


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
        kernels: KernelOptions,
    ) -> None:
        """Make no arena yet."""
        self._planes = kernels.planes
        self._n_slots = n_slots
        self._prepare = kernels.prepare
        self._dtype = dtype
        self._device = device
        self._delta_bytes = delta_bytes
        self._layers = tuple(sites)
        self._head_shape = head_shape
        self._arena: DeltaArena | None = None
        self._unfolder: Unfolder | None = None
        self._plans: dict[tuple[str, int], StepPlan] = {}
        self._plan: StepPlan | None = None
        # Prompts short enough to be read by the kernels of single tokens, and the row they begin.
        self._prompts: StepPlan | None = None
        self._first_prompt = 0
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

    @property
    def example_slot(self) -> int | None:
        if self._generation == 0:
            return -1
        return next(iter(self._arena.resident_slots), None) if self._arena else None

    def size_bytes(self, slot: int) -> int:
        del slot
        return 0 if self._arena is None else self._arena.spec.slab_bytes

    def load(self, parts: TenantParts, *, lock: Lock, factor_bytes: int) -> int:
        del factor_bytes
        heads: dict[str, PackedLinear] = {}
        head = parts.head if isinstance(parts.head, PackedRows) else None
        sites = self._name_sites(parts)
        if head is not None and head.factor is not None:
            if head.basis is None:
                heads[HEAD] = head_matrix(head)
            else:
                # Where the device is fast, and back to what an image is built from; not behind the
                # steps of others, whom a copy back would wait for.
                is_alone = self._stream is None
                with contextlib.nullcontext() if is_alone else torch.cuda.stream(self._stream):
                    padded = pad_ranks(head.to(self._device), sites[-1].in_features)
                    heads[COORDINATES] = head_matrix(padded.to("cpu"))
        is_cuda = self._device.type == "cuda"
        matrices = parts.matrices.beside(heads)
        image = build_image(sites, matrices, pin=is_cuda, memory=parts.memory)
        spec = self._find_spec(sites, image)
        if self._prepare is not None:
            self._prepare(list_wanted(spec, parts, self._dtype, planes=self._planes))
        with lock:
            arena = self._fit(spec)
            if self._stream is None:
                slot = arena.load(image)
            else:
                # The steps of others go on meanwhile, on their own stream; those that were queued
                # before may still read what the slot held.
                self._stream.wait_stream(torch.cuda.default_stream(self._device))
                with torch.cuda.stream(self._stream):
                    slot = arena.load(image)
        if self._stream is not None:
            self._stream.synchronize()
            # Its bytes are on the device now; what stays on the host says how they lie there.
            arena.images[slot] = replace(image, chunks=(), matrices={})
        return slot

    def evict(self, slot: int) -> None:
        if self._arena is not None:
            self._arena.evict(slot)

    def _name_sites(self, parts: TenantParts) -> tuple[Site, ...]:
        """Sites of an arena for this delta: those of the one there is, if it has room for them."""
        tables = [t for t in (parts.embedding, parts.head) if isinstance(t, PackedRows)]
        ranks = max((len(table.basis) for table in tables if table.basis is not None), default=0)
        if self._arena is not None and ranks <= self.n_coordinates:
            return self._arena.spec.sites
        room = -(-int(ranks * _RANK_SLACK) // WORD_COLUMNS) * WORD_COLUMNS or _COORDINATES
        rows, columns = self._head_shape
        return (
            *self._layers,
            Site(name=HEAD, parts=(HEAD,), out_features=(rows,), in_features=columns),
            Site(name=COORDINATES, parts=(COORDINATES,), out_features=(rows,), in_features=room),
        )

    @property
    def n_coordinates(self) -> int:
        """Coordinates of every vocabulary in a basis; smaller bases are filled up."""
        return 0 if self._arena is None else self._arena.spec.sites[-1].in_features

    def _find_spec(self, sites: tuple[Site, ...], image: Image) -> ArenaSpec:
        """The arena's spec, or another for an image it cannot take if nothing is resident.

        Raises:
            UserError: arena_recipe_unknown, and deltas of other recipes are resident.
        """
        arena = self._arena
        if arena is not None:
            try:
                self._check_fit(arena, sites, image)
            except UserError:
                if arena.resident_slots:
                    raise
            else:
                return arena.spec
        return self._widen(sites, image)

    def _fit(self, spec: ArenaSpec) -> DeltaArena:
        """The arena of a spec of `_find_spec`; an empty one may be made anew.

        Raises:
            UserError: arena_full, no delta fits.
        """
        if self._arena is not None and self._arena.spec is spec:
            return self._arena
        # The old slabs go before the new ones come.
        self._arena = self._unfolder = None
        self._plans.clear()
        n_slots = min(self._n_slots, self._delta_bytes // spec.slab_bytes)
        if n_slots < 1:
            raise UserError("arena_full", n_slots=0)
        if self._device.type == "cuda":
            # What torch keeps for later would be missing beside an arena that fills the device.
            torch.cuda.empty_cache()
        self._arena = DeltaArena(spec, n_slots=n_slots, device=self._device)
        self._generation += 1
        if self._device.type == "cuda":
            self._unfolder = Unfolder(self._arena, dtype=self._dtype)
        log.info("arena_made: %d slots of %d bytes", n_slots, spec.slab_bytes)
        return self._arena

    def _check_fit(self, arena: DeltaArena, sites: tuple[Site, ...], image: Image) -> None:
        if sites != arena.spec.sites:
            reason = f"a basis of more than {self.n_coordinates} ranks"
            raise UserError("arena_recipe_unknown", name="its vocabulary", reason=reason)
        arena.spec.check(image)

    def _widen(self, sites: tuple[Site, ...], image: Image) -> ArenaSpec:
        """A spec for this delta, for others of its kind, and for all that came before."""
        before = () if self._arena is None else (self._arena.spec,)
        found = [matrix for matrix in image.matrices.values() if isinstance(matrix, PackedMatrix)]
        slab_bytes = int(max(image.slab_bytes, *(s.slab_bytes for s in before), 0) * _SLACK)
        if not {HEAD, COORDINATES} & image.matrices.keys():
            # The next delta's vocabulary may have changed: a byte a coordinate, and its scales.
            steps = BASIS_BITS * count_steps(sites[-1].in_features)
            head = FragmentShape(sites[-1].total_out, steps)
            slab_bytes += int(head.size_bytes * _RANK_SLACK)
        specs = [*before, ArenaSpec.covering(sites, [image])]
        layers = [*specs]
        if found:
            layers.append(
                ArenaSpec.allowing(
                    sites,
                    slab_bytes=slab_bytes,
                    max_rank=int(max(matrix.rank for matrix in found) * _RANK_SLACK),
                    max_words=int(
                        max(count_matrix_words(matrix) for matrix in found) * _RANK_SLACK
                    ),
                    widths=frozenset(band.bits for matrix in found for band in matrix.bands),
                )
            )
        last = len(self._layers)
        needs = [
            tuple(dict.fromkeys(need for spec in layers for need in spec.needs[site]))
            for site in range(last)
        ]
        # Heads are direct matrices or nothing: ranks there would only cost programs.
        needs += [
            tuple(dict.fromkeys([*(n for spec in specs for n in spec.needs[last + at]), usual]))
            for at, usual in enumerate(_USUAL_HEADS)
        ]
        aligned = ArenaSpec.allowing(
            sites, slab_bytes=slab_bytes, max_rank=1, max_words=2, widths=frozenset({2})
        ).slab_bytes
        return ArenaSpec(sites=sites, slab_bytes=aligned, needs=tuple(needs))

    def begin(self, spans: Sequence[Span], *, n_rows: int, n_single: int) -> None:
        self._plan = self._prompts = None
        self._first_prompt = n_single
        chunks = [span for span in spans if span.slot >= 0 and span.first >= n_single]
        slots = slots_of(spans, n_single)
        if any(slot >= 0 for slot in slots):
            self._plan = self._take_plan("step", slots)
        short, n_places = _choose_short(chunks)
        if short:
            owners = np.full(n_rows - n_single, -1)
            for span in short:
                owners[span.first - n_single : span.last - n_single] = span.slot
            self._prompts = self._take_prompts(owners.tolist(), n_places)
        self._segments = [span for span in chunks if span not in short]
        self._check([span.slot for span in self._segments])

    def _check(self, slots: Sequence[int]) -> None:
        if self._arena is not None:
            self._arena.check_slots(slots)
        elif any(slot >= 0 for slot in slots):
            raise UserError("arena_slot_unknown", slot=max(slots), n_slots=0)

    def _take_plan(self, use: str, slots: list[int]) -> StepPlan:
        arena = self._arena_of(slots)
        key = (use, len(slots))
        if key not in self._plans:
            self._plans[key] = StepPlan(arena, n_tokens=len(slots), planes=self._planes)
        self._plans[key].assign(slots)
        return self._plans[key]

    def _take_prompts(self, slots: list[int], n_places: int) -> StepPlan:
        arena = self._arena_of(slots)
        room = next(size for size in PROMPT_PLACES if size >= n_places)
        key = ("prompts", room)
        if key not in self._plans:
            self._plans[key] = StepPlan(arena, planes=self._planes, n_places=room)
        self._plans[key].assign(slots)
        return self._plans[key]

    def _arena_of(self, slots: list[int]) -> DeltaArena:
        self._check(slots)
        if self._arena is None:
            raise UserError("arena_slot_unknown", slot=max(slots), n_slots=0)
        return self._arena

    def linear(self, x: torch.Tensor, weight: torch.Tensor, site: int) -> torch.Tensor:
        plan, arena = self._plan, self._arena
        prompts, first = self._prompts, self._first_prompt
        if arena is None or (plan is None and prompts is None and not self._segments):
            return functional.linear(x, weight)
        if plan is not None and plan.n_tokens == len(x):
            return delta_linear(x, weight, arena, site, plan)
        y = functional.linear(x, weight)
        if plan is not None:
            add_delta(y[:first], x[:first], plan, site)
        if prompts is not None:
            add_delta(y[first:], x[first:], prompts, site)
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

    def add_head(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        coordinates: torch.Tensor | None,
        spans: Sequence[Span],
    ) -> None:
        """Add each row's delta of the head, in place.

        Args:
            y: [rows, vocabulary].
            x: [rows, hidden].
            coordinates: f32 [rows, n_coordinates] of the rows whose heads read those, 0 for others;
                None where there is no such row.
            spans: whose the rows are; all of them covered but for some at the end.
        """
        if self._arena is None or all(span.slot < 0 for span in spans):
            return
        head = len(self._layers)
        if len(x) > PROMPT_ROWS and self._unfolder is not None:
            for span in spans:
                if span.slot >= 0:
                    self._add_segment(y, x, span, head)
                    if coordinates is not None:
                        self._add_segment(y, coordinates.to(x.dtype), span, head + 1)
            return
        slots = slots_of(spans, len(x))
        plan = self._take_head_plan(slots + [-1] * (len(x) - len(slots)))
        add_delta(y, x, plan, head)
        if coordinates is not None:
            add_delta(y, coordinates, plan, head + 1)

    def _take_head_plan(self, slots: list[int]) -> StepPlan:
        """The plan of the step where that has the same rows, as a step of single tokens does."""
        if self._plan is not None and self._plan.token_slots == slots:
            return self._plan
        return self._take_plan("head", slots)


def _choose_short(chunks: Sequence[Span]) -> tuple[list[Span], int]:
    """Chunks that the kernels of single tokens read, as many as there is room for; their rows."""
    short: list[Span] = []
    n_places = 0
    for span in sorted(chunks, key=lambda span: span.last - span.first):
        n_rows = span.last - span.first
        if n_rows > PROMPT_ROWS or n_places + n_rows > PROMPT_PLACES[-1]:
            break
        short.append(span)
        n_places += n_rows
    return short, n_places


def slots_of(spans: Sequence[Span], n_rows: int) -> list[int]:
    """Slot of each of the first `n_rows` rows; spans begin at row 0 and leave none out."""
    slots = [slot for s in spans for slot in [s.slot] * (s.last - s.first)]
    return slots[:n_rows]
