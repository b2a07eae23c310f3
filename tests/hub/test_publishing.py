import factories
import pytest
from test_jobs import race

from deltacome_core.errors import UserError
from hub import jobs, publishing
from hub.models import AuditEvent, Job, Revision

pytestmark = pytest.mark.django_db


def publication(backbone=None, **fields):
    blob = factories.make_blob(b"packed bytes")
    defaults = {
        "files": {"delta.safetensors": blob.sha256},
        "checkpoint_digest": "c" * 64,
        "architecture": "LlamaForCausalLM",
        "dtype": "BF16",
        "size_bytes": 1000,
        "source_size_bytes": 16_000,
        "n_params": 8000,
        "bits_per_param": 1.0,
        "backbone_id": backbone.pk if backbone else None,
    }
    return publishing.Publication(**defaults | fields)


def make_lease(repo):
    job = factories.make_job(repo, step="publish")
    return jobs.claim(job.pk, step="publish", owner="w")


@pytest.fixture
def repo(acme):
    return factories.make_repo(acme, "math")


def test_a_draft_becomes_the_next_revision_and_ends_its_job(repo, acme):
    factories.make_revision(repo)
    lease = make_lease(repo)
    revision = publishing.publish_revision(lease, publication(factories.make_backbone(acme)))
    assert (revision.state, revision.label) == ("PUBLISHED", "v2")
    assert revision.published_at is not None
    assert [file.path for file in revision.files.all()] == ["delta.safetensors"]
    assert Job.objects.get(pk=lease.job_id).state == Job.State.DONE


def test_scores_and_grade_come_with_the_revision(repo):
    grade = publishing.Grade(
        grade="A", recovery=0.99, kl=0.1, top1=0.9, ppl_ratio=1.0, report={"a": 1}
    )
    score = publishing.Score(task="gsm", subject="delta", accuracy=0.5, n=10, se=0.1)
    revision = publishing.publish_revision(
        make_lease(repo), publication(verification=grade, evaluations=[score])
    )
    assert revision.verification.report == {"a": 1}
    assert revision.evaluations.get().task == "gsm"


def test_a_fenced_worker_publishes_nothing(repo):
    lease = make_lease(repo)
    Job.objects.update(lease_seq=99)
    with pytest.raises(jobs.LeaseLost):
        publishing.publish_revision(lease, publication())
    assert Revision.objects.get(job=lease.job_id).state == "DRAFT"


def test_the_same_bytes_are_published_once(repo):
    publishing.publish_revision(make_lease(repo), publication())
    lease = make_lease(repo)
    with pytest.raises(UserError) as caught:
        publishing.publish_revision(lease, publication())
    assert caught.value.code == "digest_published"
    assert "acme/math@v1" in str(caught.value.params)
    assert Job.objects.get(pk=lease.job_id).state == Job.State.RUNNING


def test_the_digest_depends_on_all_that_makes_the_revision(acme):
    ours = publication()
    digests = {
        ours.digest("delta", "a" * 64),
        ours.digest("delta", "b" * 64),
        ours.digest("backbone", "a" * 64),
        publication(recipe={"name": "come"}).digest("delta", "a" * 64),
        publication(files={"x": "d" * 64}).digest("delta", "a" * 64),
    }
    assert len(digests) == 5
    assert ours.digest("delta", "a" * 64) in digests


def test_publishing_is_recorded(repo):
    revision = publishing.publish_revision(make_lease(repo), publication())
    event = AuditEvent.objects.get(action="publish")
    assert (event.object, event.detail) == ("acme/math@v1", {"digest": revision.digest})


@pytest.mark.django_db(transaction=True)
def test_revisions_published_at_once_get_different_numbers(acme, redis_server):
    repo = factories.make_repo(acme, "math")
    leases = [make_lease(repo) for _ in range(4)]
    parts = [publication(checkpoint_digest=str(n) * 64) for n in range(4)]
    out = race(4, lambda n: publishing.publish_revision(leases[n], parts[n]))
    assert sorted(revision.number for revision in out) == [1, 2, 3, 4]


def yank(browser, revision="v1", reason="wrong data"):
    url = f"/api/v1/repos/acme/math/revisions/{revision}/yank"
    return browser.post(url, {"reason": reason}, content_type="application/json")


def test_a_yanked_revision_leaves_latest_but_keeps_its_name(repo, bearer, ci_bot, client):
    first, second = factories.make_revision(repo), factories.make_revision(repo)
    answer = yank(bearer(ci_bot), "v2")
    assert (answer.json()["state"], answer.json()["yank_reason"]) == ("YANKED", "wrong data")
    latest = client.get("/api/v1/repos/acme/math/revisions/latest").json()
    assert latest["digest"] == f"sha256:{first.digest}"
    by_digest = client.get(f"/api/v1/repos/acme/math/revisions/sha256:{second.digest}")
    assert by_digest.json()["state"] == "YANKED"


def test_a_revision_is_yanked_once(repo, bearer, ci_bot):
    factories.make_revision(repo)
    browser = bearer(ci_bot)
    assert [yank(browser).status_code for _ in range(2)] == [200, 409]
    event = AuditEvent.objects.get(action="yank")
    assert (event.actor, event.token.user) == (ci_bot, ci_bot)


def test_a_change_of_visibility_is_recorded_and_a_new_text_is_not(repo, sign_in, alice):
    browser, url = sign_in(alice), "/api/v1/repos/acme/math"
    for change in ({"description": "New"}, {"visibility": "private"}, {"visibility": "private"}):
        answer = browser.patch(url, change, content_type="application/json")
        assert answer.status_code == 200
    assert AuditEvent.objects.get(action="visibility").detail == {"from": "public", "to": "private"}
    assert answer.json()["description"] == "New"


def test_an_alias_moves(repo, bearer, ci_bot, client):
    factories.make_revision(repo), factories.make_revision(repo)
    browser, url = bearer(ci_bot), "/api/v1/repos/acme/math/aliases/stable"
    for name in ("v1", "v2"):
        browser.put(url, {"revision": name}, content_type="application/json")
        found = client.get("/api/v1/repos/acme/math/revisions/stable").json()
        assert found["label"] == name
    told = AuditEvent.objects.filter(action="alias")
    assert [(event.object, event.detail) for event in told] == [
        ("acme/math@v1", {"name": "stable"}),
        ("acme/math@v2", {"name": "stable"}),
    ]
    assert all(event.token is not None for event in told)


@pytest.mark.parametrize("alias", ["v3", "latest", "sha256:" + "a" * 64, "a b", "x" * 64])
def test_an_alias_cannot_look_like_another_kind_of_name(repo, bearer, ci_bot, alias):
    factories.make_revision(repo)
    answer = bearer(ci_bot).put(
        f"/api/v1/repos/acme/math/aliases/{alias}",
        {"revision": "v1"},
        content_type="application/json",
    )
    assert (answer.status_code, answer.json()["code"]) == (422, "name_unsafe")
