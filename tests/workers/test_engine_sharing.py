"""Tokens of many tenants in one step: each answer is the one its own checkpoint gives."""

import threading
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import pytest
import tiny
import torch
from serving import Heard, answer, make_sequence, wait_for
from sharing import (
    BASIS,
    LARGER,
    PROMPTS,
    ROWS,
    SHAPES,
    greedy,
    load_all,
    make_deltas,
    make_models,
)
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen2Config, Qwen3Config

from deltacome_core import held_files
from deltacome_core.compress import compress_checkpoint
from deltacome_core.container import open_delta
from deltacome_core.errors import UserError
from deltacome_core.models import load_model
from deltacome_core.recipe import get_recipe
from kernels.plan import StepPlan
from workers.engine import arena_slots, shared
from workers.engine.arena_slots import _choose_short
from workers.engine.executor import PlainExecutor, Work
from workers.engine.layers import RowTables
from workers.engine.model import load_backbone, load_shared, share_backbone
from workers.engine.parts import ArrivingMatrices
from workers.engine.scheduler import Limits, Scheduler
from workers.engine.slots import Span

CPU = torch.device("cpu")
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": tiny.VOCABULARY,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": tiny.VOCABULARY - 1,
    "pad_token_id": None,
    "bos_token_id": None,
}


@pytest.fixture(scope="module", params=SHAPES)
def folder(tmp_path_factory, request):
    return make_models(tmp_path_factory.mktemp("models"), request.param)


