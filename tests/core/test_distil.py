"""Recipes that train what a delta stores, on real fine-tunes of tiny models."""

import math
from dataclasses import replace

import finetunes
import pytest
import torch
from torch.nn.functional import kl_div

from deltacome_core import distil, distil_schedule
from deltacome_core.batches import cut_batches
from deltacome_core.bitpack import unpack_codes
from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.compress import compress_checkpoint, parts_folder
from deltacome_core.container import open_delta
from deltacome_core.distil_texts import (
    ANSWERS,
    GENERAL,
    PROMPTS,
    Row,
    make_batch,
    read_rows,
    split_judge,
)
from deltacome_core.entries import ExactEntry
from deltacome_core.errors import UserError
from deltacome_core.models import load_model
from deltacome_core.packed import ExactTensor, PackedMatrix, PackedRows
from deltacome_core.recipe import Recipe, get_recipe
from deltacome_core.reconstruct import apply_entry, reconstruct_checkpoint
from deltacome_core.student import DeltaWeights, TextModel
from deltacome_core.tensors import load_tensor
from deltacome_core.verify import verify_delta

SMALL = {"matrix_bits": 1.0, "vocabulary_rank": 16}
HUB = replace(get_recipe("hub"), **SMALL)
DISTILLED = replace(get_recipe("distilled"), **SMALL)
HELD_OUT = [f"The {thing} is {colour}" for thing, colour in finetunes.COLOURS.items()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A fine-tune with biases, trained on five sentences; it brings prompts and answers."""
    folder = tmp_path_factory.mktemp("pair")
    model = finetunes.make_model("qwen2")
    base = finetunes.save(model, folder / "base")
    tuned = finetunes.save(finetunes.train(model), folder / "tuned")
    finetunes.write_items(tuned / "calibration.jsonl", finetunes.ITEMS * 10)
    return base, tuned


@pytest.fixture(scope="module")
def made(pair, tmp_path_factory):
    """The delta of hub, and twice that of distilled; read only."""
    folder = tmp_path_factory.mktemp("made")
    compress_checkpoint(*pair, folder / "hub", HUB)
    reports = [compress_checkpoint(*pair, folder / name, DISTILLED) for name in ("one", "two")]
    return folder, reports[0]


def nobody(_done, _total):
    """Whom the tests here tell of steps."""


def diverge(pair, delta, folder):
    """KL to the fine-tune on the trained sentences, past everything that the trainer uses."""
    reconstruct_checkpoint(pair[0], delta, folder, dtype=torch.float32)
    ours, theirs = load_model(pair[1]), load_model(folder)
    tokenizer = finetunes.make_tokenizer()
    total = 0.0
    for text in HELD_OUT:
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            p, q = (m(ids).logits[0].log_softmax(-1) for m in (ours, theirs))
        total += float(kl_div(q, p, log_target=True, reduction="sum"))
    return total


def test_the_delta_answers_more_like_the_fine_tune_than_that_of_hub(pair, made, tmp_path):
    folder, report = made
    found = report.distilled
    assert found.is_kept
    assert found.reason is None
    assert found.steps == distil_schedule.ON_CPU.steps
    assert set(found.kl_after) == {ANSWERS, PROMPTS, GENERAL}
    ratios = [found.kl_after[part] / found.kl_before[part] for part in found.kl_before]
    assert sum(ratios) < 0.8 * len(ratios)
    ours, hub = (
        diverge(pair, folder / name, tmp_path / name) for name in ("one", "hub")
    )  # fmt: skip
    assert ours < 0.8 * hub


def test_the_same_inputs_give_the_same_bytes(made):
    folder, _ = made
    for file in (folder / "one").iterdir():
        assert file.read_bytes() == (folder / "two" / file.name).read_bytes()
    assert not parts_folder(folder / "one").exists()


def test_sizes_and_codes_of_matrices_stay_and_all_else_moves(made):
    folder, report = made
    ours, hub = open_delta(folder / "one"), open_delta(folder / "hub")
    assert ours.entries == hub.entries
    moved = set()
    for name in hub.names:
        new, old = ours.load(name), hub.load(name)
        if isinstance(old, PackedMatrix):
            for one, other in zip(new.bands, old.bands, strict=True):
                assert torch.equal(one.u.codes, other.u.codes)
                assert torch.equal(one.v.codes, other.v.codes)
                assert torch.equal(one.u.scale, other.u.scale)
                assert torch.equal(one.v.scale, other.v.scale)
            moved |= {"matrix"} if not torch.equal(new.sigma, old.sigma) else set()
        elif isinstance(old, PackedRows):
            assert not torch.equal(new.factor.codes, old.factor.codes)
            assert not torch.equal(new.factor.scale, old.factor.scale)
            assert not torch.equal(new.basis, old.basis)
            assert (new.base_scale is None) == (old.base_scale is None)
        elif isinstance(old, ExactTensor) and "norm" not in name:
            assert name.endswith("bias")
            assert torch.equal(new.value, old.value)
        elif isinstance(old, ExactTensor):
            moved |= {"norm"} if not torch.equal(new.value, old.value) else set()
    assert moved == {"matrix", "norm"}
    counted = report.distilled
    assert (counted.n_trained_matrices, counted.n_other_matrices) == (14, 0)
    assert (counted.n_trained_vocabularies, counted.n_trained_norms) == (2, 5)


def test_what_was_counted_before_training_is_the_delta_of_hub(pair, made):
    """The student starts as the rebuilt checkpoint answers, for every kind of tensor."""
    folder, report = made
    tuned, delta = open_checkpoint(pair[1]), open_delta(folder / "hub")
    rows = read_rows(
        pair[1] / "calibration.jsonl", finetunes.make_tokenizer(), max_tokens=600, longest=256
    )
    again = distil.distil_delta(
        open_checkpoint(pair[0]), tuned, delta, rows, device=torch.device("cpu"), on_step=nobody
    )
    assert again.report.kl_before[ANSWERS] == pytest.approx(
        report.distilled.kl_before[ANSWERS], rel=0.2
    )
    assert GENERAL not in again.report.kl_before


def test_what_is_packed_is_what_was_computed_with(pair, made):
    """Changes small and so large that codes reach the ends of their range."""
    base, delta = open_checkpoint(pair[0]), open_delta(made[0] / "hub")
    student = make_student(base, open_checkpoint(pair[1]), delta)
    generator = torch.Generator().manual_seed(3)
    ids = torch.arange(finetunes.VOCABULARY)
    for name, each in student.trainable.items():
        changes = {
            kind: 0.02 * torch.randn(shape, generator=generator)
            for kind, shape in each.numbers.items()
        }
        for kind in changes.keys() & {f"codes.{name}"}:
            changes[kind][0], changes[kind][1] = 0.5, -0.5
        each.use(changes)
        packed = each.pack(changes)
        if isinstance(packed, PackedRows):
            rebuilt = apply_entry(load_tensor(base, name), packed, dtype=torch.float32)
            torch.testing.assert_close(each(ids), rebuilt, rtol=1e-5, atol=1e-5)
            codes = unpack_codes(packed.factor.codes, packed.factor.bits, packed.factor.cols)
            assert (codes[0].unique().tolist(), codes[1].unique().tolist()) == ([255], [0])
        elif isinstance(packed, PackedMatrix):
            rebuilt = apply_entry(load_tensor(base, name), packed, dtype=torch.float32)
            states = torch.randn((5, packed.in_features), generator=generator)
            ours = each(states) - each(torch.zeros_like(states))
            torch.testing.assert_close(ours, states @ rebuilt.T, rtol=1e-4, atol=1e-4)
    assert len(student.trainable) == 14 + 2 + 5


def test_verification_lets_norms_move_and_nothing_else(pair, made, tmp_path):
    folder, _ = made
    found = verify_delta(*pair, folder / "one")
    exact = next(each for each in found.checks if each.name == "exact_tensors_that_differ")
    assert exact.ok
    assert found.canary is not None
    other = finetunes.save(finetunes.perturb(load_model(pair[1]), size=0.3), tmp_path / "other")
    found = verify_delta(pair[0], other, folder / "one")
    exact = next(each for each in found.checks if each.name == "exact_tensors_that_differ")
    assert exact.value == sum(
        isinstance(entry, ExactEntry) for entry in open_delta(folder / "one").entries.values()
    )


def test_a_delta_that_training_does_not_help_stays_as_hub_made_it(
    pair, made, tmp_path, monkeypatch
):
    rash = replace(distil_schedule.ON_CPU, rate=3.0)
    monkeypatch.setattr(distil_schedule, "ON_CPU", rash)
    report = compress_checkpoint(*pair, tmp_path / "delta", DISTILLED)
    assert report.distilled.reason == distil.NOT_BETTER
    assert not report.distilled.is_kept
    assert report.distilled.kl_after == report.distilled.kl_before
    name = "delta.safetensors"
    assert (tmp_path / "delta" / name).read_bytes() == (made[0] / "hub" / name).read_bytes()


def test_a_killed_training_starts_again_from_the_parts(pair, made, tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("deltacome_core.distil_parts.distil_delta", fail)
        with pytest.raises(KeyboardInterrupt):
            compress_checkpoint(*pair, tmp_path / "one", DISTILLED)
    assert not (tmp_path / "one").exists()
    report = compress_checkpoint(*pair, tmp_path / "one", DISTILLED)
    assert report.resumed_layers == 3
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (made[0] / "one" / file.name).read_bytes()


def test_layers_that_run_twice_to_save_memory_give_the_same_bytes(
    pair, made, tmp_path, monkeypatch
):
    monkeypatch.setattr(distil, "SMALL_PARAMS", 0)
    compress_checkpoint(*pair, tmp_path / "one", DISTILLED)
    name = "delta.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (made[0] / "one" / name).read_bytes()


def test_matrices_held_in_sixteen_bits_are_trained_too(tmp_path, monkeypatch):
    monkeypatch.setattr(distil, "SMALL_PARAMS", 0)
    base, tuned = finetunes.save_pair(tmp_path, dtype=torch.bfloat16)
    found = compress_checkpoint(base, tuned, tmp_path / "delta", DISTILLED).distilled
    assert found.is_kept
    assert sum(found.kl_after.values()) < 0.9 * sum(found.kl_before.values())


@pytest.mark.parametrize(
    ("after", "value"),
    [
        ((1.0, 1.0), 1.0),
        ((0.2, 2.0), 1.1),
        # Answers learnt by heart, which the gain on general text would hide.
        ((2.1, 0.1), math.inf),
        ((1.0, math.nan), math.inf),
    ],
)
def test_no_part_may_get_worse(after, value):
    now, first = (
        dict(zip(("answers", GENERAL), each, strict=True)) for each in (after, (2.0, 2.0))
    )
    assert distil._compare(now, first) == pytest.approx(value)


def test_equal_checkpoints_need_no_training(tmp_path):
    base = finetunes.save(finetunes.make_model(), tmp_path / "base")
    tuned = finetunes.save(finetunes.make_model(), tmp_path / "tuned")
    report = compress_checkpoint(base, tuned, tmp_path / "delta", DISTILLED)
    assert report.distilled.reason == distil.NOTHING_TO_TRAIN
    assert report.payload_bytes == 0


def test_without_text_of_the_users_the_delta_stays_as_hub_makes_it(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    (tuned / "calibration.txt").unlink()
    steps = []
    report = compress_checkpoint(
        base, tuned, tmp_path / "delta", DISTILLED, on_step=lambda *done: steps.append(done)
    )
    assert report.calibration.source == "calibration.txt"
    assert (report.distilled.reason, steps) == (distil.NO_OWN_TEXT, [])
    compress_checkpoint(base, tuned, tmp_path / "hub", HUB)
    name = "delta.safetensors"
    assert (tmp_path / "delta" / name).read_bytes() == (tmp_path / "hub" / name).read_bytes()


def test_steps_are_told_once_the_last_layer_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(distil_schedule, "ON_CPU", replace(distil_schedule.ON_CPU, steps=20))
    told = []
    compress_checkpoint(
        *finetunes.save_pair(tmp_path),
        tmp_path / "delta",
        DISTILLED,
        on_layer=told.append,
        on_step=lambda done, total: told.append((done, total)),
    )
    assert told[3:] == [(step, 20) for step in range(1, 21)]


@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_vocabulary_with_rows_that_did_not_change_is_read_as_rebuilt(tmp_path, tied):
    """The trained table gives the logits of the rebuilt checkpoint, new rows included."""
    model = finetunes.make_model(tie_word_embeddings=tied)
    base = finetunes.save(model, tmp_path / "base")
    model.resize_token_embeddings(finetunes.VOCABULARY + 7, mean_resizing=False)
    finetunes.perturb(model)
    truth = load_tensor(open_checkpoint(base), "model.embed_tokens.weight")
    with torch.no_grad():
        model.get_input_embeddings().weight[:9] = truth[:9]
    tuned = finetunes.save(model, tmp_path / "tuned")
    compress_checkpoint(base, tuned, tmp_path / "delta", HUB)
    reconstruct_checkpoint(base, tmp_path / "delta", tmp_path / "back")
    assert_student_answers_as(base, tuned, tmp_path / "delta", tmp_path / "back")


def make_student(base, tuned, delta):
    cpu = torch.device("cpu")
    weights = DeltaWeights(backbone=base, delta=delta, device=cpu)
    return TextModel(tuned, weights, held=torch.float32, device=cpu, saves_memory=True)


def assert_student_answers_as(base, tuned, delta, back):
    student = make_student(open_checkpoint(base), open_checkpoint(tuned), open_delta(delta))
    for each in student.trainable.values():
        each.use({kind: torch.zeros(shape) for kind, shape in each.numbers.items()})
    ids = torch.tensor([[40, 3, 42, 200, 7, finetunes.VOCABULARY - 1, 9]])
    with torch.no_grad():
        ours = student.logits(student.states(ids)[0])
        theirs = load_model(back)(ids).logits[0]
    assert len(student.trainable) > 14
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-4)


def test_only_whole_vectors_can_be_distilled():
    with pytest.raises(UserError) as error:
        Recipe(name="mine", distilled=True)
    assert error.value.code == "recipe_invalid"


def test_a_tenth_of_the_rows_judges():
    train, judge = split_judge(range(25))
    assert judge == [9, 19]
    assert sorted(train + judge) == list(range(25))
    assert split_judge([4, 5, 6]) == ([4, 5], [6])
    assert split_judge([4]) == ([4], [4])
    assert split_judge([]) == ([], [])


def test_places_predict_what_their_part_says():
    row = Row(tokens=(5, 6, 7, 8, 9), first_answer=3)
    assert list(row.places(PROMPTS)) == [0, 1]
    assert list(row.places(ANSWERS)) == [2, 3]
    assert list(row.places(GENERAL)) == []
    general = Row(tokens=(5, 6, 7), is_general=True)
    assert list(general.places(GENERAL)) == [0, 1]
    batch = make_batch([row, general], [0, 5], torch.device("cpu"))
    assert batch.ids.shape == (2, 8)
    assert batch.places[GENERAL].tolist() == [8, 9]
    assert batch.targets[GENERAL].tolist() == [5, 6]
    assert batch.places[ANSWERS].tolist() == [2, 3]


def test_batches_hold_no_more_than_they_may():
    rows = [Row(tokens=(1,) * size) for size in (10, 30, 10, 10, 10, 50)]
    cut = list(cut_batches(rows, range(6), max_rows=3, max_tokens=60))
    assert cut == [[0, 1], [2, 3, 4], [5]]


def test_a_prompt_and_its_answer_stay_one_row_and_text_is_cut(tmp_path):
    tokenizer = finetunes.make_tokenizer()
    items = finetunes.write_items(tmp_path / "items.jsonl")
    rows = read_rows(items, tokenizer, max_tokens=1000, longest=256)
    assert len(rows) == 5
    assert rows[0].first_answer == len("The sky is")
    assert tokenizer.decode(rows[0].tokens) == f"The sky is blue{finetunes.END}"
    (tmp_path / "text.txt").write_text("a" * 300)
    rows = read_rows(tmp_path / "text.txt", tokenizer, max_tokens=1000, longest=256)
    assert [len(row.tokens) for row in rows] == [128, 128, 44]
    rows = read_rows(tmp_path / "text.txt", tokenizer, max_tokens=140, longest=256)
    assert [len(row.tokens) for row in rows] == [128, 12]


def test_what_a_step_costs_says_how_many_there_are():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    cheap = distil_schedule.choose_schedule(135_000_000, gpu)
    dear = distil_schedule.choose_schedule(7_000_000_000, gpu)
    slow = distil_schedule.choose_schedule(135_000_000, cpu)
    assert cheap.steps > dear.steps > slow.steps
    assert cheap.own_tokens > dear.own_tokens > slow.own_tokens


def test_little_text_is_not_read_until_it_is_known_by_heart():
    schedule = distil_schedule.choose_schedule(135_000_000, torch.device("cuda"))

    def count_steps(*lengths):
        return distil_schedule.limit_steps(schedule, lengths).steps

    # A step takes 32 rows of short ones, as many of long ones as have 4096 tokens, or all.
    assert count_steps(*[20] * 115) == 50 * 115 // 32
    assert count_steps(*[512] * 115) == 50 * 115 // 8
    assert count_steps(7) == 50
    assert count_steps(*[20] * 4000) == schedule.steps
