import errno
import hashlib

import factories
import pytest
from uploading import (
    CONFIG,
    FILES,
    PART,
    WEIGHTS,
    content_digest,
    open_upload,
    push,
    put_header,
    put_part,
)

from hub import parts, uploads
from hub.models import Job, Part, Upload, UploadFile
from hub.storage import get_store

pytestmark = pytest.mark.django_db


@pytest.fixture
def robot(bearer, ci_bot, acme, data_dir):
    return bearer(ci_bot)


@pytest.fixture
def backbone(acme):
    return factories.make_backbone(acme, "base")


@pytest.fixture
def ready(robot, backbone):
    """An upload whose headers passed; no part has been sent."""
    upload_id = open_upload(robot).json()["id"]
    assert put_header(robot, upload_id, 1, WEIGHTS).status_code == 200
    return upload_id


def test_a_checkpoint_becomes_a_sealed_upload_and_a_queued_job(robot, backbone):
    answer = push(robot)
    job = Job.objects.get(pk=answer.json()["job"]["id"])
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/api/v1/jobs/{job.pk}"
    assert (job.kind, job.state, job.step, job.revision.state) == (
        "delta",
        "QUEUED",
        "ingest",
        "DRAFT",
    )
    assert job.revision.backbone == backbone
    assert job.last_enqueued_at is not None


def test_sealing_twice_gives_the_same_job(robot, backbone):
    first = push(robot).json()["job"]
    again = robot.post(f"/api/v1/uploads/{first['upload']}/seal")
    assert (again.status_code, again.json()["job"]["id"]) == (202, first["id"])
    assert Job.objects.count() == 1


def test_a_backbone_needs_no_other_backbone(robot):
    answer = push(robot, repo="acme/base", kind="backbone")
    assert (answer.status_code, answer.json()["job"]["kind"]) == (202, "backbone")


def test_the_assembled_file_is_the_file_that_was_cut(robot, backbone):
    push(robot)
    for file in UploadFile.objects.all():
        blob = parts.assemble_file(file)
        assert b"".join(get_store().read(blob.sha256)) == FILES[file.path]
        assert parts.assemble_file(UploadFile.objects.get(pk=file.pk)).pk == blob.pk


def test_the_backbone_is_found_from_the_tensors(robot, acme, backbone):
    factories.make_backbone(acme, "other", tensors={"a.weight": ("F32", [4, 4])})
    upload_id = open_upload(robot).json()["id"]
    found = put_header(robot, upload_id, 1, WEIGHTS).json()
    assert found["backbone"] == "acme/base@v1"
    assert [fit["name"] for fit in found["layout"]["candidates"]] == ["acme/base@v1"]


def test_backbones_of_one_shape_are_all_candidates(robot, acme, backbone):
    factories.make_backbone(acme, "twin")
    upload_id = open_upload(robot).json()["id"]
    found = put_header(robot, upload_id, 1, WEIGHTS).json()["layout"]["candidates"]
    assert {fit["name"] for fit in found} == {"acme/base@v1", "acme/twin@v1"}


def test_a_private_backbone_of_strangers_is_no_candidate(robot, charlie):
    factories.make_backbone(factories.namespace_of(charlie), visibility="private")
    upload_id = open_upload(robot).json()["id"]
    answer = put_header(robot, upload_id, 1, WEIGHTS)
    assert (answer.status_code, answer.json()["code"]) == (422, "backbone_unknown")


def test_a_grown_vocabulary_fits(robot, backbone):
    grown = factories.TENSORS | {"model.embed_tokens.weight": ("BF16", [66, 32])}
    content = factories.safetensors_bytes(grown)
    upload_id = open_upload(robot, FILES | {"model.safetensors": content}).json()["id"]
    found = put_header(robot, upload_id, 1, content)
    assert found.json()["layout"]["grown_rows"] == ["model.embed_tokens.weight"]


def test_another_architecture_is_refused_before_any_part(robot, backbone):
    other = factories.TENSORS | {"model.layers.0.self_attn.q_proj.weight": ("BF16", [32, 48])}
    content = factories.safetensors_bytes(other)
    upload_id = open_upload(robot, FILES | {"model.safetensors": content}).json()["id"]
    answer = put_header(robot, upload_id, 1, content)
    assert (answer.status_code, answer.json()["code"]) == (422, "backbone_mismatch")
    assert answer.json()["fields"]["count"] == 1
    assert "q_proj.weight: expected [32, 32] found [32, 48]" in answer.json()["message"]


