import json
import shutil

import finetunes
import pytest
import torch

from deltacome_core.comparison import (
    ScoredText,
    agreed_share,
    compare_models,
    read_scored_texts,
)
from deltacome_core.compress import compress_checkpoint
from deltacome_core.errors import UserError
from deltacome_core.models import load_model
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from deltacome_core.texts import DEFAULT_PROMPTS
from deltacome_core.verify import (
    find_prompts,
    grade_delta,
    measure_recovery,
    save_report,
    verify_delta,
)


@pytest.fixture(scope="module")
def report(trained_pair, trained_delta):
    return verify_delta(*trained_pair, trained_delta)


def test_a_generous_delta_of_a_real_fine_tune_gets_an_a(report):
    assert report.grade == "A"
    assert report.recovery > 0.98
    assert report.kl_backbone > 1.0
    assert report.kl < 0.02 * report.kl_backbone
    assert report.greedy_match == 1.0
    assert all(check.ok for check in report.checks)


def test_fewer_bits_lose_more(trained_pair, tmp_path, report):
    thin = tmp_path / "thin"
    compress_checkpoint(*trained_pair, thin, get_recipe("datafree", matrix_bits=1.0))
    worse = verify_delta(*trained_pair, thin)
    assert worse.kl > 3 * report.kl
    assert worse.recovery < report.recovery


def test_worst_matrices_are_sorted_and_measured_on_the_rebuilt_weights(report):
    errors = [matrix.relative_error for matrix in report.worst_matrices]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == 10
    assert 0 < errors[-1] < errors[0] < 1
    assert report.matrices[:10] == report.worst_matrices
    assert "model.layers.0.self_attn.q_proj.weight" in {item.name for item in report.matrices}


def test_identical_checkpoints_recover_everything(tmp_path):
    base = finetunes.save(finetunes.make_model(), tmp_path / "base")
    tuned = finetunes.save(finetunes.make_model(), tmp_path / "tuned")
    compress_checkpoint(base, tuned, tmp_path / "delta", get_recipe("datafree"))
    report = verify_delta(base, tuned, tmp_path / "delta")
    assert (report.kl, report.kl_backbone, report.recovery) == (0.0, 0.0, 1.0)
    assert (report.top1, report.ppl_ratio, report.greedy_match) == (1.0, 1.0, 1.0)
    assert report.grade == "A"
    assert report.worst_matrices == ()


def test_a_delta_that_stands_for_another_fine_tune_fails(trained_pair, trained_delta, tmp_path):
    base, _ = trained_pair
    other = finetunes.save(finetunes.perturb(finetunes.make_model(), size=0.1), tmp_path / "other")
    report = verify_delta(base, other, trained_delta)
    assert report.grade == "F"
    failing = [check.name for check in report.checks if not check.ok]
    assert {"recovery", "exact_tensors_that_differ"} <= set(failing)
    assert [check.ok for check in report.checks] == sorted(check.ok for check in report.checks)


def test_a_grown_vocabulary_is_compared_on_the_tokens_both_know(tmp_path):
    model = finetunes.make_model()
    base = finetunes.save(model, tmp_path / "base")
    model.resize_token_embeddings(finetunes.VOCABULARY + 8, mean_resizing=False)
    tuned = finetunes.save(finetunes.train(model), tmp_path / "tuned")
    finetunes.write_items(tuned / "evaluation.jsonl")
    recipe = get_recipe("datafree", matrix_bits=5.0)
    compress_checkpoint(base, tuned, tmp_path / "delta", recipe)
    report = verify_delta(base, tuned, tmp_path / "delta")
    assert report.recovery > 0.9
    assert report.kl_backbone > 1.0


def test_another_backbone_is_refused(trained_pair, trained_delta, tmp_path):
    _, tuned = trained_pair
    other = finetunes.save(finetunes.make_model(seed=5), tmp_path / "other")
    with pytest.raises(UserError) as caught:
        verify_delta(other, tuned, trained_delta)
    assert caught.value.code == "backbone_digest_mismatch"


def test_nothing_is_left_beside_the_delta(trained_pair, trained_delta):
    before = set(trained_delta.parent.iterdir())
    verify_delta(*trained_pair, trained_delta)
    assert set(trained_delta.parent.iterdir()) == before


def test_a_rebuilt_checkpoint_can_be_handed_in(trained_pair, trained_delta, tmp_path, report):
    reconstruct_checkpoint(trained_pair[0], trained_delta, tmp_path / "back")
    again = verify_delta(*trained_pair, trained_delta, reconstructed_dir=tmp_path / "back")
    assert again.kl == report.kl


