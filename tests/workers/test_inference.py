"""The whole way of an answer: OpenAI's own client, the hub, the engine."""

import json
import threading

import engines
import factories
import httpx
import openai
import plant
import pytest

from hub.models import Revision

pytestmark = pytest.mark.django_db(transaction=True)
MESSAGES = [{"role": "user", "content": "What is 2+2?"}]


@pytest.fixture
def catalogue(models, acme, data_dir):
    """The session's models as published revisions, the second delta private."""
    backbone = plant.publish_backbone(acme, models.root / "backbone")
    for name, visibility in (("one", "public"), ("two", "private")):
        folder = models.root / name / "delta"
        factories.make_revision(
            factories.make_repo(acme, name, visibility=visibility),
            files={path.name: path.read_bytes() for path in folder.iterdir()},
            backbone=backbone,
        )
    return backbone


@pytest.fixture
def served(catalogue, data_dir, settings):
    """An engine that reads the hub's own blobs."""
    app = engines.make_engine(data_dir)
    with engines.serve(app) as url:
        settings.ENGINE_URL, settings.ENGINE_SECRET = url, engines.SECRET
        yield url


@pytest.fixture
def connect(live_hub):
    """Return a function that gives OpenAI's client with a token of the user."""
    opened = []

    def open_client(user, *, key=None, place=""):
        client = openai.OpenAI(
            base_url=f"{live_hub}{place}/v1",
            api_key=key or factories.make_token(user, "read"),
            max_retries=0,
            timeout=30,
        )
        opened.append(client)
        return client

    yield open_client
    for client in opened:
        client.close()


def ask_engine(models, delta):
    with (
        engines.serve(engines.make_engine(models.root)) as url,
        engines.Caller(url, models) as call,
    ):
        body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 20}
        return call.post("chat/completions", body, delta=delta).json()["choices"][0]


def test_the_model_list_shows_what_the_caller_may_see(served, connect, alice, charlie):
    assert {item.id for item in connect(alice).models.list()} == {
        "acme/base",
        "acme/one",
        "acme/two",
    }
    strange = {item.id: item for item in connect(charlie).models.list()}
    assert set(strange) == {"acme/base", "acme/one"}
    assert strange["acme/one"].parent == "acme/base"
    assert strange["acme/one"].x_delta["verified"] is None
    factories.make_verification(Revision.objects.get(repo__name="one"), grade="B")
    assert connect(charlie).models.retrieve("acme/one").x_delta["verified"] == "B"
    assert {item.id: item for item in connect(charlie).models.list()}["acme/one"].x_delta[
        "verified"
    ] == "B"
    assert connect(charlie).models.retrieve("acme/one@v1").id == "acme/one"


def test_a_chat_streams_the_text_that_comes_whole(served, connect, charlie, models):
    client = connect(charlie)
    arguments = {"model": "acme/one", "messages": MESSAGES, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**arguments)
    stream = client.chat.completions.create(
        **arguments, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.model == "acme/one"
    assert text == ask_engine(models, "one")["message"]["content"]


def test_a_completion_of_the_backbone_and_of_a_private_delta(served, connect, alice):
    client = connect(alice)
    texts = {
        model: client.completions.create(model=model, prompt="2+2=", temperature=0, max_tokens=9)
        .choices[0]
        .text
        for model in ("acme/base", "acme/one", "acme/two@v1")
    }
    assert len(set(texts.values())) == 3


def test_a_revision_is_found_by_its_digest(served, connect, charlie, catalogue):
    client = connect(charlie)
    for model in (f"acme/base@sha256:{catalogue.digest}", f"@sha256:{catalogue.digest}"):
        raw = client.completions.with_raw_response.create(model=model, prompt="a", max_tokens=1)
        assert raw.headers["x-delta-revision"] == f"v1 sha256:{catalogue.digest}"
        assert raw.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("model", ["acme/two", "acme/none", "acme/one@v9", "nonsense", "@sha256:x"])
def test_what_a_stranger_may_not_see_does_not_exist(served, connect, charlie, model):
    with pytest.raises(openai.NotFoundError) as refusal:
        connect(charlie).completions.create(model=model, prompt="a")
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")
    assert refusal.value.request_id


def test_a_wrong_field_keeps_its_name_through_the_hub(served, connect, charlie):
    with pytest.raises(openai.BadRequestError) as refusal:
        connect(charlie).completions.create(model="acme/one", prompt="a", n=99)
    assert refusal.value.param == "n"


def test_a_delta_answers_under_its_own_address(served, connect, charlie):
    client = connect(charlie, place="/d/acme/one")
    assert [item.id for item in client.models.list()] == ["acme/one"]
    arguments = {"prompt": "2+2=", "temperature": 0, "max_tokens": 9}
    answer = client.completions.create(model="acme/one", **arguments)
    elsewhere = connect(charlie).completions.create(model="acme/one", **arguments)
    assert answer.choices[0].text == elsewhere.choices[0].text
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model="acme/base", **arguments)
    assert (refusal.value.code, refusal.value.param) == ("model_mismatch", "model")