def test_a_refused_upload_holds_nothing_and_says_why_as_often_as_it_is_asked(
    robot, backbone, data_dir
):
    other = factories.safetensors_bytes({"a.weight": ("F32", [4, 4])})
    files = FILES | {"model.safetensors": other}
    upload_id = open_upload(robot, files).json()["id"]
    first = put_header(robot, upload_id, 1, other).json()
    assert put_header(robot, upload_id, 1, other).json() == first
    assert put_part(robot, upload_id, 0, 0, CONFIG).json() == first
    assert robot.post(f"/api/v1/uploads/{upload_id}/seal").json() == first
    found = robot.get(f"/api/v1/uploads/{upload_id}").json()
    assert found["state"] == "REFUSED"
    assert found["refusal"] == {name: first[name] for name in ("code", "message", "do")}
    assert not any(path.is_file() for path in data_dir.rglob("uploads/**/*"))
    assert robot.delete(f"/api/v1/uploads/{upload_id}").status_code == 204


def test_a_refused_upload_leaves_room_for_the_next(robot, backbone, settings):
    settings.UPLOAD_MAX_OPEN = 1
    upload_id = open_upload(robot).json()["id"]
    put_header(robot, upload_id, 1, b"PK\x03\x04" + bytes(20))
    assert push(robot).status_code == 202


def test_a_header_cut_short_on_its_way_can_be_sent_again(robot, backbone):
    upload_id = open_upload(robot).json()["id"]
    address = f"/api/v1/uploads/{upload_id}/files/1/header"
    short = robot.put(address, WEIGHTS[:20], content_type="application/octet-stream")
    assert short.json()["code"] == "header_truncated"
    assert put_header(robot, upload_id, 1, WEIGHTS).status_code == 200


def test_a_bad_header_after_the_checks_ends_nothing(robot, ready):
    bad = robot.put(
        f"/api/v1/uploads/{ready}/files/1/header",
        b"PK\x03\x04" + bytes(20),
        content_type="application/octet-stream",
    )
    assert bad.json()["code"] == "not_safetensors"
    assert put_part(robot, ready, 0, 0, CONFIG).status_code == 200


def test_a_mismatch_names_twenty_tensors_and_counts_all(robot, acme):
    many = {f"model.layers.{n}.q_proj.weight": ("BF16", [4, 4]) for n in range(30)}
    factories.make_backbone(acme, "deep", tensors=many)
    content = factories.safetensors_bytes({name: ("BF16", [4, 8]) for name in many})
    upload_id = open_upload(robot, FILES | {"model.safetensors": content}).json()["id"]
    fields = put_header(robot, upload_id, 1, content).json()["fields"]
    assert (len(fields["tensors"]), fields["count"]) == (20, 30)


def test_the_named_backbone_is_the_one_that_is_compared(robot, acme, backbone):
    factories.make_backbone(acme, "other", tensors={"a.weight": ("F32", [4, 4])})
    upload_id = open_upload(robot, backbone="acme/other").json()["id"]
    assert put_header(robot, upload_id, 1, WEIGHTS).json()["code"] == "backbone_mismatch"


def test_a_delta_is_no_backbone(robot, acme):
    factories.make_revision(factories.make_repo(acme, "tuned"))
    assert open_upload(robot, backbone="acme/tuned").json()["code"] == "backbone_kind"


def test_a_tensor_in_two_shards_is_refused(robot, backbone):
    files = {"config.json": CONFIG, "model.safetensors.index.json": b"{}"}
    files |= {"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS}
    upload_id = open_upload(robot, files).json()["id"]
    assert put_header(robot, upload_id, 2, WEIGHTS).status_code == 200
    assert put_header(robot, upload_id, 3, WEIGHTS).json()["code"] == "duplicate_tensor"


def test_parts_wait_for_the_headers(robot, backbone):
    upload_id = open_upload(robot).json()["id"]
    answer = put_part(robot, upload_id, 0, 0, CONFIG)
    assert (answer.status_code, answer.json()["code"]) == (409, "header_missing")


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"PK\x03\x04" + b"\0" * 20, "not_safetensors"),
        (b"\x80\x04\x95" + b"\0" * 20, "not_safetensors"),
        (b"GGUF" + b"\0" * 20, "not_safetensors"),
        (b"", "header_truncated"),
        (b"\xff" * 16, "not_safetensors"),
        (b"\xff" * 8 + b"{" * 8, "header_too_large"),
    ],
)
def test_what_is_no_safetensors_header_is_refused(robot, backbone, raw, code):
    upload_id = open_upload(robot).json()["id"]
    answer = robot.put(
        f"/api/v1/uploads/{upload_id}/files/1/header", raw, content_type="application/octet-stream"
    )
    assert answer.json()["code"] == code


