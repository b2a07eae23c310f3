import re

import pytest

from hub import organisations
from hub.models import Namespace

pytestmark = pytest.mark.django_db
LIST = "/settings/organisations"
ACME = f"{LIST}/acme"


@pytest.mark.parametrize("path", [LIST, ACME])
def test_the_pages_need_an_account(client, acme, path):
    assert client.get(path).status_code == 302
    assert client.post(path, {"name": "lab"}).status_code == 302
    assert Namespace.objects.filter(kind="org").count() == 1


def test_an_organisation_is_made_and_takes_uploads(sign_in, alice):
    browser = sign_in(alice)
    made = browser.post(LIST, {"name": "lab"}, follow=True)
    assert made.redirect_chain == [(f"{LIST}/lab", 302)]
    assert "lab is made" in made.text
    assert re.search(r"<option[^>]*>lab</option>", browser.get("/new").text)


@pytest.mark.parametrize("name", ["", "a/b", "alice", "jobs"])
def test_a_name_that_cannot_be_is_explained(sign_in, alice, name):
    answer = sign_in(alice).post(LIST, {"name": name})
    assert answer.status_code == 422
    assert 'class="error"' in answer.text
    assert not Namespace.objects.filter(kind="org").exists()


def test_an_owner_lets_somebody_in_and_takes_them_out(sign_in, acme, alice, charlie):
    browser = sign_in(alice)
    answer = browser.post(ACME, {"username": "charlie", "role": "maintainer"}, follow=True)
    assert "charlie is maintainer of acme" in answer.text
    assert sign_in(charlie).get(ACME).status_code == 200
    answer = browser.post(f"{ACME}/members/charlie/remove", follow=True)
    assert "charlie is no longer in acme" in answer.text
    assert sign_in(charlie).get(ACME).status_code == 404


@pytest.mark.parametrize("form", [{"username": "nobody", "role": "reader"}, {"username": "bob"}])
def test_a_wrong_member_is_explained(sign_in, acme, alice, form):
    answer = sign_in(alice).post(ACME, form)
    assert answer.status_code == 422
    assert 'class="error"' in answer.text


def test_members_look_and_strangers_do_not(sign_in, acme, bob, charlie):
    page = sign_in(bob).get(ACME)
    assert "ci_bot" in page.text
    assert "Let somebody in" not in page.text
    assert sign_in(charlie).get(ACME).status_code == 404
    assert sign_in(charlie).get(LIST).status_code == 200


def test_who_is_no_owner_changes_nobody(sign_in, acme, bob, charlie):
    form = {"username": "charlie", "role": "owner"}
    assert sign_in(bob).post(ACME, form).status_code == 403
    assert sign_in(bob).post(f"{ACME}/members/alice/remove").status_code == 403
    assert sign_in(charlie).post(ACME, form).status_code == 404
    assert acme.memberships.count() == 3


def test_one_leaves_but_the_last_owner_stays(sign_in, acme, alice, bob):
    gone = sign_in(bob).post(f"{ACME}/members/bob/remove", follow=True)
    assert gone.redirect_chain == [(LIST, 302)]
    assert "You left acme" in gone.text
    stays = sign_in(alice).post(f"{ACME}/members/alice/remove", follow=True)
    assert "needs an owner" in stays.text
    assert organisations.get_membership(alice, "acme").role == "owner"


def test_nothing_is_removed_by_looking(sign_in, acme, alice):
    assert sign_in(alice).get(f"{ACME}/members/bob/remove").status_code == 405