def test_the_address_names_the_model_where_the_body_does_not(served, live_hub, charlie):
    key = {"authorization": f"Bearer {factories.make_token(charlie, 'infer')}"}
    with httpx.Client(base_url=live_hub, headers=key, timeout=30) as client:
        body = {"prompt": "2+2=", "temperature": 0, "max_tokens": 4}
        for place in ("/d/acme/one", "/d/acme/one@v1"):
            answer = client.post(f"{place}/v1/completions", json=body)
            assert answer.json()["model"] == place.removeprefix("/d/")
            assert answer.headers["x-deltacome-canary"]
            assert answer.headers["x-deltacome-device"] == "cpu"
            assert int(answer.headers["openai-processing-ms"]) >= 0
        for place in ("/d/acme/one", "/d/acme/one/v1"):
            assert client.get(f"{place}/tokenizer_info").json()["eos_token"] == "<|end|>"
            ids = client.post(f"{place}/tokenize", json={"prompt": "Zürich"}).json()["tokens"]
            back = client.post(f"{place}/detokenize", json={"tokens": ids}).json()
            assert back == {"prompt": "Zürich"}
        by_query = client.get("/v1/tokenizer_info", params={"model": "acme/one"})
        assert by_query.json()["eos_token"] == "<|end|>"
        assert client.get("/v1/tokenizer_info").json()["error"]["param"] == "model"
        assert client.post("/d/acme/one/v1/completions", json=[]).status_code == 400


@pytest.mark.parametrize("name", ["two", "none"])
def test_under_its_address_too_a_private_delta_does_not_exist(served, live_hub, charlie, name):
    key = {"authorization": f"Bearer {factories.make_token(charlie, 'read')}"}
    with httpx.Client(base_url=f"{live_hub}/d/acme/{name}", headers=key, timeout=30) as client:
        answers = [
            client.get("/v1/models"),
            client.get("/tokenizer_info"),
            client.post("/tokenize", json={"prompt": "a"}),
            client.post("/detokenize", json={"tokens": [1]}),
            client.post("/v1/completions", json={"prompt": "a"}),
            client.post("/v1/compare", json={"reference": "acme/one"}),
        ]
    assert {answer.status_code for answer in answers} == {404}
    assert {answer.json()["error"]["code"] for answer in answers} == {"model_not_found"}


@pytest.mark.parametrize("name", ["acme/two", "acme/none", None, 7, ["acme/one"]])
def test_a_reference_one_may_not_see_does_not_exist(served, live_hub, charlie, name):
    key = {"authorization": f"Bearer {factories.make_token(charlie, 'read')}"}
    body = {"model": "acme/one", "reference": name, "prompt": "a", "completion": "b"}
    with httpx.Client(base_url=live_hub, headers=key, timeout=30) as client:
        error = client.post("/v1/compare", json=body).json()["error"]
    assert error["param"] == "reference"


def test_a_fine_tune_that_is_held_answers_and_is_compared(
    served, live_hub, connect, alice, charlie, acme, models
):
    """The sealed upload of a published delta, as FINETUNE_KEEP_S leaves it."""
    folder = models.root / "one" / "tuned"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    published = Revision.objects.get(repo__name="one")
    job = factories.make_job(factories.make_repo(acme, "unused"), files=files)
    job.revision = published
    job.save(update_fields=["revision"])
    client = connect(charlie)
    arguments = {"prompt": "2+2=", "temperature": 0, "max_tokens": 12}
    name = "acme/one:finetune"
    texts = {
        model: client.completions.create(model=model, **arguments).choices[0].text
        for model in ("acme/one", name, "acme/base")
    }
    assert texts[name] != texts["acme/base"]
    assert client.models.retrieve(name).id == "acme/one@v1:finetune"
    key = {"authorization": f"Bearer {factories.make_token(charlie, 'infer')}"}
    body = {"reference": name, "prompt": "2+2=", "completion": texts[name]}
    with httpx.Client(base_url=live_hub, headers=key, timeout=30) as raw:
        found = {
            model: raw.post("/v1/compare", json=body | {"model": model}).json()
            for model in ("acme/one", "acme/base", name)
        }
    assert found[name]["max_kl"] == pytest.approx(0, abs=1e-9)
    assert 0 < found["acme/one"]["mean_kl"] < found["acme/base"]["mean_kl"]
    job.upload.files.filter(path="model.safetensors").update(blob=None)
    with pytest.raises(openai.NotFoundError, match="not stored here"):
        client.completions.create(model=name, **arguments)


