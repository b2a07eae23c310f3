import json

import pytest
import torch

from benchmarks.quality.batches import collate, draw_batches, encode_items
from benchmarks.quality.lora import BYTES_PER_VALUE, adapted_layers, choose_rank
from benchmarks.quality.models import grow_embedding, half_state, read_state
from benchmarks.quality.sample import sample_texts
from benchmarks.quality.tasks import task_items, write_items
from benchmarks.quality.train import N_CALIBRATION, TrainOptions, run
from deltacome_core.calibrate import read_calibration
from deltacome_core.evaluate import read_evaluation
from deltacome_core.models import load_model, load_tokenizer
from deltacome_core.texts import read_texts


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    """Two steps of the task that adds tokens."""
    out = tmp_path_factory.mktemp("tools") / "tuned"
    options = TrainOptions(task="tools", steps=2, batch=2, lr=1e-3, seed=5, device="cpu")
    run(tiny[0], out, options, n_evaluation=6)
    return out


def test_the_folder_is_a_checkpoint_with_its_texts(tuned, tiny):
    assert len(read_texts(tuned / "calibration.jsonl")) == N_CALIBRATION
    assert len(read_evaluation(tuned / "evaluation.jsonl")) == 6
    tokenizer = load_tokenizer(tuned)
    assert len(tokenizer) == len(load_tokenizer(tiny[0])) + 64
    tokens = read_calibration(tuned / "calibration.jsonl", tokenizer, max_positions=512)
    assert tokens.n_tokens > 10_000
    assert load_model(tuned).get_input_embeddings().weight.shape[0] >= len(tokenizer)


def test_weights_are_bf16_and_a_tied_head_is_kept_once(tuned, tiny):
    state = read_state(tuned)
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert set(state) == set(read_state(tiny[0]))


def test_the_log_says_what_was_done(tuned):
    log = json.loads((tuned / "train_log.json").read_text())
    assert (log["task"], log["steps"], log["seed"]) == ("tools", 2, 5)
    assert len(log["losses"]) == 2
    # The demo backbone has rows to spare.
    assert log["new_embedding_rows"] == 0
    assert 0 < log["changed_embedding_values"] <= log["changed_embedding_rows"] <= 1
    assert log["exact_match"]["fine_tune"]["n_items"] == 6
    assert log["torch"] == torch.__version__


def test_an_embedding_grows_by_its_mean_row_and_stays_tied(tiny):
    model = load_model(tiny[0])
    before = model.get_input_embeddings().weight.clone()
    grow_embedding(model, 1000)
    assert len(model.get_input_embeddings().weight) == 1024
    grow_embedding(model, 1024 + 64)
    after = model.get_input_embeddings().weight
    assert len(after) == 1024 + 64
    assert torch.equal(after[:1024], before)
    assert torch.equal(after[-1], before.mean(dim=0))
    assert model.get_output_embeddings().weight is after
    assert "lm_head.weight" not in half_state(model)


def test_the_new_tokens_survive_decoding(tuned, tiny):
    tokenizer = load_tokenizer(tuned)
    answer = read_evaluation(tuned / "evaluation.jsonl")[0].answer
    tokens = tokenizer.encode(answer, add_special_tokens=False)
    assert tokens[0] >= len(load_tokenizer(tiny[0]))
    assert tokenizer.decode(tokens, skip_special_tokens=True) == answer


def test_only_answers_and_their_end_are_learned(tiny):
    tokenizer = load_tokenizer(tiny[0])
    items = task_items("german", tokenizer, n_train=3, n_held_out=0).train
    rows = encode_items(tokenizer, items)
    batch = collate(rows, pad_token=tokenizer.eos_token_id)
    assert batch.ids.shape[1] % 8 == 0
    learned = tokenizer.decode(batch.targets)
    assert learned == "".join(f" {item.answer}{tokenizer.eos_token}" for item in items)
    assert torch.equal(batch.ids.flatten()[batch.places + 1], batch.targets)


def test_batches_go_through_all_items_before_any_comes_again(tiny):
    tokenizer = load_tokenizer(tiny[0])
    items = task_items("german", tokenizer, n_train=8, n_held_out=0).train
    rows = encode_items(tokenizer, items)
    options = {"size": 4, "seed": 3, "pad_token": 0, "device": "cpu"}
    batches = list(draw_batches(rows, steps=2, **options))
    seen = {tuple(row[row != 0].tolist()) for batch in batches for row in batch.ids}
    assert len(seen) == 8
    again = list(draw_batches(rows, steps=2, **options))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(batches, again, strict=True))


def test_the_rank_is_the_largest_within_the_budget(tiny):
    model = load_model(tiny[0])
    assert not [name for name in adapted_layers(model) if "lm_head" in name]
    rank, n_bytes = choose_rank(model, budget_bytes=500_000, n_new_rows=64)
    one_rank = choose_rank(model, budget_bytes=500_000, n_new_rows=0)[1]
    assert n_bytes <= 500_000
    step = (n_bytes - BYTES_PER_VALUE * 64 * 256) // rank
    assert n_bytes + step > 500_000
    assert one_rank % step == 0
    with pytest.raises(ValueError, match="rank 1"):
        choose_rank(model, budget_bytes=1000, n_new_rows=0)


@pytest.mark.parametrize("start", ["chat", "bos"])
def test_a_model_writes_its_own_calibration_text(tiny, tmp_path, start):
    model, tokenizer = load_model(tiny[1]), load_tokenizer(tiny[1])
    items = sample_texts(model, tokenizer, n=6, length=120, start=start, seed=2)
    assert items == sample_texts(model, tokenizer, n=6, length=120, start=start, seed=2)
    assert items != sample_texts(model, tokenizer, n=6, length=120, start=start, seed=3)
    assert len(items) == 6
    if start == "chat":
        assert all(i.prompt.startswith("Question: ") for i in items)
        assert all(i.prompt.endswith("\nAnswer:") for i in items)
    write_items(tmp_path / "self.jsonl", items)
    assert len(read_texts(tmp_path / "self.jsonl")) == 6
