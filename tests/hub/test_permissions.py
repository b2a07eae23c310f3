"""Who may call what: every route of the API, every method, every kind of caller.

The table is the document. A route that is not in it fails the test, and so does a method that
answers somebody it should not.
"""

import uuid

import factories
import pytest
from django.test import Client
from django.urls import URLResolver, get_resolver, reverse

pytestmark = pytest.mark.django_db

CALLERS = ("visitor", "charlie", "bob", "alice", "read_token", "write_token")
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
# Statuses in the order of CALLERS. 400: the rights were enough, the empty body was not.
OPEN = (200,) * 6
MEMBERS_SEE = (401, 404, 200, 200, 200, 200)
MEMBERS_SEE_REPO = (404, 404, 200, 200, 200, 200)
EXPECTED = {
    # Anybody signed in may try; the empty body stops them, a read token stops earlier.
    ("api-uploads", "POST"): (401, 400, 400, 400, 403, 400),
    # Uploads belong to their owner alone.
    ("api-upload", "GET"): (401, 404, 404, 200, 200, 200),
    ("api-upload", "DELETE"): (401, 404, 404, 204, 403, 204),
    ("api-upload-header", "PUT"): (401, 404, 404, 422, 403, 422),
    ("api-upload-part", "PUT"): (401, 404, 404, 400, 403, 400),
    ("api-upload-seal", "POST"): (401, 404, 404, 409, 403, 409),
    ("api-repos", "GET"): OPEN,
    ("api-repo", "GET"): MEMBERS_SEE_REPO,
    ("api-repo", "PATCH"): (404, 404, 403, 200, 403, 200),
    ("api-alias", "PUT"): (401, 404, 403, 400, 403, 400),
    ("api-revisions", "GET"): MEMBERS_SEE_REPO,
    ("api-revision", "GET"): MEMBERS_SEE_REPO,
    ("api-revision-yank", "POST"): (401, 404, 403, 400, 403, 400),
    ("api-revision-file", "GET"): MEMBERS_SEE_REPO,
    ("api-jobs", "GET"): (401, 200, 200, 200, 200, 200),
    ("api-job", "GET"): MEMBERS_SEE,
    ("api-job-cancel", "POST"): (401, 404, 403, 200, 403, 200),
    ("api-job-retry", "POST"): (401, 404, 403, 409, 403, 409),
    ("api-job-events", "GET"): MEMBERS_SEE,
    # Who is in an organisation is said with a token of its own scope.
    ("api-orgs", "GET"): (401, 200, 200, 200, 200, 200),
    ("api-orgs", "POST"): (401, 400, 400, 400, 403, 403),
    ("api-org", "GET"): MEMBERS_SEE,
    ("api-members", "GET"): MEMBERS_SEE,
    ("api-member", "PUT"): (401, 404, 403, 400, 403, 403),
    # Everybody may leave.
    ("api-member", "DELETE"): (401, 404, 204, 204, 403, 403),
    # Tokens are made and ended in a browser only.
    ("api-tokens", "GET"): (401, 200, 200, 200, 403, 403),
    ("api-tokens", "POST"): (401, 400, 400, 400, 403, 403),
    ("api-token", "DELETE"): (401, 404, 404, 204, 403, 403),
    # A vote is a person's: by session only.
    ("api-votes", "POST"): (401, 400, 400, 400, 403, 403),
    ("api-whoami", "GET"): (401, 200, 200, 200, 200, 200),
    ("api-schema", "GET"): OPEN,
    ("api-nothing", "GET"): (404,) * 6,
}


def api_routes():
    """Walk the resolver: every named pattern under api/v1/."""

    def walk(patterns, prefix):
        for entry in patterns:
            if isinstance(entry, URLResolver):
                yield from walk(entry.url_patterns, prefix + str(entry.pattern))
            elif prefix == "api/v1/":
                yield entry

    return list(walk(get_resolver().url_patterns, ""))


@pytest.fixture
def world(acme, alice):
    """A private repo with everything in it, owned by alice's organisation."""
    repo = factories.make_repo(acme, "secret", visibility="private")
    factories.make_revision(repo)
    job = factories.make_job(repo)
    upload = factories.make_upload(repo, owner=alice, state="OPEN", files=None)
    file = upload.files.create(index=0, path="model.safetensors", size_bytes=100)
    token = alice.tokens.create(name="t", prefix="dch_", digest="d" * 64, scopes=["read"])
    names = {"namespace": "acme", "name": "secret", "revision": "v1", "path": "README.md"}
    names |= {"alias": "stable", "rest": "no/such/route"}
    names |= {"upload_id": upload.pk, "index": file.index, "number": 0}
    names |= {"org": "acme", "username": "bob"}
    return names | {"job_id": job.pk, "token_id": token.pk}


