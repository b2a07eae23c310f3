import factories
import pytest

from deltacome_core.errors import UserError
from hub import access, organisations
from hub.models import AuditEvent, Membership, Namespace

pytestmark = pytest.mark.django_db


def refused(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return caught.value.code


def roles(org):
    return dict(org.memberships.values_list("user__username", "role"))


def test_its_maker_owns_an_organisation(alice, charlie):
    org = organisations.create("lab", alice)
    assert org.kind == Namespace.Kind.ORG
    assert access.holds(alice, org, access.Right.ADMIN)
    assert not access.holds(charlie, org, access.Right.READ)
    assert AuditEvent.objects.get(object="org:lab").action == "org_create"


@pytest.mark.parametrize("name", ["alice", "ACME", "settings"])
def test_taken_and_reserved_names_are_refused(acme, alice, name):
    assert refused(organisations.create, name, alice) == "name_taken"
    assert Namespace.objects.filter(kind=Namespace.Kind.ORG).count() == 1


def test_an_unfit_name_is_refused(alice):
    assert refused(organisations.create, "a/b", alice) == "account_invalid"


def test_one_account_owns_so_many_and_no_more(alice, acme, monkeypatch):
    monkeypatch.setattr(organisations, "MAX_OWNED", 2)
    organisations.create("lab", alice)
    assert refused(organisations.create, "third", alice) == "too_many_organisations"


def test_a_member_is_let_in_changed_and_taken_out(acme, alice, charlie):
    organisations.put_member(alice, acme, "Charlie", "reader")
    assert roles(acme)["charlie"] == "reader"
    organisations.put_member(alice, acme, "charlie", "maintainer")
    assert roles(acme)["charlie"] == "maintainer"
    organisations.remove_member(alice, acme, "charlie")
    assert "charlie" not in roles(acme)
    told = AuditEvent.objects.filter(object="org:acme").values_list("action", flat=True)
    assert list(told)[-3:] == ["member_put", "member_put", "member_remove"]


def test_who_was_taken_out_is_recorded_by_name_and_nobody_is_not(acme, alice):
    organisations.remove_member(alice, acme, "BOB")
    organisations.remove_member(alice, acme, "nobody")
    told = AuditEvent.objects.filter(action="member_remove")
    assert [event.detail for event in told] == [{"user": "bob"}]


def test_nobody_who_does_not_exist_is_let_in(acme, alice):
    assert refused(organisations.put_member, alice, acme, "nobody", "reader") == "member_unknown"


def test_only_owners_say_who_is_in(acme, bob, ci_bot, charlie):
    for other in (bob, ci_bot, charlie):
        code = refused(organisations.put_member, other, acme, "charlie", "owner")
        assert code == "permission_denied"
        assert refused(organisations.remove_member, other, acme, "alice") == "permission_denied"
    assert roles(acme) == {"alice": "owner", "bob": "reader", "ci_bot": "maintainer"}


def test_everybody_may_leave_but_the_last_owner(acme, alice, bob):
    organisations.remove_member(bob, acme, "bob")
    assert "bob" not in roles(acme)
    assert refused(organisations.remove_member, alice, acme, "alice") == "last_owner"
    assert refused(organisations.put_member, alice, acme, "alice", "reader") == "last_owner"
    assert roles(acme)["alice"] == "owner"
    organisations.put_member(alice, acme, "ci_bot", "owner")
    organisations.remove_member(alice, acme, "alice")
    assert "alice" not in roles(acme)


def test_an_owner_whose_account_is_closed_does_not_count(acme, alice, bob):
    organisations.put_member(alice, acme, "bob", "owner")
    bob.is_active = False
    bob.save()
    assert refused(organisations.remove_member, alice, acme, "alice") == "last_owner"


def test_a_personal_namespace_is_no_organisation(alice, bob):
    assert refused(organisations.get_membership, alice, "alice") == "not_found"
    assert list(organisations.list_memberships(alice)) == []


def test_ones_organisations_are_listed_with_their_sizes(acme, bob, charlie):
    factories.make_org("zoo", owner=charlie, reader=[bob])
    mine = organisations.list_memberships(bob)
    assert [(one.namespace.name, one.role, one.n_members) for one in mine] == [
        ("acme", Membership.Role.READER, 3),
        ("zoo", Membership.Role.READER, 2),
    ]
