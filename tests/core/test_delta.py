import finetunes
import pytest
import torch

from deltacome_core.checkpoint import hash_tensors, open_checkpoint
from deltacome_core.delta import TensorKind, TensorPair, load_pair, scan_checkpoint
from deltacome_core.errors import UserError
from deltacome_core.fit import check_backbone
from deltacome_core.safetensors_file import write_safetensors
from deltacome_core.tensors import dtype_name, tensor_bytes


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), TensorKind.LOWRANK),
        ("model.layers.0.mlp.gate.weight", (8, 64), TensorKind.EXACT),
        ("model.layers.0.input_layernorm.weight", (64,), TensorKind.EXACT),
        ("model.layers.0.self_attn.q_proj.bias", (64,), TensorKind.EXACT),
        ("model.embed_tokens.weight", (99, 64), TensorKind.ROWS),
        ("lm_head.weight", (99, 64), TensorKind.ROWS),
        ("model.layers.0.mlp.experts.down_proj", (2, 64, 64), TensorKind.LOWRANK),
        ("model.layers.0.mlp.experts.down_proj_bias", (64, 64), TensorKind.EXACT),
        ("conv1.weight", (64, 64, 3), TensorKind.EXACT),
        ("vision.patch_embedding.weight", (64, 64, 64, 64), TensorKind.EXACT),
    ],
)
def test_a_changed_tensor_is_kept_by_its_kind(name, shape, kind):
    pair = TensorPair(name=name, base=torch.zeros(shape), tuned=torch.ones(shape))
    assert pair.kind is kind


def test_a_tensor_that_equals_the_backbone_after_a_cast_is_unchanged():
    base = torch.rand(64, 64)
    pair = TensorPair(name="a.weight", base=base, tuned=base.bfloat16())
    assert pair.kind is TensorKind.UNCHANGED


def test_a_tensor_without_counterpart_is_exact():
    pair = TensorPair(name="model.extra.weight", base=None, tuned=torch.ones(64, 64))
    assert pair.kind is TensorKind.EXACT


def test_integers_are_exact():
    pair = TensorPair(
        name="a.weight",
        base=torch.zeros(64, 64, dtype=torch.int64),
        tuned=torch.ones(64, 64, dtype=torch.int64),
    )
    assert pair.kind is TensorKind.EXACT


def test_the_difference_is_taken_after_widening(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path, dtype=torch.bfloat16)
    name = "model.layers.1.mlp.up_proj.weight"
    pair = load_pair(open_checkpoint(base), open_checkpoint(tuned), name)
    assert pair.difference().dtype == torch.float32
    expected = pair.tuned.double() - pair.base.double()
    # Both sides are bf16, so their fp32 difference is off by one fp32 rounding at most.
    assert torch.allclose(pair.difference().double(), expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_named_with_its_file(tmp_path, poison):
    model = finetunes.make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = poison
    folder = finetunes.save(model, tmp_path / "m")
    with pytest.raises(UserError) as caught:
        scan_checkpoint(open_checkpoint(folder))
    assert caught.value.code == "nan_weights"
    assert caught.value.params["tensors"] == [
        "model.layers.1.mlp.up_proj.weight (model.safetensors)"
    ]


def save_tensor(folder, tensor):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    source = ("a.weight", dtype_name(tensor.dtype), tuple(tensor.shape), tensor_bytes(tensor))
    write_safetensors(folder / "model.safetensors", [source], {})
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e5m2,
        torch.float8_e4m3fn,
    ],
    ids=str,
)
def test_every_float_type_is_scanned_for_what_is_not_finite(tmp_path, dtype):
    largest = torch.finfo(dtype).max
    values = torch.tensor([0.0, -0.0, 1.0, largest, -largest], dtype=torch.float64).to(dtype)
    checkpoint = save_tensor(tmp_path / "fine", values)
    assert scan_checkpoint(checkpoint).hashes == hash_tensors(checkpoint)
    for number, poison in enumerate(("nan", "inf")):
        if poison == "inf" and dtype is torch.float8_e4m3fn:
            continue
        broken = torch.cat([values, torch.tensor([float(poison)]).to(dtype)])
        with pytest.raises(UserError) as caught:
            scan_checkpoint(save_tensor(tmp_path / f"broken{number}", broken))
        assert caught.value.code == "nan_weights"


def test_another_shape_is_named_with_both_shapes(tmp_path):
    base = finetunes.save(finetunes.make_model(), tmp_path / "a")
    other = finetunes.save(finetunes.make_model(intermediate_size=160), tmp_path / "b")
    with pytest.raises(UserError) as caught:
        check_backbone(open_checkpoint(base), open_checkpoint(other))
    assert caught.value.code == "backbone_mismatch"
    lines = caught.value.params["tensors"]
    assert "model.layers.0.mlp.up_proj.weight: expected [192, 128] found [160, 128]" in lines
    assert len(lines) == 6


def test_a_missing_layer_is_named(tmp_path):
    base = finetunes.save(finetunes.make_model(), tmp_path / "a")
    other = finetunes.save(finetunes.make_model(num_hidden_layers=1), tmp_path / "b")
    with pytest.raises(UserError) as caught:
        check_backbone(open_checkpoint(base), open_checkpoint(other))
    assert caught.value.code == "backbone_mismatch"
    line = "model.layers.1.mlp.up_proj.weight: expected [192, 128] found nothing"
    assert line in caught.value.params["tensors"]
