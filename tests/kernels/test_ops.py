import inspect
import subprocess
import sys

import pytest
import torch

import kernels
from deltacome_core.bitpack import pack_codes
from deltacome_core.errors import InternalError
from deltacome_core.layout import RankBand
from deltacome_core.packed import PackedDirect, PackedFactor
from kernels import reference, triton_ops
from kernels.case_list import CASES, MIXED
from kernels.cases import (
    OPS,
    Case,
    make_direct,
    make_frame,
    make_matrix,
    measure,
)

BACKENDS = {"triton": triton_ops, "reference": reference}


def draw_matrix(seed=0, **sizes):
    case = Case(op="shrink", bands=MIXED, out_features=35, in_features=44, **sizes)
    return make_matrix(case, seed=torch.Generator().manual_seed(seed)).packed


@pytest.fixture
def matrix():
    return draw_matrix()


@pytest.fixture
def direct():
    case = Case(op="multiply", direct_bits=1, out_features=35, in_features=44, symmetric=True)
    return make_direct(case, seed=torch.Generator().manual_seed(0)).packed


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_agrees_with_float64(case):
    outcome = measure(case, triton_ops, seed=CASES.index(case))
    assert outcome.is_correct, outcome


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_agrees_with_float64(case):
    outcome = measure(case, reference, seed=CASES.index(case))
    assert outcome.is_correct, outcome


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_one_signature(op):
    signatures = {
        inspect.signature(getattr(module, op)) for module in (kernels, *BACKENDS.values())
    }
    assert len(signatures) == 1


def test_ops_allocate_their_outputs(backend, matrix, direct):
    torch.manual_seed(1)
    x, y, weight = torch.randn(2, 44), torch.randn(2, 35).bfloat16(), torch.randn(35, 44).half()
    h = backend.shrink(x, matrix)
    assert (h.dtype, h.shape) == (torch.float32, (2, 33))
    outputs = [
        h,
        backend.expand(h, matrix),
        backend.expand(h, matrix, y),
        backend.merge(weight, matrix),
        backend.dequantise(matrix.bands[1].u),
        backend.multiply(x, direct),
        backend.multiply(x, direct, y),
        backend.merge(weight, direct),
    ]
    assert [output.dtype for output in outputs[1:]] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_may_overwrite_what_they_add_to(backend, matrix, direct, dtype):
    torch.manual_seed(2)
    x, added, other = (
        torch.randn(3, 44),
        torch.randn(3, 35).to(dtype),
        torch.randn(35, 44).to(dtype),
    )
    expected = backend.multiply(x, direct, added), backend.merge(other, direct)
    assert backend.multiply(x, direct, added, out=added) is added
    assert backend.merge(other, direct, out=other) is other
    assert torch.equal(added, expected[0])
    assert torch.equal(other, expected[1])
    h, y, weight = torch.randn(3, 33), torch.randn(3, 35).to(dtype), torch.randn(35, 44).to(dtype)
    apart = backend.expand(h, matrix, y), backend.merge(weight, matrix)
    assert backend.expand(h, matrix, y, out=y) is y
    assert backend.merge(weight, matrix, out=weight) is weight
    assert torch.equal(y, apart[0])
    assert torch.equal(weight, apart[1])


def test_inputs_may_be_transposed(backend, matrix, direct):
    torch.manual_seed(3)
    x, h, y, weight = (torch.randn(n, m).T for m, n in ((2, 44), (2, 33), (2, 35), (35, 44)))
    pairs = [
        (backend.shrink(x, matrix), backend.shrink(x.contiguous(), matrix)),
        (
            backend.expand(h, matrix, y),
            backend.expand(h.contiguous(), matrix, y.contiguous()),
        ),
        (backend.merge(weight, matrix), backend.merge(weight.contiguous(), matrix)),
        (
            backend.multiply(x, direct, y),
            backend.multiply(x.contiguous(), direct, y.contiguous()),
        ),
        (backend.merge(weight, direct), backend.merge(weight.contiguous(), direct)),
    ]
    for transposed, adjacent in pairs:
        torch.testing.assert_close(transposed, adjacent, rtol=1e-5, atol=1e-5)


def test_no_tokens_give_no_rows(backend, matrix, direct):
    assert backend.multiply(torch.empty(0, 44), direct).shape == (0, 35)
    h = backend.shrink(torch.empty(0, 44), matrix)
    assert h.shape == (0, 33)
    assert backend.expand(h, matrix).shape == (0, 35)


def test_a_token_does_not_depend_on_its_batch():
    matrix = draw_matrix(n_tokens=40)
    torch.manual_seed(4)
    x = torch.randn(40, 44)
    order = torch.randperm(40)
    h = triton_ops.shrink(x, matrix)
    y = triton_ops.expand(h, matrix)
    # Not bit for bit: the interpreter multiplies with the host's BLAS, which on some processors
    # sums the rows at the edge of a tile in another order.
    close = {"rtol": 1e-6, "atol": 2e-6 * float(h.abs().max())}
    torch.testing.assert_close(triton_ops.shrink(x[order], matrix), h[order], **close)
    close["atol"] = 2e-6 * float(y.abs().max())
    torch.testing.assert_close(triton_ops.expand(h[order], matrix), y[order], **close)


