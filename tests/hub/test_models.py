import uuid

import factories
import pytest
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction

from hub.models import Repo, Revision
from hub.models.base import uuid7

pytestmark = pytest.mark.django_db


def test_uuid7_rises_and_carries_version_and_variant():
    values = [uuid7() for _ in range(5000)]
    assert values == sorted(set(values))
    assert {(value.version, value.variant) for value in values} == {(7, uuid.RFC_4122)}


def test_repo_names_are_unique_in_any_case(acme):
    factories.make_repo(acme, "Math")
    with pytest.raises(IntegrityError), transaction.atomic():
        factories.make_repo(acme, "math")


@pytest.mark.parametrize("name", ["", "..", "a/b", "-a", "a" * 97, "a\n", "é"])
def test_repo_names_are_plain(acme, alice, name):
    with pytest.raises(ValidationError):
        Repo(namespace=acme, name=name, kind="delta", created_by=alice).full_clean()


def test_drafts_share_an_empty_number(acme):
    repo = factories.make_repo(acme)
    factories.make_revision(repo, state="DRAFT")
    factories.make_revision(repo, state="DRAFT")
    assert repo.revisions.filter(number=None).count() == 2


def test_a_revision_number_is_given_once(acme):
    repo = factories.make_repo(acme)
    factories.make_revision(repo, number=1)
    with pytest.raises(IntegrityError), transaction.atomic():
        factories.make_revision(repo, number=1)


def test_members_see_private_repos_and_strangers_do_not(acme, alice, bob, charlie, ci_bot):
    repo = factories.make_repo(acme, visibility="private")
    seen = {
        user.username: Repo.objects.visible_to(user).filter(pk=repo.pk).exists()
        for user in (alice, bob, charlie, ci_bot)
    }
    assert seen == {"alice": True, "bob": True, "charlie": False, "ci_bot": True}


def test_an_inactive_member_sees_what_a_stranger_sees(acme):
    gone = factories.make_user("gone", is_active=False)
    gone.refresh_from_db()
    factories.make_org("former", owner=gone)
    repo = factories.make_repo(gone.memberships.last().namespace, visibility="private")
    assert not Repo.objects.visible_to(gone).filter(pk=repo.pk).exists()


def test_the_ratio_counts_whole_files(acme):
    revision = factories.make_revision(factories.make_repo(acme))
    assert revision.ratio == 16.0
    assert Revision(repo=revision.repo).ratio == 0.0
