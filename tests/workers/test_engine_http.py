import json
import threading
import time

import pytest
import tiny
import torch
from engines import Caller, make_engine, no_claim, serve

from deltacome_core.models import load_model, load_tokenizer
from workers.engine.shared import SharedExecutor

MESSAGES = [{"role": "user", "content": "What is 2+2?"}]
GREEDY = {"temperature": 0, "max_tokens": 24}


def expected_text(folder, prompt_ids, *, length=24):
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    with torch.inference_mode():
        ids = model.generate(torch.tensor([prompt_ids]), max_new_tokens=length, do_sample=False)
    return tokenizer.decode(ids[0, len(prompt_ids) :], skip_special_tokens=True)


def chat_ids(folder):
    tokenizer = load_tokenizer(folder)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("delta", [None, "one", "two"])
def test_chat_says_greedily_what_transformers_says_on_the_rebuilt_checkpoint(engine, delta):
    answer = engine.post("chat/completions", {"messages": MESSAGES, **GREEDY}, delta=delta).json()
    folder = engine.models.rebuilt(delta)
    choice = answer["choices"][0]
    assert choice["message"]["content"] == expected_text(folder, chat_ids(folder))
    assert choice["message"]["role"] == "assistant"
    assert answer["usage"]["prompt_tokens"] == len(chat_ids(folder))


@pytest.mark.parametrize("delta", [None, "one"])
def test_a_completion_continues_the_prompt(engine, delta):
    answer = engine.post("completions", {"prompt": "2+2=", **GREEDY}, delta=delta).json()
    folder = engine.models.rebuilt(delta)
    ids = load_tokenizer(folder)("2+2=")["input_ids"]
    assert answer["choices"][0]["text"] == expected_text(folder, ids)


def test_the_models_do_differ(engine):
    body = {"prompt": "2+2=", **GREEDY}
    texts = [
        engine.post("completions", body, delta=delta).json()["choices"][0]["text"]
        for delta in (None, "one", "two")
    ]
    assert len(set(texts)) == 3


