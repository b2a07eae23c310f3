"""Train what a delta stores, the codes of matrices fixed, so that it answers like its source.

With s the strength of each direction of a matrix, n the weights of norms, and coordinates, their
scales, basis and base scale of a vocabulary, all written as relative changes x that start at 0,
this minimises

    sum over parts p of  KL_p(x) / KL_p(0),   KL_p = mean over places of KL(fine-tune || delta)

where the parts are answers, prompts and general text. The fine-tune runs once over all texts and
leaves only its last states and its output head; then backbone and factors take its place.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import kl_div

from deltacome_core.batches import cut_batches
from deltacome_core.checkpoint import Checkpoint
from deltacome_core.container import Delta
from deltacome_core.distil_schedule import SMALL_PARAMS, choose_schedule, limit_steps
from deltacome_core.distil_texts import Batch, Row, make_batch, split_judge
from deltacome_core.entries import LowRankEntry, UnchangedEntry
from deltacome_core.errors import UserError
from deltacome_core.models import compute_dtype
from deltacome_core.packed import PackedTensor
from deltacome_core.student import CheckpointWeights, DeltaWeights, TextModel

_WARM_SHARE, _N_CHECKS = 0.1, 5
# Places whose logits are in memory at once: each takes a row of the vocabulary's length, twice.
_PLACES_AT_ONCE = 2048
_SEED = 7
_BETAS = (0.9, 0.98)
# Share of a kind's root mean square gradient in Adam's denominator: where gradients are far below
# those of their kind, noise must not move a number as far as the others.
_FLOOR = 0.5
_LEAST_KL = 1e-9
NOTHING_TO_TRAIN, NO_OWN_TEXT, NOT_BETTER = "nothing_to_train", "no_own_text", "not_better"
_NEEDS_TEXT = (
    "Put a calibration.jsonl beside the fine-tune's weights: a few thousand items of "
    '{"prompt", "answer"} like those it answers.'
)
OnStep = Callable[[int, int], None]
"""Told after each step how many are done, and how many there are."""
_UNTRAINABLE = {"architecture_unknown", "model_not_runnable", "activations_not_finite"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilReport:
    """What training a delta gave.

    kl_before and kl_after: nats per token on text that was held out, by part; of the delta as it
    was and as it is, no part worse. is_kept: whether the trained numbers are in the delta; reason:
    why not.
    """

    is_kept: bool
    reason: str | None
    steps: int
    seconds: float
    kl_before: dict[str, float]
    kl_after: dict[str, float]
    n_trained_matrices: int
    n_other_matrices: int
    n_trained_vocabularies: int
    n_trained_norms: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """Say in a line what training gave, in nats per token of held-out text."""
        if not self.is_kept:
            told = f"Not distilled ({self.reason}): the delta is as hub makes it."
            return told if self.reason != NO_OWN_TEXT else f"{told} {_NEEDS_TEXT}"
        changes = ", ".join(
            f"{part} {before:.2e} to {self.kl_after[part]:.2e}"
            for part, before in self.kl_before.items()
        )
        return f"Distilled in {self.seconds:.1f} s: {changes}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """The tensors that changed, on the host, and the report."""

    tensors: dict[str, PackedTensor]
    report: DistilReport


def distil_delta(
    backbone: Checkpoint,
    tuned: Checkpoint,
    delta: Delta,
    rows: Sequence[Row],
    *,
    device: torch.device,
    on_step: OnStep,
) -> Distilled:
    """Train a delta on the fine-tune's own distributions.

    Args:
        backbone: at the precision that it is served with.
        tuned: the fine-tune.
        delta: of both; not changed.
        rows: text, a tenth of which judges; with general text alone nothing is trained. On a GPU
            backbone and factors must fit the device.
        device: where the models run, one after the other.
        on_step: told about each step.

    Returns:
        New tensors for the delta; none, with the reason, where the model cannot run here or the
        held-out text says that training did not help.
    """
    started = time.monotonic()
    if all(isinstance(entry, UnchangedEntry) for entry in delta.entries.values()):
        return Distilled(tensors={}, report=_report(delta, started, reason=NOTHING_TO_TRAIN))
    if all(row.is_general for row in rows):
        # It gained little, and on one task of six it lost threefold, which no general text shows.
        return Distilled(tensors={}, report=_report(delta, started, reason=NO_OWN_TEXT))
    try:
        with _arithmetic():
            tensors, found = _Distiller(backbone, tuned, delta, rows, device).run(on_step)
    except UserError as error:
        if error.code not in _UNTRAINABLE:
            raise
        tensors, found = {}, {"reason": error.code}
    return Distilled(tensors=tensors, report=_report(delta, started, **found))


def _report(delta: Delta, started: float, **found: Any) -> DistilReport:
    """Fill in what a run that stopped early does not say."""
    nothing: dict[str, Any] = {
        "reason": None,
        "steps": 0,
        "kl_before": {},
        "kl_after": {},
        "n_trained_matrices": 0,
        "n_other_matrices": _count_matrices(delta),
        "n_trained_vocabularies": 0,
        "n_trained_norms": 0,
    }
    told = nothing | found
    return DistilReport(is_kept=told["reason"] is None, seconds=time.monotonic() - started, **told)


def _count_matrices(delta: Delta) -> int:
    return sum(
        entry.n_slices for entry in delta.entries.values() if isinstance(entry, LowRankEntry)
    )


@contextmanager
def _arithmetic() -> Iterator[None]:
    """TF32 for fine-tune and delta alike, and attention that gives the same bits every time."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _compare(now: dict[str, float], first: dict[str, float]) -> float:
    """Sum over parts of KL over its first value; infinite if any part got worse.

    What prompts and general text gain must not pay for answers that were learnt by heart.
    """
    ratios = [kl / max(first[part], _LEAST_KL) for part, kl in now.items()]
    return sum(ratios) if all(ratio <= 1 for ratio in ratios) else math.inf


