"""API tokens: shown once, stored as a keyed digest, checkable offline by their last six letters."""

import hashlib
import hmac
import secrets
import string
import zlib
from collections.abc import Sequence
from datetime import timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import Q
from django.db.models.functions import Now

from deltacome_core.errors import UserError
from hub import audit
from hub.jobs import from_now
from hub.models import ApiToken, User

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
PREFIX = "dch_"
SECRET_LENGTH = 30
CHECKSUM_LENGTH = 6
MAX_AGE = timedelta(days=365)
LAST_USED_EVERY_S = 60
# Tokens whose use another thread of this process is writing down.
_NOTING: set[object] = set()


def mint(
    user: User, name: str, *, scopes: Sequence[str], expires_in: timedelta
) -> tuple[ApiToken, str]:
    """Make a token and return it with its secret, which is not kept.

    Raises:
        UserError: invalid.
    """
    known = set(ApiToken.Scope.values)
    if not scopes or set(scopes) - known:
        raise UserError("invalid", scopes=[f"Choose from {', '.join(sorted(known))}."])
    if not timedelta(0) < expires_in <= MAX_AGE:
        raise UserError("invalid", expires_in_days=[f"It is from 1 to {MAX_AGE.days}."])
    body = "".join(secrets.choice(ALPHABET) for _ in range(SECRET_LENGTH))
    secret = f"{PREFIX}{body}{checksum(body)}"
    with transaction.atomic():
        token = ApiToken.objects.create(
            user=user,
            name=name,
            prefix=secret[:8],
            digest=digest(secret),
            scopes=sorted(set(scopes)),
            expires_at=from_now(expires_in.total_seconds()),
        )
        audit.record(user, "token_create", f"token:{token.pk}", detail={"scopes": token.scopes})
    token.refresh_from_db(fields=["expires_at", "created_at"])
    return token, secret


def find(secret: str) -> ApiToken | None:
    """Return the live token of this secret, and note at most once a minute that it was used."""
    if not is_well_formed(secret):
        return None
    wanted = digest(secret)
    live = Q(expires_at=None) | Q(expires_at__gt=Now())
    token = (
        ApiToken.objects.filter(live, digest=wanted, revoked_at=None, user__is_active=True)
        .select_related("user")
        .annotate(noted=Q(last_used_at__gte=from_now(-LAST_USED_EVERY_S)))
        .first()
    )
    if token is None or not hmac.compare_digest(token.digest, wanted):
        return None
    if not token.noted:
        _note_use(token)
    return token


def _note_use(token: ApiToken) -> None:
    """Write once for all requests that came together: on SQLite each write waits for all others."""
    if token.pk in _NOTING:
        return
    _NOTING.add(token.pk)
    try:
        unused = Q(last_used_at=None) | Q(last_used_at__lt=from_now(-LAST_USED_EVERY_S))
        ApiToken.objects.filter(unused, pk=token.pk).update(last_used_at=Now())
    finally:
        _NOTING.discard(token.pk)


def revoke(token: ApiToken, actor: User) -> None:
    with transaction.atomic():
        if ApiToken.objects.filter(pk=token.pk, revoked_at=None).update(revoked_at=Now()):
            audit.record(actor, "token_revoke", f"token:{token.pk}")


def digest(secret: str) -> str:
    return hmac.new(settings.TOKEN_PEPPER.encode(), secret.encode(), hashlib.sha256).hexdigest()


def checksum(body: str) -> str:
    value, letters = zlib.crc32(body.encode()), ""
    for _ in range(CHECKSUM_LENGTH):
        value, remainder = divmod(value, len(ALPHABET))
        letters = ALPHABET[remainder] + letters
    return letters


def is_well_formed(secret: str) -> bool:
    """Tell a typing error from a token without asking the database."""
    body, check = secret[len(PREFIX) : -CHECKSUM_LENGTH], secret[-CHECKSUM_LENGTH:]
    return (
        len(secret) == len(PREFIX) + SECRET_LENGTH + CHECKSUM_LENGTH
        and secret.startswith(PREFIX)
        and secret.isascii()
        and hmac.compare_digest(check, checksum(body))
    )