def test_damaged_weights_are_found(trained_pair, trained_delta, tmp_path):
    base, tuned = trained_pair
    model = load_model(tuned)
    with torch.no_grad():
        model.model.norm.weight[0] = 50.0
    finetunes.save(model, tmp_path / "back")
    report = verify_delta(base, tuned, trained_delta, reconstructed_dir=tmp_path / "back")
    assert report.grade == "F"
    assert report.checks[0].ok is False
    exact = next(c for c in report.checks if c.name == "exact_tensors_that_differ")
    assert exact.value == 1


def test_the_report_is_saved_as_json(report, trained_delta, tmp_path):
    folder = shutil.copytree(trained_delta, tmp_path / "delta")
    stored = json.loads(save_report(report, folder).read_text())
    assert stored["grade"] == "A"
    assert stored["checks"][0].keys() == {"name", "ok", "value", "threshold"}


def test_kl_matches_torchs_own(trained_pair):
    base, tuned = map(load_model, trained_pair)
    tokens = finetunes.make_tokenizer().encode("The sky is blue")
    found = compare_models(tuned, base, [ScoredText(tokens=tokens, first_scored=5, opening=[])])
    ids = torch.tensor([tokens])
    with torch.no_grad():
        truth = tuned(input_ids=ids).logits[0, 4:-1].log_softmax(-1)
        guess = base(input_ids=ids).logits[0, 4:-1].log_softmax(-1)
    kl = torch.nn.functional.kl_div(guess, truth, log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(kl.item(), rel=1e-4)
    assert found.n_tokens == len(tokens) - 5
    surprise = [
        torch.nn.functional.cross_entropy(logits, ids[0, 5:]).item() for logits in (truth, guess)
    ]
    ratio = torch.tensor(surprise[1] - surprise[0]).exp().item()
    assert found.ppl_ratio == pytest.approx(ratio, rel=1e-3)


def test_a_model_agrees_with_itself(trained_pair):
    model = load_model(trained_pair[1])
    text = ScoredText(tokens=list(range(40)), first_scored=1, opening=[])
    same = compare_models(model, model, [text])
    assert (same.kl, same.top1, same.ppl_ratio) == (0.0, 1.0, 1.0)


def test_only_the_answer_of_a_prompt_is_scored(tmp_path):
    rows = [{"prompt": "The sky is", "answer": "blue"}, {"text": "abcd"}, {"prompt": "no answer"}]
    path = finetunes.write_items(tmp_path / "p.jsonl", rows)
    pair, plain = read_scored_texts([path], finetunes.make_tokenizer())
    assert len(pair.tokens) - pair.first_scored == len(" blue")
    assert len(pair.opening) == len("The sky is")
    assert (len(plain.tokens), plain.first_scored, len(plain.opening)) == (4, 1, 2)


def test_the_end_of_a_long_text_is_scored(tmp_path):
    rows = [{"prompt": "x" * 2000, "answer": "blue"}]
    path = finetunes.write_items(tmp_path / "p.jsonl", rows)
    (text,) = read_scored_texts([path], finetunes.make_tokenizer())
    assert len(text.tokens) == 512
    assert len(text.tokens) - text.first_scored == len(" blue")


def test_a_file_without_answers_is_refused(tmp_path):
    path = finetunes.write_items(tmp_path / "p.jsonl", [{"prompt": "no answer"}])
    with pytest.raises(UserError) as caught:
        read_scored_texts([path], finetunes.make_tokenizer())
    assert caught.value.code == "texts_invalid"


def test_the_fine_tunes_own_prompts_are_preferred(tmp_path):
    assert find_prompts(tmp_path) == (DEFAULT_PROMPTS,)
    (tmp_path / "evaluation.jsonl").touch()
    assert find_prompts(tmp_path) == (tmp_path / "evaluation.jsonl",)


@pytest.mark.parametrize(
    ("recovery", "ppl_ratio", "grade"),
    [
        (0.98, 1.005, "A"),
        (0.98, 0.994, "B"),
        (0.979, 1.0, "B"),
        (0.95, 1.011, "C"),
        (0.90, 1.0199, "C"),
        (0.899, 1.0, "F"),
        (1.0, 1.021, "F"),
        (float("nan"), 1.0, "F"),
    ],
)
def test_grades_demand_recovery_and_perplexity(recovery, ppl_ratio, grade):
    assert grade_delta(recovery, ppl_ratio) == grade


@pytest.mark.parametrize(
    ("kl", "backbone", "recovery"),
    [(0.0, 0.0, 1.0), (0.0, 2.0, 1.0), (0.02, 2.0, 0.99), (3.0, 2.0, -0.5)],
)
def test_recovery_is_the_share_that_survived(kl, backbone, recovery):
    assert measure_recovery(kl, backbone) == pytest.approx(recovery)


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [([], [], 1.0), ([1, 2], [1, 2], 1.0), ([1, 2, 3, 4], [1, 2, 9, 4], 0.5), ([1], [1, 2], 0.5)],
)
def test_agreement_counts_up_to_the_first_difference(first, second, share):
    assert agreed_share(first, second) == share
