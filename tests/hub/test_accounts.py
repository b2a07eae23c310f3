import factories
import pytest
from django.contrib.auth import authenticate

from deltacome_core.errors import UserError
from hub import access, accounts, organisations
from hub.models import Namespace, User

pytestmark = pytest.mark.django_db


def test_a_new_user_owns_the_namespace_of_the_same_name():
    user = accounts.sign_up("dora", "dora@example.org", password=factories.PASSWORD)
    assert authenticate(username="dora", password=factories.PASSWORD) == user
    assert access.holds(user, Namespace.objects.get(name="dora"), access.Right.ADMIN)


def test_a_robot_has_no_password():
    accounts.sign_up("robot", "", password=None)
    assert authenticate(username="robot", password="") is None
    assert not User.objects.get(username="robot").has_usable_password()


@pytest.mark.parametrize("name", ["alice", "ALICE", "acme", "api", "Static", "healthz"])
def test_taken_and_reserved_names_are_refused(acme, name):
    with pytest.raises(UserError) as caught:
        accounts.sign_up(name, "", password=factories.PASSWORD)
    assert caught.value.code == "name_taken"
    assert User.objects.count() == 3


@pytest.mark.parametrize(
    ("name", "password"),
    [("a/b", factories.PASSWORD), ("", factories.PASSWORD), ("dora", "12345678"), ("dora", "dora")],
)
def test_an_unfit_name_or_password_is_refused(name, password):
    with pytest.raises(UserError) as caught:
        accounts.sign_up(name, "", password=password)
    assert caught.value.code == "account_invalid"
    assert not Namespace.objects.exists()


def test_every_first_path_segment_of_ours_is_reserved():
    from django.urls import get_resolver

    from hub.models.account import RESERVED_NAMES

    firsts = {str(entry.pattern).split("/")[0] for entry in get_resolver().url_patterns}
    for resolver in get_resolver().url_patterns:
        for entry in getattr(resolver, "url_patterns", []):
            if not str(resolver.pattern):
                firsts.add(str(entry.pattern).split("/")[0])
    ours = {name for name in firsts if name and "<" not in name}
    assert ours <= RESERVED_NAMES


@pytest.mark.parametrize(
    ("right", "allowed"),
    [("read", {"alice", "bob", "ci_bot"}), ("write", {"alice", "ci_bot"}), ("admin", {"alice"})],
)
def test_each_role_has_its_rights(acme, alice, bob, charlie, ci_bot, right, allowed):
    repo = factories.make_repo(acme, visibility="private")
    people = (alice, bob, charlie, ci_bot)
    assert {user.username for user in people if access.may(user, repo, right)} == allowed


def test_a_role_is_changed_not_doubled(acme, bob):
    organisations.set_role(acme, bob, "owner")
    assert acme.memberships.get(user=bob).role == "owner"
