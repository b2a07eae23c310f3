"""A revision appears at once, in one transaction, and never changes afterwards."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import Max
from django.db.models.functions import Now

from deltacome_core.errors import UserError
from hub import audit, catalog, jobs
from hub.models import (
    Alias,
    ApiToken,
    Evaluation,
    File,
    Repo,
    Revision,
    User,
    Verification,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    task: str
    subject: str
    accuracy: float
    n: int
    se: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    grade: str
    recovery: float
    kl: float
    top1: float
    ppl_ratio: float
    report: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What a revision will be; every file's bytes are blobs already."""

    files: Mapping[str, str]
    checkpoint_digest: str
    architecture: str
    dtype: str
    size_bytes: int
    source_size_bytes: int
    n_params: int
    bits_per_param: float
    recipe: Mapping[str, Any] = field(default_factory=dict)
    backbone_id: UUID | None = None
    verification: Grade | None = None
    evaluations: Sequence[Score] = ()

    def digest(self, kind: str, backbone_digest: str | None) -> str:
        """Return the sha256 of the canonical manifest: what it is, on what, with which bytes."""
        manifest = {
            "kind": kind,
            "backbone": backbone_digest,
            "checkpoint": self.checkpoint_digest,
            "recipe": dict(self.recipe),
            "files": dict(self.files),
        }
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def publish_revision(
    lease: jobs.Lease, publication: Publication, *, seconds: float = 0.0
) -> Revision:
    """Publish the job's draft and finish the job, all or nothing.

    Raises:
        LeaseLost: somebody else holds the job now.
        UserError: digest_published.
    """
    with transaction.atomic():
        job = jobs.hold(lease)
        revision = Revision.objects.select_related("repo__namespace").get(pk=job.revision_id)
        # The repo's row is the lock under which numbers are given.
        Repo.objects.select_for_update().get(pk=revision.repo_id)
        _fill(revision, publication)
        _refuse_second(revision)
        last = revision.repo.revisions.aggregate(last=Max("number"))["last"] or 0
        revision.number = last + 1
        revision.state = Revision.State.PUBLISHED
        revision.save(update_fields=[*_PUBLISHED_FIELDS, "number", "state"])
        Revision.objects.filter(pk=revision.pk).update(published_at=Now())
        _attach(revision, publication)
        Repo.objects.filter(pk=revision.repo_id).update(updated_at=Now())
        audit.record(job.owner, "publish", str(revision), detail={"digest": revision.digest})
        outputs = {"revision": str(revision), "digest": revision.digest}
        jobs.complete_step(lease, outputs=outputs, seconds=seconds)
    revision.refresh_from_db()
    return revision


_PUBLISHED_FIELDS = (
    "digest",
    "backbone",
    "recipe",
    "checkpoint_digest",
    "architecture",
    "dtype",
    "size_bytes",
    "source_size_bytes",
    "n_params",
    "bits_per_param",
)


def _fill(revision: Revision, publication: Publication) -> None:
    for name in _PUBLISHED_FIELDS[3:]:
        setattr(revision, name, getattr(publication, name))
    revision.recipe = dict(publication.recipe)
    revision.backbone_id = publication.backbone_id
    backbone_digest = revision.backbone.digest if revision.backbone else None
    revision.digest = publication.digest(revision.repo.kind, backbone_digest)


def _refuse_second(revision: Revision) -> None:
    same = revision.repo.revisions.filter(digest=revision.digest).exclude(pk=revision.pk).first()
    if same is not None:
        raise UserError("digest_published", revision=str(same))


def _attach(revision: Revision, publication: Publication) -> None:
    File.objects.filter(revision=revision).delete()
    File.objects.bulk_create(
        File(revision=revision, path=path, blob_id=sha256)
        for path, sha256 in sorted(publication.files.items())
    )
    grade = publication.verification
    if grade is not None:
        Verification.objects.create(
            revision=revision,
            grade=grade.grade,
            recovery=grade.recovery,
            kl=grade.kl,
            top1=grade.top1,
            ppl_ratio=grade.ppl_ratio,
            report=dict(grade.report),
        )
    Evaluation.objects.bulk_create(
        Evaluation(
            revision=revision,
            task=score.task,
            subject=score.subject,
            accuracy=score.accuracy,
            n=score.n,
            se=score.se,
        )
        for score in publication.evaluations
    )


def yank_revision(
    revision: Revision, actor: User, *, reason: str, token: ApiToken | None = None
) -> None:
    """Hide a revision from `latest` and from lists; exact names still resolve.

    Raises:
        UserError: state_conflict.
    """
    with transaction.atomic():
        row = Revision.objects.published().filter(pk=revision.pk)
        if not row.update(state=Revision.State.YANKED, yank_reason=reason):
            state = revision.state.lower()
            raise UserError("state_conflict", revision=str(revision), state=state)
        audit.record(actor, "yank", str(revision), token=token, detail={"reason": reason})
    revision.refresh_from_db()


def set_alias(
    repo: Repo, name: str, revision: Revision, actor: User, *, token: ApiToken | None = None
) -> Alias:
    """Point a name of the repo at a revision.

    Raises:
        UserError: name_unsafe for a name that means something else.
    """
    alias = Alias(repo=repo, name=name, revision=revision)
    try:
        alias.clean_fields()
    except ValidationError:
        raise UserError("name_unsafe", name=ascii(name[:80])) from None
    if name == catalog.LATEST or catalog.NUMBER.match(name):
        raise UserError("name_unsafe", name=name)
    with transaction.atomic():
        alias, _ = Alias.objects.update_or_create(
            repo=repo, name=name, defaults={"revision": revision}
        )
        audit.record(actor, "alias", str(revision), token=token, detail={"name": name})
    return alias


def update_repo(
    repo: Repo,
    actor: User,
    *,
    description: str | None = None,
    visibility: str | None = None,
    token: ApiToken | None = None,
) -> None:
    fields = {"description": description, "visibility": visibility}
    changed = {name: value for name, value in fields.items() if value is not None}
    with transaction.atomic():
        Repo.objects.filter(pk=repo.pk).update(updated_at=Now(), **changed)
        if visibility is not None and visibility != repo.visibility:
            detail = {"from": repo.visibility, "to": visibility}
            audit.record(actor, "visibility", str(repo), token=token, detail=detail)
    repo.refresh_from_db()
