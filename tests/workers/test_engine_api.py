"""Choices, echoes, ids and tokenizers: what clients of the OpenAI API lean on, field by field."""

import json

import pytest
import tiny

from deltacome_core.models import load_tokenizer

MESSAGES = [{"role": "user", "content": "What is 2+2?"}]
GREEDY = {"temperature": 0, "max_tokens": 24}


def get(engine, route, *, delta=None):
    return engine.client.get(f"/v1/{route}", headers=engine.headers(delta))


def read_stream(engine, route, body, *, delta=None):
    """Return the chunks before [DONE]."""
    events = [event for _, event in engine.stream(route, body, delta=delta)]
    assert events[-1] == "[DONE]"
    return events[:-1]


def test_each_prompt_gets_its_choices_in_order(engine):
    body = {"prompt": ["abc", "2+2="], "n": 3, "max_tokens": 16, "temperature": 1.5, "seed": 5}
    answer = engine.post("completions", body, delta="one").json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) == 6
    alone = [
        engine.post("completions", body | {"prompt": prompt, "n": 1}, delta="one").json()
        for prompt in body["prompt"]
    ]
    assert [texts[0], texts[3]] == [one["choices"][0]["text"] for one in alone]
    assert answer["usage"]["prompt_tokens"] == 3 + 4
    assert answer["usage"]["completion_tokens"] <= 6 * 16


def test_streamed_choices_are_the_collected_ones(engine):
    body = {"messages": MESSAGES, "n": 2, "max_tokens": 12, "temperature": 1.2, "seed": 3}
    whole = engine.post("chat/completions", body).json()
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in read_stream(engine, "chat/completions", body):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {c["index"]: c["message"]["content"] for c in whole["choices"]}
    assert reasons == {c["index"]: c["finish_reason"] for c in whole["choices"]}


@pytest.mark.parametrize("logprobs", [None, 0, 1, 5])
def test_an_echo_streams_what_it_answers_whole(engine, logprobs):
    body = {"prompt": ["2+2=", "Zürich"], "echo": True, "max_tokens": 3, "temperature": 0}
    body |= {} if logprobs is None else {"logprobs": logprobs}
    whole = engine.post("completions", body, delta="one").json()["choices"]
    texts, scores = ["", ""], [[], []]
    for chunk in read_stream(engine, "completions", body, delta="one"):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            scores[choice["index"]] += (choice["logprobs"] or {}).get("token_logprobs", [])
    assert texts == [choice["text"] for choice in whole]
    assert texts[0].startswith("2+2=")
    if logprobs is not None:
        assert scores == [choice["logprobs"]["token_logprobs"] for choice in whole]
        tops = whole[0]["logprobs"]["top_logprobs"][1:]
        assert all(1 <= len(top) <= logprobs + 1 for top in tops)


def test_one_new_token_is_counted_even_when_it_ends_the_answer(engine):
    """A harness drops the last score unseen: without that token it would drop a scored one."""
    tokenizer = load_tokenizer(engine.models.rebuilt())
    eos = tokenizer.eos_token_id
    # Greedily, the tiny model says something; whatever it is, there is exactly one of it.
    for prompt in ([40, 41, eos], [eos, 40], [50]):
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        choice = engine.post("completions", body).json()["choices"][0]
        scores = choice["logprobs"]
        assert {len(values) for values in scores.values()} == {len(prompt) + 1}
        assert scores["token_logprobs"][0] is None
        assert scores["token_logprobs"][-1] == max(scores["top_logprobs"][-1].values())


def test_ids_are_given_back_when_asked_for(engine):
    ids = [40, 41, 42]
    body = {"prompt": ids, **GREEDY, "return_token_ids": True}
    choice = engine.post("completions", body).json()["choices"][0]
    assert choice["prompt_token_ids"] == ids
    tokenizer = load_tokenizer(engine.models.rebuilt())
    assert tokenizer.decode(choice["token_ids"], skip_special_tokens=True) == choice["text"]
    streamed = [
        token
        for chunk in read_stream(engine, "completions", body)
        for token in chunk["choices"][0]["token_ids"]
    ]
    assert streamed == choice["token_ids"]
    chat = {"messages": MESSAGES, **GREEDY, "return_token_ids": True}
    whole = engine.post("chat/completions", chat).json()
    assert len(whole["choices"][0]["token_ids"]) == whole["usage"]["completion_tokens"]


