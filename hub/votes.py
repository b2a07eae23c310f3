"""Which of two answers people like better when they do not know whose it is."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import comb

from django.db.models import Q

from deltacome_core.errors import UserError
from hub.access import AnyUser
from hub.inference import Model, find_model
from hub.models import Repo, Revision, User, Vote

Outcome = Vote.Outcome
_MIRRORED = {Outcome.LEFT: Outcome.RIGHT, Outcome.RIGHT: Outcome.LEFT, Outcome.TIE: Outcome.TIE}
Side = tuple[Revision, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Votes on a model against one opponent; `opponent` is empty where one may not know it."""

    opponent: str
    wins: int
    losses: int
    ties: int

    @property
    def n(self) -> int:
        return self.wins + self.losses + self.ties

    @property
    def p(self) -> float:
        """How likely so uneven a count is if both are equally good (sign test, ties left out)."""
        n, most = self.wins + self.losses, max(self.wins, self.losses)
        tail = sum(comb(n, k) for k in range(most, n + 1)) / (1 << n)
        return min(1.0, 2 * tail)


def record_vote(user: User, *, left: str, right: str, outcome: str, question: str) -> Tally:
    """Count a vote, in place of an earlier one on the same question; return `left`'s tally.

    Raises:
        UserError: not_found, revision_unknown, finetune_gone; vote_invalid for a model against
            itself.
    """
    ours, theirs = find_model(user, left), find_model(user, right)
    if ours == theirs:
        raise UserError("vote_invalid", model=ours.name)
    sides = (ours, theirs)
    if _order(theirs) < _order(ours):
        sides, outcome = (theirs, ours), _MIRRORED[Outcome(outcome)]
    Vote.objects.update_or_create(
        user=user,
        left=sides[0].revision,
        left_is_finetune=sides[0].is_finetune,
        right=sides[1].revision,
        right_is_finetune=sides[1].is_finetune,
        question_sha256=hashlib.sha256(question.encode()).hexdigest(),
        defaults={"outcome": outcome},
    )
    counted = _count(_votes_on(ours))
    return _tally(theirs.name, counted[theirs.revision, theirs.is_finetune])


def list_tallies(user: AnyUser, revision: Revision) -> list[Tally]:
    """Count the votes on a delta by opponent, the most voted first."""
    counted = _count(_votes_on(Model(revision=revision)))
    visible = set(
        Repo.objects.visible_to(user)
        .filter(pk__in={opponent.repo_id for opponent, _ in counted})
        .values_list("pk", flat=True)
    )
    tallies = []
    for (opponent, is_finetune), outcomes in counted.items():
        name = Model(revision=opponent, is_finetune=is_finetune).name
        tallies.append(_tally(name if opponent.repo_id in visible else "", outcomes))
    return sorted(tallies, key=lambda tally: -tally.n)


def _order(model: Model) -> tuple[str, bool]:
    return str(model.revision.pk), model.is_finetune


def _votes_on(model: Model) -> Iterable[tuple[Side, str]]:
    """Each vote as the opponent and the outcome, `left` being the model's win."""
    is_left = Q(left=model.revision, left_is_finetune=model.is_finetune)
    is_right = Q(right=model.revision, right_is_finetune=model.is_finetune)
    rows = Vote.objects.filter(is_left | is_right).select_related(
        "left__repo__namespace", "right__repo__namespace"
    )
    for vote in rows:
        if (vote.left_id, vote.left_is_finetune) == (model.revision.pk, model.is_finetune):
            yield (vote.right, vote.right_is_finetune), vote.outcome
        else:
            yield (vote.left, vote.left_is_finetune), _MIRRORED[Outcome(vote.outcome)]


def _count(votes: Iterable[tuple[Side, str]]) -> dict[Side, list[str]]:
    counted: dict[Side, list[str]] = {}
    for opponent, outcome in votes:
        counted.setdefault(opponent, []).append(outcome)
    return counted


def _tally(opponent: str, outcomes: list[str]) -> Tally:
    return Tally(
        opponent=opponent,
        wins=outcomes.count(Outcome.LEFT),
        losses=outcomes.count(Outcome.RIGHT),
        ties=outcomes.count(Outcome.TIE),
    )