def test_a_text_file_has_no_header(robot, backbone):
    upload_id = open_upload(robot).json()["id"]
    assert put_header(robot, upload_id, 0, WEIGHTS).json()["code"] == "header_not_wanted"


def test_a_file_that_changed_after_its_check_is_refused(robot, ready):
    changed = bytearray(WEIGHTS[:PART])
    changed[20] ^= 1
    answer = put_part(robot, ready, 1, 0, bytes(changed))
    assert (answer.status_code, answer.json()["code"]) == (422, "header_differs")


def test_a_second_header_must_be_the_same(robot, ready):
    other = WEIGHTS.replace(b"model.norm.weight", b"model.form.weight")
    assert put_header(robot, ready, 1, other).json()["code"] == "header_differs"
    assert put_header(robot, ready, 1, WEIGHTS).status_code == 200


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        (lambda part: part + b"x", 413, "part_too_large"),
        (lambda part: part[:-1], 422, "part_too_small"),
        (lambda part: part[:0], 422, "part_too_small"),
    ],
)
def test_a_part_has_exactly_its_length(robot, ready, change, status, code):
    answer = put_part(robot, ready, 1, 0, change(WEIGHTS[:PART]))
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert Part.objects.count() == 0


def test_the_last_part_is_as_short_as_the_file(robot, ready):
    last = len(WEIGHTS) // PART
    assert put_part(robot, ready, 1, last, WEIGHTS[last * PART :]).status_code == 200
    assert put_part(robot, ready, 1, last + 1, b"x").json()["code"] == "part_number"


def test_a_damaged_part_leaves_nothing(robot, ready, data_dir):
    damaged = WEIGHTS[: PART - 1] + b"\xff"
    announced = WEIGHTS[:PART]
    answer = put_part(robot, ready, 1, 0, damaged, content_digest(announced))
    assert (answer.status_code, answer.json()["code"]) == (422, "part_digest_mismatch")
    for part in (announced, damaged):
        assert hashlib.sha256(part).hexdigest() in answer.json()["message"]
    left = [path.name for path in (data_dir / "uploads" / ready / "1").iterdir()]
    assert left == ["header"]


@pytest.mark.parametrize("header", ["", "sha-256=", "sha-512=:AAAA:", "sha-256=:AAAA:", "x" * 999])
def test_a_part_needs_a_sha256_digest(robot, ready, header):
    answer = put_part(robot, ready, 1, 0, WEIGHTS[:PART], header or " ")
    assert (answer.status_code, answer.json()["code"]) == (400, "content_digest_missing")


def test_a_part_may_be_sent_again(robot, ready):
    for _ in range(2):
        assert put_part(robot, ready, 1, 0, WEIGHTS[:PART]).status_code == 200
    assert Part.objects.count() == 1


def test_a_text_file_holds_no_binary(robot, backbone):
    files = FILES | {"config.json": b"\x80\x04\0\0"}
    upload_id = open_upload(robot, files).json()["id"]
    put_header(robot, upload_id, 1, WEIGHTS)
    assert put_part(robot, upload_id, 0, 0, files["config.json"]).json()["code"] == "text_invalid"


