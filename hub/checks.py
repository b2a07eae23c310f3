"""Each wrong setting has a check with an id, so that `manage.py check` names it."""

from typing import Any

from django.conf import settings
from django.core import checks
from django.core.checks import CheckMessage, Error, Tags, register


@register(Tags.security)
def check_secrets(**_kwargs: Any) -> list[CheckMessage]:
    found: list[CheckMessage] = []
    if not settings.DEBUG and len(settings.SECRET_KEY) < 32:  # noqa: PLR2004  Django asks for 50
        found.append(Error("SECRET_KEY is shorter than 32 characters.", id="hub.E001"))
    if not settings.DEBUG and "*" in settings.ALLOWED_HOSTS:
        found.append(Error("ALLOWED_HOSTS must name the hosts, not '*'.", id="hub.E002"))
    if settings.TOKEN_PEPPER == settings.SECRET_KEY and not settings.INSECURE_HTTP:
        found.append(
            checks.Warning(
                "TOKEN_PEPPER is not set: rotating SECRET_KEY will invalidate every API token.",
                id="hub.W003",
            )
        )
    return found


@register()
def check_storage(**_kwargs: Any) -> list[CheckMessage]:
    found: list[CheckMessage] = []
    if settings.BLOB_STORE not in {"local", "s3"}:
        found.append(Error("BLOB_STORE must be local or s3.", id="hub.E004"))
    if settings.BLOB_STORE == "s3" and not settings.S3_BUCKET:
        found.append(Error("BLOB_STORE=s3 needs S3_BUCKET.", id="hub.E005"))
    if settings.X_ACCEL_PREFIX and not settings.X_ACCEL_PREFIX.startswith("/"):
        found.append(Error("X_ACCEL_PREFIX must start with '/'.", id="hub.E006"))
    if settings.UPLOAD_PART_BYTES < 1:
        found.append(Error("UPLOAD_PART_BYTES must be positive.", id="hub.E007"))
    return found


@register()
def check_leases(**_kwargs: Any) -> list[CheckMessage]:
    found: list[CheckMessage] = []
    if settings.HEARTBEAT_S * 3 > settings.LEASE_TTL_S:
        found.append(Error("LEASE_TTL_S must be at least three times HEARTBEAT_S.", id="hub.E008"))
    if not settings.REDIS_URL.startswith(("redis://", "rediss://", "unix://")):
        found.append(Error("REDIS_URL must start with redis://.", id="hub.E009"))
    return found
