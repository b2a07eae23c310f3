"""What may be uploaded, by whom, under which name, and how much of it."""

import factories
import pytest
from uploading import CONFIG, FILES, WEIGHTS, body, open_upload

from hub.models import Repo, Upload

pytestmark = pytest.mark.django_db


@pytest.fixture
def robot(bearer, ci_bot, acme, data_dir):
    return bearer(ci_bot)


@pytest.fixture
def backbone(acme):
    return factories.make_backbone(acme, "base")


def test_a_name_of_which_nothing_is_left_is_free_for_another_kind(robot, client, backbone):
    upload_id = open_upload(robot, visibility="public").json()["id"]
    assert client.get("/api/v1/repos?q=math").json()["items"] != []
    assert open_upload(robot, kind="backbone").json()["code"] == "repo_kind"
    robot.delete(f"/api/v1/uploads/{upload_id}")
    assert client.get("/api/v1/repos?q=math").json()["items"] == []
    assert open_upload(robot, kind="backbone", visibility="public").status_code == 201
    (again,) = client.get("/api/v1/repos?q=math").json()["items"]
    assert again["kind"] == "backbone"


def test_a_name_keeps_what_was_published_under_it(robot, acme, backbone):
    factories.make_revision(factories.make_repo(acme, "math"), backbone=backbone)
    robot.delete(f"/api/v1/uploads/{open_upload(robot).json()['id']}")
    assert open_upload(robot, kind="backbone").json()["code"] == "repo_kind"
    assert len(robot.get("/api/v1/repos?q=math").json()["items"]) == 1


def test_one_key_gives_one_upload(robot, backbone):
    answers = [open_upload(robot, headers={"idempotency-key": "run-7"}).json() for _ in range(2)]
    assert answers[0]["id"] == answers[1]["id"]
    changed = open_upload(robot, headers={"idempotency-key": "run-7"}, description="other")
    assert (changed.status_code, changed.json()["code"]) == (409, "idempotency_conflict")


def test_without_a_key_each_request_is_an_upload(robot, backbone):
    assert open_upload(robot).json()["id"] != open_upload(robot).json()["id"]


@pytest.mark.parametrize(
    "path",
    [
        *("../config.json", "a/../b.json", "/etc/passwd", "C:\\x.json", "a\\b.json", "a b.json"),
        *("x\0.json", "x\n.json", "-rf.json", ".hidden.json", "a..json", "run.py", "x.exe"),
        *("model.safetensors/", "é.json", "a" * 196 + ".json", "\u202ejson.json", "%2e%2e.json"),
    ],
)
def test_an_unsafe_name_is_refused(robot, path):
    answer = open_upload(robot, FILES | {path: b"x"})
    assert answer.status_code in {400, 422}
    assert answer.json()["code"] in {"file_name_unsafe", "invalid"}
    assert Upload.objects.count() == 0


@pytest.mark.parametrize("path", ["pytorch_model.bin", "a.pt", "b.CKPT", "c.pkl", "d.gguf"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(robot, path):
    answer = open_upload(robot, FILES | {path: b"x"}).json()
    assert answer["code"] == "not_safetensors"
    assert "save_pretrained" in answer["do"]


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": CONFIG},
        {"model.safetensors": WEIGHTS},
        {"config.json": CONFIG, "a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS},
        {"config.json": CONFIG, "CONFIG.json": CONFIG, "model.safetensors": WEIGHTS},
    ],
)
def test_an_incomplete_set_of_files_is_refused(robot, files):
    assert open_upload(robot, files).json()["code"] == "file_set_invalid"


def test_a_file_listed_twice_is_refused(robot):
    listed = [{"path": "config.json", "size_bytes": 9}] * 2
    asked = body() | {"files": [*listed, {"path": "model.safetensors", "size_bytes": 9}]}
    answer = robot.post("/api/v1/uploads", asked, content_type="application/json")
    assert (answer.status_code, answer.json()["code"]) == (422, "file_set_invalid")
    assert "twice" in answer.json()["message"]


def test_a_missing_shard_is_named_before_any_byte_moves(robot):
    names = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    files = {"config.json": CONFIG, "model.safetensors.index.json": b"{}"}
    held = {names[0]: WEIGHTS, names[2]: WEIGHTS}
    answer = open_upload(robot, files | held)
    assert (answer.status_code, answer.json()["code"]) == (422, "shard_missing")
    assert answer.json()["fields"]["files"] == [names[1]]
    assert names[1] in answer.json()["message"]
    assert Upload.objects.count() == 0
    assert open_upload(robot, files | held | {names[1]: WEIGHTS}).status_code == 201


def test_a_shard_of_very_many_is_refused_in_bounded_memory(robot):
    files = {"config.json": CONFIG, "model-00001-of-99999.safetensors": WEIGHTS}
    missing = open_upload(robot, files).json()["fields"]["files"]
    assert len(missing) < 1000


def test_the_limits_of_size_quota_and_number_hold(robot, settings, backbone):
    settings.UPLOAD_MAX_BYTES = 100
    assert open_upload(robot).json()["code"] == "upload_too_large"
    settings.UPLOAD_MAX_BYTES, settings.NAMESPACE_QUOTA_BYTES = 10**9, 100
    assert open_upload(robot).json()["code"] == "quota_exceeded"
    settings.NAMESPACE_QUOTA_BYTES, settings.UPLOAD_MAX_OPEN = 10**9, 1
    assert open_upload(robot).status_code == 201
    answer = open_upload(robot)
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_uploads")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"recipe": "magic"}, "recipe_unknown"),
        ({"kind": "adapter"}, "invalid"),
        ({"files": {}}, "invalid"),
        ({"repo": "nobody/x"}, "not_found"),
        ({"repo": "acme"}, "name_unsafe"),
        ({"repo": "acme/.."}, "name_unsafe"),
        ({"bits_per_param": "NaN"}, "invalid"),
        ({"backbone": "acme/none"}, "not_found"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(robot, fields, code):
    answer = open_upload(robot, **fields)
    assert answer.json()["code"] == code, answer.json()
    assert Repo.objects.count() == 0


def test_a_reader_cannot_upload_and_a_stranger_learns_nothing(bearer, bob, charlie, acme):
    factories.make_repo(acme, "secret", visibility="private")
    for user, repo in ((bob, "acme/x"), (charlie, "acme/secret"), (charlie, "acme/none")):
        answer = open_upload(bearer(user), repo=repo)
        assert (answer.status_code, answer.json()["code"]) == (403, "permission_denied")


def test_a_repo_keeps_its_kind(robot, acme, backbone):
    assert open_upload(robot, repo="acme/base").json()["code"] == "repo_kind"
