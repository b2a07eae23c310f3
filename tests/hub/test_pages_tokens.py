import re

import pytest

from hub import tokens
from hub.models import ApiToken

pytestmark = pytest.mark.django_db
FORM = {"name": "CI", "scopes": ["read"], "days": "30"}


def test_tokens_need_an_account(client, db):
    assert client.get("/settings/tokens").status_code == 302
    assert client.post("/settings/tokens", FORM).status_code == 302
    assert not ApiToken.objects.exists()


def test_a_token_is_shown_once_and_works(sign_in, alice):
    browser = sign_in(alice)
    made = browser.post("/settings/tokens", FORM)
    (secret,) = set(re.findall(r"dch_\w{36}", made.text))
    assert "no-store" in made.headers["Cache-Control"]
    assert tokens.find(secret).user == alice
    assert tokens.find(secret).scopes == ["read"]
    again = browser.get("/settings/tokens").text
    assert secret not in again
    assert secret[:8] in again


@pytest.mark.parametrize(
    "change", [{"name": ""}, {"scopes": []}, {"scopes": ["admin"]}, {"days": "0"}, {"days": "366"}]
)
def test_a_wrong_request_makes_no_token(sign_in, alice, change):
    answer = sign_in(alice).post("/settings/tokens", FORM | change)
    assert answer.status_code == 422
    assert not ApiToken.objects.exists()


def test_a_token_is_revoked_by_its_owner_only(sign_in, alice, charlie):
    sign_in(alice).post("/settings/tokens", FORM)
    token = ApiToken.objects.get()
    sign_in(charlie).post(f"/settings/tokens/{token.pk}/revoke")
    token.refresh_from_db()
    assert token.revoked_at is None
    sign_in(alice).post(f"/settings/tokens/{token.pk}/revoke")
    token.refresh_from_db()
    assert token.revoked_at is not None
    assert "revoked" in sign_in(alice).get("/settings/tokens").text


def test_nobody_sees_the_tokens_of_others(sign_in, alice, charlie):
    sign_in(alice).post("/settings/tokens", FORM)
    assert "No token yet" in sign_in(charlie).get("/settings/tokens").text
