import json
import sys
from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand

from hub import accounts, tokens
from hub.models import ApiToken, User

TOKEN_NAME = "demo"  # noqa: S105  its label, not the secret
TOKEN_LIFE = timedelta(days=30)


class Command(BaseCommand):
    """Reads the password from stdin; prints JSON with a new token."""

    help = "Make the demo user, or renew its token (the former one is revoked)."

    def handle(self, *_args: Any, **_options: Any) -> None:
        password = sys.stdin.readline().strip()
        user = User.objects.filter(username="demo").first()
        if user is None:
            user = accounts.sign_up("demo", "demo@localhost.localdomain", password=password)
        for token in ApiToken.objects.filter(user=user, name=TOKEN_NAME, revoked_at=None):
            tokens.revoke(token, user)
        _, secret = tokens.mint(user, TOKEN_NAME, scopes=["read", "write"], expires_in=TOKEN_LIFE)
        self.stdout.write(json.dumps({"username": user.username, "token": secret}))
