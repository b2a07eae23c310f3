import errno
import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import factories
import pytest
from django.db import connection
from moto.server import ThreadedMotoServer

from deltacome_core.errors import InternalError, UserError
from hub import blobs, storage
from hub.jobs import from_now
from hub.models import Blob

CONTENT = os.urandom(2 * storage.CHUNK_BYTES + 11)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def no_claim(_stored):
    return None


def cut(content, size=100_000):
    return [content[start : start + size] for start in range(0, len(content), size)]


@pytest.fixture(scope="module")
def s3():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["local", "s3"])
def store(request, settings, data_dir, monkeypatch):
    settings.BLOB_STORE = request.param
    if request.param == "s3":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        settings.S3_ENDPOINT_URL, settings.S3_BUCKET = request.getfixturevalue("s3"), "blobs"
        storage.get_store().client.create_bucket(Bucket="blobs")
    yield storage.get_store()
    if request.param == "s3":
        for sha256 in (SHA256, hashlib.sha256(b"").hexdigest()):
            storage.get_store().delete(sha256)


def test_what_is_put_is_what_is_read(store):
    stored = store.put(iter(cut(CONTENT)), no_claim)
    assert (stored.sha256, stored.size_bytes) == (SHA256, len(CONTENT))
    assert b"".join(store.read(SHA256)) == CONTENT


def test_a_file_is_put_like_a_stream(store, tmp_path):
    (tmp_path / "x").write_bytes(CONTENT)
    assert store.put_file(tmp_path / "x", no_claim).sha256 == SHA256
    assert store.has(SHA256)


@pytest.mark.parametrize(
    "span", [(0, 1), (5, 5), (100, None), (storage.CHUNK_BYTES - 1, storage.CHUNK_BYTES + 1)]
)
def test_a_span_is_exactly_that(store, span):
    store.put([CONTENT], no_claim)
    assert b"".join(store.read(SHA256, start=span[0], end=span[1])) == CONTENT[slice(*span)]


def test_a_second_put_changes_nothing_and_delete_is_final(store):
    for _ in range(2):
        store.put([CONTENT], no_claim)
    assert store.has(SHA256)
    store.delete(SHA256)
    store.delete(SHA256)
    assert not store.has(SHA256)


def test_an_empty_blob_is_a_blob(store):
    stored = store.put([], no_claim)
    assert b"".join(store.read(stored.sha256)) == b""


def test_the_claim_comes_before_the_name(store):
    seen = []
    store.put([CONTENT], lambda stored: seen.append(store.has(stored.sha256)))
    assert seen == [False]


def test_bytes_on_disk_are_read_only_and_leave_no_scratch(data_dir):
    store = storage.get_store()
    store.put([CONTENT], no_claim)
    path = store.path(SHA256)
    assert path.relative_to(data_dir).parts == ("blobs", "sha256", SHA256[:2], SHA256[2:4], SHA256)
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert list((data_dir / "blobs" / "incoming").iterdir()) == []


def test_a_stream_that_breaks_leaves_nothing(data_dir):
    def broken():
        yield b"half"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        storage.get_store().put(broken(), no_claim)
    assert [path for path in data_dir.rglob("*") if path.is_file()] == []


def test_writers_of_the_same_bytes_do_not_disturb_each_other(data_dir):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: storage.get_store().put(cut(CONTENT), no_claim), range(16)))
    assert b"".join(storage.get_store().read(SHA256)) == CONTENT


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_has_a_code_of_its_own(data_dir, monkeypatch, number):
    def fail(_descriptor):
        raise OSError(number, "full")

    monkeypatch.setattr(storage.os, "fsync", fail)
    with pytest.raises(UserError) as caught:
        storage.get_store().put([CONTENT], no_claim)
    assert caught.value.code == "disk_full"


@pytest.mark.parametrize("name", ["../../etc/passwd", "A" * 64, "a" * 63, ""])
def test_only_a_digest_becomes_a_path(data_dir, name):
    with pytest.raises(InternalError):
        storage.get_store().path(name)


@pytest.mark.django_db
def test_a_blob_row_follows_the_bytes(data_dir):
    first = blobs.keep_chunks(cut(CONTENT))
    assert (first.sha256, first.size_bytes) == (SHA256, len(CONTENT))
    assert blobs.keep_chunks([CONTENT]).pk == first.pk
    assert blobs.read_blob(first) == CONTENT


def age(blob):
    Blob.objects.filter(pk=blob.pk).update(touched_at=from_now(-(10**6)))


@pytest.mark.django_db
def test_only_idle_bytes_that_nothing_refers_to_are_pruned(data_dir, acme):
    kept = factories.make_revision(factories.make_repo(acme)).files.get().blob
    source = (
        factories.make_upload(factories.make_repo(acme), files={"x": b"source"}).files.get().blob
    )
    idle, fresh = factories.make_blob(b"idle"), factories.make_blob(b"fresh")
    for blob in (kept, source, idle):
        age(blob)
    assert (blobs.prune_blobs(), blobs.prune_blobs()) == (1, 0)
    assert set(Blob.objects.values_list("pk", flat=True)) == {kept.pk, source.pk, fresh.pk}
    assert not storage.get_store().has(idle.pk)


@pytest.mark.django_db
def test_bytes_that_are_offered_again_are_spared(data_dir):
    age(factories.make_blob(b"idle"))
    factories.make_blob(b"idle")
    assert blobs.prune_blobs() == 0


@pytest.mark.django_db(transaction=True)
def test_writers_and_pruners_of_the_same_bytes_never_leave_a_row_without_bytes(data_dir):
    """The race that other registries lost: an upload finds bytes that are being deleted."""

    def write(_number):
        with closing(connection), suppress(Blob.DoesNotExist):
            age(blobs.keep_chunks([b"contested"]))
            blobs.prune_blobs()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(400)))
    blob = blobs.keep_chunks([b"contested"])
    assert storage.get_store().has(blob.pk)
    assert Blob.objects.filter(pk=blob.pk).exists()
