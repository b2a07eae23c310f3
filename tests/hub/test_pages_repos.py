import factories
import pytest

from hub.models import JobStep
from hub.pages import plots

pytestmark = pytest.mark.django_db

TABS = ("", "/files", "/verification", "/evaluations")
REPORT = {
    "greedy_match": 0.9876,
    "n_prompts": 100,
    "checks": [
        {"name": "recovery", "ok": True, "value": 0.9931, "threshold": 0.9},
        {"name": "ppl_drift", "ok": False, "value": 0.0412, "threshold": 0.02},
    ],
    "matrices": [
        {
            "name": f"model.layers.{layer}.self_attn.q_proj.weight",
            "relative_error": 0.5 - layer / 10,
        }
        for layer in range(3)
    ],
}
CARD = b"""---
license: mit
---
# Title

### Deeper

<script>alert(1)</script> [bad](javascript:alert(1)) [good](https://example.org)

| a |
|---|
| b |
"""


@pytest.fixture
def backbone(acme):
    return factories.make_backbone(acme, "base", n_params=6_738_415_616, size_bytes=13_476_839_424)


@pytest.fixture
def delta(acme, backbone):
    repo = factories.make_repo(acme, "math", description="Sums.")
    files = {"README.md": CARD, "delta.safetensors": b"packed", "delta.json": b"{}"}
    sizes = {"size_bytes": 600_000, "source_size_bytes": 8_100_000}
    revision = factories.make_revision(repo, backbone=backbone, files=files, **sizes)
    factories.make_verification(revision, recovery=0.9931, report=REPORT)
    factories.make_evaluation(revision, "gsm8k", backbone=0.11, finetune=0.552, delta=0.536)
    return revision


@pytest.fixture
def private(delta):
    delta.repo.visibility = "private"
    delta.repo.save(update_fields=["visibility"])
    return delta


def text_of(response):
    return " ".join(response.text.replace("\N{NO-BREAK SPACE}", " ").split())


def test_a_delta_makes_its_three_promises(client, delta):
    text = text_of(client.get("/acme/math"))
    assert "1/13.5" in text
    assert '<span title="600,000 bytes">600 kB</span> of' in text
    assert '<span title="8,100,000 bytes">8.1 MB</span>' in text
    assert "99.3 %" in text
    assert "grade A" in text
    assert "backbone 11.0 %, fine-tune 55.2 %, delta 53.6 %" in text
    assert "1 of 2 checks" in text


@pytest.mark.parametrize("tab", TABS)
def test_a_private_model_does_not_exist_for_strangers(client, sign_in, private, bob, charlie, tab):
    assert client.get(f"/acme/math{tab}").status_code == 404
    assert sign_in(charlie).get(f"/acme/math{tab}").status_code == 404
    assert sign_in(bob).get(f"/acme/math{tab}").status_code == 200


def test_a_stranger_cannot_tell_private_from_absent(sign_in, private, charlie):
    browser = sign_in(charlie)
    there, absent = browser.get("/acme/math"), browser.get("/acme/nothing")
    assert (there.status_code, absent.status_code) == (404, 404)
    # The form tokens differ from one answer to the next, and nothing else does.
    assert (
        text_of(there).split("csrfmiddlewaretoken")[0]
        == text_of(absent).split("csrfmiddlewaretoken")[0]
    )


def test_the_card_is_shown_without_its_dangers(client, delta):
    text = client.get("/acme/math").text
    assert "<script>alert" not in text
    assert 'href="javascript' not in text
    assert '<a href="https://example.org" rel="nofollow noopener">good</a>' in text
    assert "<h2>Title</h2>" in text
    assert "<h3>Deeper</h3>" in text
    assert "license: mit" not in text


def test_a_delta_does_not_name_a_backbone_its_reader_may_not_see(client, sign_in, delta, bob):
    delta.backbone.repo.visibility = "private"
    delta.backbone.repo.save(update_fields=["visibility"])
    assert "acme/base" not in client.get("/acme/math").text
    assert "acme/base" in sign_in(bob).get("/acme/math").text


