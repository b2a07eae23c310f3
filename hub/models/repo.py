from django.contrib.auth.models import AnonymousUser
from django.core.validators import RegexValidator
from django.db import models
from django.db.models.functions import Lower, Now

from .account import Membership, Namespace, User
from .base import UUIDModel

validate_sha256 = RegexValidator(r"\A[0-9a-f]{64}\Z", "A sha256 digest has 64 hex digits.")
validate_repo_name = RegexValidator(
    r"\A[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?\Z",
    "Use letters, digits, dots, dashes and underscores, up to 96 of them.",
)


class RepoQuerySet(models.QuerySet["Repo"]):
    def visible_to(self, user: User | AnonymousUser) -> "RepoQuerySet":
        public = models.Q(visibility=Repo.Visibility.PUBLIC)
        if not isinstance(user, User) or not user.is_active:
            return self.filter(public)
        mine = Membership.objects.filter(user=user).values("namespace")
        return self.filter(public | models.Q(namespace__in=mine))

    def kept(self) -> "RepoQuerySet":
        """Leave out names of which nothing is left: each upload was aborted or has expired."""
        same = Repo.objects.filter(pk=models.OuterRef("pk"))
        is_filled = models.Exists(same.filter(revisions__isnull=False))
        is_arriving = models.Exists(same.filter(uploads__state="OPEN"))
        is_new = ~models.Exists(same.filter(uploads__isnull=False))
        return self.filter(is_filled | is_arriving | is_new)

    def named(self, namespace: str, name: str) -> "RepoQuerySet":
        return self.filter(namespace__name__iexact=namespace, name__iexact=name)


class Repo(UUIDModel):
    class Kind(models.TextChoices):
        BACKBONE = "backbone"
        DELTA = "delta"

    class Visibility(models.TextChoices):
        PUBLIC = "public"
        PRIVATE = "private"

    namespace = models.ForeignKey(Namespace, models.PROTECT, related_name="repos")
    name = models.CharField(max_length=96, validators=[validate_repo_name])
    kind = models.CharField(max_length=8, choices=Kind)
    visibility = models.CharField(max_length=8, choices=Visibility, default=Visibility.PRIVATE)
    description = models.TextField(max_length=10_000, blank=True)
    created_by = models.ForeignKey(User, models.PROTECT, related_name="+")
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    updated_at = models.DateTimeField(db_default=Now())

    objects = RepoQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint("namespace", Lower("name"), name="repo_name_any_case")
        ]
        indexes = [models.Index(fields=["kind", "-id"], name="repo_by_kind")]

    def __str__(self) -> str:
        return f"{self.namespace.name}/{self.name}"


class Blob(models.Model):
    sha256 = models.CharField(max_length=64, primary_key=True, validators=[validate_sha256])
    size_bytes = models.BigIntegerField()
    # Moves forward whenever content is offered again, so that pruning never races a writer.
    touched_at = models.DateTimeField(db_default=Now())

    def __str__(self) -> str:
        return f"sha256:{self.sha256}"


class RevisionQuerySet(models.QuerySet["Revision"]):
    def visible_to(self, user: User | AnonymousUser) -> "RevisionQuerySet":
        return self.filter(repo__in=Repo.objects.visible_to(user))

    def published(self) -> "RevisionQuerySet":
        return self.filter(state=Revision.State.PUBLISHED)

    def downloadable(self) -> "RevisionQuerySet":
        """Yanked revisions stay resolvable, so that what was built on them still can be."""
        return self.filter(state__in=[Revision.State.PUBLISHED, Revision.State.YANKED])


class Revision(UUIDModel):
    class State(models.TextChoices):
        DRAFT = "DRAFT"
        PUBLISHED = "PUBLISHED"
        YANKED = "YANKED"
        REJECTED = "REJECTED"

    repo = models.ForeignKey(Repo, models.PROTECT, related_name="revisions")
    # Number and digest exist once published: drafts and rejected ones leave no gaps.
    number = models.PositiveIntegerField(null=True)
    digest = models.CharField(max_length=64, null=True, validators=[validate_sha256])  # noqa: DJ001  NULL is what lets drafts share a unique constraint
    state = models.CharField(max_length=10, choices=State, default=State.DRAFT)
    backbone = models.ForeignKey("self", models.PROTECT, null=True, related_name="deltas")
    recipe = models.JSONField(default=dict)
    # Digest of the weights: the backbone's own, or those of the fine-tune that became a delta.
    checkpoint_digest = models.CharField(max_length=64, blank=True, db_index=True)
    architecture = models.CharField(max_length=100, blank=True)
    dtype = models.CharField(max_length=16, blank=True)
    size_bytes = models.BigIntegerField(default=0)
    source_size_bytes = models.BigIntegerField(default=0)
    n_params = models.BigIntegerField(default=0)
    bits_per_param = models.FloatField(default=0.0)
    reject_code = models.CharField(max_length=64, blank=True)
    reject_text = models.TextField(blank=True)
    yank_reason = models.TextField(blank=True)
    created_by = models.ForeignKey(User, models.PROTECT, related_name="+")
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    published_at = models.DateTimeField(null=True)

    objects = RevisionQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["repo", "number"], name="revision_number"),
            models.UniqueConstraint(fields=["repo", "digest"], name="revision_digest"),
        ]

    def __str__(self) -> str:
        return f"{self.repo}@{self.label}"

    @property
    def label(self) -> str:
        return f"v{self.number}" if self.number else self.state.lower()

    @property
    def ratio(self) -> float:
        """Whole-file bytes of the source over whole-file bytes of this revision."""
        return self.source_size_bytes / self.size_bytes if self.size_bytes else 0.0


class File(UUIDModel):
    revision = models.ForeignKey(Revision, models.CASCADE, related_name="files")
    path = models.CharField(max_length=200)
    blob = models.ForeignKey(Blob, models.PROTECT, related_name="files")

    class Meta:
        constraints = [models.UniqueConstraint(fields=["revision", "path"], name="file_path")]

    def __str__(self) -> str:
        return self.path


class Alias(UUIDModel):
    repo = models.ForeignKey(Repo, models.CASCADE, related_name="aliases")
    name = models.CharField(max_length=63, validators=[validate_repo_name])
    revision = models.ForeignKey(Revision, models.PROTECT, related_name="aliases")

    class Meta:
        constraints = [models.UniqueConstraint(fields=["repo", "name"], name="alias_name")]

    def __str__(self) -> str:
        return f"{self.repo}@{self.name}"


class Verification(UUIDModel):
    revision = models.OneToOneField(Revision, models.CASCADE, related_name="verification")
    grade = models.CharField(max_length=1)
    recovery = models.FloatField()
    kl = models.FloatField()
    top1 = models.FloatField()
    ppl_ratio = models.FloatField()
    report = models.JSONField()
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    def __str__(self) -> str:
        return f"{self.revision} grade {self.grade}"


class Evaluation(UUIDModel):
    class Subject(models.TextChoices):
        BACKBONE = "backbone"
        FINETUNE = "finetune"
        DELTA = "delta"

    revision = models.ForeignKey(Revision, models.CASCADE, related_name="evaluations")
    task = models.CharField(max_length=100)
    subject = models.CharField(max_length=8, choices=Subject)
    accuracy = models.FloatField()
    n = models.PositiveIntegerField()
    se = models.FloatField()

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["revision", "task", "subject"], name="one_score_per_subject"
            )
        ]

    def __str__(self) -> str:
        return f"{self.task} {self.subject} {self.accuracy:.3f}"
