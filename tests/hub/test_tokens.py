import logging
import re
from datetime import timedelta

import factories
import pytest

from deltacome_core.errors import UserError
from hub import logs, tokens
from hub.jobs import from_now
from hub.models import ApiToken, AuditEvent

pytestmark = pytest.mark.django_db


def test_a_token_has_the_shape_that_scanners_know(alice):
    token, secret = tokens.mint(alice, "ci", scopes=["read"], expires_in=timedelta(days=1))
    assert re.fullmatch(r"dch_[0-9A-Za-z]{36}", secret)
    assert tokens.is_well_formed(secret)
    assert token.prefix == secret[:8]


def test_the_secret_is_not_kept(alice):
    token, secret = tokens.mint(alice, "ci", scopes=["read"], expires_in=timedelta(days=1))
    row = ApiToken.objects.filter(pk=token.pk).values().get()
    assert secret not in str(row)
    assert secret[8:20] not in str(row)


def test_the_digest_depends_on_the_pepper(settings):
    before = tokens.digest("dch_x")
    settings.TOKEN_PEPPER = "another pepper"
    assert tokens.digest("dch_x") != before


def test_a_typing_error_asks_no_database(alice, django_assert_num_queries):
    secret = factories.make_token(alice)
    wrong = secret[:10] + ("a" if secret[10] != "a" else "b") + secret[11:]
    with django_assert_num_queries(0):
        assert tokens.find(wrong) is None


def test_a_token_finds_its_user_until_it_is_revoked(alice):
    token, secret = tokens.mint(alice, "ci", scopes=["read"], expires_in=timedelta(days=1))
    assert tokens.find(secret).user == alice
    tokens.revoke(token, alice)
    assert tokens.find(secret) is None


def test_an_expired_token_is_none(alice):
    secret = factories.make_token(alice)
    ApiToken.objects.update(expires_at=from_now(-1))
    assert tokens.find(secret) is None


def test_a_token_of_an_inactive_user_is_none(alice):
    secret = factories.make_token(alice)
    alice.is_active = False
    alice.save(update_fields=["is_active"])
    assert tokens.find(secret) is None


def test_the_last_use_is_written_once_a_minute(alice):
    secret = factories.make_token(alice)
    tokens.find(secret)
    first = ApiToken.objects.get().last_used_at
    tokens.find(secret)
    assert ApiToken.objects.get().last_used_at == first
    ApiToken.objects.update(last_used_at=from_now(-61))
    tokens.find(secret)
    assert ApiToken.objects.get().last_used_at >= first


def test_a_use_that_is_noted_already_writes_nothing(alice, django_assert_num_queries):
    """On SQLite a write that changes no row still waits for every other writer."""
    secret = factories.make_token(alice)
    assert tokens.find(secret)
    with django_assert_num_queries(1):
        assert tokens.find(secret)


def test_requests_that_come_together_note_a_use_once(alice, monkeypatch, django_assert_num_queries):
    secret = factories.make_token(alice)
    monkeypatch.setattr(tokens, "_NOTING", set(ApiToken.objects.values_list("pk", flat=True)))
    with django_assert_num_queries(1):
        assert tokens.find(secret)
    assert ApiToken.objects.get().last_used_at is None


@pytest.mark.parametrize(
    ("scopes", "days"), [([], 1), (["admin"], 1), (["read"], 0), (["read"], 366), (["read"], -1)]
)
def test_a_token_without_scope_or_end_is_not_made(alice, scopes, days):
    with pytest.raises(UserError):
        tokens.mint(alice, "ci", scopes=scopes, expires_in=timedelta(days=days))


def test_a_browser_makes_sees_and_ends_tokens(sign_in, alice):
    browser = sign_in(alice)
    made = browser.post(
        "/api/v1/tokens", {"name": "ci", "scopes": ["read"]}, content_type="application/json"
    )
    assert (made.status_code, made.headers["Cache-Control"]) == (201, "no-store")
    listed = browser.get("/api/v1/tokens").json()["items"]
    assert [row["name"] for row in listed] == ["ci"]
    assert "token" not in listed[0]
    assert browser.delete(f"/api/v1/tokens/{made.json()['id']}").status_code == 204
    assert tokens.find(made.json()["token"]) is None


def test_nobody_ends_another_persons_token(sign_in, alice, charlie):
    token, secret = tokens.mint(alice, "ci", scopes=["read"], expires_in=timedelta(days=1))
    assert sign_in(charlie).delete(f"/api/v1/tokens/{token.pk}").status_code == 404
    assert tokens.find(secret) is not None


def test_making_and_ending_a_token_is_recorded(alice):
    token, _ = tokens.mint(alice, "ci", scopes=["read"], expires_in=timedelta(days=1))
    tokens.revoke(token, alice)
    tokens.revoke(token, alice)
    actions = AuditEvent.objects.order_by("id").values_list("action", "object")
    assert list(actions) == [
        (f"token_{verb}", f"token:{token.pk}") for verb in ("create", "revoke")
    ]


def test_the_log_shows_no_token_and_no_password(alice):
    secret = factories.make_token(alice)
    record = logging.makeLogRecord({"msg": "%s %s", "args": (secret, "redis://u:hush@h/0")})
    record.header = f"Bearer {secret}"
    logs.RedactTokens().filter(record)
    line = logs.FieldFormatter().format(record)
    assert secret not in line
    assert "hush" not in line
    assert '"event": "dch_*** redis://***:***@h/0"' in line
