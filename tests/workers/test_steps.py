"""Steps run by the supervisor in this process, their children for real."""

import json
import re
import time

import plant
import pytest
import tiny
import torch
from django.db import OperationalError

from deltacome_core.errors import UserError
from hub import jobs
from hub.jobs import Lease
from hub.models import Blob, File, Job, Revision
from workers import stages, step
from workers.ingest import find_backbone
from workers.lease import LeaseKeeper
from workers.spec import Candidate

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def short_leases(settings, data_dir):
    settings.HEARTBEAT_S, settings.LEASE_TTL_S, settings.RETRY_BACKOFF_S = 0.2, 30.0, 0.0


def run_all(job, *, until=None):
    """Do what the bells would do, one step after the other."""
    for _ in range(12):
        job.refresh_from_db()
        if job.is_finished or job.step == until:
            return job
        step.run_step(job.step, str(job.pk))
    raise AssertionError(f"{job} does not end")


def assert_nothing_published(job):
    revision = Revision.objects.get(pk=job.revision_id)
    assert revision.state in {"DRAFT", "REJECTED"}
    assert revision.number is None
    assert not File.objects.filter(revision=revision).exists()


def test_weights_that_are_not_numbers_fail_the_upload(tmp_path, alice, acme):
    model = tiny.make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    folder = tiny.save(model, tmp_path / "base")
    job = run_all(plant.upload(alice, folder, "acme/base", kind="backbone"))
    assert (job.state, job.error_code, job.attempt) == ("FAILED", "nan_weights", 1)
    assert "model.layers.1.mlp.up_proj.weight" in job.error_text
    assert_nothing_published(job)


def test_a_missing_shard_fails_the_upload(tmp_path, alice, acme):
    folder = tiny.save(tiny.make_model(), tmp_path / "base", max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    # Named like this, only the index tells that one is missing.
    index = folder / "model.safetensors.index.json"
    index.write_text(re.sub(r"model-(\d{5})-of-\d{5}", r"piece-\1", index.read_text()))
    shards = [shard.rename(folder / f"piece-{shard.name[6:11]}.safetensors") for shard in shards]
    shards[1].unlink()
    job = run_all(plant.upload(alice, folder, "acme/base", kind="backbone"))
    assert (job.state, job.error_code) == ("FAILED", "shard_missing")
    assert shards[1].name in job.error_text
    assert_nothing_published(job)


def test_a_tokenizer_that_brings_code_fails_the_upload(tmp_path, alice, acme):
    folder = tiny.save(tiny.make_model(), tmp_path / "base")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["x.Y", None]}}
    path.write_text(json.dumps(config))
    job = run_all(plant.upload(alice, folder, "acme/base", kind="backbone"))
    assert (job.state, job.error_code) == ("FAILED", "config_unsafe")
    assert_nothing_published(job)


def test_a_part_that_rotted_on_disk_is_tried_again_and_then_told(tmp_path, alice, acme, settings):
    folder = tiny.save(tiny.make_model(), tmp_path / "base")
    job = plant.upload(alice, folder, "acme/base", kind="backbone")
    part = next((settings.DATA_DIR / "uploads" / str(job.upload_id)).glob("*/2.*"))
    content = bytearray(part.read_bytes())
    content[10] ^= 1
    part.chmod(0o644)
    part.write_bytes(content)
    run_all(job)
    assert (job.state, job.error_code, job.attempt) == ("FAILED", "internal", 3)
    assert str(job.pk) in job.error_text
    assert_nothing_published(job)


def test_a_delta_below_the_threshold_is_rejected_with_the_check_named(tmp_path, alice, acme):
    folder = tiny.save(tiny.make_model(), tmp_path / "base")
    tuned = tiny.save(tiny.tune(tiny.make_model(), size=0.05), tmp_path / "tuned")
    plant.publish_backbone(acme, folder)
    job = plant.upload(alice, tuned, "acme/math", recipe="bitdelta")
    run_all(job)
    assert (job.state, job.error_code) == ("REJECTED", "verification_failed")
    assert job.error_params["check"] == "recovery"
    assert job.error_params["value"] < job.error_params["threshold"]
    assert_nothing_published(job)
    assert Revision.objects.get(pk=job.revision_id).reject_code == "verification_failed"