@pytest.mark.parametrize("kind", ["matrix", "direct"])
def test_delta_linear_keeps_leading_dimensions(kind, request):
    matrix = request.getfixturevalue(kind)
    torch.manual_seed(5)
    x, weight, bias = torch.randn(2, 3, 44), torch.randn(35, 44), torch.randn(35)
    y = kernels.delta_linear(x, weight, matrix, bias)
    merged = torch.nn.functional.linear(x, kernels.merge(weight, matrix), bias)
    assert y.shape == (2, 3, 35)
    torch.testing.assert_close(y, merged, rtol=1e-5, atol=1e-4)


def test_one_bit_is_plus_or_minus_half_the_scale(backend):
    factor = PackedFactor(
        codes=pack_codes(torch.tensor([[1, 0, 1], [0, 0, 1]]), 1),
        scale=torch.tensor([[2.0], [0.5]]).half(),
        zero=None,
        bits=1,
        rows=2,
        cols=3,
        group=(1, 0),
    )
    signs = torch.tensor([[1.0, -1.0, 1.0], [-0.25, -0.25, 0.25]])
    assert torch.equal(backend.dequantise(factor), signs)
    y = backend.multiply(torch.eye(3), PackedDirect(name="w", factor=factor))
    assert torch.equal(y, signs.T)


def test_ops_refuse_what_does_not_fit(matrix, direct):
    x, h, weight = torch.randn(2, 44), torch.randn(2, 33), torch.randn(35, 44)
    refused = [
        lambda: kernels.shrink(x[:, 1:], matrix),
        lambda: kernels.shrink(x.double(), matrix),
        lambda: kernels.shrink(x, matrix, out=torch.empty(2, 32)),
        lambda: kernels.shrink(x, matrix, out=torch.empty(33, 2).T),
        lambda: kernels.shrink(x.to("meta"), matrix),
        lambda: kernels.expand(h.half(), matrix),
        lambda: kernels.expand(h, matrix, torch.randn(3, 35)),
        lambda: kernels.expand(h, matrix, out=torch.empty(2, 35).half()),
        lambda: kernels.merge(weight.T, matrix),
        lambda: kernels.dequantise(matrix.bands[0].u, out=torch.empty(2, 35)),
        lambda: kernels.delta_linear(x[:, 1:], weight, matrix),
        lambda: kernels.multiply(x[:, 1:], direct),
        lambda: kernels.multiply(x, direct, torch.randn(3, 35)),
        lambda: kernels.multiply(x, direct, out=torch.empty(2, 35).half()),
        lambda: kernels.multiply(x.to("meta"), direct),
        lambda: kernels.merge(weight.T, direct),
        lambda: kernels.delta_linear(x[:, 1:], weight, direct),
        lambda: kernels.delta_linear(x, weight.half(), matrix),
        lambda: kernels.delta_linear(x, weight, matrix, torch.randn(34)),
    ]
    for call in refused:
        with pytest.raises(InternalError):
            call()


def test_ops_on_a_cpu_do_not_import_triton():
    program = (
        "import sys, kernels, kernels.cases as cases\n"
        "from kernels.case_list import CASES\n"
        "for op in cases.OPS:\n"
        "    case = next(case for case in CASES if case.op == op)\n"
        "    assert cases.measure(case, kernels).is_correct\n"
        "print('triton' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout == "False\n"


class Faulty:
    """The reference with one fault in its shrink."""

    def __init__(self, fault):
        self.fault = fault

    def shrink(self, x, matrix, *, out):
        return self.fault(reference.shrink(x, matrix), out)


def leave_one_unwritten(h, out):
    out[:, 1:] = h[:, 1:]


def write_beyond(h, out):
    out[:] = h
    out._base[-1, 0] = 0


def lose_precision(h, out):
    out[:] = h * (1 + 4e-6)


def vary(h, out):
    out[:] = h + torch.rand_like(h) * 1e-7


@pytest.mark.parametrize("fault", [leave_one_unwritten, write_beyond, lose_precision, vary])
def test_measure_sees_a_fault(fault):
    torch.manual_seed(6)
    case = Case(op="shrink", bands=(RankBand(2, 7),))
    assert not measure(case, Faulty(fault)).is_correct


def test_frame_keeps_the_alignment_of_its_columns():
    frame, inside = make_frame((3, 32), dtype=torch.bfloat16, device="cpu")
    assert (inside.data_ptr() - frame.data_ptr()) % 16 == 0
    assert inside.stride(0) * 2 % 16 == 0


def test_interpreter_still_truncates(monkeypatch, round_to_bf16, poisoned_memory):
    """When this fails, `rounding_interpreter` is no longer needed."""
    from triton.runtime.interpreter import InterpreterBuilder

    nearly_two = torch.tensor([1.999, 1.0, 1.5, 1.25])
    assert round_to_bf16(nearly_two)[0] == 2
    monkeypatch.setattr(
        InterpreterBuilder, "create_fp_trunc", InterpreterBuilder.truncate_of_triton
    )
    assert round_to_bf16(nearly_two)[0] < 2
