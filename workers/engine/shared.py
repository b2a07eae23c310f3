"""One model for a backbone and all its deltas: each step mixes tokens of any of them."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.streams import send
from workers.engine.arena_slots import EXACT, ArenaSlots, KernelOptions
from workers.engine.attention import AttentionStep, Chunk, DecodeRows, put_together, running
from workers.engine.executor import Work
from workers.engine.graphs import DecodeGraphs, StepInputs
from workers.engine.layers import Link, RowTables
from workers.engine.packed_vocabulary import PackedVocabulary
from workers.engine.paging import PAGE_TOKENS, PagedCache, PagePool, pages_for
from workers.engine.parts import Places, TenantParts
from workers.engine.probes import Probe, check_against
from workers.engine.rooms import BUCKETS, PROMPT_ROWS
from workers.engine.sharing import (
    list_sites,
    list_vectors,
    make_twin,
    name_tables,
    probe,
    swap_layers,
)
from workers.engine.slots import FactorSlots, Slots, Span
from workers.engine.vocabulary import DenseVocabulary, Vocabulary

# Keys that all rows of the prompts in a step may read together and still stand alone: 256 rows of
# 256 tokens. A layer of a 7B model reads 16 KB for each of them, mostly from the L2 cache.
_MOST_READ = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the rows of a step are: those that stand alone, filled up to `n_single`, then chunks.

    Single tokens stand alone, and the tokens of short prompts do. firsts: first row of each item;
    spans: whose the rows are, all of them covered.
    """

    firsts: tuple[int, ...]
    spans: tuple[Span, ...]
    n_single: int
    n_rows: int