WAYS = {
    "packed": {"factor_bytes": 0},
    "factors": {"factor_bytes": 1 << 30},
    "arena": {"arena": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_tenants_in_one_step_answer_as_their_checkpoints_do(folder, way):
    models = load_all(folder, 3, **WAYS[way])
    scheduler = Scheduler(Limits(prefill_tokens=9))
    asked = [(model, prompt) for model in models for prompt in PROMPTS]
    heard = [Heard() for _ in asked]
    scheduler.submit(
        [
            make_sequence(model, one, prompt=prompt, max_tokens=20, tenant=str(model.slot))
            for (model, prompt), one in zip(asked, heard, strict=True)
        ]
    )
    scheduler.start()
    wait_for(lambda: scheduler.running == 0)
    scheduler.stop()
    assert scheduler._metrics.batch_tenants.mean > 1
    names = [name for name in ("base", "r0", "r1", "r2") for _ in PROMPTS]
    for name, (_, prompt), one in zip(names, asked, heard, strict=True):
        assert one.ids == greedy(folder / name, prompt)


@pytest.mark.parametrize("way", ["factors", "arena"])
def test_prompts_whose_rows_stand_alone_are_read_as_well(folder, way, monkeypatch):
    models = load_all(folder, 3, **WAYS[way])
    executor = models[0].executor
    expected = [answer([model], prompt=PROMPTS[0])[0].ids for model in models]
    # As on a GPU, where such a step is a graph; prompts begin at 0 and in their middle.
    monkeypatch.setattr(executor, "_splits", True)
    lay_out, chunks = executor._lay_out, []

    def note(work, n_alone):
        layout = lay_out(work, n_alone)
        chunks.append(layout.n_rows - layout.n_single)
        return layout

    monkeypatch.setattr(executor, "_lay_out", note)
    heard = answer([replace(m, key="again") for m in models], prompt=PROMPTS[0])
    pieces = answer(
        [replace(m, key="pieces") for m in models],
        prompt=PROMPTS[0],
        limits=Limits(prefill_tokens=3),
    )
    assert [one.ids for one in heard] == [one.ids for one in pieces] == expected
    assert set(chunks) == {0}
    # A step of which the rows would read too much keeps its chunks.
    monkeypatch.setattr(shared, "_MOST_READ", 4)
    assert answer([replace(models[1], key="whole")], prompt=PROMPTS[0])[0].ids == expected[1]
    assert max(chunks) == len(PROMPTS[0])


def logits_of(executor, model, prompt):
    class Source:
        pass

    source = Source()
    source.model, source.tokens, source.cache = model, list(prompt), None
    source.pages = executor.pages.take(4)
    return Work(sequence=source, start=0, count=len(prompt), rows=len(prompt))


@pytest.mark.parametrize("way", ["factors", "arena"])
def test_logits_of_a_mixed_step_are_those_of_each_alone(folder, way):
    models = load_all(folder, 3, **WAYS[way])
    executor = models[0].executor
    work = [logits_of(executor, model, prompt) for model in models for prompt in PROMPTS]
    mixed = executor.forward(work).split([item.rows for item in work])
    names = [name for name in ("base", "r0", "r1", "r2") for _ in PROMPTS]
    for name, item, found in zip(names, work, mixed, strict=True):
        with torch.inference_mode():
            truth = load_model(folder / name)(torch.tensor([item.sequence.tokens])).logits[0]
        width = truth.shape[1]
        # The same sums in another order: 1.3e-5 was seen on logits of size 6.
        torch.testing.assert_close(found[:, :width], truth, rtol=1e-4, atol=1e-4)
        # What another tenant's vocabulary has beyond this one's can never be chosen.
        assert torch.isneginf(found[:, width:]).all()


def test_short_prompts_are_read_together_as_far_as_there_is_room():
    def spans(*counts):
        ends = list(accumulate(counts, initial=5))
        return [
            Span(first=first, last=last, slot=slot)
            for slot, (first, last) in enumerate(pairwise(ends))
        ]

    long, short, shorter = spans(129, 128, 9)
    both = [shorter, short]
    assert _choose_short([long, short, shorter]) == (both, 9 + 128)
    assert _choose_short([long]) == ([], 0)
    many = spans(*[64] * 40)
    chosen, n_places = _choose_short(many)
    assert (chosen, n_places) == (many[:32], 2048)


def test_a_slot_is_used_again_without_a_trace_of_who_left(folder):
    models = load_all(folder, 3, n_slots=3)
    executor = models[0].executor
    with pytest.raises(UserError) as refusal:
        load_shared(models[0], folder / "base", folder / "d0", factor_bytes=0)
    assert refusal.value.code == "arena_full"
    executor.evict(models[2].slot)
    again = load_shared(models[0], folder / "base", folder / "d0", factor_bytes=0)
    assert again.slot == models[2].slot
    assert answer([again], prompt=PROMPTS[0], max_tokens=20)[0].ids == greedy(
        folder / "r0", PROMPTS[0]
    )
    executor.evict(again.slot)
    assert answer([models[0]], prompt=PROMPTS[0], max_tokens=20)[0].ids == greedy(
        folder / "base", PROMPTS[0]
    )


@pytest.mark.parametrize("way", ["factors", "arena"])
def test_a_slot_without_a_delta_is_never_the_backbone(folder, way):
    models = load_all(folder, 1, **WAYS[way])
    models[0].executor.evict(models[1].slot)
    heard = answer([models[1]])[0]
    assert heard.end.error.code == "arena_slot_unknown"
    assert not heard.ids


def test_a_delta_that_slots_cannot_hold_is_left_to_a_model_of_its_own(tmp_path):
    tiny.save(tiny.make_model(), tmp_path / "base")
    make_deltas(tmp_path, [tiny.tune(tiny.make_model())], get_recipe("lossless"))
    backbone, delta = load_all(tmp_path, 1)
    assert backbone.slot == -1
    assert delta is None


def test_a_fine_tune_with_another_decoder_does_not_share(tmp_path):
    tiny.save(tiny.make_model(), tmp_path / "base")
    tuned = tiny.tune(tiny.make_model())
    tuned.config.rms_norm_eps = 1e-3
    make_deltas(tmp_path, [tuned], get_recipe("datafree", matrix_bits=3.0))
    assert load_all(tmp_path, 1)[1] is None


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        Qwen3Config(**TEXT, head_dim=16),
    ],
    ids=["qwen2-window-bias", "qwen3-norms-of-heads"],
)
def test_other_classes_share_too(tmp_path, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    tiny.save(model, tmp_path / "base")
    make_deltas(tmp_path, [tiny.tune(model, size=0.05)], get_recipe("datafree", matrix_bits=3.0))
    models = load_all(tmp_path, 1)
    heard = answer(models, prompt=PROMPTS[1], max_tokens=20)
    for one, name in zip(heard, ("base", "r0"), strict=True):
        # The library goes on after the tokenizer's end of an answer; the engine does not.
        assert one.ids == greedy(tmp_path / name, PROMPTS[1])[: len(one.ids)]
        assert len(one.ids) == 20 or one.end.reason == "stop"


def test_a_class_the_shared_model_would_get_wrong_runs_by_its_own_code(tmp_path):
    """Gemma 2 bounds its logits after the head, which the check at loading notices."""
    config = Gemma2Config(
        **TEXT, head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=2.0
    )
    torch.manual_seed(0)
    tiny.save(AutoModelForCausalLM.from_config(config).eval(), tmp_path)
    loaded = load_backbone(tmp_path, device="cpu")
    shared = share_backbone(loaded, tmp_path, kv_bytes=1 << 22, n_slots=1)
    assert isinstance(shared.executor, PlainExecutor)
    assert answer([shared], prompt=PROMPTS[0], max_tokens=8)[0].ids == greedy(
        tmp_path, PROMPTS[0], 8
    )


def test_an_arena_takes_deltas_of_its_recipe_and_another_one_when_it_is_empty(tmp_path):
    tiny.save(tiny.make_model(), tmp_path / "base")
    tuned = tiny.tune(tiny.make_model())
    make_deltas(tmp_path, [tuned], get_recipe("datafree", matrix_bits=3.0))
    pair = tmp_path / "base", tmp_path / "t0"
    compress_checkpoint(*pair, tmp_path / "d1", get_recipe("bitdelta"))
    shared, delta = load_all(tmp_path, 1, arena=True)
    options = {"factor_bytes": 0}
    with pytest.raises(UserError) as refusal:
        load_shared(shared, tmp_path / "base", tmp_path / "d1", **options)
    assert refusal.value.code == "arena_recipe_unknown"
    shared.executor.evict(delta.slot)
    other = load_shared(shared, tmp_path / "base", tmp_path / "d1", **options)
    assert answer([other], max_tokens=8)[0].ids
    # Both recipes may be resident now.
    again = load_shared(shared, tmp_path / "base", tmp_path / "d0", **options)
    assert answer([again], prompt=PROMPTS[0], max_tokens=20)[0].ids == greedy(
        tmp_path / "r0", PROMPTS[0]
    )


def test_a_basis_beyond_the_arena_waits_until_it_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(arena_slots, "WORD_COLUMNS", 8)
    monkeypatch.setattr(arena_slots, "_RANK_SLACK", 1)
    tiny.save(tiny.make_model(), tmp_path / "base")
    tuned = [tiny.tune(tiny.make_model(), seed=seed, size=0.05) for seed in (1, 2)]
    make_deltas(tmp_path, tuned, BASIS, LARGER)
    shared, first = load_all(tmp_path, 1, arena=True)
    assert shared.executor.slots.n_coordinates == 8
    with pytest.raises(UserError) as refusal:
        load_shared(shared, tmp_path / "base", tmp_path / "d1", factor_bytes=0)
    assert refusal.value.code == "arena_recipe_unknown"
    shared.executor.evict(first.slot)
    models = [
        load_shared(shared, tmp_path / "base", tmp_path / name, factor_bytes=0)
        for name in ("d1", "d0")
    ]
    for model, one in zip(models, answer(models, prompt=PROMPTS[0], max_tokens=20), strict=True):
        name = "r1" if model is models[0] else "r0"
        assert one.ids == greedy(tmp_path / name, PROMPTS[0])


def test_an_arena_made_for_an_unchanged_vocabulary_takes_changed_ones(tmp_path):
    tiny.save(tiny.make_model(), tmp_path / "base")
    still = tiny.tune(tiny.make_model(), size=0.05, everywhere=False)
    make_deltas(tmp_path, [still, tiny.tune(tiny.make_model(), size=0.05)], BASIS)
    models = load_all(tmp_path, 2, arena=True)
    heard = answer(models, prompt=PROMPTS[1], max_tokens=20)
    for name, one in zip(("base", "r0", "r1"), heard, strict=True):
        assert one.ids == greedy(tmp_path / name, PROMPTS[1])


@pytest.mark.parametrize("rows", [3, 300])
def test_vectors_of_a_step_are_those_of_its_tenants_however_many_rows_there_are(rows):
    tables = RowTables({"a": torch.zeros(4), "b": torch.ones(4)}, n_slots=2, device=CPU)
    tables.put(1, {"a": torch.full((4,), 5.0)})
    tables.put(1, {"b": torch.full((4,), 7.0)})
    owners = torch.arange(rows) % 3
    tables.gather(owners)
    assert torch.equal(tables.rows_of("a"), torch.zeros(rows, 4))
    wanted = torch.where(owners == 2, 7.0, 1.0)[:, None].expand(rows, 4)
    assert torch.equal(tables.rows_of("b"), wanted)


def test_a_flipped_byte_is_named_and_leaves_its_slot_free(tmp_path):
    tiny.save(tiny.make_model(), tmp_path / "base")
    tuned = [tiny.tune(tiny.make_model(), seed=seed, size=0.05) for seed in (1, 2)]
    make_deltas(tmp_path, tuned, ROWS)
    path = tmp_path / "d1" / "delta.safetensors"
    whole = path.read_bytes()
    at = open_delta(tmp_path / "d1").folder.stored["packed.model.layers.1"]
    # Among the codes, any of which are as good as others to every other check.
    damaged = bytearray(whole)
    damaged[at.start + at.info.size_bytes // 2] ^= 1
    path.write_bytes(damaged)
    shared, _ = load_all(tmp_path, 1, n_slots=2, arena=True)

    def load():
        return load_shared(shared, tmp_path / "base", tmp_path / "d1", factor_bytes=0)

    for _ in range(3):
        with pytest.raises(UserError) as refusal:
            load()
        assert refusal.value.code == "file_digest_mismatch"
    path.write_bytes(whole)
    model = load()
    heard = answer([model], prompt=PROMPTS[0], max_tokens=8)
    assert heard[0].ids == greedy(tmp_path / "r1", PROMPTS[0], 8)


def test_hashing_does_not_wait_for_the_last_block_to_be_read(tmp_path, monkeypatch):
    tiny.save(tiny.make_model(), tmp_path / "base")
    make_deltas(tmp_path, [tiny.tune(tiny.make_model(), size=0.05)], ROWS)
    monkeypatch.setattr(held_files, "_BLOCK_BYTES", 1 << 12)
    begun = threading.Event()
    late = []
    read, check = held_files.read_into, held_files.HeldFiles.check

    def noting_check(held):
        begun.set()
        check(held)

    def read_when_hashing(buffer, path, start):
        # Every reader waits here: whoever shares their threads would never begin.
        if not begun.wait(30):
            late.append(start)
        read(buffer, path, start)

    monkeypatch.setattr(held_files.HeldFiles, "check", noting_check)
    monkeypatch.setattr(held_files, "read_into", read_when_hashing)
    assert len(load_all(tmp_path, 1, arena=True)) == 2
    assert late == []


def test_matrices_are_laid_out_as_they_arrive_and_found_where_they_belong():
    names = ["c", "a", "b"]
    asked = []

    def read(name):
        asked.append(name)
        return name

    matrices = ArrivingMatrices({name: partial(read, name) for name in names})
    assert (list(matrices), len(matrices), "b" in matrices, "d" in matrices) == (names, 3, True, 0)
    assert asked == []
    both = matrices.beside({"head": "HEAD"})
    assert list(both) == [*names, "head"]
    assert [both[name] for name in both] == ["c", "a", "b", "HEAD"]
    assert matrices["a"] == "a"
    assert asked == names


def test_the_head_of_single_tokens_takes_the_plan_of_their_step(tmp_path, monkeypatch):
    tiny.save(tiny.make_model(), tmp_path / "base")
    tuned = [tiny.tune(tiny.make_model(), seed=seed, size=0.05) for seed in (1, 2)]
    make_deltas(tmp_path, tuned, ROWS)
    shared, *models = load_all(tmp_path, 2, arena=True)
    assigned = []
    assign = StepPlan.assign
    monkeypatch.setattr(
        StepPlan, "assign", lambda plan, slots: assigned.append(list(slots)) or assign(plan, slots)
    )
    works = [logits_of(shared.executor, model, [40, 41]) for model in models]
    singles = [replace(work, count=1, rows=1) for work in works]
    apart = [shared.executor.forward([work])[0] for work in works]
    assigned.clear()
    together = shared.executor.forward(singles)
    assert assigned == [[0, 1]]
    for one, row in zip(apart, together, strict=True):
        torch.testing.assert_close(one, row, rtol=1e-4, atol=1e-4)