def make_client(caller, users, bearer):
    if caller == "visitor":
        return Client()
    if caller.endswith("_token"):
        return bearer(users["alice"], caller.removesuffix("_token"))
    browser = Client()
    browser.force_login(users[caller])
    return browser


def call(browser, route, method, world):
    wanted = route.pattern.converters
    url = reverse(route.name, kwargs={name: world[name] for name in wanted})
    return browser.generic(method, url, b"{}", content_type="application/json")


def test_the_table_names_every_route_and_no_other():
    assert {route.name for route in api_routes()} == {name for name, _ in EXPECTED}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("route", api_routes(), ids=lambda route: route.name)
def test_each_caller_gets_what_the_table_says(caller, route, world, alice, bob, charlie, bearer):
    browser = make_client(caller, {"alice": alice, "bob": bob, "charlie": charlie}, bearer)
    column = CALLERS.index(caller)
    for method in METHODS:
        status = call(browser, route, method, world).status_code
        row = EXPECTED.get((route.name, method))
        if row is not None:
            assert status == row[column], (method, status)
        else:
            assert status in {401, 403, 404, 405}, (method, status)


def test_the_default_permission_refuses_everybody(rf, alice):
    from rest_framework.response import Response
    from rest_framework.views import APIView

    class Forgotten(APIView):
        def get(self, _request):
            return Response({"leak": True})

    request = rf.get("/")
    request.user = alice
    assert Forgotten.as_view()(request).status_code == 403


def test_a_public_repo_is_open_to_visitors(acme, client):
    repo = factories.make_repo(acme, "open")
    factories.make_revision(repo)
    assert client.get("/api/v1/repos/acme/open/revisions/v1").status_code == 200


def test_a_stranger_cannot_tell_a_private_repo_from_none(acme, sign_in, charlie):
    factories.make_repo(acme, "secret", visibility="private")
    browser = sign_in(charlie)
    answers = [browser.get(f"/api/v1/repos/acme/{name}").json() for name in ("secret", "none")]
    assert answers[0] == answers[1]


def test_another_members_upload_is_invisible(acme, bearer, alice, ci_bot):
    upload = factories.make_upload(factories.make_repo(acme), owner=alice, state="OPEN")
    assert bearer(ci_bot).get(f"/api/v1/uploads/{upload.pk}").status_code == 404


def test_an_upload_ends_with_the_right_to_write(acme, bearer, ci_bot):
    from hub.organisations import set_role

    upload = factories.make_upload(factories.make_repo(acme), owner=ci_bot, state="OPEN")
    set_role(acme, ci_bot, "reader")
    assert bearer(ci_bot).get(f"/api/v1/uploads/{upload.pk}").status_code == 403


def test_a_maintainer_cannot_change_visibility(acme, bearer, ci_bot):
    factories.make_repo(acme, "open")
    answer = bearer(ci_bot).patch(
        "/api/v1/repos/acme/open", {"visibility": "private"}, content_type="application/json"
    )
    assert (answer.status_code, answer.json()["code"]) == (403, "permission_denied")


def test_a_token_ignores_the_session_cookie(acme, sign_in, alice, charlie):
    factories.make_repo(acme, "secret", visibility="private")
    browser = sign_in(alice)
    secret = factories.make_token(charlie)
    answer = browser.get("/api/v1/repos/acme/secret", headers={"authorization": f"Bearer {secret}"})
    assert answer.status_code == 404


def test_a_wrong_token_is_refused_even_on_public_routes_and_with_a_session(sign_in, alice):
    browser = sign_in(alice)
    answer = browser.get("/api/v1/repos", headers={"authorization": "Bearer dch_wrong"})
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_a_session_needs_the_csrf_token(alice):
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(alice)
    answer = browser.post("/api/v1/uploads", {}, content_type="application/json")
    assert (answer.status_code, answer.json()["code"]) == (403, "csrf_failed")


def test_a_job_of_an_unknown_id_is_not_found(bearer, alice):
    assert bearer(alice).get(f"/api/v1/jobs/{uuid.uuid4()}").status_code == 404
