import factories
import pytest

pytestmark = pytest.mark.django_db


@pytest.fixture
def models(acme):
    backbone = factories.make_backbone(acme, "base")
    for name, visibility in (("math", "public"), ("secret", "private")):
        repo = factories.make_repo(acme, name, visibility=visibility)
        factories.make_revision(repo, backbone=backbone)


def chosen(response):
    return [column["chosen"] for column in response.context["columns"]]


def test_only_models_one_may_see_are_offered(client, sign_in, models, bob):
    assert client.get("/playground").context["deltas"] == ["acme/math"]
    assert sign_in(bob).get("/playground").context["deltas"] == ["acme/math", "acme/secret"]


def test_a_backbone_stands_beside_the_chosen_delta(client, models):
    assert chosen(client.get("/playground?d=acme/math")) == ["acme/math", "acme/base"]
    assert chosen(client.get("/playground")) == ["acme/base", "acme/math"]


def test_a_pinned_revision_stays_chosen(client, models):
    page = client.get("/playground?d=acme/math%40v1&prompt=2%2B2&t=0.5&mode=text")
    assert chosen(page)[0] == "acme/math@v1"
    assert '<option value="acme/math@v1" selected>' in page.text
    assert ">2+2</textarea>" in page.text
    assert 'value="0.5"' in page.text


def test_an_empty_hub_says_what_to_do(client, db):
    assert "Nothing to talk to yet" in client.get("/playground").text


def test_a_visitor_is_asked_to_sign_in(client, sign_in, models, bob):
    words = "needs an account"
    assert words in client.get("/playground").text
    assert words not in sign_in(bob).get("/playground").text
