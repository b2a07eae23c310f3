"""What holds for the whole service: health, headers, errors, schema, settings."""

import json
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import factories
import pytest
import yaml
from django.conf import settings as django_settings
from django.core.checks import run_checks
from django.test import Client

from hub import middleware
from hub import settings as hub_settings
from hub.models import Repo

pytestmark = pytest.mark.django_db
ROOT = Path(__file__).resolve().parents[2]


def test_alive_needs_nothing(client, monkeypatch):
    monkeypatch.setattr(django_settings, "REDIS_URL", "redis://127.0.0.1:1/0")
    assert client.get("/healthz").json() == {"status": "ok"}


def test_ready_without_redis_is_degraded_not_down(client):
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")


def test_ready_with_everything(client, redis_server):
    assert client.get("/readyz").json()["checks"] == {
        "database": True,
        "storage": True,
        "redis": True,
    }


def test_not_ready_when_nothing_can_be_written(client, settings, tmp_path):
    settings.DATA_DIR = tmp_path / "file" / "data"
    (tmp_path / "file").write_text("in the way")
    assert client.get("/readyz").status_code == 503


@pytest.mark.parametrize("url", ["/healthz", "/api/v1/repos", "/api/v1/none", "/api/v1/whoami"])
def test_each_answer_carries_the_security_headers(client, url):
    headers = client.get(url).headers
    assert {name: headers[name] for name in middleware.HEADERS} == middleware.HEADERS
    assert "unsafe" not in headers["Content-Security-Policy"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", ""])
def test_another_host_is_refused(host):
    assert Client(headers={"host": host}).get("/api/v1/repos").status_code == 400


@pytest.mark.parametrize("url", ["/v1/models", "/d/acme/math/v1/models", "/v1/none"])
def test_a_call_with_a_token_takes_the_short_way_with_the_same_guards(live_client, url):
    headers = {"authorization": "Bearer dch_wrong", "cookie": "sessionid=x"}
    answer = live_client.get(url, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert {name: answer.headers[name] for name in middleware.HEADERS} == middleware.HEADERS
    # Nothing on that way reads a cookie.
    assert "Cookie" not in answer.headers.get("vary", "")
    assert live_client.get(url, headers=headers | {"host": "evil.example"}).status_code == 400


def test_a_call_with_a_token_still_has_to_come_by_tls(live_client, monkeypatch):
    from hub import asgi

    monkeypatch.setattr(asgi._model_calls._security, "redirect", True)
    answer = live_client.get("/v1/models", headers={"authorization": "Bearer dch_wrong"})
    assert answer.status_code == 301
    assert answer.headers["location"].startswith("https://")


def test_a_mistake_of_ours_on_the_short_way_is_an_error_without_its_reason(
    live_client, monkeypatch
):
    monkeypatch.setattr("hub.api.inference.find_token", lambda _request: 1 // 0)
    answer = live_client.get("/v1/models", headers={"authorization": "Bearer dch_wrong"})
    assert answer.status_code == 500
    assert "ZeroDivision" not in answer.text


@pytest.mark.parametrize(
    ("method", "url", "code"),
    [
        ("get", "/api/v1/none", "not_found"),
        ("get", "/api/v1/whoami", "not_signed_in"),
        ("delete", "/api/v1/repos", "method_not_allowed"),
        ("get", "/api/v1/repos/a/b", "not_found"),
        ("post", "/api/v1/none", "not_found"),
        ("post", "/api/v1/schema", "method_not_allowed"),
        ("post", f"/api/v1/jobs/{UUID(int=1)}/events", "method_not_allowed"),
    ],
)
def test_errors_have_one_shape(client, method, url, code):
    body = getattr(client, method)(url).json()
    assert set(body) == {"code", "message", "do", "fields"}
    assert (body["code"], bool(body["do"])) == (code, True)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"null", b'{"repo": 1}'])
def test_a_body_that_is_no_request_is_invalid(sign_in, alice, body):
    answer = sign_in(alice).post("/api/v1/uploads", body, content_type="application/json")
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"kind": "\\ud800"}',
        b'{"description": "\\uDC00"}',
        b'{"bits_per_param": NaN}',
    ],
    ids=["deep list", "deep object", "half a pair", "other half", "no number"],
)
def test_json_that_no_database_holds_is_invalid(bearer, ci_bot, body):
    browser = bearer(ci_bot)
    answer = browser.post("/api/v1/uploads", body, content_type="application/json")
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid")
    assert answer.json()["fields"]["non_field_errors"][0].startswith("The body is not JSON: ")
    asked = browser.post("/v1/completions", body, content_type="application/json")
    assert (asked.status_code, asked.json()["error"]["code"]) == (400, "invalid_json")


def test_a_whole_pair_is_text(bearer, ci_bot, acme):
    body = b'{"description": "\\ud83d\\ude00"}'
    factories.make_repo(acme, "math")
    answer = bearer(ci_bot).patch("/api/v1/repos/acme/math", body, content_type="application/json")
    assert answer.json()["description"] == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("url", "field"),
    [
        ("/api/v1/repos?after=x", "after"),
        ("/api/v1/repos?kind=x", "kind"),
        ("/api/v1/jobs?state=x", "state"),
        ("/api/v1/repos?q=%00", "address"),
    ],
)
def test_a_parameter_that_is_refused_is_named(bearer, ci_bot, url, field):
    assert list(bearer(ci_bot).get(url).json()["fields"]) == [field]


