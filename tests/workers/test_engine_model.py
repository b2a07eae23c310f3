import json
from dataclasses import replace

import pytest
import tiny
import torch

from deltacome_core import distil_schedule
from deltacome_core.compress import compress_checkpoint
from deltacome_core.errors import UserError
from deltacome_core.models import load_model
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from workers.engine.model import load_backbone, load_delta, measure_delta
from workers.engine.own_module import DeltaLinear

PROMPT = torch.tensor([[40, 41, 42, 200, 7, 8, 9]])
SHAPES = {
    "plain": {},
    "tied": {"tied": True},
    "bias": {"bias": True},
}


LOW_RANK = get_recipe("datafree", matrix_bits=3.0)


def make_delta(folder, *, new_rows=0, dtype=torch.float32, recipe=LOW_RANK, **shape):
    tiny.save(tiny.make_model(**shape), folder / "base", dtype=dtype)
    tuned = tiny.tune(tiny.make_model(**shape), new_rows=new_rows)
    tiny.save(tuned, folder / "tuned", dtype=dtype)
    compress_checkpoint(folder / "base", folder / "tuned", folder / "delta", recipe)
    reconstruct_checkpoint(folder / "base", folder / "delta", folder / "rebuilt")
    return folder


def decode_greedily(model, length=24):
    with torch.inference_mode():
        return model.generate(PROMPT, max_new_tokens=length, do_sample=False)[0].tolist()


@pytest.mark.parametrize("new_rows", [0, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor_bytes", [0, 1 << 30], ids=["packed", "factors"])
def test_a_served_delta_gives_the_logits_of_the_rebuilt_checkpoint(
    tmp_path, shape, new_rows, factor_bytes
):
    folder = make_delta(tmp_path, new_rows=new_rows, **SHAPES[shape])
    backbone = load_backbone(folder / "base", device="cpu")
    served = load_delta(
        backbone, folder / "base", folder / "delta", factor_bytes=factor_bytes
    ).module
    rebuilt = load_model(folder / "rebuilt")
    with torch.inference_mode():
        ours, theirs = served(PROMPT).logits, rebuilt(PROMPT).logits
    # The same sums in another order: 1.3e-5 was seen on logits of size 6.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert decode_greedily(served) == decode_greedily(rebuilt)


def test_a_trained_delta_is_served_as_the_rebuilt_checkpoint_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(distil_schedule, "ON_CPU", replace(distil_schedule.ON_CPU, steps=10))
    folder = make_delta(tmp_path, new_rows=5, recipe=get_recipe("distilled", matrix_bits=3.0))
    manifest = json.loads((folder / "delta" / "delta.json").read_text())
    assert manifest["recipe"]["distilled"]
    backbone = load_backbone(folder / "base", device="cpu")
    served = load_delta(backbone, folder / "base", folder / "delta", factor_bytes=0).module
    rebuilt = load_model(folder / "rebuilt")
    with torch.inference_mode():
        ours, theirs = served(PROMPT).logits, rebuilt(PROMPT).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bitdelta", "bitdelta-row"])
@pytest.mark.parametrize("factor_bytes", [0, 1 << 30], ids=["packed", "factors"])
def test_direct_matrices_are_served_as_the_rebuilt_checkpoint_answers(tmp_path, name, factor_bytes):
    folder = make_delta(tmp_path, new_rows=5, recipe=get_recipe(name))
    backbone = load_backbone(folder / "base", device="cpu")
    served = load_delta(backbone, folder / "base", folder / "delta", factor_bytes=factor_bytes)
    linears = [part for part in served.module.modules() if isinstance(part, DeltaLinear)]
    assert len(linears) == 14
    rebuilt = load_model(folder / "rebuilt")
    with torch.inference_mode():
        ours, theirs = served.module(PROMPT).logits, rebuilt(PROMPT).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert decode_greedily(served.module) == decode_greedily(rebuilt)
    assert decode_greedily(served.module) != decode_greedily(backbone.module)


def test_a_bfloat16_delta_is_served_as_near_as_its_rounding_allows(tmp_path):
    folder = make_delta(tmp_path, new_rows=3, dtype=torch.bfloat16)
    backbone = load_backbone(folder / "base", device="cpu")
    served = load_delta(backbone, folder / "base", folder / "delta", factor_bytes=0).module
    rebuilt = load_model(folder / "rebuilt")
    with torch.inference_mode():
        ours, theirs = served(PROMPT).logits, rebuilt(PROMPT).logits
    # The rebuilt weights were rounded to 8 bits of mantissa, the served ones were not.
    assert (ours - theirs).norm() / theirs.norm() < 2**-6
    embedding = rebuilt.get_input_embeddings().weight
    torch.testing.assert_close(served.get_input_embeddings().weight, embedding, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_lossless_delta_is_served_as_the_fine_tune_itself(tmp_path, shape, dtype):
    tiny.save(tiny.make_model(**SHAPES[shape]), tmp_path / "base", dtype=dtype)
    tuned = tiny.tune(tiny.make_model(**SHAPES[shape]), new_rows=3)
    tiny.save(tuned, tmp_path / "tuned", dtype=dtype)
    pair = tmp_path / "base", tmp_path / "tuned"
    compress_checkpoint(*pair, tmp_path / "delta", get_recipe("lossless"))
    backbone = load_backbone(tmp_path / "base", device="cpu")
    served = load_delta(backbone, tmp_path / "base", tmp_path / "delta", factor_bytes=0)
    with torch.inference_mode():
        ours, theirs = served.module(PROMPT).logits, load_model(tmp_path / "tuned")(PROMPT).logits
    assert torch.equal(ours, theirs)
    assert measure_delta(tmp_path / "delta", backbone) >= served.size_bytes


def test_a_backbone_in_a_narrower_type_does_not_spoil_a_lossless_delta(tmp_path):
    tiny.save(tiny.make_model(), tmp_path / "base")
    tiny.save(tiny.tune(tiny.make_model()), tmp_path / "tuned")
    pair = tmp_path / "base", tmp_path / "tuned"
    compress_checkpoint(*pair, tmp_path / "delta", get_recipe("lossless"))
    backbone = load_backbone(tmp_path / "base", device="cpu")
    backbone.module.to(torch.bfloat16)
    served = load_delta(backbone, tmp_path / "base", tmp_path / "delta", factor_bytes=0).module
    expected = load_model(tmp_path / "tuned").lm_head.weight.to(torch.bfloat16)
    assert torch.equal(served.lm_head.weight, expected)


def test_loading_a_delta_leaves_the_backbone_as_it_was(tmp_path):
    folder = make_delta(tmp_path, tied=True, new_rows=2)
    backbone = load_backbone(folder / "base", device="cpu")
    with torch.inference_mode():
        before = backbone.module(PROMPT).logits
        load_delta(backbone, folder / "base", folder / "delta", factor_bytes=0)
        after = backbone.module(PROMPT).logits
        plain = load_model(folder / "base")(PROMPT).logits
    assert torch.equal(before, after)
    assert torch.equal(before, plain)


def test_a_delta_shares_the_large_weights_and_counts_only_its_own(tmp_path):
    folder = make_delta(tmp_path)
    backbone = load_backbone(folder / "base", device="cpu")
    served = load_delta(backbone, folder / "base", folder / "delta", factor_bytes=0)
    linears = [part for part in served.module.modules() if isinstance(part, DeltaLinear)]
    shared = {weight.data_ptr() for weight in backbone.module.parameters()}
    assert len(linears) == 14
    assert all(linear.weight.data_ptr() in shared for linear in linears)
    assert 0 < served.size_bytes < backbone.size_bytes


def test_a_delta_of_another_backbone_is_refused(tmp_path):
    from deltacome_core.checkpoint import hash_tensors, open_checkpoint
    from hub.backbones import dump_tensors

    folder = make_delta(tmp_path / "one")
    other = tiny.save(tiny.make_model(seed=9), tmp_path / "other")
    checkpoint = open_checkpoint(other)
    table = dump_tensors(checkpoint.layout, hash_tensors(checkpoint))
    (other / "tensors.json").write_bytes(table)
    backbone = load_backbone(other, device="cpu")
    with pytest.raises(UserError) as refusal:
        load_delta(backbone, other, folder / "delta", factor_bytes=0)
    assert refusal.value.code == "backbone_digest_mismatch"


def test_a_damaged_delta_is_refused(tmp_path):
    folder = make_delta(tmp_path)
    path = folder / "delta" / "delta.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(damaged)
    backbone = load_backbone(folder / "base", device="cpu")
    with pytest.raises(UserError) as refusal:
        load_delta(backbone, folder / "base", folder / "delta", factor_bytes=0)
    assert refusal.value.code == "file_digest_mismatch"


def test_the_end_tokens_and_the_context_come_from_the_fine_tune(tmp_path):
    folder = make_delta(tmp_path, new_rows=2)
    backbone = load_backbone(folder / "base", device="cpu")
    served = load_delta(backbone, folder / "base", folder / "delta", factor_bytes=0)
    assert served.eos_ids == {len(tiny.BYTES)}
    assert served.context_tokens == 256
    assert served.vocabulary == tiny.VOCABULARY + 2


def test_a_delta_for_a_backbone_served_with_fewer_bits_is_refused(tmp_path):
    base = tiny.save(tiny.make_model(), tmp_path / "base")
    tuned = tiny.save(tiny.tune(tiny.make_model()), tmp_path / "tuned")
    compress_checkpoint(base, tuned, tmp_path / "delta", LOW_RANK, backbone_precision="int8")
    with pytest.raises(UserError) as caught:
        load_delta(load_backbone(base, device="cpu"), base, tmp_path / "delta", factor_bytes=0)
    assert caught.value.code == "backbone_precision_mismatch"
    assert "int8" in str(caught.value)
