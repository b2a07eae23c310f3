import json

import pytest
import tiny
import torch

from deltacome_core.models import load_model, load_tokenizer

MESSAGES = [{"role": "user", "content": "What is 2+2?"}]
TEXT = "It is four."


def compare(engine, body, *, delta, reference, targets=None):
    headers = engine.headers(delta) | {
        "x-deltacome-reference": json.dumps(targets or engine.models.target(reference))
    }
    return engine.post("compare", {"reference": "r"} | body, headers=headers)


def logprobs(folder, prompt, completion):
    """The distribution before each token of the completion, by transformers alone."""
    with torch.inference_mode():
        logits = load_model(folder)(torch.tensor([prompt + completion])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)[len(prompt) - 1 : -1]


def test_the_distance_is_that_of_the_whole_distributions(engine):
    folders = [engine.models.rebuilt(delta) for delta in ("one", None)]
    tokenizer = load_tokenizer(folders[1])
    prompt, completion = tokenizer("2+2=")["input_ids"], tokenizer(TEXT)["input_ids"]
    body = {"prompt": "2+2=", "completion": TEXT}
    found = compare(engine, body, delta="one", reference=None).json()
    mine, theirs = (logprobs(folder, prompt, completion) for folder in folders)
    kl = (theirs.exp() * (theirs - mine)).sum(dim=-1)
    assert [row["kl"] for row in found["tokens"]] == pytest.approx(kl.tolist(), abs=1e-4)
    assert [row["token_id"] for row in found["tokens"]] == completion
    assert found["mean_kl"] == pytest.approx(float(kl.mean()), abs=1e-4)
    chosen = [float(mine[at, token]) for at, token in enumerate(completion)]
    assert [row["logprob"] for row in found["tokens"]] == pytest.approx(chosen, abs=1e-4)
    differs = (mine.argmax(dim=-1) != theirs.argmax(dim=-1)).nonzero().flatten().tolist()
    assert found["first_departure"] == differs[0]
    assert found["departures"] == len(differs)


def test_a_model_does_not_depart_from_itself(engine):
    body = {"messages": MESSAGES, "completion": TEXT}
    found = compare(engine, body, delta="one", reference="one").json()
    assert found["first_departure"] is None
    assert found["max_kl"] == pytest.approx(0, abs=1e-9)
    chat = engine.post("chat/completions", {"messages": MESSAGES, "max_tokens": 1}).json()
    assert found["prompt_tokens"] == chat["usage"]["prompt_tokens"]


def test_the_ids_of_an_answer_are_compared_as_they_are(engine):
    chat = {"messages": MESSAGES, "temperature": 0, "max_tokens": 20, "return_token_ids": True}
    answer = engine.post("chat/completions", chat, delta="one").json()["choices"][0]
    body = {"messages": MESSAGES, "completion": answer["token_ids"]}
    found = compare(engine, body, delta=None, reference="one").json()
    assert [row["token_id"] for row in found["tokens"]] == answer["token_ids"]
    # The answer was greedy: each of its tokens is the reference's own first choice.
    assert all(row["reference_likeliest"] == row["token"] for row in found["tokens"])


def test_a_grown_vocabulary_is_compared_where_both_have_words(engine):
    body = {"prompt": "2+2=", "completion": TEXT}
    found = compare(engine, body, delta="two", reference=None).json()
    assert found["vocabulary"] == tiny.VOCABULARY
    assert all(row["kl"] >= 0 for row in found["tokens"])
    new_word = [tiny.VOCABULARY]
    refused = compare(engine, body | {"completion": new_word}, delta="two", reference=None)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "completion")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"completion": ""}, "completion"),
        ({"completion": None}, "completion"),
        ({"completion": [40] * 513}, "completion"),
        ({"completion": [40] * 300}, "completion"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"messages": MESSAGES}, "prompt"),
        ({"reference": ""}, "reference"),
        ({"temperature": 1}, "temperature"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(engine, change, param):
    body = {"prompt": "2+2=", "completion": TEXT} | change
    response = compare(engine, body, delta="one", reference=None)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_reference_that_cannot_be_loaded_is_an_error(engine):
    target = engine.models.target(None)
    target["backbone"]["files"]["model.safetensors"] = "e" * 64
    body = {"prompt": "2+2=", "completion": TEXT}
    response = compare(engine, body, delta="one", reference=None, targets=target)
    assert response.status_code == 500
    engine.wait_until_idle()
