import factories
import pytest

pytestmark = pytest.mark.django_db


def listed(response):
    return [str(entry.repo) for entry in response.context["repos"]]


@pytest.fixture
def hub(alice, acme):
    """A public backbone with two deltas, one of them private."""
    backbone = factories.make_backbone(acme, "base")
    for name, visibility in (("math", "public"), ("secret", "private")):
        repo = factories.make_repo(acme, name, visibility=visibility)
        factories.make_revision(repo, backbone=backbone)
    return backbone


def test_a_visitor_sees_public_models_and_what_they_save(client, hub):
    response = client.get("/")
    assert listed(response) == ["acme/math", "acme/base"]
    assert "1/16.0" in response.text
    assert "Sign up" in response.text


def test_members_see_private_models_and_strangers_do_not(sign_in, hub, bob, charlie):
    assert "acme/secret" in listed(sign_in(bob).get("/"))
    assert "acme/secret" not in listed(sign_in(charlie).get("/"))


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("q=math", ["acme/math"]),
        ("kind=backbone", ["acme/base"]),
        ("kind=delta&backbone=acme/base", ["acme/math"]),
        ("kind=nonsense", ["acme/math", "acme/base"]),
        ("q=zzz", []),
        ("backbone=acme/nothing", []),
        ("after=not-a-cursor", []),
    ],
)
def test_filters_are_in_the_address(client, hub, query, found):
    response = client.get(f"/?{query}")
    assert listed(response) == found
    assert bool(found) != ("Nothing matches" in response.text)


def test_an_empty_hub_says_what_to_do(client, db):
    assert "Upload a backbone once" in client.get("/").text


def test_the_list_alone_is_sent_for_a_filter(client, hub):
    response = client.get("/?q=math", headers={"HX-Request": "true"})
    assert "<html" not in response.text
    assert "acme/" in response.text
    assert "HX-Request" in response.headers["Vary"]


def test_older_models_are_on_the_next_page(client, acme):
    for number in range(51):
        factories.make_repo(acme, f"m{number:02}")
    first = client.get("/?q=m")
    assert len(listed(first)) == 50
    second = client.get(f"/?{first.context['next_query']}")
    assert listed(second) == ["acme/m00"]
    assert second.context["next_query"] == ""


def test_the_name_of_a_private_backbone_is_not_told(client, sign_in, acme, bob):
    backbone = factories.make_backbone(acme, "hush", visibility="private")
    repo = factories.make_repo(acme, "open")
    factories.make_revision(repo, backbone=backbone)
    assert "hush" not in client.get("/").text
    assert "of acme/hush" in sign_in(bob).get("/").text


def test_running_jobs_are_shown_to_members_only(sign_in, acme, bob, charlie):
    factories.make_job(factories.make_repo(acme, "busy"))
    assert "Running now" in sign_in(bob).get("/").text
    assert "Running now" not in sign_in(charlie).get("/").text


def test_the_number_of_queries_does_not_grow_with_the_list(
    client, acme, django_assert_max_num_queries
):
    backbone = factories.make_backbone(acme, "base")
    for _ in range(20):
        revision = factories.make_revision(factories.make_repo(acme), backbone=backbone)
        factories.make_verification(revision)
    with django_assert_max_num_queries(10):
        client.get("/")
