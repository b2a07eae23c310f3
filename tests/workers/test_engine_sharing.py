"""Tokens of many tenants in one step: each answer is the one its own checkpoint gives."""

import pytest
import tiny
import torch
from serving import Heard, answer, make_sequence, wait_for
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen2Config, Qwen3Config

from deltacome_core.compress import compress_checkpoint
from deltacome_core.errors import UserError
from deltacome_core.models import load_model
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from workers.engine.executor import PlainExecutor, Work
from workers.engine.model import load_backbone, load_shared, share_backbone
from workers.engine.scheduler import Limits, Scheduler
from workers.engine.shared import SharedExecutor

PROMPTS = ((40, 41, 42, 200, 7, 8, 9), tuple(range(50, 83)), (99,))
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


def make_deltas(folder, tuned, recipe):
    """Deltas d0, d1, … of the models in `tuned` on the backbone in folder/base."""
    for number, model in enumerate(tuned):
        tiny.save(model, folder / f"t{number}")
        compress_checkpoint(folder / "base", folder / f"t{number}", folder / f"d{number}", recipe)
        reconstruct_checkpoint(folder / "base", folder / f"d{number}", folder / f"r{number}")


def load_all(folder, n, *, factor_bytes=1 << 30, n_slots=4):
    backbone = load_backbone(folder / "base", device="cpu")
    shared = share_backbone(backbone, folder / "base", kv_bytes=1 << 23, n_slots=n_slots)
    assert isinstance(shared.executor, SharedExecutor)
    deltas = [
        load_shared(shared, folder / "base", folder / f"d{number}", factor_bytes=factor_bytes)
        for number in range(n)
    ]
    return [shared, *deltas]


def greedy(folder, prompt, length=20):
    model = load_model(folder)
    with torch.inference_mode():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False)
    return ids[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=["plain", "tied", "bias"])
def folder(tmp_path_factory, request):
    shape = {} if request.param == "plain" else {request.param: True}
    root = tmp_path_factory.mktemp(request.param)
    tiny.save(tiny.make_model(**shape), root / "base")
    tuned = [
        tiny.tune(tiny.make_model(**shape), seed=seed, size=0.05, new_rows=new_rows)
        for seed, new_rows in ((1, 0), (2, 3), (3, 0))
    ]
    make_deltas(root, tuned, get_recipe("datafree", matrix_bits=3.0))
    return root


@pytest.mark.parametrize("factor_bytes", [0, 1 << 30], ids=["packed", "factors"])
def test_tenants_in_one_step_answer_as_their_checkpoints_do(folder, factor_bytes):
    models = load_all(folder, 3, factor_bytes=factor_bytes)
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


def logits_of(executor, model, prompt):
    class Source:
        pass

    source = Source()
    source.model, source.tokens, source.cache = model, list(prompt), None
    source.pages = executor.pages.take(4)
    return Work(sequence=source, start=0, count=len(prompt), rows=len(prompt))


def test_logits_of_a_mixed_step_are_those_of_each_alone(folder):
    models = load_all(folder, 3)
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


def test_a_slot_without_a_delta_is_never_the_backbone(folder):
    models = load_all(folder, 1)
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