def test_a_key_for_inference_reads_nothing_else(served, live_hub, connect, charlie):
    secret = factories.make_token(charlie, "infer")
    answer = connect(charlie, key=secret).completions.create(
        model="acme/one", prompt="a", max_tokens=1
    )
    assert answer.choices
    with httpx.Client(base_url=live_hub, headers={"authorization": f"Bearer {secret}"}) as client:
        for path in ("repos", "whoami", "repos/acme/one/revisions/v1/files/delta.safetensors"):
            assert client.get(f"/api/v1/{path}").status_code == 403, path
        job = "00000000-0000-7000-8000-000000000000"
        assert client.get(f"/api/v1/jobs/{job}/events").status_code == 403


def test_choices_echo_and_scores_reach_openais_client(served, connect, charlie):
    client = connect(charlie)
    answer = client.completions.create(
        model="acme/one", prompt=[[40, 41, 42]], n=2, echo=True, logprobs=1, max_tokens=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    scores = answer.choices[0].logprobs
    assert len(scores.token_logprobs) == 4
    assert scores.token_logprobs[0] is None
    chat = client.chat.completions.create(
        model="acme/one", messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, max_tokens=3
    )
    assert len(chat.choices) == 2
    assert len(chat.choices[1].logprobs.content[0].top_logprobs) == 2


@pytest.mark.parametrize("key", ["dch_wrong", "sk-other"])
def test_a_wrong_key_is_refused(served, connect, charlie, key):
    with pytest.raises(openai.AuthenticationError):
        connect(charlie, key=key).models.list()


def test_an_engine_that_is_away_asks_to_come_back(catalogue, connect, charlie, settings):
    settings.ENGINE_URL, settings.ENGINE_SECRET = "http://127.0.0.1:9", engines.SECRET
    with pytest.raises(openai.InternalServerError) as refusal:
        connect(charlie).completions.create(model="acme/one", prompt="a")
    assert (refusal.value.status_code, refusal.value.code) == (503, "engine_away")
    assert refusal.value.response.headers["retry-after"] == "5"


def test_a_delta_that_cannot_be_loaded_is_an_error_not_its_backbone(
    served, connect, alice, acme, catalogue, models
):
    folder = models.root / "one" / "delta"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["delta.safetensors"] = files["delta.safetensors"][:-1] + b"\x7f"
    repo = factories.make_repo(acme, "damaged")
    factories.make_revision(repo, files=files, backbone=catalogue)
    with pytest.raises(openai.InternalServerError) as refusal:
        connect(alice).completions.create(model="acme/damaged", prompt="a")
    assert refusal.value.code == "file_digest_mismatch"


def test_a_browser_needs_its_csrf_token(served, live_hub, charlie, sign_in):
    session = sign_in(charlie).cookies["sessionid"].value
    body = json.dumps({"model": "acme/one", "prompt": "a", "max_tokens": 1})
    cookies = {"sessionid": session, "csrftoken": "c" * 32}
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=live_hub, cookies=cookies, headers=headers, timeout=30) as browser:
        bare = browser.post("/v1/completions", content=body)
        assert (bare.status_code, bare.json()["error"]["code"]) == (403, "csrf_failed")
        sent = browser.post("/v1/completions", content=body, headers={"x-csrftoken": "c" * 32})
        assert sent.status_code == 200
    with httpx.Client(base_url=live_hub, headers=headers) as stranger:
        assert stranger.post("/v1/completions", content=body).status_code == 401


def test_hanging_up_on_the_hub_ends_the_sequence_in_the_engine(served, connect, charlie):
    client = connect(charlie)
    arguments = {"model": "acme/one", "prompt": "abc", "temperature": 1.0, "max_tokens": 200}
    stream = client.completions.create(**arguments, stream=True)
    next(iter(stream))
    stream.close()

    def is_idle():
        return httpx.get(f"{served}/healthz").json()["running"] == 0

    plant.wait_for(is_idle, what="the engine is idle", timeout_s=20)


def test_two_columns_at_once_say_what_each_says_alone(served, connect, alice):
    client = connect(alice)
    arguments = {"prompt": "one two", "temperature": 0, "max_tokens": 60}
    names = ("acme/one", "acme/two")
    alone = {
        name: client.completions.create(model=name, **arguments).choices[0].text for name in names
    }
    together = dict.fromkeys(names, "")

    def read(name):
        for chunk in client.completions.create(model=name, **arguments, stream=True):
            together[name] += chunk.choices[0].text

    threads = [threading.Thread(target=read, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone
