import json

import finetunes
import pytest
import torch

from deltacome_core import calibrate
from deltacome_core.calibrate import LayerCalibrator, read_calibration
from deltacome_core.errors import UserError
from deltacome_core.models import load_model
from deltacome_core.moments import LayerMoments
from deltacome_core.parameters import Piece

CPU = torch.device("cpu")


def read(tmp_path, text=finetunes.CALIBRATION, *, max_positions=256):
    (tmp_path / "c.txt").write_text(text)
    tokenizer = finetunes.make_tokenizer()
    return read_calibration(tmp_path / "c.txt", tokenizer, max_positions=max_positions)


def hook_hessians(folder, tokens):
    """The truth: hooks on the whole model, float64 sums."""
    model = load_model(folder)
    sums = {}

    def watch(name):
        def see(_module, inputs):
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + rows.T @ rows

        return see

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(f"{name}.weight"))
    with torch.no_grad():
        for sequence in tokens.sequences:
            model(input_ids=sequence[None])
    return {name: total / tokens.n_tokens for name, total in sums.items()}


@pytest.mark.parametrize("family", sorted(finetunes.FAMILIES))
def test_streamed_hessians_equal_those_of_the_whole_model(tmp_path, family):
    changes = {"sliding_window": 64} if family == "mistral" else {}
    model = finetunes.perturb(finetunes.make_model(family, **changes), size=0.1)
    folder = finetunes.save(model, tmp_path / "m")
    tokens = read(tmp_path)
    truth = hook_hessians(folder, tokens)
    seen = set()
    calibrator = LayerCalibrator(folder, tokens, CPU)
    for layer in calibrator.layers(lambda _names: True):
        for shared in layer:
            for name in shared.weights:
                expected = truth[name].float()
                error = torch.linalg.norm(shared.hessian - expected) / torch.linalg.norm(expected)
                assert error < 1e-5
                seen.add(name)
    assert seen == {name for name in truth if "layers" in name}
    head = truth["lm_head.weight"].float()
    error = torch.linalg.norm(calibrator.head_hessian() - head) / torch.linalg.norm(head)
    assert error < 1e-5


def test_projections_of_one_input_share_a_hessian(tmp_path):
    folder = finetunes.save(finetunes.make_model(), tmp_path / "m")
    layers = LayerCalibrator(folder, read(tmp_path), CPU).layers(lambda _names: True)
    shared = [{n.split(".")[-2] for n in group.weights} for group in next(layers)]
    attention, mlp = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
    assert shared == [attention, {"o_proj"}, mlp, {"down_proj"}]