def test_a_backbone_lists_the_deltas_its_reader_may_see(client, sign_in, private, bob):
    factories.make_revision(
        factories.make_repo(private.repo.namespace, "open"), backbone=private.backbone
    )
    seen = text_of(client.get("/acme/base"))
    assert "6.74 B" in seen
    assert "acme/open" in seen
    assert "acme/math" not in seen
    assert "1 fine-tune:" in seen
    assert "2 fine-tunes:" in text_of(sign_in(bob).get("/acme/base"))


def test_files_have_their_size_digest_and_a_link_that_downloads(client, delta):
    response = client.get("/acme/math/files")
    row = next(row for row in response.context["files"] if row.path == "delta.safetensors")
    assert row.size_bytes == 6
    assert row.sha256 in response.text
    assert row.url in response.text
    assert client.get(row.url).getvalue() == b"packed"


def test_the_bytes_of_a_delta_add_up(client, acme, backbone):
    job = factories.make_job(factories.make_repo(acme, "made"), backbone=backbone)
    sizes = {"codes": 700, "scales": 200, "embeddings": 40, "exact": 30, "coded": 10, "header": 20}
    JobStep.objects.create(
        job=job, name="compress", attempt=1, outputs={"size": {"bytes": sizes}}, seconds=1.0
    )
    job.revision.number, job.revision.state, job.revision.digest = 1, "PUBLISHED", "c" * 64
    job.revision.save()
    bar = client.get("/acme/made/files").context["byte_bar"]
    assert bar.total_bytes == 1000
    assert {part.name: part.size_bytes for part in bar.slices} == sizes
    assert sum(part.width for part in bar.slices) == pytest.approx(bar.width)


def test_a_fine_tune_that_equals_its_backbone_is_said_to_have_no_payload(client, acme, backbone):
    job = factories.make_job(factories.make_repo(acme, "made"), backbone=backbone)
    sizes = {"codes": 0, "scales": 0, "embeddings": 0, "exact": 0, "coded": 0, "header": 2000}
    JobStep.objects.create(
        job=job, name="compress", attempt=1, outputs={"size": {"bytes": sizes}}, seconds=1.0
    )
    job.revision.number, job.revision.state, job.revision.digest = 1, "PUBLISHED", "c" * 64
    job.revision.save()
    assert "equals the backbone: 0 bytes of payload" in client.get("/acme/made/files").text


def test_a_class_without_bytes_is_left_out():
    bar = plots.plot_bytes({"codes": 60, "coded": 0, "header": 40})
    assert [part.name for part in bar.slices] == ["codes", "header"]


def test_failing_checks_come_first(client, delta):
    response = client.get("/acme/math/verification")
    assert [check.ok for check in response.context["checks"]] == [False, True]
    assert "98.76\xa0%" in response.text


def test_what_a_check_needs_has_a_side_and_recovery_one_form(client, delta):
    text = text_of(client.get("/acme/math/verification"))
    assert '<td class="num">99.31 %</td> <td class="num">≥ 90 %</td>' in text
    assert '<td class="num">0.0412</td> <td class="num">≤ 0.02</td>' in text
    assert "0.9931" not in text


def test_the_error_map_has_a_cell_for_each_matrix(client, delta):
    plot = client.get("/acme/math/verification").context["error_map"]
    assert [(cell.step, cell.error) for cell in plot.cells] == [(8, 0.5), (4, 0.4), (0, 0.3)]
    assert len({cell.x for cell in plot.cells}) == 3


def test_evaluations_stand_beside_each_other(client, delta):
    (plot,) = client.get("/acme/math/evaluations").context["quality"]
    assert [(bar.subject, bar.accuracy) for bar in plot.bars] == [
        ("backbone", 0.11),
        ("finetune", 0.552),
        ("delta", 0.536),
    ]
    assert plot.bars[1].width > plot.bars[2].width > plot.bars[0].width
    assert all(bar.low < bar.accuracy < bar.high for bar in plot.bars)


@pytest.mark.parametrize(
    ("right", "ends"),
    [(0, (0.0, 0.01885)), (100, (0.43136, 0.56864)), (200, (0.98115, 1.0))],
)
def test_an_interval_is_wilsons(right, ends):
    assert plots.bound_share(right / 200, 200) == pytest.approx(ends, abs=1e-5)


@pytest.mark.parametrize("n", [12, 200, 305])
def test_an_interval_of_all_or_none_ends_there(n):
    assert (plots.bound_share(0.0, n)[0], plots.bound_share(1.0, n)[1]) == (0.0, 1.0)


def test_a_model_without_records_says_so(client, acme, backbone):
    factories.make_revision(factories.make_repo(acme, "bare"), backbone=backbone)
    assert "no verification record" in client.get("/acme/bare/verification").text
    assert "No evaluation" in client.get("/acme/bare/evaluations").text
    assert client.get("/acme/bare").status_code == 200


def test_revisions_are_switched_in_the_address(client, delta):
    factories.make_revision(
        delta.repo, backbone=delta.backbone, yank_reason="", files={"README.md": b"# Second"}
    )
    assert "<h2>Second</h2>" in client.get("/acme/math").text
    first = client.get("/acme/math?rev=v1")
    assert "<h2>Title</h2>" in first.text
    assert "/acme/math/files?rev=v1" in first.text
    assert client.get("/acme/math?rev=v9").status_code == 404


def test_a_repo_without_revisions_shows_its_jobs_to_members(client, sign_in, acme, bob):
    factories.make_job(factories.make_repo(acme, "draft"))
    assert "Nothing is published here yet" in client.get("/acme/draft").text
    assert "/jobs/" not in client.get("/acme/draft").text
    assert "/jobs/" in sign_in(bob).get("/acme/draft").text
    assert client.get("/acme/draft/files").status_code == 404


def test_a_maintainer_yanks_a_revision(sign_in, client, delta, ci_bot):
    answer = sign_in(ci_bot).post("/acme/math/yank", {"rev": "v1", "reason": "Leaked test set."})
    assert answer.status_code == 302
    delta.refresh_from_db()
    assert delta.state == "YANKED"
    page = client.get("/acme/math?rev=v1")
    assert "This revision was withdrawn" in page.text
    assert "Leaked test set." in page.text
    assert "Nothing is published here yet" in client.get("/acme/math").text


def test_a_second_yank_is_explained(sign_in, delta, alice):
    browser = sign_in(alice)
    browser.post("/acme/math/yank", {"rev": "v1", "reason": "once"})
    answer = browser.post("/acme/math/yank", {"rev": "v1", "reason": "twice"}, follow=True)
    assert "Only published revisions can be yanked" in answer.text


def test_a_visibility_that_does_not_exist_is_refused(sign_in, delta, alice):
    answer = sign_in(alice).post("/acme/math/visibility", {"visibility": "secret"})
    assert answer.status_code == 400
    delta.repo.refresh_from_db()
    assert delta.repo.visibility == "public"


@pytest.mark.parametrize("action", ["yank", "visibility"])
def test_only_those_with_the_right_change_a_model(client, sign_in, delta, bob, charlie, action):
    form = {"rev": "v1", "reason": "x", "visibility": "private"}
    url = f"/acme/math/{action}"
    assert client.post(url, form).headers["Location"].startswith("/accounts/login")
    assert sign_in(bob).post(url, form).status_code == 403
    assert sign_in(charlie).post(url, form).status_code == 403
    assert sign_in(bob).get(url).status_code == 405
    delta.refresh_from_db()
    assert (delta.state, delta.repo.visibility) == ("PUBLISHED", "public")


def test_an_owner_hides_a_model(sign_in, client, delta, alice, ci_bot):
    assert (
        sign_in(ci_bot).post("/acme/math/visibility", {"visibility": "private"}).status_code == 403
    )
    assert (
        sign_in(alice).post("/acme/math/visibility", {"visibility": "private"}).status_code == 302
    )
    assert client.get("/acme/math").status_code == 404


def test_buttons_are_shown_to_those_who_may_press_them(sign_in, delta, ci_bot, bob):
    assert "Yank v1" in sign_in(ci_bot).get("/acme/math").text
    assert "Yank v1" not in sign_in(bob).get("/acme/math").text


def test_snippets_name_this_hub_and_this_revision(client, delta):
    texts = {s.id: s.text for s in client.get("/acme/math").context["snippets"]}
    assert texts["snippet-pull"] == "deltacome pull acme/math@v1 math --url http://testserver"
    assert "reconstruct --base base --delta math --out math-full" in texts["snippet-reconstruct"]
    assert '"model": "acme/math@v1"' in texts["snippet-chat"]