def test_the_status_tells_which_parts_are_held(robot, ready):
    put_part(robot, ready, 1, 1, WEIGHTS[PART : 2 * PART])
    status = robot.get(f"/api/v1/uploads/{ready}").json()
    assert [file["parts"] for file in status["files"]] == [[], [1]]
    assert [file["n_parts"] for file in status["files"]] == [1, -(-len(WEIGHTS) // PART)]
    assert status["part_size_bytes"] == PART


def test_a_seal_names_the_missing_parts(robot, ready):
    put_part(robot, ready, 0, 0, CONFIG)
    answer = robot.post(f"/api/v1/uploads/{ready}/seal")
    assert (answer.status_code, answer.json()["code"]) == (409, "parts_missing")
    assert answer.json()["fields"]["parts"][0] == "model.safetensors:0"
    assert Job.objects.count() == 0


def test_a_seal_before_the_headers_is_refused(robot, backbone):
    upload_id = open_upload(robot).json()["id"]
    assert robot.post(f"/api/v1/uploads/{upload_id}/seal").json()["code"] == "header_missing"


def test_a_sealed_upload_takes_no_part_and_cannot_be_aborted(robot, backbone):
    upload_id = push(robot).json()["job"]["upload"]
    assert put_part(robot, upload_id, 0, 0, CONFIG).json()["code"] == "upload_closed"
    assert robot.delete(f"/api/v1/uploads/{upload_id}").json()["code"] == "upload_closed"


def test_an_aborted_upload_leaves_no_bytes(robot, ready, data_dir):
    put_part(robot, ready, 0, 0, CONFIG)
    assert robot.delete(f"/api/v1/uploads/{ready}").status_code == 204
    assert list((data_dir / "uploads").iterdir()) == []
    assert robot.post(f"/api/v1/uploads/{ready}/seal").json()["code"] == "upload_closed"


def test_a_full_disk_is_told_before_and_during_the_upload(robot, ready, settings, monkeypatch):
    settings.FREE_SPACE_FLOOR_BYTES = 2**62
    for answer in (open_upload(robot), put_part(robot, ready, 0, 0, CONFIG)):
        assert (answer.status_code, answer.json()["code"]) == (507, "disk_full")
    assert f"Needed: {len(CONFIG)} bytes; to spare: 0." in answer.json()["message"]
    settings.FREE_SPACE_FLOOR_BYTES = 0

    def fail(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parts.os, "fsync", fail)
    assert put_part(robot, ready, 0, 0, CONFIG).status_code == 507
    assert Part.objects.count() == 0


def test_an_expired_upload_is_swept_with_its_bytes(robot, ready, data_dir):
    from hub.jobs import from_now

    Upload.objects.filter(pk=ready).update(expires_at=from_now(-1))
    assert (uploads.expire_uploads(), uploads.expire_uploads()) == (1, 0)
    assert Upload.objects.get(pk=ready).state == Upload.State.ABORTED
    assert not (data_dir / "uploads" / ready).exists()


def test_a_part_moves_the_expiry_on(robot, ready):
    from hub.jobs import from_now

    Upload.objects.filter(pk=ready).update(expires_at=from_now(10))
    put_part(robot, ready, 0, 0, CONFIG)
    upload = Upload.objects.get(pk=ready)
    assert (upload.expires_at - upload.created_at).total_seconds() > 3600


@pytest.mark.parametrize(("state", "kept"), [("DONE", False), ("FAILED", True), ("QUEUED", True)])
def test_the_sources_go_when_the_delta_is_published(acme, state, kept):
    job = factories.make_job(factories.make_repo(acme), files=FILES)
    job.move("RUNNING") if state != "QUEUED" else None
    job.move(state) if state != "QUEUED" else None
    uploads.expire_uploads()
    assert UploadFile.objects.exclude(blob=None).exists() == kept


@pytest.mark.parametrize(("age_s", "kept"), [(10, True), (7200, False)])
def test_a_fine_tune_stays_as_long_as_the_operator_wants(acme, settings, age_s, kept):
    from hub.jobs import from_now
    from hub.models import Job

    settings.FINETUNE_KEEP_S = 3600
    job = factories.make_job(factories.make_repo(acme), files=FILES)
    job.move("RUNNING")
    job.move("DONE")
    uploads.finish_sources(job.upload)
    Job.objects.filter(pk=job.pk).update(finished_at=from_now(-age_s))
    uploads.expire_uploads()
    assert UploadFile.objects.exclude(blob=None).exists() == kept


def test_a_backbones_upload_is_let_go_even_where_fine_tunes_stay(acme, settings):
    settings.FINETUNE_KEEP_S = 3600
    job = factories.make_job(factories.make_repo(acme, kind="backbone"), files=FILES)
    uploads.finish_sources(job.upload)
    assert not UploadFile.objects.exclude(blob=None).exists()