def test_field_errors_are_named(sign_in, alice):
    answer = sign_in(alice).post("/api/v1/uploads", {}, content_type="application/json")
    assert set(answer.json()["fields"]) == {"repo", "kind", "files"}


def test_an_error_of_ours_shows_a_reference_and_is_logged(client, monkeypatch, caplog):
    def fail(*_args):
        raise RuntimeError("boom")

    monkeypatch.setattr(Repo.objects, "visible_to", fail)
    answer = client.get("/api/v1/repos")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "boom" not in answer.text
    (record,) = [found for found in caplog.records if found.name == "hub.api.errors"]
    assert record.reference in answer.json()["message"]


@pytest.mark.django_db(transaction=True)
def test_a_body_larger_than_any_route_takes_is_cut_off(live_client):
    limit = 8 * 2**20 + 9
    answer = live_client.put("/api/v1/uploads", content=b"x" * (limit + 1))
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


@pytest.mark.django_db(transaction=True)
def test_a_body_of_unknown_length_is_cut_off_too(live_client):
    endless = (b"x" * 2**20 for _ in range(64))
    answer = live_client.put("/api/v1/uploads", content=endless)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


def test_the_committed_schema_is_current(client):
    from drf_spectacular.generators import SchemaGenerator

    current = SchemaGenerator().get_schema(request=None, public=True)
    committed = yaml.safe_load((ROOT / "docs/openapi.yaml").read_text())
    assert json.loads(json.dumps(current, default=str)) == committed


def test_the_schema_names_every_route_of_the_api(client):
    from test_permissions import EXPECTED, api_routes

    documented = {
        (path.removeprefix("/api/v1/"), method.upper())
        for path, methods in yaml.safe_load((ROOT / "docs/openapi.yaml").read_text())[
            "paths"
        ].items()
        for method in methods
    }
    # The stream of events, the schema itself and the catch-all are not JSON operations.
    silent = {"api-job-events", "api-schema", "api-nothing"}
    assert len(documented) == len([key for key in EXPECTED if key[0] not in silent])
    assert len(api_routes()) > 20


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("SECRET_KEY", "short", "hub.E001"),
        ("ALLOWED_HOSTS", ["*"], "hub.E002"),
        ("BLOB_STORE", "floppy", "hub.E004"),
        ("BLOB_STORE", "s3", "hub.E005"),
        ("X_ACCEL_PREFIX", "inner", "hub.E006"),
        ("UPLOAD_PART_BYTES", 0, "hub.E007"),
        ("LEASE_TTL_S", 5.0, "hub.E008"),
        ("REDIS_URL", "amqp://x", "hub.E009"),
    ],
)
def test_a_wrong_setting_is_named(settings, name, value, wanted):
    setattr(settings, name, value)
    assert wanted in {message.id for message in run_checks()}


def test_the_settings_of_the_tests_are_right():
    assert [message for message in run_checks() if message.id.startswith("hub")] == []


@pytest.mark.parametrize(
    ("url", "engine", "name"),
    [
        ("sqlite:////data/hub.sqlite3", "sqlite3", "/data/hub.sqlite3"),
        ("sqlite:///hub.sqlite3", "sqlite3", "hub.sqlite3"),
        ("postgres://u:p%40ss@db:5433/hub", "postgresql", "hub"),
    ],
)
def test_a_database_url_is_understood(url, engine, name):
    database = hub_settings.parse_database_url(url)
    assert database["ENGINE"] == f"django.db.backends.{engine}"
    assert database["NAME"] == name
    assert database.get("PASSWORD", "p@ss") == "p@ss"


@pytest.mark.parametrize("env", [{"DEBUG": "maybe"}, {"LEASE_TTL_S": "x"}, {"DATABASE_URL": "x"}])
def test_a_wrong_environment_stops_the_start(env):
    done = subprocess.run(
        [sys.executable, "-c", "import hub.settings"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert next(iter(env)) in done.stderr


def test_production_cookies_are_host_bound_and_secure():
    script = (
        "from hub import settings as s\n"
        "print(s.SESSION_COOKIE_SECURE, s.CSRF_COOKIE_SECURE, s.SESSION_COOKIE_NAME,"
        " s.SECURE_SSL_REDIRECT, s.SECURE_HSTS_SECONDS > 0, s.DEBUG)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "True", "__Host-sessionid", "True", "True", "False"]


def test_the_deployment_check_finds_nothing_in_the_default_settings():
    env = {"SECRET_KEY": "".join(map(chr, range(48, 123))), "TOKEN_PEPPER": "pepper"}
    command = [sys.executable, "manage.py", "check", "--deploy", "--fail-level", "WARNING"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("url", ["/v1/nothing", "/v1/embeddings", "/v1/chat/completions/x"])
@pytest.mark.parametrize("method", ["get", "post", "put"])
def test_an_unknown_openai_route_answers_in_its_shape(bearer, ci_bot, url, method):
    answer = getattr(bearer(ci_bot), method)(url)
    assert answer.status_code == (405 if method == "put" else 404)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_every_openai_route_wants_a_name(client, db):
    for url in ("/v1/models", "/v1/models/x", "/v1/nothing"):
        assert client.get(url).status_code == 401, url
    for url in ("/v1/completions", "/v1/chat/completions", "/v1/nothing"):
        assert client.post(url).status_code == 401, url
