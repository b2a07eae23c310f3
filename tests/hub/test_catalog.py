import factories
import pytest

from deltacome_core.errors import UserError
from hub import catalog

pytestmark = pytest.mark.django_db


def names(answer):
    return [row["full_name"] for row in answer.json()["items"]]


def test_the_newest_repos_come_first_with_their_latest_revision(client, acme):
    factories.make_repo(acme, "empty")
    repo = factories.make_repo(acme, "math")
    factories.make_revision(repo), factories.make_revision(repo)
    factories.make_revision(repo, state="DRAFT")
    answer = client.get("/api/v1/repos")
    assert names(answer) == ["acme/math", "acme/empty"]
    assert [row["latest"] and row["latest"]["label"] for row in answer.json()["items"]] == [
        "v2",
        None,
    ]


def test_private_repos_are_listed_to_members_only(client, sign_in, acme, bob):
    factories.make_repo(acme, "secret", visibility="private")
    assert names(client.get("/api/v1/repos")) == []
    assert names(sign_in(bob).get("/api/v1/repos")) == ["acme/secret"]


def test_words_kind_and_backbone_narrow_the_list(client, acme):
    base = factories.make_backbone(acme, "llama-base")
    math = factories.make_repo(acme, "math", description="arithmetic word problems")
    factories.make_revision(math, backbone=base)
    factories.make_repo(acme, "chat")
    assert names(client.get("/api/v1/repos?q=WORD arith")) == ["acme/math"]
    assert names(client.get("/api/v1/repos?kind=backbone")) == ["acme/llama-base"]
    assert names(client.get("/api/v1/repos?backbone=acme/llama-base")) == ["acme/math"]


def test_a_hidden_backbone_narrows_to_not_found(client, acme):
    factories.make_backbone(acme, "secret", visibility="private")
    assert client.get("/api/v1/repos?backbone=acme/secret").status_code == 404


@pytest.mark.parametrize("query", ["kind=x", "after=x", "after=00000000", "backbone=acme/a/b"])
def test_a_wrong_query_is_refused(client, query):
    assert client.get(f"/api/v1/repos?{query}").status_code in {400, 404}


@pytest.mark.parametrize("q", ["%", "_", "'; --", "\\", "x" * 5000])
def test_any_words_are_only_words(client, acme, q):
    factories.make_repo(acme, "math")
    assert names(client.get("/api/v1/repos", {"q": q})) == []


@pytest.mark.parametrize(
    "url", ["/api/v1/repos?q=%00", "/api/v1/repos/acme/a%00", "/api/v1/jobs?after=%00"]
)
def test_a_nul_never_reaches_the_database(client, acme, url):
    answer = client.get(url)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid")


def test_pages_follow_each_other_without_gap_or_repeat(client, acme):
    made = {f"acme/{factories.make_repo(acme).name}" for _ in range(120)}
    seen, after = [], ""
    while after is not None:
        page = client.get("/api/v1/repos", {"after": after})
        seen += names(page)
        after = page.json()["next"]
    assert (len(seen), set(seen)) == (120, made)


def test_a_page_costs_the_same_number_of_queries_whatever_its_length(
    client, acme, django_assert_max_num_queries
):
    for _ in range(30):
        factories.make_revision(factories.make_repo(acme))
    with django_assert_max_num_queries(4):
        client.get("/api/v1/repos")


def test_names_are_found_in_any_case(client, acme):
    factories.make_repo(acme, "Math")
    assert client.get("/api/v1/repos/ACME/math").json()["full_name"] == "acme/Math"


@pytest.mark.parametrize(
    "name", ["v0", "v01", "v2", "v1x", "sha256:0", "newest", "V1", "v99999999999"]
)
def test_an_unknown_revision_is_not_found(client, acme, name):
    factories.make_revision(factories.make_repo(acme, "math"))
    answer = client.get(f"/api/v1/repos/acme/math/revisions/{name}")
    assert (answer.status_code, answer.json()["code"]) == (404, "revision_unknown")


def test_a_revision_tells_files_grade_and_scores(client, acme):
    base = factories.make_backbone(acme, "base")
    revision = factories.make_revision(factories.make_repo(acme, "math"), backbone=base)
    factories.make_verification(revision)
    factories.make_evaluation(revision, backbone=0.1, finetune=0.9, delta=0.9)
    found = client.get("/api/v1/repos/acme/math/revisions/v1").json()
    assert found["files"][0]["path"] == "README.md"
    assert (found["verification"]["grade"], len(found["evaluations"])) == ("A", 3)
    assert found["backbone"]["label"] == "v1"
    assert found["ratio"] == 16.0


def test_a_revision_is_found_by_its_full_name(acme, alice):
    factories.make_revision(factories.make_repo(acme, "math"))
    assert catalog.find_revision(alice, "acme/math").label == "v1"
    assert catalog.find_revision(alice, "acme/math@v1").label == "v1"
    for wrong in ("math", "/math", "acme/", "acme/math/x", "", "acme/math@v2"):
        with pytest.raises(UserError):
            catalog.find_revision(alice, wrong)


@pytest.mark.parametrize(
    "path", ["", "/acme/math", "/acme/math/revisions", "/acme/math/revisions/v1"]
)
def test_a_private_backbone_is_named_to_its_members_only(client, sign_in, acme, bob, path):
    backbone = factories.make_backbone(acme, "hush-hush", visibility="private")
    factories.make_revision(factories.make_repo(acme, "math"), backbone=backbone)
    url = f"/api/v1/repos{path}"
    assert "hush-hush" not in client.get(url).content.decode()
    assert "acme/hush-hush" in sign_in(bob).get(url).content.decode()


@pytest.mark.parametrize("url", ["/v1/models", "/v1/models/acme/math"])
def test_the_list_of_models_does_not_name_a_private_backbone(client, acme, bob, charlie, url):
    backbone = factories.make_backbone(acme, "hush-hush", visibility="private")
    factories.make_revision(factories.make_repo(acme, "math"), backbone=backbone)

    def ask(user):
        headers = {"Authorization": f"Bearer {factories.make_token(user)}"}
        return client.get(url, headers=headers).content.decode()

    assert "acme/math" in ask(charlie)
    assert "hush-hush" not in ask(charlie)
    assert '"parent": "acme/hush-hush"' in ask(bob)
