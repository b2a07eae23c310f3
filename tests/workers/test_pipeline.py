"""The whole way with the real queue: Redis, a Celery worker, the sweeper, children."""

import json
import os
import signal
from pathlib import Path

import plant
import pytest
import redis
import tiny

from deltacome_core.budget import Budget
from deltacome_core.compress import compress_checkpoint
from deltacome_core.recipe import get_recipe
from hub.models import Evaluation, Verification

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def env(hub_env, redis_server, data_dir):
    return hub_env | plant.SHORT_LEASES | {"DELTACOME_DATA_DIR": str(data_dir)}


def make_pair(folder, *, layers=2):
    tiny.save(tiny.make_model(layers=layers), folder / "base")
    # One direction a matrix: what the recipe keeps in 8 bits, so that verification passes.
    tuned = tiny.tune(tiny.make_model(layers=layers), rank=1, everywhere=False)
    tiny.save(tuned, folder / "tuned")
    tiny.write_calibration(folder / "tuned")
    return folder


def compress_undisturbed(folder, *, bits_per_param):
    budget = Budget(bits_per_param=bits_per_param)
    places = folder / "base", folder / "tuned", folder / "delta"
    compress_checkpoint(*places, get_recipe("hub"), budget=budget)
    return {path.name: path.read_bytes() for path in (folder / "delta").iterdir()}


def test_a_backbone_and_then_its_fine_tune_are_published(env, tmp_path, alice, acme):
    folder = make_pair(tmp_path)
    tiny.write_evaluation(folder / "tuned")
    with plant.run_worker(env), plant.run_sweeper(env):
        job = plant.upload(alice, folder / "base", "acme/base", kind="backbone")
        assert plant.wait_for_end(job).state == "DONE", job.error_text
        backbone = job.revision
        backbone.refresh_from_db()
        published = plant.read_files(backbone)
        table = json.loads(published["tensors.json"])
        assert table["lm_head.weight"]["shape"] == [tiny.VOCABULARY, 64]
        weights = (folder / "base" / "model.safetensors").read_bytes()
        assert published["model.safetensors"] == weights

        job = plant.upload(alice, folder / "tuned", "acme/math", bits_per_param=4.0)
        assert plant.wait_for_end(job).state == "DONE", job.error_text
        # The fine-tune's own weights go from every list: only the delta stands for them.
        sources = job.upload.files.exclude(blob=None)
        workspace = Path(env["DELTACOME_DATA_DIR"]) / "workspaces" / str(job.pk)
        plant.wait_for(
            lambda: not sources.exists() and not workspace.exists(), what="the sources go"
        )
    revision = job.revision
    revision.refresh_from_db()
    assert (str(revision), revision.backbone) == ("acme/math@v1", backbone)
    files = plant.read_files(revision)
    made = compress_undisturbed(folder, bits_per_param=4.0)
    assert {path: files[path] for path in made} == made
    assert set(files) - set(made) == {"README.md", "verification.json", "evaluation.json"}
    assert b"| verification | grade " in files["README.md"]
    # The backbone is private: the card gives its digest and keeps its name.
    assert backbone.digest.encode() in files["README.md"]
    assert b"acme/base" not in files["README.md"]
    assert revision.size_bytes == len(made["delta.safetensors"]) + len(made["delta.json"])
    verification = Verification.objects.get(revision=revision)
    assert verification.grade == json.loads(files["verification.json"])["grade"]
    subjects = Evaluation.objects.filter(revision=revision).values_list("subject", "n")
    assert sorted(subjects) == [("backbone", 4), ("delta", 4), ("finetune", 4)]


def test_a_job_survives_a_lost_queue_a_killed_child_and_a_killed_worker(env, tmp_path, alice, acme):
    folder = make_pair(tmp_path, layers=6)
    plant.publish_backbone(acme, folder / "base")
    job = plant.upload(alice, folder / "tuned", "acme/math", bits_per_param=4.0)
    redis.Redis.from_url(env["REDIS_URL"]).flushall()
    workspace = Path(env["DELTACOME_DATA_DIR"]) / "workspaces" / str(job.pk)

    def child_with_parts(count):
        job.refresh_from_db()
        parts = list(workspace.glob(".delta.parts/*/*.safetensors"))
        children = plant.find_children(job.pk) if job.step == "compress" else []
        return children if len(parts) >= count else []

    with plant.run_sweeper(env):
        with plant.run_worker(env) as worker:
            (child,) = plant.wait_for(lambda: child_with_parts(1), what="the first layer")
            surroundings = Path(f"/proc/{child}/environ").read_bytes()
            for secret in (b"SECRET_KEY", b"TOKEN_PEPPER", b"DATABASE_URL", b"REDIS_URL"):
                assert secret + b"=" not in surroundings
            os.kill(child, signal.SIGKILL)
            plant.wait_for(
                lambda: child not in plant.find_children(job.pk) and child_with_parts(2),
                what="the second attempt goes on",
            )
            (child,) = plant.find_children(job.pk)
            plant.kill_group(worker.pid)
        # The child was in a session of its own, and still nothing is left of it.
        plant.wait_for(lambda: not plant.find_children(job.pk), what="the child dies too")
        with plant.run_worker(env):
            plant.wait_for_end(job)
    assert job.state == "DONE", job.error_text
    files = plant.read_files(job.revision)
    made = compress_undisturbed(folder, bits_per_param=4.0)
    assert {path: files[path] for path in made} == made
    assert job.revision.repo.revisions.filter(state="PUBLISHED").count() == 1
    assert job.steps.get(name="compress").attempt == 3
    told = redis.Redis.from_url(env["REDIS_URL"]).xrange(f"job:{job.pk}:events")
    progress = [json.loads(fields[b"data"]) for _, fields in told if fields[b"type"] == b"progress"]
    resumed = [data for data in progress if data.get("from") == "an earlier attempt"]
    assert resumed
    assert all("seconds" not in data for data in resumed)


def test_each_queue_gets_its_own_messages_only(env):
    """Bindings outlive workers: after one of each has run, a message must still reach one queue."""
    from hub import jobs
    from hub.celery import app

    client = redis.Redis.from_url(env["REDIS_URL"])
    with client, app.connection_for_write() as connection:
        for queue in app.amqp.queues.values():
            queue(connection).declare()
        for step in ("compress", "ingest"):
            assert jobs.ring("0192d5b0-0000-7000-8000-000000000000", step)
        assert [client.llen(f"dch:{queue}") for queue in ("io", "gpu")] == [1, 1]