def test_a_late_message_does_nothing(tmp_path, alice, acme):
    folder = tiny.save(tiny.make_model(), tmp_path / "base")
    job = plant.upload(alice, folder, "acme/base", kind="backbone")
    step.run_step("publish", str(job.pk))
    job.refresh_from_db()
    assert (job.state, job.step, job.attempt) == ("QUEUED", "ingest", 0)


def test_a_zombie_cannot_publish(tmp_path, alice, acme, monkeypatch):
    folder = tiny.save(tiny.make_model(), tmp_path / "base")
    job = run_all(plant.upload(alice, folder, "acme/base", kind="backbone"), until="publish")
    describe = stages.publish

    def sleep_while_another_takes_over(attempt):
        publication = describe(attempt)
        Job.objects.filter(pk=job.pk).update(lease_expires_at=jobs.from_now(-1))
        assert jobs.claim(job.pk, step="publish", owner="another worker")
        return publication

    monkeypatch.setattr(stages, "publish", sleep_while_another_takes_over)
    step.run_step("publish", str(job.pk))
    job.refresh_from_db()
    assert (job.state, job.step, job.lease_owner) == ("RUNNING", "publish", "another worker")
    assert_nothing_published(job)


def test_a_cancelled_job_loses_its_child_soon(tmp_path, alice, acme, monkeypatch):
    folder = tiny.save(tiny.make_model(), tmp_path / "base")
    job = plant.upload(alice, folder, "acme/base", kind="backbone")
    listen = step._listener

    def cancel_at_the_first_word(lease, keeper):
        inner = listen(lease, keeper)

        def hear(kind, data):
            inner(kind, data)
            row = Job.objects.get(pk=job.pk)
            if row.state == "RUNNING":
                jobs.cancel(row)
                # The child would be done in a moment; it is held until the heartbeat ends it.
                plant.wait_for(lambda: not plant.find_children(job.pk), what="the child ends")

        return hear

    monkeypatch.setattr(step, "_listener", cancel_at_the_first_word)
    step.run_step("ingest", str(job.pk))
    job.refresh_from_db()
    assert job.state == "CANCELLED"
    assert not job.steps.exists()
    assert not plant.find_children(job.pk)


@pytest.mark.parametrize(("outage_s", "is_lost"), [(0.4, False), (60, True)])
def test_a_database_that_is_away_is_waited_for_as_long_as_the_lease(
    monkeypatch, settings, outage_s, is_lost
):
    settings.LEASE_TTL_S, settings.HEARTBEAT_S = 1.5, 0.1
    back_at = time.monotonic() + outage_s
    calls = []

    def heartbeat(_lease, _progress):
        calls.append(time.monotonic())
        if time.monotonic() < back_at:
            raise OperationalError("the server is restarting")
        return True

    monkeypatch.setattr(jobs, "heartbeat", heartbeat)
    lost = []
    lease = Lease(job_id=None, step="ingest", seq=1, attempt=1)
    with LeaseKeeper(lease, on_lost=lambda: lost.append(True), timeout_s=60) as keeper:
        plant.wait_for(
            lambda: keeper.lost or (calls and calls[-1] > back_at), what="the outage is over"
        )
    assert (keeper.lost, bool(lost)) == (is_lost, is_lost)


def test_a_step_beyond_its_time_is_ended_and_told(tmp_path, alice, acme, monkeypatch):
    monkeypatch.setenv("STEP_TIMEOUT_S", "0.3")
    folder = tiny.save(tiny.make_model(), tmp_path / "base")
    job = plant.upload(alice, folder, "acme/base", kind="backbone")
    step.run_step("ingest", str(job.pk))
    job.refresh_from_db()
    assert (job.state, job.error_code) == ("FAILED", "step_timeout")


