"""Organisations over REST, as a script that keeps members in step with a directory uses them."""

import factories
import pytest

from hub.models import AuditEvent

pytestmark = pytest.mark.django_db

JSON = {"content_type": "application/json"}


@pytest.fixture
def script(bearer, alice, acme):
    """alice's script, whose token can say who is in what and nothing else."""
    return bearer(alice, "members")


def test_a_script_lets_people_in_changes_them_and_takes_them_out(script, charlie):
    member = "/api/v1/orgs/acme/members/Charlie"
    assert script.put(member, {"role": "reader"}, **JSON).json() == {
        "username": "charlie",
        "role": "reader",
    }
    assert script.put(member, {"role": "maintainer"}, **JSON).json()["role"] == "maintainer"
    listed = script.get("/api/v1/orgs/acme/members").json()["items"]
    assert {one["username"]: one["role"] for one in listed} == {
        "alice": "owner",
        "bob": "reader",
        "ci_bot": "maintainer",
        "charlie": "maintainer",
    }
    # A second time is no fault: such scripts are run again.
    assert [script.delete(member).status_code for _ in range(2)] == [204, 204]
    assert len(script.get("/api/v1/orgs/acme/members").json()["items"]) == 3
    events = AuditEvent.objects.filter(object="org:acme", token__isnull=False)
    assert sorted(event.action for event in events) == ["member_put", "member_put", "member_remove"]


def test_a_script_makes_an_organisation_and_owns_it(script):
    made = script.post("/api/v1/orgs", {"name": "lab"}, **JSON)
    assert (made.status_code, made.json()["name"], made.json()["role"]) == (201, "lab", "owner")
    assert script.get("/api/v1/orgs/LAB").json() == made.json()
    names = [one["name"] for one in script.get("/api/v1/orgs").json()["items"]]
    assert sorted(names) == ["acme", "lab"]
    again = script.post("/api/v1/orgs", {"name": "Lab"}, **JSON)
    assert (again.status_code, again.json()["code"]) == (409, "name_taken")


def test_its_token_reads_and_writes_nothing_else(script, acme):
    factories.make_repo(acme, "secret", visibility="private")
    for url in ("/api/v1/repos/acme/secret", "/api/v1/repos", "/api/v1/jobs", "/api/v1/whoami"):
        answer = script.get(url)
        assert (answer.status_code, answer.json()["code"]) == (403, "permission_denied")
    assert script.post("/api/v1/uploads", {}, **JSON).status_code == 403


def test_a_token_of_somebody_who_is_no_owner_changes_nothing(bearer, acme, ci_bot):
    script = bearer(ci_bot, "members")
    for role in ("owner", "reader"):
        answer = script.put("/api/v1/orgs/acme/members/ci_bot", {"role": role}, **JSON)
        assert (answer.status_code, answer.json()["code"]) == (403, "permission_denied")
    assert script.delete("/api/v1/orgs/acme/members/bob").status_code == 403


@pytest.mark.parametrize(
    ("username", "role", "status", "code"),
    [
        ("nobody", "reader", 422, "member_unknown"),
        ("bob", "king", 400, "invalid"),
        ("alice", "reader", 409, "last_owner"),
    ],
)
def test_what_cannot_be_is_refused_by_name(script, username, role, status, code):
    answer = script.put(f"/api/v1/orgs/acme/members/{username}", {"role": role}, **JSON)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert len(script.get("/api/v1/orgs/acme/members").json()["items"]) == 3


def test_the_last_owner_stays(script):
    answer = script.delete("/api/v1/orgs/acme/members/alice")
    assert (answer.status_code, answer.json()["code"]) == (409, "last_owner")


def test_a_personal_namespace_is_no_organisation(script):
    assert script.get("/api/v1/orgs/alice").status_code == 404
    assert script.get("/api/v1/orgs/alice/members").status_code == 404
