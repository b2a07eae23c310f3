from django.contrib.auth.models import AbstractUser
from django.core.validators import RegexValidator
from django.db import models
from django.db.models.functions import Lower, Now

from .base import UUIDModel, uuid7

NAME_PATTERN = r"\A[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?\Z"
# First segments of our own URLs: a namespace of that name would be unreachable.
RESERVED_NAMES = frozenset(
    {
        *("accounts", "admin", "api", "d", "docs", "explore", "favicon.ico", "healthz", "jobs"),
        *("new", "planner", "playground", "readyz", "robots.txt", "settings", "static", "uploads"),
        *("v1", "about", "help", "login", "logout", "signup", "search", "compare", "backbones"),
    }
)
validate_name = RegexValidator(
    NAME_PATTERN, "Use letters, digits, dots, dashes and underscores, up to 63 of them."
)


class User(AbstractUser):
    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)

    class Meta:
        constraints = [models.UniqueConstraint(Lower("username"), name="user_name_any_case")]


class Namespace(UUIDModel):
    class Kind(models.TextChoices):
        USER = "user"
        ORG = "org"

    name = models.CharField(max_length=63, validators=[validate_name])
    kind = models.CharField(max_length=8, choices=Kind, default=Kind.USER)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        constraints = [models.UniqueConstraint(Lower("name"), name="namespace_name_any_case")]

    def __str__(self) -> str:
        return self.name


class Membership(UUIDModel):
    class Role(models.TextChoices):
        OWNER = "owner"
        MAINTAINER = "maintainer"
        READER = "reader"

    namespace = models.ForeignKey(Namespace, models.CASCADE, related_name="memberships")
    user = models.ForeignKey(User, models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=16, choices=Role)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["namespace", "user"], name="one_role")]

    def __str__(self) -> str:
        return f"{self.user} {self.role} of {self.namespace}"


class ApiToken(UUIDModel):
    class Scope(models.TextChoices):
        READ = "read"
        WRITE = "write"
        # Ask models and nothing else: the key of an application that serves strangers.
        INFER = "infer"
        # Say who is in the organisations one owns: more than what a pipeline's token should do.
        MEMBERS = "members"

    user = models.ForeignKey(User, models.CASCADE, related_name="tokens")
    name = models.CharField(max_length=100)
    prefix = models.CharField(max_length=12)
    digest = models.CharField(max_length=64, unique=True)
    scopes = models.JSONField(default=list)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    expires_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)

    def __str__(self) -> str:
        return f"{self.name} ({self.prefix}…)"


class AuditEvent(UUIDModel):
    """Append-only: nothing in the hub updates or deletes these rows."""

    actor = models.ForeignKey(User, models.SET_NULL, null=True, related_name="+")
    token = models.ForeignKey(ApiToken, models.SET_NULL, null=True, related_name="+")
    action = models.CharField(max_length=40)
    object = models.CharField(max_length=200)
    detail = models.JSONField(default=dict)
    at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        indexes = [models.Index(fields=["object", "id"], name="audit_by_object")]

    def __str__(self) -> str:
        return f"{self.action} {self.object}"