def test_a_full_disk_is_told_and_tried_again(tmp_path, alice, acme, monkeypatch):
    monkeypatch.setenv("CHILD_FILE_BYTES", "64")
    folder = tiny.save(tiny.make_model(), tmp_path / "base")
    job = plant.upload(alice, folder, "acme/base", kind="backbone")
    step.run_step("ingest", str(job.pk))
    job.refresh_from_db()
    assert (job.state, job.attempt, job.error_code) == ("QUEUED", 1, "disk_full")
    monkeypatch.delenv("CHILD_FILE_BYTES")
    run_all(job)
    # The trouble is over: a page that shows it beside "done" would be wrong.
    assert (job.state, job.error_code, job.error_text) == ("DONE", "", "")
    codes = job.events.order_by("id").values_list("new", "code")
    assert list(codes)[-1] == ("DONE", "")
    assert Blob.objects.filter(files__revision=job.revision).count() >= 5


def candidate(folder, number):
    from deltacome_core.checkpoint import hash_tensors, open_checkpoint
    from hub.backbones import dump_tensors

    checkpoint = open_checkpoint(folder)
    (folder / "tensors.json").write_bytes(dump_tensors(checkpoint.layout, hash_tensors(checkpoint)))
    return Candidate(revision=str(number), folder=str(folder))


@pytest.mark.parametrize("frozen_embedding", [True, False])
def test_of_two_backbones_of_one_shape_the_nearest_is_found(tmp_path, frozen_embedding):
    from deltacome_core.checkpoint import hash_tensors, open_checkpoint

    rivals = [
        candidate(tiny.save(tiny.make_model(seed=seed), tmp_path / str(seed)), seed)
        for seed in (4, 5, 6)
    ]
    tuned = tiny.make_model(seed=5)
    embedding = tuned.model.embed_tokens.weight.clone()
    tiny.tune(tuned)
    if frozen_embedding:
        with torch.no_grad():
            tuned.model.embed_tokens.weight.copy_(embedding)
    checkpoint = open_checkpoint(tiny.save(tuned, tmp_path / "tuned"))
    assert find_backbone(checkpoint, hash_tensors(checkpoint), rivals) == "5"


def test_a_stranger_to_every_backbone_of_its_shape_is_refused(tmp_path):
    from deltacome_core.checkpoint import hash_tensors, open_checkpoint

    rivals = [
        candidate(tiny.save(tiny.make_model(seed=seed), tmp_path / str(seed)), seed)
        for seed in (4, 5)
    ]
    tuned = open_checkpoint(tiny.save(tiny.tune(tiny.make_model(seed=9)), tmp_path / "tuned"))
    with pytest.raises(UserError) as caught:
        find_backbone(tuned, hash_tensors(tuned), rivals)
    assert caught.value.code == "backbone_unrelated"


def test_a_stranger_to_the_only_backbone_fails_before_it_is_compressed(tmp_path, alice, acme):
    plant.publish_backbone(acme, tiny.save(tiny.make_model(seed=4), tmp_path / "base"))
    folder = tiny.save(tiny.tune(tiny.make_model(seed=9)), tmp_path / "tuned")
    tiny.write_calibration(folder)
    job = run_all(plant.upload(alice, folder, "acme/tuned"))
    assert (job.state, job.step, job.error_code) == ("FAILED", "compress", "backbone_unrelated")
    assert "--force" in job.error_text
    assert_nothing_published(job)


def test_a_fine_tune_that_equals_its_backbone_is_published_and_says_so(tmp_path, alice, acme):
    base = tiny.save(tiny.make_model(), tmp_path / "base")
    plant.publish_backbone(acme, base)
    tiny.write_calibration(base)
    tiny.write_evaluation(base, items=2)
    job = run_all(plant.upload(alice, base, "acme/tuned"))
    assert (job.state, job.error_code) == ("DONE", "")
    files = plant.read_files(Revision.objects.get(pk=job.revision_id))
    assert "delta.json" in files
    assert not any(name.startswith("delta") and name.endswith(".safetensors") for name in files)
    assert "nothing to store" in files["README.md"].decode()
