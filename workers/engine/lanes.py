"""The answers of one executor: whose tokens go into its next step, and who holds its pages."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from workers.engine.executor import Executor, Work
from workers.engine.fairness import DeficitRoundRobin
from workers.engine.generate import Sequence
from workers.engine.paging import PAGE_TOKENS, extend_keys, pages_for
from workers.engine.steps import Chosen

# What a step reads of prompts is shared out among tenants in blocks of this many tokens.
_BLOCK_TOKENS = 64
# While nobody waits for a next token a long prompt is read in pieces so many times larger: what a
# piece costs beside its tokens, like unfolding a delta, is paid less often.
_ALONE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """max_sequences: answers in one step; max_running: in the cache; max_waiting: before it.

    max_waiting_tenant: of one tenant; prefill_tokens: of prompts in one step, eight times as many
    of long ones while no answer waits for its next token.
    """

    max_sequences: int = 32
    max_running: int = 128
    max_waiting: int = 256
    max_waiting_tenant: int = 64
    prefill_tokens: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Due(Work):
    """Work of an answer, which the scheduler knows more of than an executor does."""

    sequence: Sequence


@dataclass(slots=True)
class Lane:
    """Answers under way, oldest first; each tenant has its turn in decoding and in prompts.

    chosen: of the last step, where its tokens are not read yet; n_found_tokens: of prompts, that
    did not have to be read, since another answer had read them.
    """

    executor: Executor
    running: list[Sequence] = field(default_factory=list)
    chosen: Chosen | None = None
    n_found_tokens: int = 0
    _decode_turns: DeficitRoundRobin = field(default_factory=lambda: DeficitRoundRobin(quantum=1))
    _prefill_turns: DeficitRoundRobin = field(
        default_factory=lambda: DeficitRoundRobin(quantum=_BLOCK_TOKENS)
    )

    def take_found(self) -> int:
        """How many tokens were found since this was asked last."""
        found, self.n_found_tokens = self.n_found_tokens, 0
        return found

    def remove(self, sequence: Sequence) -> None:
        """Take an answer out of the cache; it may come again."""
        self.running.remove(sequence)
        self._name_pages(sequence)
        self.executor.pages.give_back(sequence.pages)
        sequence.forget()

    def missing_pages(self, sequence: Sequence) -> int:
        """Pages short of what the answer has now, beside what others still have to feed."""
        promised = sum(
            max(0, pages_for(len(other.tokens)) - len(other.pages)) for other in self.running
        )
        return promised + pages_for(len(sequence.tokens)) - self.executor.pages.free

    def find_excess(self, limits: Limits) -> Sequence | None:
        """The newest answer of the tenant that holds most, if that is more than an equal share."""
        held = self._by_tenant(self.running)
        if not held:
            return None

        def part(name: str) -> float:
            pages = sum(len(item.pages) for item in held[name]) / self.executor.pages.capacity
            return max(pages, len(held[name]) / limits.max_running)

        largest = max(held, key=part)
        fair = 1 / (len(held) + 1)
        return held[largest][-1] if part(largest) > fair and len(held[largest]) > 1 else None

    def compose(self, limits: Limits, push_out: Callable[[Sequence], None]) -> list[Due]:
        """Choose the tokens of a step: one of each answer under way, then pieces of prompts.

        Args:
            limits: of a step.
            push_out: called with an answer whose pages others need; it must leave the lane.
        """

        def blocks(sequence: Sequence) -> list[int]:
            size = min(_BLOCK_TOKENS, limits.prefill_tokens)
            whole, rest = divmod(sequence.unfed, size)
            return [size] * whole + ([rest] if rest else [])

        for item in self.running:
            self._name_pages(item)
        prompts = self._choose_readers([item for item in self.running if not item.is_decoding])
        # A prompt of which all but the last token was found is decoding now.
        decoding = [item for item in self.running if item.is_decoding]
        prompts = [item for item in prompts if not item.is_decoding]
        singles = _choose(
            self._decode_turns, decoding, cost=lambda _: [1], budget=limits.max_sequences
        )
        budget = limits.prefill_tokens
        if not decoding and any(item.unfed > budget for item in prompts):
            budget *= _ALONE
        pieces = _choose(self._prefill_turns, prompts, cost=blocks, budget=budget)
        work = [_due(sequence, 1) for sequence in singles]
        work += [
            _due(sequence, sum(blocks(sequence)[: pieces.count(sequence)]))
            for sequence in dict.fromkeys(pieces)
        ]
        reserved = [item for item in work if self._reserve(item, push_out)]
        # A later one may have pushed out an earlier one.
        return [item for item in reserved if item.sequence in self.running]

    def compose_ahead(self, chosen: Chosen) -> tuple[list[Due], list[int]] | None:
        """The step after the one whose tokens are chosen but not read.

        Returns:
            A token of each answer that has another one to come, and its place among those chosen.
            None when the step has to be composed of what is known: there are prompts, answers that
            wait for their turn or for pages, or ones whose choice depends on their last token.
        """
        running = {id(item) for item in self.running}
        if running - {id(item) for item in chosen.sequences}:
            return None
        going = [
            (place, item)
            for place, item in enumerate(chosen.sequences)
            if id(item) in running and not item.finished and item.has_more
        ]
        if not going or any(item.needs_its_tokens for _, item in going):
            return None
        for _, item in going:
            missing = pages_for(item.fed + 1) - len(item.pages)
            taken = self.executor.pages.take(max(0, missing))
            if taken is None:
                return None
            item.pages.extend(taken)
        work = [Due(sequence=item, start=item.fed, count=1, rows=1) for _, item in going]
        return work, [place for place, _ in going]

    def _name_pages(self, sequence: Sequence) -> None:
        """Let others find what this answer has read."""
        # A step whose tokens were never known may have been fed.
        n_full = min(sequence.fed, len(sequence.tokens)) // PAGE_TOKENS
        if not self.executor.reads_pages or n_full <= sequence.n_named:
            return
        extend_keys(sequence.page_keys, _owner(sequence), sequence.tokens, n_full)
        for at in range(sequence.n_named, n_full):
            self.executor.pages.name(sequence.pages[at], sequence.page_keys[at])
        sequence.n_named = n_full

    def _choose_readers(self, prompts: list[Sequence]) -> list[Sequence]:
        """Begin prompts behind the pages that are known, and leave out those that gain by waiting.

        A prompt that another answer is reading to its end waits for it, as choices of one request
        do: then it finds all of it.
        """
        if not self.executor.reads_pages:
            return prompts
        kept, readers = [], set()
        # Those that have begun come first, whoever was there first.
        for sequence in sorted(prompts, key=lambda item: not item.fed):
            keys = _keys_to_find(sequence)
            if not sequence.fed:
                if keys and keys[-1] in readers:
                    continue
                sequence.pages.extend(self.executor.pages.find(keys))
                sequence.n_named = len(sequence.pages)
                sequence.fed = sequence.n_named * PAGE_TOKENS
                self.n_found_tokens += sequence.fed
            if sequence.fed < len(keys) * PAGE_TOKENS:
                # The last name stands for the whole text.
                readers.add(keys[-1])
            kept.append(sequence)
        return kept

    def _reserve(self, item: Due, push_out: Callable[[Sequence], None]) -> bool:
        """Give a sequence pages for its next tokens, from the largest holder if none is free."""
        sequence = item.sequence
        if sequence not in self.running:
            # Pushed out by one before it in this step.
            return False
        missing = pages_for(sequence.fed + item.count) - len(sequence.pages)
        while (taken := self.executor.pages.take(max(0, missing))) is None:
            victim = self._find_victim()
            if victim is not None:
                push_out(victim)
            if victim is None or victim is sequence:
                return False
        sequence.pages.extend(taken)
        return True

    def _find_victim(self) -> Sequence | None:
        """The newest answer of the tenant that holds most pages; None when no answer has any."""
        held = self._by_tenant(item for item in self.running if item.pages)
        if not held:
            return None
        largest = max(held, key=lambda name: sum(len(item.pages) for item in held[name]))
        return held[largest][-1]

    @staticmethod
    def _by_tenant(sequences: Iterable[Sequence]) -> dict[str, list[Sequence]]:
        held: dict[str, list[Sequence]] = {}
        for sequence in sequences:
            held.setdefault(sequence.tenant, []).append(sequence)
        return held


def _keys_to_find(sequence: Sequence) -> list[bytes]:
    """Names of the pages an answer may find: its last token is read anyway, for its logits."""
    if sequence.scores_prompt:
        return []
    n_full = (len(sequence.tokens) - 1) // PAGE_TOKENS
    extend_keys(sequence.page_keys, _owner(sequence), sequence.tokens, n_full)
    return sequence.page_keys[:n_full]


def _owner(sequence: Sequence) -> str:
    """Whose numbers its pages hold: the backbone has no slot, and its key is that of its files."""
    return f"{sequence.model.key}/{sequence.model.slot}"


def _choose(
    turns: DeficitRoundRobin,
    sequences: Iterable[Sequence],
    *,
    cost: Callable[[Sequence], list[int]],
    budget: int,
) -> list[Sequence]:
    """Sequences whose turn it is, as often as their items were chosen."""
    items: dict[str, list[tuple[Sequence, int]]] = {}
    for sequence in sequences:
        own = items.setdefault(sequence.tenant, [])
        own.extend((sequence, each) for each in cost(sequence))
    costs = {name: [each for _, each in own] for name, own in items.items()}
    places = {name: iter(own) for name, own in items.items()}
    return [next(places[name])[0] for name in turns.pick(costs, budget=budget)]


def _due(sequence: Sequence, count: int) -> Due:
    return Due(sequence=sequence, start=sequence.fed, count=count, rows=sequence.rows_wanted(count))