class SharedExecutor:
    """Runs rows of many tenants through the backbone's layers, each with its own delta."""

    reads_pages = True
    _is_loading = False

    def __init__(
        self,
        module: Any,
        folder: Path,
        *,
        device: str,
        kv_bytes: int,
        n_slots: int,
        delta_bytes: int = 1 << 30,
        arena: bool | None = None,
        kernels: KernelOptions = EXACT,
    ) -> None:
        self._device = torch.device(device)
        self.is_async = self._device.type == "cuda"
        # Rows that stand alone in sizes that graphs are captured for, and one kernel for all.
        self._pads = self._splits = self.is_async
        self.lock = threading.RLock()
        twin = make_twin(module, folder, self._device)
        geometry = probe(twin, self._device)
        n_pages = max(1, kv_bytes // (PAGE_TOKENS * geometry.token_bytes))
        self.pages = PagePool(n_pages)
        self._cache = PagedCache(n_pages)
        sites = tuple(list_sites(module, geometry.groups))
        vectors = dict(list_vectors(module, sites))
        embedding, head = name_tables(module)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        self.slots: Slots
        self.vocabulary: Vocabulary
        self._graphs: DecodeGraphs | None = None
        # Slots of an arena also run without a GPU, by the reference of their kernels, uncompiled.
        if self.is_async if arena is None else arena:
            slots = ArenaSlots(
                sites,
                head_shape=tuple(parameters[head].shape),
                n_slots=n_slots,
                device=self._device,
                dtype=module.dtype,
                delta_bytes=delta_bytes,
                kernels=kernels if self.is_async else replace(kernels, prepare=None),
            )
            self.slots = slots
            self.vocabulary = PackedVocabulary(parameters[embedding], parameters[head], slots)
        else:
            self.slots = FactorSlots(sites, n_slots=n_slots)
            self.vocabulary = DenseVocabulary(
                parameters[embedding], parameters[head], n_slots=n_slots
            )
        self.tables = RowTables(vectors, n_slots=n_slots, device=self._device)
        self.places = Places(
            matrices=frozenset(part for site in sites for part in site.parts),
            vectors={name: self.tables.length(name) for name in self.tables.names},
            embedding=embedding,
            head=head,
        )
        swap_layers(twin, module, sites, Link(self.slots, self.tables))
        self.module = twin
        self._decoder = twin.get_decoder()
        if self.is_async:
            self._graphs = DecodeGraphs(self._run, n_pages=self._longest_pages(module))
        check_against(module, self)

    def _longest_pages(self, module: Any) -> int:
        positions = int(module.config.get_text_config().max_position_embeddings)
        return min(self.pages.capacity, pages_for(positions))

    def load(self, parts: TenantParts, *, factor_bytes: int = 0) -> int:
        """Make a delta resident; other tenants' steps go on meanwhile.

        Raises:
            UserError: arena_full, arena_recipe_unknown.
        """
        self._is_loading = True
        try:
            slot = self.slots.load(parts, lock=self.lock, factor_bytes=factor_bytes)
            try:
                self.tables.put(slot, parts.vectors)
                self.vocabulary.load(slot, parts)
            except BaseException:
                self.slots.evict(slot)
                raise
        finally:
            self._is_loading = False
        return slot

    def evict(self, slot: int) -> None:
        with self.lock:
            self.slots.evict(slot)
            self.vocabulary.evict(slot)

    def size_bytes(self, slot: int) -> int:
        return self.slots.size_bytes(slot) + self.vocabulary.size_bytes(slot)

    def prepare_step(self) -> bool:
        if self._graphs is None:
            return False
        with self.lock:
            slot = self.slots.example_slot
            # A delta on its way shall not wait, and who asked for it ends the quiet anyway.
            if slot is None or self._is_loading:
                return False
            key = (self.slots.graph_key[0], slot >= 0)
            # The largest first: smaller ones find room in the memory that it needed.
            missing = (n for n in reversed(BUCKETS) if self._graphs.lacks(n, key=key))
            n_rows = next(missing, None)
            if n_rows is None:
                return False
            # They write to page 0, as rows that fill up do.
            probe = Probe([0], slot=slot, pages=[0])
            heads = [int(at < PROMPT_ROWS) for at in range(n_rows)]
            self.forward([Work(sequence=probe, start=0, count=1, rows=rows) for rows in heads])
        return True

    @torch.inference_mode()
    def forward(self, work: Sequence[Work], tokens: torch.Tensor | None = None) -> torch.Tensor:
        # Rows of one tenant side by side: its numbers are then read once.
        alone = self._choose_alone(work)
        order = sorted(range(len(work)), key=lambda at: (at not in alone, _slot(work[at])))
        ordered = [work[at] for at in order]
        is_ordered = order == list(range(len(work)))
        if tokens is not None and not is_ordered:
            tokens = tokens[send(np.array(order), self._device)]
        layout = self._lay_out(ordered, len(alone))
        with self.lock:
            self.slots.begin(layout.spans, n_rows=layout.n_rows, n_single=layout.n_single)
            inputs = self._prepare(ordered, layout, tokens)
            if self._graphs is not None and layout.n_single == layout.n_rows:
                hidden = self._graphs.run(inputs, key=self.slots.graph_key)
            else:
                hidden = self._run(inputs)
            logits = self._head(hidden, ordered, layout)
        if is_ordered:
            return logits
        return logits[send(_back_in_order(work, order), self._device)]

    def _choose_alone(self, work: Sequence[Work]) -> set[int]:
        """Items whose rows stand alone: single tokens, and prompts where that makes a graph.

        A row that stands alone reads keys and values by itself, and a chunk reads them once. What
        that costs a short prompt is less than to launch every kernel of a step.
        """
        alone = {at for at, item in enumerate(work) if item.count == 1}
        if not self._splits or len(alone) == len(work):
            return alone
        n_rows = sum(item.count for item in work)
        n_read = sum(item.count * (item.start + item.count) for item in work if item.count > 1)
        if n_rows > BUCKETS[-1] or n_read > _MOST_READ:
            return alone
        return set(range(len(work)))

    def _lay_out(self, work: Sequence[Work], n_alone: int) -> Layout:
        """Lay rows out; the first `n_alone` items are those whose rows stand alone."""
        n_single = sum(item.count for item in work[:n_alone])
        filled = n_single
        if self._pads and n_single:
            filled = next((size for size in BUCKETS if size >= n_single), n_single)
        # Spans end where the rows that stand alone do, whoever comes before and after.
        singles = [(item.count, _slot(item)) for item in work[:n_alone]]
        singles += [(filled - n_single, -1)]
        chunks = [(item.count, _slot(item)) for item in work[n_alone:]]
        starts = accumulate((count for count, _ in singles[:-1]), initial=0)
        ends = list(accumulate((count for count, _ in chunks), initial=filled))
        return Layout(
            firsts=(*list(starts)[:-1], *ends[:-1]),
            spans=(*_spans(singles), *_spans(chunks, first=filled)),
            n_single=filled,
            n_rows=ends[-1],
        )

    def _prepare(
        self, work: Sequence[Work], layout: Layout, tokens: torch.Tensor | None
    ) -> StepInputs:
        # Rows that fill up are token 0 at position 0, and write to page 0, which is nobody's.
        table = np.zeros((4, layout.n_rows), dtype=np.int64)
        ids, positions, written, owners = table
        chunks = []
        for item, first in zip(work, layout.firsts, strict=True):
            last = first + item.count
            if tokens is None:
                ids[first:last] = item.tokens
            if item.count == 1:
                positions[first] = item.start
                written[first] = _place(item.sequence.pages, item.start)
                continue
            positions[first:last] = np.arange(item.start, item.start + item.count)
            seen = _places(item.sequence.pages, item.start + item.count)
            written[first:last] = seen[item.start :]
            if first >= layout.n_single:
                places = send(seen, self._device)
                chunks.append(Chunk(first=first, last=last, places=places))
        for span in layout.spans:
            owners[span.first : span.last] = span.slot + 1
        on_device = send(table, self._device)
        if tokens is not None:
            on_device[0, : len(tokens)] = tokens
        return StepInputs(
            embeds=self.vocabulary.embed(on_device[0], layout.spans)[None],
            positions=on_device[1:2],
            places=on_device[2],
            owners=on_device[3],
            chunks=tuple(chunks),
            decode=self._decode_rows(work, layout) if layout.n_single else None,
        )

    def _decode_rows(self, work: Sequence[Work], layout: Layout) -> DecodeRows:
        alone = [
            (item, first)
            for item, first in zip(work, layout.firsts, strict=True)
            if first < layout.n_single
        ]
        longest = max(len(item.sequence.pages) for item, _ in alone)
        pages = np.zeros((layout.n_single, longest), dtype=np.int32)
        lengths = np.ones(layout.n_single, dtype=np.int32)
        for item, first in alone:
            last = first + item.count
            pages[first:last, : len(item.sequence.pages)] = item.sequence.pages
            lengths[first:last] = np.arange(item.start + 1, item.start + item.count + 1)
        return DecodeRows(
            pages=send(pages, self._device),
            lengths=send(lengths, self._device),
        )

    def _run(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states of all rows, [rows, hidden]."""
        self._cache.places = inputs.places
        self.tables.gather(inputs.owners)
        step = AttentionStep(
            cache=self._cache,
            chunks=inputs.chunks,
            decode=inputs.decode if self._pads else None,
            together=put_together(inputs.decode) if inputs.decode and not self._pads else (),
        )
        with running(step):
            output = self._decoder(
                inputs_embeds=inputs.embeds,
                position_ids=inputs.positions,
                past_key_values=self._cache,
                use_cache=True,
            )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def _head(self, hidden: torch.Tensor, work: Sequence[Work], layout: Layout) -> torch.Tensor:
        rows = [
            row
            for item, first in zip(work, layout.firsts, strict=True)
            for row in range(first + item.count - item.rows, first + item.count)
        ]
        spans = _spans([(item.rows, _slot(item)) for item in work])
        if not rows:
            return hidden.new_zeros((0, 1), dtype=torch.float32)
        if rows == list(range(len(rows))):
            wanted = hidden[: len(rows)]
        else:
            wanted = hidden[send(np.array(rows), self._device)]
        return self.vocabulary.logits(wanted, spans)


def _slot(item: Work) -> int:
    return int(item.sequence.model.slot)


def _spans(counts: Sequence[tuple[int, int]], *, first: int = 0) -> list[Span]:
    """Neighbouring rows of one slot as one span; `counts` are (rows, slot)."""
    spans: list[Span] = []
    for count, slot in counts:
        if spans and spans[-1].slot == slot:
            spans[-1] = Span(first=spans[-1].first, last=first + count, slot=slot)
        elif count:
            spans.append(Span(first=first, last=first + count, slot=slot))
        first += count
    return spans


def _place(pages: list[int], at: int) -> int:
    """Place in the cache of token `at` of a sequence."""
    return pages[at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS


def _places(pages: list[int], n_tokens: int) -> npt.NDArray[np.int64]:
    """Places in the cache of the first tokens of a sequence, [n_tokens]."""
    starts = np.array(pages, dtype=np.int64)[:, None] * PAGE_TOKENS
    return (starts + np.arange(PAGE_TOKENS)).reshape(-1)[:n_tokens]


def _back_in_order(work: Sequence[Work], order: Sequence[int]) -> npt.NDArray[np.int64]:
    """Where the logits of each item lie after sorting, in the order of the work."""
    firsts: dict[int, int] = {}
    first = 0
    for at in order:
        firsts[at] = first
        first += work[at].rows
    rows = [firsts[at] + row for at, item in enumerate(work) for row in range(item.rows)]
    return np.array(rows, dtype=np.int64)
