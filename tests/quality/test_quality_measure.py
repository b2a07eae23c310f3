import pytest
import torch

from benchmarks.quality.decode import make_decoder
from benchmarks.quality.general_text import general_tokens, read_code, read_prose
from benchmarks.quality.measure import compare_states, prefix_share
from benchmarks.quality.models import grow_vocabulary, load_in_place, read_state
from deltacome_core.generate import decode_greedily, end_tokens
from deltacome_core.models import load_model, load_tokenizer
from deltacome_core.texts import DEFAULT_CALIBRATION


def test_the_fine_tune_agrees_with_itself_exactly(bench, tiny):
    found = bench.measure(read_state(tiny[1]))
    assert (found.kl_task, found.kl_text) == (0.0, 0.0)
    assert (found.top1, found.top1_text, found.recovery) == (1.0, 1.0, 1.0)
    assert (found.greedy_match, found.greedy_text) == (1.0, 1.0)
    assert found.score == 1.0
    assert found.score_se == 0.0
    assert found.n_items == 12


def test_the_backbone_recovers_nothing(bench):
    found = bench.backbone
    assert found.kl_task > 1.0
    assert found.kl_text > 1.0
    assert found.recovery == found.recovery_text == 0.0
    assert found.score == 0.0
    assert found.greedy_match < 0.5


def test_a_candidate_half_way_lies_between_and_leaves_no_trace(bench, tiny):
    base, tuned = (read_state(folder) for folder in tiny)
    nearly = {k: (0.2 * base[k].float() + 0.8 * tuned[k].float()) for k in tuned}
    found = bench.measure(nearly)
    assert 0.0 < found.kl_task < bench.backbone.kl_task
    assert 0.0 < found.recovery < 1.0
    assert bench.measure(tuned).kl_task == 0.0


def test_a_missing_or_misshapen_parameter_is_refused(bench, tiny):
    state = read_state(tiny[1])
    norm = "model.norm.weight"
    with pytest.raises(KeyError):
        bench.measure({k: v for k, v in state.items() if k != norm})
    with pytest.raises(ValueError, match=norm):
        bench.measure(state | {norm: torch.ones(3)})


def test_divergence_is_that_of_the_definition():
    generator = torch.Generator().manual_seed(1)
    states, other = (torch.randn(700, 8, generator=generator) for _ in range(2))
    head = torch.randn(30, 8, generator=generator)
    rows = torch.arange(700) // 7
    found = compare_states(states, head, other, head, rows=rows)
    p = (states @ head.T).double().softmax(-1)
    q = (other @ head.T).double().softmax(-1)
    # fp32 sums over thirty classes.
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    sums = (p * (p / q).log()).sum(-1).reshape(100, 7).sum(1)
    assert found.kl_se == pytest.approx(float(sums.std(correction=0)) * 100**0.5 / 700, rel=1e-5)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_tokens_after_the_first_difference_do_not_count():
    reference = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    tokens = torch.tensor([[1, 2, 3, 4], [1, 9, 3, 4], [9, 2, 3, 4]])
    assert prefix_share(reference, tokens) == pytest.approx((4 + 1 + 0) / 12)


def test_static_decoding_gives_the_tokens_of_the_plain_one(tiny):
    tokenizer = load_tokenizer(tiny[0])
    model = load_model(tiny[0])
    texts = ["One sunny day", "Mia", "Question: What is the capital of Peru?\nAnswer:"]
    prompts = [tokenizer.encode(text) for text in texts]
    stops = end_tokens(model, tokenizer)
    decoder = make_decoder(model, prompts, new_tokens=40)
    for _ in range(2):
        found = decoder.decode(prompts, stop_tokens=sorted(stops)).tolist()
        plain = decode_greedily(model, prompts, max_new_tokens=40, stop_tokens=stops)
        filler = min(stops)
        assert found == [(row + [filler] * 40)[:40] for row in plain]


def test_rows_of_new_tokens_are_the_mean_row(tiny):
    rows = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert grow_vocabulary(rows, 4).tolist() == [[1, 2], [3, 6], [2, 4], [2, 4]]
    model = load_model(tiny[0])
    state = read_state(tiny[0])
    name = "model.embed_tokens.weight"
    load_in_place(model, state | {name: state[name][:1000]})
    grown = model.get_input_embeddings().weight
    assert torch.equal(grown[1000], grown[1023])


def test_general_text_is_the_same_each_time_and_no_calibration_text(tiny):
    tokenizer = load_tokenizer(tiny[0])
    first = general_tokens(tokenizer, rows=8, length=64)
    assert first.shape == (8, 64)
    assert torch.equal(first, general_tokens(tokenizer, rows=8, length=64))
    known = DEFAULT_CALIBRATION.read_text()
    lines = {line.strip() for line in (read_prose() + read_code()).splitlines()}
    assert not [line for line in lines if len(line) > 30 and line in known]
