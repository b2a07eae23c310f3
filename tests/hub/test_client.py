import json
import os

import factories
import httpx
import pytest

from deltacome_core.client import HubClient, HubError
from deltacome_core.errors import UserError
from hub.models import Job, Part, Upload

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(factories.safetensors_bytes())
    (folder / "optimizer.pt").write_bytes(b"left at home")
    return folder


@pytest.fixture
def base(acme):
    return factories.make_backbone(acme, "base")


@pytest.fixture
def hub(live_hub, acme, ci_bot):
    with HubClient(live_hub, factories.make_token(ci_bot)) as client:
        yield client


def test_a_push_becomes_a_job(hub, base, checkpoint):
    seen = []
    job = hub.push(
        checkpoint, "acme/math", on_progress=lambda done, total: seen.append((done, total))
    )
    assert (job.state, job.step, job.repo) == ("QUEUED", "ingest", "acme/math")
    assert (
        seen[-1][0]
        == seen[-1][1]
        == sum((checkpoint / name).stat().st_size for name in ("config.json", "model.safetensors"))
    )


def test_the_same_push_finds_its_own_job(hub, base, checkpoint):
    assert hub.push(checkpoint, "acme/math").id == hub.push(checkpoint, "acme/math").id
    assert Upload.objects.count() == 1


def test_a_push_after_a_failed_job_is_a_new_one(hub, base, checkpoint):
    first = hub.push(checkpoint, "acme/math")
    Job.objects.update(state="FAILED")
    assert hub.push(checkpoint, "acme/math").id != first.id


def test_a_changed_file_is_a_new_push(hub, base, checkpoint):
    first = hub.push(checkpoint, "acme/math")
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    assert hub.push(checkpoint, "acme/math").id != first.id


def test_an_interrupted_push_sends_only_what_is_missing(hub, base, checkpoint, monkeypatch):
    sent, real = [], hub._http.request

    def fail_after_one_part(method, address, **options):
        sent.extend([address] if "/parts/" in address else [])
        if len(sent) > 1:
            raise HubError(400, {"code": "invalid"})
        return real(method, address, **options)

    monkeypatch.setattr("deltacome_core.client.PARTS_IN_FLIGHT", 1)
    monkeypatch.setattr(hub._http, "request", fail_after_one_part)
    with pytest.raises(HubError):
        hub.push(checkpoint, "acme/math")
    monkeypatch.setattr(hub._http, "request", real)
    held = Part.objects.get().pk
    hub.push(checkpoint, "acme/math")
    assert (Upload.objects.count(), Part.objects.filter(pk=held).count()) == (1, 1)


def test_a_wrong_backbone_is_told_in_the_hubs_words(hub, acme, checkpoint):
    factories.make_backbone(acme, "other", tensors={"a.weight": ("F32", [4, 4])})
    with pytest.raises(HubError) as caught:
        hub.push(checkpoint, "acme/math")
    assert (caught.value.code, caught.value.status) == ("backbone_mismatch", 422)
    assert "does not fit" in str(caught.value)
    assert caught.value.fields["count"] == 4
    factories.make_backbone(acme, "base")
    assert hub.push(checkpoint, "acme/math").state == "QUEUED"


def test_a_folder_without_weights_is_no_checkpoint(hub, tmp_path):
    with pytest.raises(UserError) as caught:
        hub.push(tmp_path, "acme/math")
    assert caught.value.code == "not_a_checkpoint"


def test_waiting_ends_with_the_job(hub, acme, later):
    job = factories.make_job(factories.make_repo(acme))
    later(0.3, lambda: Job.objects.filter(pk=job.pk).update(state="DONE"))
    states = []
    assert hub.wait(str(job.pk), on_update=lambda seen: states.append(seen.state)).is_finished
    assert states[-1] == "DONE"


def test_waiting_gives_up_when_told_so(hub, acme):
    job = factories.make_job(factories.make_repo(acme))
    assert hub.wait(str(job.pk), timeout_s=0.2).state == "QUEUED"


def test_a_failed_job_tells_why(hub, acme):
    job = factories.make_job(
        factories.make_repo(acme),
        state="FAILED",
        error_code="worker_lost",
        error_params={"step": "compress", "attempts": 3},
    )
    found = hub.get_job(str(job.pk))
    assert (found.error_code, "compress" in found.error) == ("worker_lost", True)


def test_a_pull_brings_the_files_and_names_the_backbone(hub, acme, base, tmp_path):
    files = {"delta.safetensors": os.urandom(300_000), "delta.json": b"{}"}
    factories.make_revision(factories.make_repo(acme, "math"), files=files, backbone=base)
    pulled = hub.pull("acme/math", tmp_path / "out")
    assert (pulled.name, pulled.backbone) == ("acme/math@v1", "acme/base@v1")
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found == files


def test_a_pull_goes_on_where_it_stopped(hub, acme, tmp_path):
    content = os.urandom(200_000)
    factories.make_revision(factories.make_repo(acme, "math"), files={"d.safetensors": content})
    (tmp_path / ".d.safetensors.partial").write_bytes(content[:150_000])
    ranges = []
    hub._http.event_hooks["request"] = [lambda request: ranges.append(request.headers.get("range"))]
    hub.pull("acme/math@v1", tmp_path)
    assert ranges[-1] == "bytes=150000-"
    assert (tmp_path / "d.safetensors").read_bytes() == content


def test_a_damaged_part_file_is_found_out(hub, acme, tmp_path):
    factories.make_revision(factories.make_repo(acme, "math"), files={"d.json": b"x" * 100})
    (tmp_path / ".d.json.partial").write_bytes(b"y" * 50)
    with pytest.raises(UserError) as caught:
        hub.pull("acme/math", tmp_path)
    assert caught.value.code == "file_digest_mismatch"
    assert list(tmp_path.iterdir()) == []
    hub.pull("acme/math", tmp_path)
    assert (tmp_path / "d.json").read_bytes() == b"x" * 100


def test_a_second_pull_loads_nothing(hub, acme, tmp_path):
    factories.make_revision(factories.make_repo(acme, "math"))
    hub.pull("acme/math", tmp_path)
    asked = []
    hub._http.event_hooks["request"] = [lambda request: asked.append(request.url.path)]
    hub.pull("acme/math", tmp_path)
    assert asked == ["/api/v1/repos/acme/math/revisions/latest"]


def test_listing_reads_all_pages(hub, acme):
    for _ in range(60):
        factories.make_repo(acme)
    assert len(list(hub.list_repos(kind="delta"))) == 60


def test_who_am_i(hub):
    found = hub.whoami()
    assert (found["username"], found["scopes"]) == ("ci_bot", ["read", "write"])
    assert {row["name"]: row["role"] for row in found["namespaces"]} == {
        "acme": "maintainer",
        "ci_bot": "owner",
    }


def test_an_absent_hub_is_an_error_with_advice(monkeypatch):
    monkeypatch.setattr("deltacome_core.client.FIRST_PAUSE_S", 0.001)
    with HubClient("http://127.0.0.1:9") as client, pytest.raises(UserError) as caught:
        client.whoami()
    assert caught.value.code == "hub_unreachable"
    assert "127.0.0.1:9" in str(caught.value)


def test_a_restarting_hub_is_asked_again(monkeypatch, hub):
    monkeypatch.setattr("deltacome_core.client.FIRST_PAUSE_S", 0.001)
    answers = [httpx.ConnectError("refused"), httpx.Response(503), None]
    real = hub._http.request

    def request(method, address, **options):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer or real(method, address, **options)

    monkeypatch.setattr(hub._http, "request", request)
    assert hub.whoami()["username"] == "ci_bot"
