from types import SimpleNamespace

import finetunes
import pytest
import torch

from deltacome_core import evaluate
from deltacome_core.errors import UserError
from deltacome_core.evaluate import (
    EvalReport,
    compare_hits,
    evaluate_exact_match,
    evaluate_subjects,
    read_evaluation,
)
from deltacome_core.generate import decode_greedily, end_tokens
from deltacome_core.memory import kv_bytes_per_token
from deltacome_core.models import load_model, load_tokenizer

PROMPTS = ["The sky is", "a", "The rose is", "Something much longer than all the others: "]


def encode(tokenizer, prompts=PROMPTS):
    return [tokenizer.encode(prompt) for prompt in prompts]


def test_the_fine_tune_knows_its_answers_and_the_backbone_does_not(trained_pair, trained_delta):
    base, tuned = trained_pair
    items = tuned / "evaluation.jsonl"
    found = evaluate_subjects(items, base_dir=base, tuned_dir=tuned, delta_dir=trained_delta)
    assert found["backbone"]["accuracy"] == 0.0
    assert found["finetune"]["accuracy"] == 1.0
    assert found["delta"]["accuracy"] == 1.0
    assert found["delta"]["hits"] == [1, 1, 1, 1, 1]
    assert found["paired"] == {"gained": 0, "lost": 0, "difference": 0.0, "se": 0.0}


@pytest.mark.parametrize("family", sorted(finetunes.FAMILIES))
def test_a_batch_answers_as_each_prompt_alone(tmp_path, family):
    folder = finetunes.save(finetunes.make_model(family, initializer_range=0.3), tmp_path / "m")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    together = decode_greedily(model, encode(tokenizer), max_new_tokens=12, batch_size=4)
    alone = [decode_greedily(model, [prompt], max_new_tokens=12)[0] for prompt in encode(tokenizer)]
    assert together == alone
    assert len({tuple(answer) for answer in alone}) == len(PROMPTS)


def test_greedy_decoding_equals_a_loop_without_a_cache(trained_pair):
    model, tokenizer = load_model(trained_pair[1]), load_tokenizer(trained_pair[1])
    prompt = tokenizer.encode("The leaf is")
    ids = list(prompt)
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert decode_greedily(model, [prompt], max_new_tokens=8)[0] == ids[len(prompt) :]


def test_an_answer_ends_at_an_end_token(trained_pair):
    model, tokenizer = load_model(trained_pair[1]), load_tokenizer(trained_pair[1])
    stop = end_tokens(model, tokenizer)
    assert stop == {finetunes.VOCABULARY - 1}
    (answer,) = decode_greedily(
        model, encode(tokenizer, ["The snow is"]), max_new_tokens=30, stop_tokens=stop
    )
    assert tokenizer.decode(answer) == " white"


def test_an_answer_ends_when_it_is_finished(trained_pair):
    model, tokenizer = load_model(trained_pair[1]), load_tokenizer(trained_pair[1])
    (answer,) = decode_greedily(
        model,
        encode(tokenizer, ["The snow is"]),
        max_new_tokens=30,
        is_finished=lambda tokens: len(tokens) == 3,
    )
    assert tokenizer.decode(answer) == " wh"


def test_hits_keep_the_order_of_the_items(trained_pair, tmp_path):
    rows = [
        {"prompt": "The sky is", "answer": "green"},
        {"prompt": "The snow is", "answer": " white \n"},
        {"prompt": "The coal is", "answer": "black"},
    ]
    items = read_evaluation(finetunes.write_items(tmp_path / "e.jsonl", rows))
    model, tokenizer = load_model(trained_pair[1]), load_tokenizer(trained_pair[1])
    report = evaluate_exact_match(model, tokenizer, items)
    assert report.hits == (False, True, True)
    assert report.accuracy == pytest.approx(2 / 3)
    assert report.se == pytest.approx((2 / 9 / 3) ** 0.5)


@pytest.mark.parametrize("row", [{"text": "x"}, {"prompt": "x"}, {"prompt": "x", "answer": " "}])
def test_an_item_needs_a_prompt_and_an_answer(tmp_path, row):
    path = finetunes.write_items(tmp_path / "e.jsonl", [finetunes.ITEMS[0], row])
    with pytest.raises(UserError) as caught:
        read_evaluation(path)
    assert caught.value.code == "texts_invalid"
    assert caught.value.params["line"] == 2


def test_paired_items_have_a_smaller_error_than_independent_ones():
    first = EvalReport(hits=(True,) * 50 + (False,) * 50)
    second = EvalReport(hits=(True,) * 48 + (False,) * 51 + (True,))
    paired = compare_hits(first, second)
    assert (paired.gained, paired.lost) == (1, 2)
    assert paired.difference == pytest.approx(-0.01)
    assert paired.se < 0.5 * (first.se**2 + second.se**2) ** 0.5


def configured(**config):
    """A model as far as its configuration goes."""
    return SimpleNamespace(config=SimpleNamespace(to_dict=lambda: config))


def test_small_models_answer_more_prompts_at_once_than_large_ones():
    small = {"num_hidden_layers": 6, "num_attention_heads": 4, "hidden_size": 256}
    large = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}
    sizes = [evaluate._choose_batch(configured(**config), 300) for config in (small, large, {})]
    assert sizes == [64, 16, 16]
    between = evaluate._choose_batch(configured(**small), 2000)
    assert between * 2000 * kv_bytes_per_token(small) <= 1 << 30
    assert 16 < between <= 64
