from typing import Any

from django.contrib.auth.models import AnonymousUser
from django.db import models, transaction
from django.db.models.functions import Now

from deltacome_core.errors import InternalError

from .account import User
from .base import UUIDModel
from .repo import Repo, Revision
from .upload import Upload


class LostRace(Exception):  # noqa: N818  the name the code reads by: except LostRace
    """Another process moved the job first; the caller's view of it is stale."""


class JobQuerySet(models.QuerySet["Job"]):
    def visible_to(self, user: User | AnonymousUser) -> "JobQuerySet":
        """Jobs show what people work on: members of the namespace see them, nobody else."""
        if not isinstance(user, User) or not user.is_active:
            return self.none()
        return self.filter(revision__repo__namespace__memberships__user=user)

    def unfinished(self) -> "JobQuerySet":
        return self.filter(state__in=[Job.State.QUEUED, Job.State.RUNNING])


class Job(UUIDModel):
    class Kind(models.TextChoices):
        BACKBONE = "backbone"
        DELTA = "delta"

    class State(models.TextChoices):
        QUEUED = "QUEUED"
        RUNNING = "RUNNING"
        DONE = "DONE"
        FAILED = "FAILED"
        CANCELLED = "CANCELLED"
        REJECTED = "REJECTED"

    kind = models.CharField(max_length=8, choices=Kind)
    owner = models.ForeignKey(User, models.PROTECT, related_name="jobs")
    upload = models.OneToOneField(Upload, models.PROTECT, related_name="job")
    revision = models.OneToOneField(Revision, models.PROTECT, related_name="job")
    state = models.CharField(max_length=10, choices=State, default=State.QUEUED)
    step = models.CharField(max_length=16)
    # Attempts of the current step; counted at the claim, so that a crash counts too.
    attempt = models.PositiveIntegerField(default=0)
    max_attempts = models.PositiveIntegerField(default=3)
    lease_owner = models.CharField(max_length=100, blank=True)
    # The fence: rises with every move that takes the job from somebody.
    lease_seq = models.BigIntegerField(default=0)
    lease_expires_at = models.DateTimeField(null=True)
    heartbeat_at = models.DateTimeField(null=True)
    run_after = models.DateTimeField(db_default=Now())
    progress = models.JSONField(default=dict)
    error_code = models.CharField(max_length=64, blank=True)
    error_params = models.JSONField(default=dict)
    error_text = models.TextField(blank=True)
    last_enqueued_at = models.DateTimeField(null=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    finished_at = models.DateTimeField(null=True)

    objects = JobQuerySet.as_manager()
    # What this process recorded last; not read from the database.
    last_event: "JobEvent"

    class Meta:
        # No index on heartbeat columns: they change every few seconds for every running job.
        indexes = [
            models.Index(
                fields=["state"],
                name="job_unfinished",
                condition=models.Q(state__in=["QUEUED", "RUNNING"]),
            ),
            models.Index(fields=["owner", "-id"], name="job_by_owner"),
        ]

    def __str__(self) -> str:
        return f"job {self.id} {self.state} {self.step}"

    @property
    def repo(self) -> Repo:
        return self.revision.repo

    @property
    def is_finished(self) -> bool:
        return self.state not in {Job.State.QUEUED, Job.State.RUNNING}

    def move(self, to: str, *, guard: models.Q | None = None, **fields: Any) -> None:
        """Change the state if nobody did since this row was read, and leave a JobEvent.

        Raises:
            LostRace: state or fence changed meanwhile, or the guard does not hold.
        """
        if to not in TRANSITIONS[Job.State(self.state)]:
            raise InternalError(f"No transition {self.state} -> {to}.")
        old = self.state
        if to not in {Job.State.QUEUED, Job.State.RUNNING}:
            fields.setdefault("finished_at", Now())
        with transaction.atomic():
            row = Job.objects.filter(pk=self.pk, state=old, lease_seq=self.lease_seq)
            if not row.filter(guard or models.Q()).update(state=to, **fields):
                raise LostRace(f"{self} -> {to}")
            self.refresh_from_db()
            self.record(old=old)

    def record(self, *, old: str = "") -> None:
        """Leave a JobEvent that tells the state of this row."""
        self.last_event = self.events.create(
            old=old, new=self.state, step=self.step, attempt=self.attempt, code=self.error_code
        )


TRANSITIONS: dict[Job.State, frozenset[Job.State]] = {
    # A queued job that is out of attempts fails without running again.
    Job.State.QUEUED: frozenset({Job.State.RUNNING, Job.State.CANCELLED, Job.State.FAILED}),
    # RUNNING -> RUNNING is the takeover of an expired lease.
    Job.State.RUNNING: frozenset(Job.State),
    Job.State.FAILED: frozenset({Job.State.QUEUED}),
    Job.State.CANCELLED: frozenset({Job.State.QUEUED}),
    Job.State.REJECTED: frozenset(),
    Job.State.DONE: frozenset(),
}


class JobStep(UUIDModel):
    """What a finished step left: a later attempt of the job starts after it."""

    job = models.ForeignKey(Job, models.CASCADE, related_name="steps")
    name = models.CharField(max_length=16)
    attempt = models.PositiveIntegerField()
    outputs = models.JSONField()
    seconds = models.FloatField()
    finished_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["job", "name"], name="one_row_per_step")]

    def __str__(self) -> str:
        return f"{self.job_id} {self.name}"


class JobEvent(models.Model):
    job = models.ForeignKey(Job, models.CASCADE, related_name="events")
    old = models.CharField(max_length=10, blank=True)
    new = models.CharField(max_length=10)
    step = models.CharField(max_length=16)
    attempt = models.PositiveIntegerField()
    code = models.CharField(max_length=64, blank=True)
    at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        indexes = [models.Index(fields=["job", "id"], name="event_by_job")]
        ordering = ["id"]

    def __str__(self) -> str:
        return f"{self.old} -> {self.new} ({self.step})"
