import pytest
import torch
import triton
import triton.language as tl
from interpreters import skip_unread_checks
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

if type(tl.sum) is not InterpretedFunction:
    raise RuntimeError("triton was imported before tests/conftest.py set TRITON_INTERPRET")
skip_unread_checks()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill what torch leaves uninitialised with NaN, so that a result nobody wrote is seen."""

    def poison(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture(autouse=True)
def rounding_interpreter(monkeypatch):
    """Round fp32 to bf16 as a GPU does.

    The interpreter of triton 3.6 to 3.9 cuts the low bits off (runtime/interpreter.py,
    `_convert_float` without a rounding mode). To be removed when `test_interpreter_still_truncates`
    fails.
    """
    truncate = InterpreterBuilder.create_fp_trunc

    def round_nearest(self, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return truncate(self, source, target)
        values = torch.from_numpy(source.data.copy()).bfloat16()
        return TensorHandle(values.view(torch.int16).numpy().view("uint16"), target.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", round_nearest)
    monkeypatch.setattr(InterpreterBuilder, "truncate_of_triton", truncate, raising=False)


@pytest.fixture
def round_to_bf16():
    """Return a function that casts fp32 to bf16 inside a kernel."""

    @triton.jit
    def cast_kernel(source, target, n: tl.constexpr):
        at = tl.arange(0, n)
        tl.store(target + at, tl.load(source + at).to(tl.bfloat16))

    def cast(values):
        rounded = torch.empty(values.shape, dtype=torch.bfloat16)
        cast_kernel[(1,)](values, rounded, n=len(values))
        return rounded

    return cast