def test_half_a_character_has_no_bytes(engine):
    body = {"messages": MESSAGES, "max_tokens": 40, "temperature": 0, "logprobs": True}
    content = engine.post("chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    halves = [token for token in content if "\N{REPLACEMENT CHARACTER}" in token["token"]]
    assert halves, "the random bytes of the tiny model hold half characters"
    assert {token["bytes"] for token in halves} == {None}
    whole = next(token for token in content if token not in halves)
    assert bytes(whole["bytes"]).decode() == whole["token"]


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "x", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"tools": [], "tool_choice": "none", "logit_bias": {}, "response_format": {"type": "text"}},
        {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "n": None, "stop": None},
        {"max_completion_tokens": 24, "max_tokens": 24},
        {"stream_options": None},
    ],
)
def test_what_changes_nothing_is_taken(engine, extra):
    body = {"messages": MESSAGES, **GREEDY}
    plain = engine.post("chat/completions", body).json()["choices"]
    assert engine.post("chat/completions", body | extra).json()["choices"] == plain


def test_a_typing_error_is_answered_with_the_field_it_may_mean(engine):
    response = engine.post("completions", {"prompt": "a", "max_token": 3})
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("unknown_parameter", "max_token")
    assert "Did you mean max_tokens?" in error["message"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_is_refused(engine, value):
    body = f'{{"model": "m", "prompt": "a", "temperature": {value}}}'
    response = engine.client.post("/v1/completions", content=body, headers=engine.headers(None))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "temperature")


def test_the_canary_of_the_model_is_in_the_headers(engine):
    whole = engine.post("completions", {"prompt": "a", "max_tokens": 1}, delta="one")
    assert whole.headers["x-deltacome-canary"]
    body = {"model": "m", "prompt": "a", "max_tokens": 1, "stream": True}
    streamed = engine.client.post("/v1/completions", json=body, headers=engine.headers("one"))
    assert streamed.headers["x-deltacome-canary"] == whole.headers["x-deltacome-canary"]


def test_the_tokenizer_describes_itself_without_the_weights(engine, models, tmp_path):
    tiny.save(tiny.make_model(seed=50), tmp_path / "cold")
    target = {"backbone": models.snapshot(tmp_path / "cold"), "delta": None}
    # Weights that are not even there: nothing may ask for them.
    target["backbone"]["files"]["model.safetensors"] = "e" * 64
    headers = engine.headers(None) | {"x-deltacome-target": json.dumps(target)}
    info = engine.client.get("/v1/tokenizer_info", headers=headers).json()
    assert info["eos_token"] == "<|end|>"
    assert info["bos_token"] is None
    assert info["add_bos_token"] is False
    assert info["chat_template"] == tiny.CHAT_TEMPLATE
    assert info["max_model_len"] == 256
    assert info["vocab_size"] == tiny.VOCABULARY


@pytest.mark.parametrize("text", ["2+2=", "Zürich 😀  two  spaces", "<|user|>hello<|end|>"])
def test_a_text_survives_its_tokens(engine, text):
    found = engine.post("tokenize", {"prompt": text, "return_token_strs": True}, delta="two").json()
    assert found["tokens"] == load_tokenizer(engine.models.rebuilt("two"))(text)["input_ids"]
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    back = engine.post("detokenize", {"tokens": found["tokens"]}, delta="two").json()
    assert back == {"prompt": text}


def test_messages_are_cut_as_the_chat_cuts_them(engine):
    found = engine.post("tokenize", {"messages": MESSAGES}).json()
    chat = engine.post("chat/completions", {"messages": MESSAGES, "max_tokens": 1}).json()
    assert found["count"] == chat["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("tokenize", {"prompt": ["a"]}, "prompt"),
        ("tokenize", {"prompt": "a", "truncation": 3}, "truncation"),
        ("detokenize", {}, "tokens"),
        ("detokenize", {"tokens": "abc"}, "tokens"),
        ("detokenize", {"tokens": [1, 10_000]}, "tokens"),
        ("detokenize", {"tokens": [-1]}, "tokens"),
    ],
)
def test_what_no_tokenizer_can_do_is_refused_by_name(engine, route, body, param):
    response = engine.post(route, body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("route", ["tokenizer_info", "tokenize", "detokenize"])
def test_the_tokenizer_too_is_for_the_hub_alone(engine, route):
    method = "GET" if route == "tokenizer_info" else "POST"
    assert engine.client.request(method, f"/v1/{route}", json={}).status_code == 401