def test_shards_give_the_same_hessians_as_one_file(tmp_path):
    whole = finetunes.save(finetunes.make_model(), tmp_path / "whole")
    sharded = finetunes.save(finetunes.make_model(), tmp_path / "cut", max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    tokens = read(tmp_path)
    first, second = (
        [
            g.hessian
            for layer in LayerCalibrator(f, tokens, CPU).layers(lambda _n: True)
            for g in layer
        ]
        for f in (whole, sharded)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_names_without_the_models_prefix_are_found(tmp_path):
    model = finetunes.make_model()
    whole = finetunes.save(model, tmp_path / "whole")
    inner = finetunes.save(model.model, tmp_path / "inner")
    tokens = read(tmp_path)
    (first,) = [
        g for g in next(LayerCalibrator(whole, tokens, CPU).layers(bool)) if len(g.weights) == 3
    ]
    (second,) = [
        g for g in next(LayerCalibrator(inner, tokens, CPU).layers(bool)) if len(g.weights) == 3
    ]
    assert second.weights[0] == "layers.0.self_attn.q_proj.weight"
    assert torch.equal(first.hessian, second.hessian)


def test_passing_a_layer_by_does_not_change_the_next(tmp_path):
    folder = finetunes.save(finetunes.make_model(), tmp_path / "m")
    tokens = read(tmp_path)
    every = list(LayerCalibrator(folder, tokens, CPU).layers(lambda _names: True))
    only_last = list(
        LayerCalibrator(folder, tokens, CPU).layers(
            lambda names: any("layers.1." in name for name in names)
        )
    )
    assert only_last[0] == []
    for a, b in zip(every[1], only_last[1], strict=True):
        assert a.weights == b.weights
        assert torch.equal(a.hessian, b.hessian)


def test_weights_are_in_memory_for_one_layer_at_a_time(tmp_path):
    folder = finetunes.save(finetunes.make_model(num_hidden_layers=4), tmp_path / "m")
    calibrator = LayerCalibrator(folder, read(tmp_path), CPU)

    def loaded():
        return [
            i
            for i, layer in enumerate(calibrator._layers)
            if any(p.device.type != "meta" for p in layer.parameters())
        ]

    seen = []
    for layer in calibrator._layers:
        layer.register_forward_pre_hook(lambda _module, _inputs: seen.append(loaded()))
    for index, _ in enumerate(calibrator.layers(lambda _names: True)):
        assert seen
        assert all(found == [index] for found in seen)
        assert loaded() == []
        seen.clear()


class States:
    """Stands for states on a device, of which two fit beside everything else."""

    nbytes = 1 << 30

    def cpu(self):
        return "on the host"


def test_states_stay_on_the_device_as_far_as_they_fit():
    layers = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    sequences = [States() for _ in range(4)]
    with calibrate._LayerInputs(layers) as inputs:
        for states in sequences:
            layers[0](states)
    assert inputs.hidden == [*sequences[:2], "on the host", "on the host"]


def test_overflowing_activations_are_reported(tmp_path):
    model = finetunes.make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.fill_(1e30)
        model.model.layers[0].mlp.up_proj.weight.fill_(1e30)
    folder = finetunes.save(model, tmp_path / "m")
    with pytest.raises(UserError) as caught:
        list(LayerCalibrator(folder, read(tmp_path), CPU).layers(lambda _names: True))
    assert caught.value.code == "activations_not_finite"
    assert caught.value.params["layer"] == "model.layers.0"


def test_a_short_text_says_how_much_is_needed(tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, "too short")
    assert caught.value.code == "calibration_too_short"
    assert caught.value.params == {"n_tokens": 10, "needed": 512}


def test_the_shortest_text_makes_two_sequences(tmp_path):
    tokens = read(tmp_path, "x" * 511, max_positions=4096)
    assert tokens.sequences.shape == (2, 256)


def test_nearly_all_tokens_are_used_and_none_exceeds_the_positions(tmp_path):
    tokens = read(tmp_path, "abcdefg " * 400, max_positions=256)
    n_sequences, length = tokens.sequences.shape
    assert length <= 256
    assert 3201 - tokens.n_tokens < n_sequences


def test_a_long_text_is_read_up_to_the_limit(tmp_path):
    (tmp_path / "c.txt").write_text("abcdefg " * 1000)
    tokens = read_calibration(
        tmp_path / "c.txt", finetunes.make_tokenizer(), max_positions=512, max_sequences=1
    )
    assert tokens.sequences.shape == (4, 512)


def test_chats_are_calibrated_through_their_template(tmp_path):
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    (tmp_path / "c.jsonl").write_text((json.dumps(chat) + "\n") * 40)
    tokenizer = finetunes.make_tokenizer()
    tokens = read_calibration(tmp_path / "c.jsonl", tokenizer, max_positions=256)
    text = tokenizer.decode(tokens.sequences.flatten())
    assert text.startswith("user:hi<|end|>assistant:yo<|end|><|end|>user:hi")


def test_other_token_ids_give_another_digest(tmp_path):
    first, second = read(tmp_path, "a" * 600), read(tmp_path, "b" * 600)
    assert first.digest != second.digest
    assert first.sha256 != second.sha256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_on_a_cpu_are_sums_of_float32_products(dtype):
    layer = torch.nn.Linear(48, 16, bias=False).to(dtype)
    rows = torch.randn(200, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    moments = LayerMoments(layer, {"weight": (Piece(tensor="w"),)})
    with torch.no_grad(), moments:
        layer(rows)
    (found,) = moments.finish()
    assert found.hessian.dtype is torch.float32
    assert torch.equal(found.hessian, (rows.float().T @ rows.float()) / 200)


def test_general_text_takes_half_of_the_tokens(tmp_path):
    tokenizer = finetunes.make_tokenizer()
    (tmp_path / "own.txt").write_text("o" * 30_000)
    (tmp_path / "general.txt").write_text("g" * 700)
    own, general = tokenizer.encode("og")
    for max_sequences, expected in ((8, 8 * 2048), (64, 2 * 30_001)):
        tokens = read_calibration(
            tmp_path / "own.txt",
            tokenizer,
            max_positions=256,
            max_sequences=max_sequences,
            general=tmp_path / "general.txt",
        )
        assert expected - 2 * 256 < tokens.n_tokens <= expected
        counts = tokens.count(finetunes.VOCABULARY)
        assert counts[own] >= 0.99 * tokens.n_tokens / 2
        assert counts[general] >= 0.99 * tokens.n_tokens / 2
        assert not any({own, general} <= set(row.tolist()) for row in tokens.sequences)
        assert tokens.source == "own.txt + general.txt"
