"""What the matrices of each class are calibrated with, against the modules' own inputs."""

import finetunes
import pytest
import torch
from architecture_packs import COME, multiply_out
from architectures import ARCHITECTURES, EXPERTS

from deltacome_core.calibrate import LayerCalibrator, read_calibration
from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.delta import load_pair
from deltacome_core.factorise import NamedDelta, factorise_matrices
from deltacome_core.models import load_model
from deltacome_core.packed import PackedMatrix

CPU = torch.device("cpu")


def read_tokens(packed):
    path = packed.tuned / "calibration.txt"
    return read_calibration(path, finetunes.make_tokenizer(), max_positions=256)


def find_hessians(folder, tokens):
    """By matrix name: the Hessian and whether the checkpoint stores the matrix [in, out]."""
    layers = LayerCalibrator(folder, tokens, CPU).layers(lambda _names: True)
    return {
        weight: (shared.hessian, shared.transposed)
        for layer in layers
        for shared in layer
        for weight in shared.weights
    }


def watch_modules(model, tokens, kinds):
    """What modules of a class were called with, one list of arguments per sequence."""
    seen = {}

    def watch(name):
        return lambda _module, inputs: seen.setdefault(name, []).append(inputs)

    for name, module in model.named_modules():
        if type(module).__name__ in kinds:
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for sequence in tokens.sequences:
            model(input_ids=sequence[None])
    return seen


def assert_same_hessian(found, rows):
    expected = rows.double().T @ rows.double() / len(rows)
    error = torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected)
    assert error < 1e-4


def test_the_matrices_of_gpt2_are_seen_from_the_side_of_their_input(pack):
    packed = pack("gpt2")
    tokens = read_tokens(packed)
    found = find_hessians(packed.tuned, tokens)
    inputs = watch_modules(load_model(packed.tuned), tokens, {"Conv1D"})
    assert set(found) == {f"{module}.weight" for module in inputs}
    for module, calls in inputs.items():
        hessian, transposed = found[f"{module}.weight"]
        assert transposed
        assert_same_hessian(hessian, torch.cat([x.reshape(-1, x.shape[-1]) for (x,) in calls]))


@pytest.mark.parametrize(
    ("name", "kind", "template", "transposed"),
    [
        ("gpt_oss", "GptOssExperts", "{module}.gate_up_proj[{expert}]", True),
        ("mixtral_fused", "MixtralExperts", "{module}.gate_up_proj[{expert}]", False),
        ("qwen3_moe", "Qwen3MoeExperts", "{module}.{expert}.up_proj.weight", False),
    ],
)
def test_an_expert_is_calibrated_with_the_tokens_it_was_given(
    pack, name, kind, template, transposed
):
    packed = pack(name)
    tokens = read_tokens(packed)
    found = find_hessians(packed.tuned, tokens)
    inputs = watch_modules(load_model(packed.tuned), tokens, {kind})
    assert len(inputs) == 2
    for module, calls in inputs.items():
        for expert in range(EXPERTS):
            rows = torch.cat([x[(chosen == expert).any(dim=1)] for x, chosen, _ in calls])
            hessian, stored_by_input = found[template.format(module=module, expert=expert)]
            assert stored_by_input == transposed
            assert_same_hessian(hessian, rows)


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "qwen2_moe"])
def test_feedback_lowers_the_error_of_what_a_layer_puts_out(pack, name):
    """Errors weighed by the Hessian of the input, against the same bands rounded without it."""
    packed = pack(name)
    base, tuned = open_checkpoint(packed.base), open_checkpoint(packed.tuned)
    loaded = {
        piece.name: piece
        for matrix in map(packed.delta.load, packed.delta.names)
        for piece in getattr(matrix, "slices", [matrix])
        if isinstance(piece, PackedMatrix)
    }
    ratios = []
    for key, (hessian, transposed) in find_hessians(packed.tuned, read_tokens(packed)).items():
        matrix = loaded.get(key) or loaded.get(f"{key}[0]")
        tensor, _, index = key.partition("[")
        if matrix is None:
            continue
        truth = load_pair(base, tuned, tensor).difference()
        truth = truth[int(index[:-1])] if index else truth
        truth = truth.T if transposed else truth
        (plain,) = factorise_matrices([NamedDelta(name=key, delta=truth)], COME, hessian=None)
        errors = [multiply_out(each).float() - truth for each in (matrix, plain.packed)]
        with_it, without = (float(((error @ hessian) * error).sum()) for error in errors)
        ratios.append(with_it / without)
    assert len(ratios) == ARCHITECTURES[name].n_matrices
    assert sum(ratios) / len(ratios) < 0.95
