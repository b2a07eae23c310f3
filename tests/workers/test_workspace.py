import factories
import pytest
from django.db.models.functions import Now

from deltacome_core.errors import UserError
from hub.jobs import from_now
from hub.models import Job
from hub.storage import LocalStore
from workers import sweeper
from workers.fetch import fetch_blob
from workers.workspace import materialise, open_workspace, prune_workspaces, workspaces_root


def no_claim(_stored):
    """No rows refer to these blobs."""


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "blobs")


class FarStore:
    """A store without local paths, as S3 is."""

    def __init__(self, store):
        self.store = store

    def read(self, sha256, *, start=0, end=None):
        return self.store.read(sha256, start=start, end=end)


@pytest.mark.parametrize("far", [False, True])
def test_a_fetched_file_has_the_bytes_of_its_name(tmp_path, store, far):
    stored = store.put([b"some ", b"weights"], no_claim)
    target = tmp_path / "out" / "model.safetensors"
    fetch_blob(FarStore(store) if far else store, stored.sha256, target)
    assert target.read_bytes() == b"some weights"
    assert target.samefile(store.path(stored.sha256)) != far
    assert [path.name for path in target.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("far", [False, True])
def test_a_blob_that_is_not_what_its_name_says_is_refused(tmp_path, store, far):
    stored = store.put([b"some weights"], no_claim)
    path = store.path(stored.sha256)
    path.chmod(0o644)
    path.write_bytes(b"other weight")
    target = tmp_path / "out" / "model.safetensors"
    with pytest.raises(UserError) as refusal:
        fetch_blob(FarStore(store) if far else store, stored.sha256, target)
    assert refusal.value.code == "file_digest_mismatch"
    assert list(target.parent.iterdir()) == []


def test_a_folder_holds_exactly_what_was_asked_for(tmp_path, store):
    first, second = (store.put([text], no_claim).sha256 for text in (b"1", b"2"))
    folder = tmp_path / "tuned"
    materialise(store, {"a": first, "b": second}, folder)
    materialise(store, {"a": second}, folder)
    visible = {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}
    assert visible == {"a": b"2"}


def make_workspace(repo, state, **fields):
    revision = factories.make_revision(repo, state="DRAFT")
    job = Job.objects.create(
        kind="delta",
        owner=repo.created_by,
        upload=factories.make_upload(repo),
        revision=revision,
        state=state,
        step="compress",
        **fields,
    )
    (open_workspace(job.pk) / "file").write_text("x")
    return job


@pytest.mark.django_db
def test_only_folders_that_nobody_will_ask_for_are_pruned(acme, data_dir):
    repo = factories.make_repo(acme)
    gone = {
        make_workspace(repo, "DONE", finished_at=Now()).pk,
        make_workspace(repo, "REJECTED", finished_at=Now()).pk,
        make_workspace(repo, "CANCELLED", finished_at=Now()).pk,
        make_workspace(repo, "FAILED", finished_at=from_now(-2 * 24 * 3600)).pk,
    }
    kept = {
        make_workspace(repo, "FAILED", finished_at=Now()).pk,
        make_workspace(repo, "RUNNING").pk,
        make_workspace(repo, "QUEUED").pk,
    }
    (workspaces_root() / "notes").mkdir()
    assert prune_workspaces() == len(gone)
    left = {path.name for path in workspaces_root().iterdir()}
    assert left == {str(pk) for pk in kept} | {"notes"}


@pytest.mark.django_db(transaction=True)
def test_the_sweeper_outlives_a_database_that_is_away(monkeypatch, caplog):
    from django.db import OperationalError

    def fail():
        raise OperationalError("the server is restarting")

    sweeper._try(fail)
    assert "sweep_failed" in caplog.text
    assert sweeper.sweep() == {"requeued": 0, "failed": 0, "rung": 0}


@pytest.mark.django_db
def test_upkeep_counts_what_it_removed(acme, data_dir):
    make_workspace(factories.make_repo(acme), "DONE", finished_at=Now())
    assert sweeper.tidy()["workspaces_removed"] == 1