class _Adam:
    """Adam whose denominator has a floor, over relative changes by kind."""

    def __init__(self, changes: dict[str, torch.Tensor]) -> None:
        self._changes = changes
        self._means = {kind: torch.zeros_like(each) for kind, each in changes.items()}
        self._squares = {kind: torch.zeros_like(each) for kind, each in changes.items()}
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: dict[str, torch.Tensor], rate: float) -> None:
        self._steps += 1
        slow, slower = _BETAS
        for kind, gradient in gradients.items():
            mean = self._means[kind].lerp_(gradient, 1 - slow)
            square = self._squares[kind].lerp_(gradient.square(), 1 - slower)
            size = (square / (1 - slower**self._steps)).sqrt()
            floor = _FLOOR * size.square().mean().sqrt() + 1e-12
            move = mean / (1 - slow**self._steps) / (size + floor)
            self._changes[kind].sub_(rate * move)


class _Distiller:
    """One delta, its rows of text, and the fine-tune's states of them."""

    def __init__(
        self,
        backbone: Checkpoint,
        tuned: Checkpoint,
        delta: Delta,
        rows: Sequence[Row],
        device: torch.device,
    ) -> None:
        self._rows, self._device, self._delta = rows, device, delta
        self._schedule = choose_schedule(tuned.n_params, device)
        self._starts = [0]
        for row in rows:
            self._starts.append(self._starts[-1] + len(row.tokens))
        is_small = tuned.n_params <= SMALL_PARAMS
        held = torch.float32 if is_small else compute_dtype(tuned, torch.device("cuda"))
        load = partial(TextModel, tuned, held=held, device=device, saves_memory=not is_small)
        self._teacher = load(CheckpointWeights(checkpoint=tuned))
        self._targets = self._read_states()
        self._teacher.drop_layers()
        self._student = load(DeltaWeights(backbone=backbone, delta=delta, device=device))
        self._sets: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for name, each in self._student.trainable.items():
            for kind, shape in each.numbers.items():
                self._sets.setdefault(kind, []).append((name, shape))
        own = split_judge([at for at, row in enumerate(rows) if not row.is_general])
        general = split_judge([at for at, row in enumerate(rows) if row.is_general])
        self._main, self._beside = own[0], general[0]
        self._judge_rows = own[1] + general[1]
        lengths = [len(rows[at].tokens) for at in self._main]
        self._schedule = limit_steps(self._schedule, lengths)

    @torch.no_grad()
    def _read_states(self) -> torch.Tensor:
        """Run the fine-tune over all rows: float32 [tokens, hidden], rows without padding."""
        found: torch.Tensor | None = None
        for chosen in self._cut(range(len(self._rows))):
            batch = self._batch(chosen)
            states = self._teacher.states(batch.ids)
            if found is None:
                found = torch.empty((self._starts[-1], states.shape[-1]), device=self._device)
            for number, at in enumerate(chosen):
                size = len(self._rows[at].tokens)
                found[self._starts[at] : self._starts[at] + size] = states[number, :size]
        if found is None or not bool(torch.isfinite(found).all()):
            raise UserError("activations_not_finite", layer="the last layer")
        return found

    def _cut(self, chosen: Sequence[int]) -> Iterator[list[int]]:
        return cut_batches(
            self._rows,
            chosen,
            max_rows=self._schedule.rows,
            max_tokens=self._schedule.max_tokens,
        )

    def _batch(self, chosen: Sequence[int]) -> Batch:
        starts = [self._starts[at] for at in chosen]
        return make_batch([self._rows[at] for at in chosen], starts, self._device)

    def _use(self, changes: dict[str, torch.Tensor]) -> None:
        for name, pieces in self._split(changes).items():
            self._student.trainable[name].use(pieces)

    def _split(self, changes: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Cut the changes of each kind into those of its tensors."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for kind, sets in self._sets.items():
            pieces = torch.split(changes[kind], [math.prod(shape) for _, shape in sets])
            for (name, shape), piece in zip(sets, pieces, strict=True):
                found.setdefault(name, {})[kind] = piece.view(shape)
        return found

    def _divergence(
        self, chosen: Sequence[int], generator: torch.Generator | None = None
    ) -> dict[str, tuple[torch.Tensor, int]]:
        """KL(fine-tune || delta) of some rows by part: its sum and how many places it has.

        With a generator no more places are looked at than a step does.
        """
        batch = self._batch(chosen)
        states = self._student.states(batch.ids).flatten(0, 1)
        found = {}
        for part, places in batch.places.items():
            order = torch.arange(len(places))
            if generator is not None and len(places) > self._schedule.max_places:
                order = torch.randperm(len(places), generator=generator)[
                    : self._schedule.max_places
                ]
            total = torch.zeros((), device=self._device)
            for some in torch.split(order, _PLACES_AT_ONCE):
                theirs = self._student.logits(states[places[some].to(self._device)])
                with torch.no_grad():
                    targets = self._targets[batch.targets[part][some].to(self._device)]
                    ours = self._teacher.logits(targets).log_softmax(dim=-1)
                theirs = theirs.log_softmax(dim=-1)
                total = total + kl_div(theirs, ours, log_target=True, reduction="sum")
            found[part] = total, len(order)
        return found

    @torch.no_grad()
    def _judge(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for chosen in self._cut(self._judge_rows):
            for part, (total, n_places) in self._divergence(chosen).items():
                sums[part] = sums.get(part, 0.0) + float(total)
                counts[part] = counts.get(part, 0) + n_places
        return {part: sums[part] / counts[part] for part in sums}

    def _draw(self, generator: torch.Generator) -> list[list[int]]:
        """Choose the rows of a step, batch by batch: own ones, and some general text beside."""

        def shuffle(rows: Sequence[int]) -> list[int]:
            return [rows[at] for at in torch.randperm(len(rows), generator=generator).tolist()]

        chosen = next(self._cut(shuffle(self._main)))
        beside = shuffle(self._beside)[: self._schedule.beside]
        if beside and self._schedule.is_joined:
            # Long rows of the user's would make wide ones of the general text.
            longest = max(len(self._rows[at].tokens) for at in chosen)
            room = self._schedule.max_tokens // (2 * longest)
            return [chosen + beside[: max(1, room)]]
        return [chosen, beside] if beside else [chosen]

    def run(self, on_step: OnStep) -> tuple[dict[str, PackedTensor], dict[str, Any]]:
        """Train; return the tensors of the best check and what the report says."""
        changes = {
            kind: torch.zeros(sum(math.prod(shape) for _, shape in sets), device=self._device)
            for kind, sets in self._sets.items()
        }
        self._use(changes)
        first = self._judge()
        if not self._sets:
            return {}, {"reason": NOTHING_TO_TRAIN, "kl_before": first, "kl_after": first}
        best, best_kl = self._train(changes, first, on_step)
        found = {
            "steps": self._schedule.steps,
            "kl_before": first,
            "kl_after": best_kl,
        } | self._count()
        if best is None:
            return {}, found | {"reason": NOT_BETTER}
        split = self._split(best)
        return {name: self._student.trainable[name].pack(split[name]) for name in split}, found

    def _train(
        self, changes: dict[str, torch.Tensor], first: dict[str, float], on_step: OnStep
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, float]]:
        """Warm up, then let the rate fall to 0; give the changes that judged best, if any did."""
        generator = torch.Generator().manual_seed(_SEED)
        adam, n_steps = _Adam(changes), self._schedule.steps
        checks = {n_steps * check // _N_CHECKS for check in range(1, _N_CHECKS + 1)}
        best, best_kl, least = None, first, float(len(first))
        for step in range(1, n_steps + 1):
            free = {kind: each.detach().requires_grad_() for kind, each in changes.items()}
            self._use(free)
            loss = torch.zeros((), device=self._device)
            for chosen in self._draw(generator):
                for part, (total, n_places) in self._divergence(chosen, generator).items():
                    if part in first:
                        loss = loss + total / n_places / max(first[part], _LEAST_KL)
            gradients = torch.autograd.grad(
                loss, list(free.values()), allow_unused=True, materialize_grads=True
            )
            adam.step(
                dict(zip(free, gradients, strict=True)),
                self._schedule.rate * min(step / (_WARM_SHARE * n_steps), 1 - (step - 1) / n_steps),
            )
            on_step(step, n_steps)
            if step in checks:
                self._use(changes)
                now = self._judge()
                value = _compare(now, first)
                if value < least:
                    best = {kind: each.clone() for kind, each in changes.items()}
                    best_kl, least = now, value
        return best, best_kl

    def _count(self) -> dict[str, int]:
        names = self._student.trainable
        kinds = [next(iter(each.numbers)).partition(".")[0] for each in names.values()]
        matrices = kinds.count("sigma")
        return {
            "n_trained_matrices": matrices,
            "n_other_matrices": _count_matrices(self._delta) - matrices,
            "n_trained_vocabularies": kinds.count("scales"),
            "n_trained_norms": kinds.count("norm"),
        }
