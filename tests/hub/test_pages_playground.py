import factories
import pytest

pytestmark = pytest.mark.django_db


@pytest.fixture
def models(acme):
    """A backbone, a public delta whose fine-tune is held, and a private one."""
    backbone = factories.make_backbone(acme, "base")
    for name, visibility in (("math", "public"), ("secret", "private")):
        repo = factories.make_repo(acme, name, visibility=visibility)
        factories.make_revision(repo, backbone=backbone)
    return backbone


def publish_with_finetune(acme, name, backbone, **fields):
    """Publish a delta whose sealed upload still has its files."""
    repo = factories.make_repo(acme, name, **fields)
    job = factories.make_job(repo, files={"model.safetensors": b"weights", "config.json": b"{}"})
    revision = job.revision
    revision.state, revision.number, revision.digest = "PUBLISHED", 1, "c" * 64
    revision.backbone = backbone
    revision.save()
    return revision


def chosen(response):
    return [column.chosen for column in response.context["columns"] if column.chosen]


def offered(response):
    return [choice.name for choice in response.context["deltas"]]


def test_only_models_one_may_see_are_offered(client, sign_in, models, bob):
    assert offered(client.get("/playground")) == ["acme/math"]
    assert offered(sign_in(bob).get("/playground")) == ["acme/math", "acme/secret"]


def test_a_backbone_stands_beside_the_chosen_delta(client, models):
    assert chosen(client.get("/playground?d=acme/math")) == ["acme/math", "acme/base"]
    assert chosen(client.get("/playground")) == ["acme/math", "acme/base"]


def test_it_is_the_backbone_of_that_delta(client, acme, models):
    other = factories.make_backbone(acme, "another")
    factories.make_revision(factories.make_repo(acme, "code"), backbone=other)
    assert chosen(client.get("/playground?d=acme/code")) == ["acme/code", "acme/another"]


def test_a_private_backbone_is_not_named(client, acme):
    hidden = factories.make_backbone(acme, "hidden", visibility="private")
    factories.make_revision(factories.make_repo(acme, "code"), backbone=hidden)
    page = client.get("/playground?d=acme/code")
    assert chosen(page) == ["acme/code"]
    assert "acme/hidden" not in page.text


def test_a_fine_tune_that_is_held_stands_beside_its_delta(client, acme, models):
    revision = publish_with_finetune(acme, "held", models)
    page = client.get("/playground?d=acme/held")
    assert chosen(page) == ["acme/held", "acme/held:finetune", "acme/base"]
    assert 'value="acme/math:finetune"' not in page.text
    revision.job.upload.files.filter(path="config.json").update(blob=None)
    assert chosen(client.get("/playground?d=acme/held")) == ["acme/held", "acme/base"]


def test_up_to_six_columns_are_taken_from_the_address(client, models):
    names = [f"acme/m{number}" for number in range(9)]
    page = client.get("/playground", {"d": [names[0], *names]})
    assert chosen(page) == names[:6]
    two = client.get("/playground", {"d": names[:2]})
    assert [column.is_shown for column in two.context["columns"]] == [True] * 2 + [False] * 4


def test_a_pinned_revision_stays_chosen(client, models):
    page = client.get("/playground?d=acme/math%40v1&prompt=2%2B2&t=0.5&top_p=0.9&mode=text")
    assert chosen(page)[0] == "acme/math@v1"
    assert '<option value="acme/math@v1" selected>' in page.text
    assert ">2+2</textarea>" in page.text
    assert 'value="0.5"' in page.text
    assert 'value="0.9"' in page.text


def test_an_empty_hub_says_what_to_do(client, db):
    assert "Nothing to talk to yet" in client.get("/playground").text


def test_a_visitor_is_asked_to_sign_in(client, sign_in, models, bob):
    words = "needs an account"
    assert words in client.get("/playground").text
    assert words not in sign_in(bob).get("/playground").text


def test_the_page_asks_the_database_a_fixed_number_of_times(
    client, acme, models, django_assert_num_queries
):
    with django_assert_num_queries(9) as before:
        client.get("/playground?d=acme/math")
    for number in range(5):
        factories.make_revision(factories.make_repo(acme, f"more{number}"), backbone=models)
    with django_assert_num_queries(len(before)):
        client.get("/playground?d=acme/math")