def test_a_stream_carries_the_same_text_then_the_usage(engine):
    body = {"messages": MESSAGES, **GREEDY}
    whole = engine.post("chat/completions", body, delta="one").json()
    body["stream_options"] = {"include_usage": True}
    events = [event for _, event in engine.stream("chat/completions", body, delta="one")]
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    chunks = [event["choices"][0] for event in events[:-2]]
    text = "".join(chunk["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert events[-2]["choices"] == []
    assert events[-2]["usage"] == whole["usage"]


def test_two_streams_at_once_say_what_each_says_alone(engine):
    body = {"prompt": "one two three", "temperature": 0, "max_tokens": 120}
    alone = {
        delta: engine.post("completions", body, delta=delta).json()["choices"][0]["text"]
        for delta in ("one", "two")
    }
    streams = {delta: engine.stream("completions", body, delta=delta) for delta in alone}
    # Both are open before either is read to its end.
    texts = {delta: next(stream)[1]["choices"][0]["text"] for delta, stream in streams.items()}
    for delta, stream in streams.items():
        for _, event in stream:
            texts[delta] += "" if event == "[DONE]" else event["choices"][0]["text"]
    assert texts == alone


def test_a_stop_string_ends_the_answer_and_is_not_shown(engine):
    body = {"prompt": "abc", **GREEDY}
    whole = engine.post("completions", body).json()["choices"][0]["text"]
    stop = whole[5:8]
    found = engine.post("completions", body | {"stop": stop}).json()["choices"][0]
    assert found["text"] == whole[: whole.index(stop)]
    assert found["finish_reason"] == "stop"
    streamed = [event for _, event in engine.stream("completions", body | {"stop": [stop]})]
    text = "".join(event["choices"][0]["text"] for event in streamed[:-1])
    assert text == found["text"]


def test_a_seed_fixes_the_draw(engine):
    body = {"prompt": "abc", "max_tokens": 32, "temperature": 1.5, "top_p": 0.9}
    draws = [
        engine.post("completions", body | {"seed": seed}).json()["choices"][0]["text"]
        for seed in (5, 5, 6)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_tiny_nucleus_is_greedy(engine):
    body = {"prompt": "abc", "max_tokens": 16}
    greedy = engine.post("completions", body | {"temperature": 0}).json()
    narrow = engine.post("completions", body | {"top_p": 1e-6, "temperature": 1.0}).json()
    assert narrow["choices"][0]["text"] == greedy["choices"][0]["text"]


def test_echo_scores_the_prompt_and_exactly_one_token_more(engine):
    prompts = [[40, 41, 42, 43, 44], list(range(60, 100))]
    body = {"prompt": prompts, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    answer = engine.post("completions", body | {"seed": 1234}, delta="one").json()
    model = load_model(engine.models.rebuilt("one"))
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        scores = choice["logprobs"]
        assert [len(scores[key]) for key in scores] == [len(prompt) + 1] * 4
        assert scores["token_logprobs"][0] is None
        assert scores["top_logprobs"][0] is None
        with torch.inference_mode():
            table = torch.log_softmax(model(torch.tensor([prompt])).logits[0], dim=-1)
        truth = [float(table[at, token]) for at, token in enumerate(prompt[1:])]
        assert scores["token_logprobs"][1:-1] == pytest.approx(truth, abs=1e-4)
        for at, (value, top) in enumerate(
            zip(scores["token_logprobs"][1:-1], scores["top_logprobs"][1:-1], strict=True)
        ):
            is_greedy = int(table[at].argmax()) == prompt[at + 1]
            assert (value == max(top.values())) == is_greedy
            assert scores["tokens"][at + 1] in top
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]


def test_echo_with_no_new_token_gives_the_prompt_back(engine):
    body = {"prompt": "hello", "max_tokens": 0, "echo": True}
    answer = engine.post("completions", body).json()
    assert answer["choices"][0]["text"] == "hello"
    assert answer["usage"]["completion_tokens"] == 0


def test_chat_logprobs_name_the_likeliest_tokens(engine):
    body = {"messages": MESSAGES, **GREEDY, "logprobs": True, "top_logprobs": 3}
    choice = engine.post("chat/completions", body).json()["choices"][0]
    for token in choice["logprobs"]["content"]:
        values = [other["logprob"] for other in token["top_logprobs"]]
        assert len(values) == 3
        assert token["logprob"] == max(values)


def test_a_base_model_without_a_template_gets_plain_lines(engine, tmp_path):
    tiny.save(tiny.make_model(), tmp_path / "plain", chat=False)
    target = {"backbone": engine.models.snapshot(tmp_path / "plain"), "delta": None}
    headers = engine.headers(None) | {"x-deltacome-target": json.dumps(target)}
    answer = engine.post("chat/completions", {"messages": MESSAGES, **GREEDY}, headers=headers)
    ids = load_tokenizer(tmp_path / "plain")("user: What is 2+2?\nassistant:")["input_ids"]
    text = answer.json()["choices"][0]["message"]["content"]
    assert text == expected_text(tmp_path / "plain", ids)


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("completions", {"prompt": "a", "n": 17}, "n"),
        ("completions", {"prompt": ["a"] * 33, "n": 2}, "n"),
        ("completions", {"prompt": "a", "best_of": 2}, "best_of"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("completions", {"prompt": "a", "logit_bias": {"1": 5}}, "logit_bias"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [1, "a"]}, "prompt"),
        ("completions", {"prompt": [10_000]}, "prompt"),
        ("completions", {"prompt": [-1]}, "prompt"),
        ("completions", {"prompt": "a", "temperature": 3}, "temperature"),
        ("completions", {"prompt": "a", "top_p": "x"}, "top_p"),
        ("completions", {"prompt": "a", "max_tokens": True}, "max_tokens"),
        ("completions", {"prompt": "a", "max_tokens": 201}, "max_tokens"),
        ("completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
        ("completions", {"prompt": "a", "stop": [""]}, "stop"),
        ("completions", {"prompt": "a", "best_of": "2"}, "best_of"),
        ("completions", {"prompt": "a", "best_of": [2]}, "best_of"),
        ("completions", {"prompt": "a", "temperatur": 0}, "temperatur"),
        ("completions", {"prompt": "a", "guided_json": {}}, "guided_json"),
        ("completions", {"prompt": "a", "messages": MESSAGES}, "messages"),
        ("completions", {"prompt": "a", "stream_options": {}}, "stream_options"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": MESSAGES, "tools": [{}]}, "tools"),
        (
            "chat/completions",
            {"messages": MESSAGES, "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ("chat/completions", {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        (
            "chat/completions",
            {"messages": MESSAGES, "max_tokens": 3, "max_completion_tokens": 4},
            "max_tokens",
        ),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(engine, route, body, param):
    response = engine.post(route, body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_a_prompt_beyond_the_context_is_refused(engine):
    response = engine.post("completions", {"prompt": [50] * 250, "max_tokens": 10})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    fits = engine.post("completions", {"prompt": [50] * 246, "max_tokens": 10, "temperature": 0})
    assert fits.status_code == 200


def test_without_a_limit_the_answer_ends_with_the_context(engine):
    answer = engine.post("chat/completions", {"messages": MESSAGES, "temperature": 0}).json()
    choice = answer["choices"][0]
    total = answer["usage"]["total_tokens"]
    assert choice["finish_reason"] == "stop" or total in {
        256,
        answer["usage"]["prompt_tokens"] + 200,
    }


@pytest.mark.parametrize("secret", ["", "wrong", "a secret of the test"])
def test_only_the_hub_may_ask(engine, secret):
    headers = engine.headers(None) | {"x-engine-secret": secret}
    assert engine.post("completions", {"prompt": "a"}, headers=headers).status_code == 401
    assert engine.client.get("/v1/models", headers=headers).status_code == 401


def test_health_needs_no_secret(engine):
    assert engine.health()["status"] == "ok"


@pytest.mark.parametrize(
    "header",
    [None, "x", "[]", '{"backbone": {"digest": "a", "files": {"../x": "%s"}}}' % ("a" * 64)],
)
def test_a_request_without_sound_file_names_is_refused(engine, header):
    headers = {"x-engine-secret": engine.headers(None)["x-engine-secret"]}
    if header is not None:
        headers["x-deltacome-target"] = header
    assert engine.post("completions", {"prompt": "a"}, headers=headers).status_code == 400


def test_a_delta_that_cannot_be_loaded_is_never_answered_by_its_backbone(engine, models):
    target = models.target("one")
    data = target["delta"]["files"]["delta.safetensors"]
    content = bytearray(b"".join(models.store.read(data)))
    content[-200] ^= 1
    target["delta"]["files"]["delta.safetensors"] = models.store.put(
        [bytes(content)], no_claim
    ).sha256
    headers = engine.headers(None) | {"x-deltacome-target": json.dumps(target)}
    for _ in range(2):
        response = engine.post("completions", {"prompt": "a"}, headers=headers)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "file_digest_mismatch"
        assert response.headers["x-should-retry"] == "false"


def test_a_blob_that_rotted_in_the_store_is_noticed(engine, models, tmp_path):
    tiny.save(tiny.make_model(seed=77), tmp_path / "rotten")
    snapshot = models.snapshot(tmp_path / "rotten")
    blob = models.store.path(snapshot["files"]["model.safetensors"])
    blob.chmod(0o644)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    headers = engine.headers(None) | {
        "x-deltacome-target": json.dumps({"backbone": snapshot, "delta": None})
    }
    response = engine.post("completions", {"prompt": "a"}, headers=headers)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "file_digest_mismatch"


def test_hanging_up_ends_the_sequence(engine):
    body = {"prompt": "abc", "max_tokens": 200, "temperature": 1.0}
    for count, _ in enumerate(engine.stream("completions", body, delta="one")):
        if count == 2:
            break
    engine.wait_until_idle()


def test_a_full_engine_asks_to_come_back(models, monkeypatch):
    body, short = {"prompt": "2+2=", **GREEDY}, {"prompt": "a", "max_tokens": 1}
    may_go_on = threading.Event()
    forward = SharedExecutor.forward

    def forward_when_allowed(executor, work):
        # Held after a few tokens, so that the engine is full for as long as the test needs.
        held = any(len(item.sequence.tokens) == 8 for item in work)
        assert not held or may_go_on.wait(60)
        return forward(executor, work)

    monkeypatch.setattr(SharedExecutor, "forward", forward_when_allowed)
    limits = {"max_running": 1, "max_waiting": 1}
    with (
        serve(make_engine(models.root, **limits)) as url,
        Caller(url, models) as caller,
        Caller(url, models) as other,
    ):
        events = caller.stream("completions", body)
        next(events)
        waiting = other.stream("completions", body)
        threading.Thread(target=lambda: list(waiting), daemon=True).start()
        deadline = time.monotonic() + 20
        while not caller.health()["waiting"]:
            assert time.monotonic() < deadline
        with Caller(url, models) as third:
            refused = third.post("completions", short)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "engine_busy"
        assert int(refused.headers["retry-after"]) >= 1
        events.close()
        may_go_on.set()
        caller.wait_until_idle()
        assert other.post("completions", short).status_code == 200


def test_the_least_recently_used_delta_makes_room(models):
    # The backbone takes 380 kB in fp32, a delta between 120 kB and 170 kB: one fits beside it.
    memory_bytes = 580_000
    body = {"prompt": "2+2=", **GREEDY}
    texts = {}
    with (
        serve(make_engine(models.root, memory_bytes=memory_bytes)) as url,
        Caller(url, models) as caller,
    ):
        for delta in ("one", "two", "one", None, "two"):
            answer = caller.post("completions", body, delta=delta)
            assert answer.status_code == 200, answer.text
            text = answer.json()["choices"][0]["text"]
            assert texts.setdefault(delta, text) == text
            health = caller.health()
            assert health["resident_models"] <= 2
            assert health["resident_bytes"] <= memory_bytes
    assert len(set(texts.values())) == 3


def test_a_model_larger_than_memory_is_refused_for_good(models):
    with (
        serve(make_engine(models.root, memory_bytes=10_000)) as url,
        Caller(url, models) as caller,
    ):
        response = caller.post("completions", {"prompt": "a"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "model_too_large"
