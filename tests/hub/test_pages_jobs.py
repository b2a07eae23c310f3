import re

import factories
import pytest

from hub.models import Job, JobStep

pytestmark = pytest.mark.django_db


@pytest.fixture
def make_job(acme):
    def make(name="math", **fields):
        job = factories.make_job(factories.make_repo(acme, name), **fields)
        job.record()
        return job

    return make


def states(response):
    return re.findall(r'data-state="(\w+)" data-step="(\w+)"', response.text)


def test_jobs_are_listed_for_members_only(client, sign_in, make_job, bob, charlie):
    make_job()
    assert client.get("/jobs").headers["Location"] == "/accounts/login?next=/jobs"
    assert "acme/math" in sign_in(bob).get("/jobs").text
    assert "No jobs yet" in sign_in(charlie).get("/jobs").text


@pytest.mark.parametrize("path", ["", "/state"])
def test_a_job_does_not_exist_for_strangers(client, sign_in, make_job, bob, charlie, path):
    url = f"/jobs/{make_job().pk}{path}"
    assert client.get(url).status_code == 302
    assert sign_in(charlie).get(url).status_code == 404
    assert sign_in(bob).get(url).status_code == 200


def test_each_step_has_its_state_and_duration(sign_in, make_job, bob):
    job = make_job(
        state="RUNNING",
        step="compress",
        attempt=2,
        progress={"done": 3, "total": 8, "layer": "model.layers.2", "seconds": 0.5164},
    )
    JobStep.objects.create(job=job, name="ingest", attempt=1, outputs={}, seconds=75.0)
    page = sign_in(bob).get(f"/jobs/{job.pk}")
    assert states(page) == [
        ("done", "ingest"),
        ("running", "compress"),
        ("waiting", "verify"),
        ("waiting", "evaluate"),
        ("waiting", "publish"),
    ]
    assert "1 min 15 s" in page.text
    assert "attempt 2 of 3" in page.text
    assert "3 of 8 · layer model.layers.2 · 0.516 s" in page.text
    assert re.search(r'<progress[^>]+max="8"\s+value="3"', page.text)


def test_changes_of_state_come_with_the_state(sign_in, make_job, bob):
    job = make_job(state="RUNNING", step="compress")
    whole = sign_in(bob).get(f"/jobs/{job.pk}").text
    parts = sign_in(bob).get(f"/jobs/{job.pk}/state").text
    assert "hx-swap-oob" not in whole
    assert parts.count('id="history" hx-swap-oob="true"') == 1
    rows = re.compile(r"<td>\s*running\s*</td>\s*<td>\s*compress\s*</td>")
    assert rows.search(whole)
    assert rows.search(parts)


def test_a_page_without_scripts_reloads_until_the_end(sign_in, make_job, bob):
    running, done = make_job(state="RUNNING"), make_job("other", state="DONE", step="publish")
    reload = re.compile(r'<noscript>\s*<meta http-equiv="refresh"')
    assert reload.search(sign_in(bob).get(f"/jobs/{running.pk}").text)
    assert not reload.search(sign_in(bob).get(f"/jobs/{done.pk}").text)


def test_a_failure_says_what_happened_and_what_to_do(sign_in, make_job, bob):
    params = {"tensors": ["model.norm.weight: expected [64] found [32]"]}
    job = make_job(state="FAILED", error_code="backbone_mismatch", error_params=params)
    text = sign_in(bob).get(f"/jobs/{job.pk}").text
    assert "The fine-tune does not fit this backbone" in text
    assert "model.norm.weight: expected [64] found [32]" in text
    assert "What to do:" in text
    assert "backbone_mismatch" in text


def test_a_rejection_begins_with_the_failing_check(sign_in, make_job, bob):
    job = make_job(
        state="REJECTED",
        step="verify",
        error_code="verification_failed",
        error_params={"check": "recovery", "value": 0.8712, "threshold": 0.9},
    )
    text = sign_in(bob).get(f"/jobs/{job.pk}").text
    assert text.index("0.8712") < text.index("Code <code>verification_failed")
    assert ("rejected", "verify") in re.findall(r'data-state="(\w+)" data-step="(\w+)"', text)


def test_a_finished_job_leads_to_its_result(sign_in, make_job, bob):
    job = make_job(state="DONE", step="publish")
    job.revision.number, job.revision.state, job.revision.digest = 1, "PUBLISHED", "d" * 64
    job.revision.save()
    assert 'href="/acme/math?rev=v1"' in sign_in(bob).get(f"/jobs/{job.pk}").text


def test_a_maintainer_cancels_and_retries(sign_in, make_job, ci_bot):
    job, browser = make_job(), sign_in(ci_bot)
    browser.post(f"/jobs/{job.pk}/cancel")
    job.refresh_from_db()
    assert job.state == Job.State.CANCELLED
    browser.post(f"/jobs/{job.pk}/retry")
    job.refresh_from_db()
    assert job.state == Job.State.QUEUED


@pytest.mark.parametrize(("code", "first"), [("nan_weights", False), ("storage_full", True)])
def test_a_retry_comes_first_only_where_it_can_help(sign_in, make_job, ci_bot, code, first):
    job = make_job(state="FAILED", error_code=code)
    text = sign_in(ci_bot).get(f"/jobs/{job.pk}").text
    assert ("Upload another checkpoint" in text) != first
    assert ('class="button primary" type="submit"' in text) == first


@pytest.mark.parametrize("action", ["cancel", "retry"])
def test_readers_and_strangers_move_no_job(client, sign_in, make_job, bob, charlie, action):
    job = make_job(state="FAILED" if action == "retry" else "QUEUED")
    url = f"/jobs/{job.pk}/{action}"
    assert client.post(url).headers["Location"].startswith("/accounts/login")
    assert sign_in(bob).post(url).status_code == 403
    assert sign_in(charlie).post(url).status_code == 404
    assert sign_in(bob).get(url).status_code == 405
    before = job.state
    job.refresh_from_db()
    assert job.state == before


def test_a_late_cancel_is_explained(sign_in, make_job, alice):
    job = make_job(state="DONE", step="publish")
    answer = sign_in(alice).post(f"/jobs/{job.pk}/cancel", follow=True)
    assert "The job is finished" in answer.text


def test_a_wrong_cursor_is_refused_in_words(sign_in, alice):
    answer = sign_in(alice).get("/jobs?after=yesterday")
    assert answer.status_code == 400
    assert "The request is not valid" in answer.text
