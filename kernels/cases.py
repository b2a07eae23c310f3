"""Correctness cases of every op against float64; run by the tests and by `kernels.gpu_check`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from deltacome_core.bitpack import pack_codes
from deltacome_core.layout import Group, RankBand, scale_shape
from deltacome_core.packed import (
    PackedBand,
    PackedDirect,
    PackedFactor,
    PackedMatrix,
)
from kernels import Backend

Op = Literal["dequantise", "shrink", "expand", "merge", "multiply", "delta_linear"]
OPS: Final[tuple[Op, ...]] = ("dequantise", "shrink", "expand", "merge", "multiply", "delta_linear")
LOWRANK_OPS: Final[tuple[Op, ...]] = tuple(op for op in OPS if op != "multiply")
DIRECT_OPS: Final[tuple[Op, ...]] = ("multiply", "merge", "delta_linear")
OPS_ON_TOKENS: Final[tuple[Op, ...]] = ("shrink", "expand", "delta_linear")
BITS: Final = (1, 2, 3, 4, 8)
# A value is exact in fp32. Sums stay below the limit in any order, since no running sum of a kernel
# is longer than 512 terms or the rank; one kept in tf32 or bf16 misses it a hundredfold.
ERROR_LIMITS: Final[dict[Op, float]] = dict.fromkeys(OPS, 2e-6) | {"dequantise": 0.0}
# Half a unit in the last place, relative: what rounding the exact result once may cost.
ROUNDING: Final = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call: sizes, formats and the op; the defaults fit no block of any kernel.

    A case of a direct matrix has its bits and no bands; group_v is the group of its codes.
    """

    op: Op
    bands: tuple[RankBand, ...] = ()
    direct_bits: int = 0
    out_features: int = 131
    in_features: int = 300
    n_tokens: int = 3
    dtype: torch.dtype = torch.float32
    group_u: Group = (1, 128)
    group_v: Group = (1, 128)
    symmetric: bool = False
    has_y: bool = True

    def __str__(self) -> str:
        bands = "+".join(f"{band.rank}@{band.bits}" for band in self.bands)
        bands = bands or f"direct@{self.direct_bits}"
        groups = "-".join("x".join(map(str, group)) for group in (self.group_u, self.group_v))
        flags = ("-symmetric" if self.symmetric else "") + ("" if self.has_y else "-without-y")
        sizes = f"{self.out_features}x{self.in_features}-t{self.n_tokens}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}-{bands}-{sizes}-{dtype}-g{groups}{flags}"

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of all codes the op reads."""
        return tuple(band.bits for band in self.bands) or (self.direct_bits,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How far an op was from float64, beyond the rounding of its output, and how it behaved."""

    error: float
    error_limit: float
    is_repeatable: bool
    stays_inside: bool

    @property
    def is_correct(self) -> bool:
        return self.error <= self.error_limit and self.is_repeatable and self.stays_inside


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactMatrix:
    """A packed matrix and, from the codes before packing, its factors in float64."""

    packed: PackedMatrix
    u: torch.Tensor
    v: torch.Tensor

    @property
    def delta(self) -> torch.Tensor:
        return self.u @ self.v

    def to(self, device: torch.device | str) -> "ExactMatrix":
        return ExactMatrix(packed=self.packed.to(device), u=self.u.to(device), v=self.v.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactDirect:
    """A direct matrix and, from the codes before packing, its values in float64."""

    packed: PackedDirect
    delta: torch.Tensor

    def to(self, device: torch.device | str) -> "ExactDirect":
        return ExactDirect(packed=self.packed.to(device), delta=self.delta.to(device))


def make_factor(
    rows: int, cols: int, *, bits: int, group: Group, symmetric: bool, seed: torch.Generator
) -> tuple[PackedFactor, torch.Tensor]:
    """Draw a packed factor.

    Args:
        rows: Rows of the factor.
        cols: Columns of the factor.
        bits: 1, 2, 3, 4 or 8.
        group: Codes that share a scale; 0 is the whole dimension.
        symmetric: Without zero points.
        seed: Where the codes, scales and zeros come from.

    Returns:
        The factor and its values, float64 [rows, cols].
    """
    levels = 1 << bits
    codes = torch.randint(levels, (rows, cols), generator=seed)
    grid = scale_shape(rows, cols, group)
    scale = (torch.rand(grid, generator=seed) * 2 / levels + 1 / levels).half()
    zero = None if symmetric else torch.randint(levels, grid, generator=seed).to(torch.uint8)
    factor = PackedFactor(
        codes=pack_codes(codes, bits),
        scale=scale,
        zero=zero,
        bits=bits,
        rows=rows,
        cols=cols,
        group=group,
    )
    row_group = torch.arange(rows) // (group[0] or rows)
    col_group = torch.arange(cols) // (group[1] or cols)
    at = (row_group[:, None], col_group[None, :])
    centre = (levels - 1) / 2 if zero is None else zero.double()[at]
    return factor, (codes - centre) * scale.double()[at]


def make_matrix(case: Case, *, seed: torch.Generator) -> ExactMatrix:
    """Draw the packed matrix of a case.

    Args:
        case: Sizes, bands, groups.
        seed: Where the numbers come from.

    Returns:
        The packed matrix on the CPU, u float64 [out, rank] and v float64 [rank, in] with sigma
        folded in.
    """
    bands, left, right = [], [], []
    for band in case.bands:
        u, u_values = make_factor(
            case.out_features,
            band.rank,
            bits=band.bits,
            group=case.group_u,
            symmetric=case.symmetric,
            seed=seed,
        )
        v, v_values = make_factor(
            band.rank,
            case.in_features,
            bits=band.bits,
            group=case.group_v,
            symmetric=case.symmetric,
            seed=seed,
        )
        bands.append(PackedBand(u=u, v=v))
        left.append(u_values)
        right.append(v_values)
    sigma = torch.rand(sum(band.rank for band in case.bands), generator=seed) + 0.5
    matrix = PackedMatrix(
        name=str(case),
        out_features=case.out_features,
        in_features=case.in_features,
        sigma=sigma,
        bands=tuple(bands),
    )
    v_exact = torch.cat(right) * sigma.double()[:, None]
    return ExactMatrix(packed=matrix, u=torch.cat(left, dim=1), v=v_exact)


def make_direct(case: Case, *, seed: torch.Generator) -> ExactDirect:
    """Draw the direct matrix of a case.

    Args:
        case: Sizes, bits, group.
        seed: Where the numbers come from.

    Returns:
        The packed matrix on the CPU and its values float64 [out, in].
    """
    factor, values = make_factor(
        case.out_features,
        case.in_features,
        bits=case.direct_bits,
        group=case.group_v,
        symmetric=case.symmetric,
        seed=seed,
    )
    return ExactDirect(packed=PackedDirect(name=str(case), factor=factor), delta=values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One op on its inputs: what it should write, and the distance that rounding explains."""

    write: Callable[[torch.Tensor], object]
    wanted: torch.Tensor
    dtype: torch.dtype = torch.float32
    allowed: torch.Tensor | float = 0.0


Draw = Callable[..., torch.Tensor]
Exact = ExactMatrix | ExactDirect


def make_frame(
    shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate a matrix inside a larger one of NaN, so that no access beyond it goes unseen.

    Args:
        shape: (m, n) of the matrix.
        dtype: Of both.
        device: Of both.

    Returns:
        The frame [m + 2, n + 16] and the view [m, n] in it, both NaN; the view keeps the
        alignment that its columns have.
    """
    rows, cols = shape
    frame = torch.full((rows + 2, cols + 16), torch.nan, dtype=dtype, device=device)
    return frame, frame[1:-1, :cols]


def measure(
    case: Case, backend: Backend, *, device: torch.device | str = "cpu", seed: int = 0
) -> Outcome:
    """Run one case twice between NaNs and compare with float64.

    Args:
        case: The case.
        backend: `kernels.reference` or `kernels.triton_ops`.
        device: Where the op runs.
        seed: Of the inputs.

    Returns:
        The relative L2 norm of what an output is further from the exact result than rounding it to
        its dtype explains, whether the two runs agree in every bit, and whether nothing was
        written beyond the output.
    """
    generator = torch.Generator().manual_seed(seed)
    make = make_matrix if case.bands else make_direct
    exact = make(case, seed=generator).to(device)

    def draw(rows: int, cols: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        _, matrix = make_frame((rows, cols), dtype=dtype, device=device)
        return matrix.copy_(torch.randn((rows, cols), generator=generator))

    call = _PREPARE[case.op](case, backend, exact, draw)
    outputs, stays_inside = [], True
    for _ in range(2):
        frame, out = make_frame(tuple(call.wanted.shape), dtype=call.dtype, device=device)
        call.write(out)
        outputs.append(out.clone())
        out.fill_(torch.nan)
        stays_inside &= bool(frame.isnan().all())
    excess = ((outputs[0].double() - call.wanted).abs() - call.allowed).clamp(min=0)
    return Outcome(
        error=float(excess.norm() / call.wanted.norm()),
        error_limit=ERROR_LIMITS[case.op],
        is_repeatable=torch.equal(*outputs),
        stays_inside=stays_inside,
    )


def _prepare_dequantise(case: Case, backend: Backend, exact: ExactMatrix, draw: Draw) -> Call:
    del case, draw
    u = exact.packed.bands[0].u
    return Call(write=lambda out: backend.dequantise(u, out=out), wanted=exact.u[:, : u.cols])


def _prepare_shrink(case: Case, backend: Backend, exact: ExactMatrix, draw: Draw) -> Call:
    x = draw(case.n_tokens, case.in_features)
    return Call(
        write=lambda out: backend.shrink(x, exact.packed, out=out),
        wanted=x.double() @ exact.v.T,
    )


def _prepare_expand(case: Case, backend: Backend, exact: ExactMatrix, draw: Draw) -> Call:
    h = draw(case.n_tokens, exact.packed.rank, torch.float32)
    y = draw(case.n_tokens, case.out_features) if case.has_y else None
    wanted = h.double() @ exact.u.T + (0.0 if y is None else y.double())
    dtype = h.dtype if y is None else y.dtype
    return Call(
        write=lambda out: backend.expand(h, exact.packed, y, out=out),
        wanted=wanted,
        dtype=dtype,
        allowed=ROUNDING[dtype] * wanted.abs(),
    )


def _prepare_multiply(case: Case, backend: Backend, exact: ExactDirect, draw: Draw) -> Call:
    x = draw(case.n_tokens, case.in_features)
    y = draw(case.n_tokens, case.out_features) if case.has_y else None
    wanted = x.double() @ exact.delta.T + (0.0 if y is None else y.double())
    dtype = torch.float32 if y is None else y.dtype
    return Call(
        write=lambda out: backend.multiply(x, exact.packed, y, out=out),
        wanted=wanted,
        dtype=dtype,
        allowed=ROUNDING[dtype] * wanted.abs(),
    )


def _prepare_merge(case: Case, backend: Backend, exact: Exact, draw: Draw) -> Call:
    weight = draw(case.out_features, case.in_features)
    wanted = exact.delta + weight.double()
    return Call(
        write=lambda out: backend.merge(weight, exact.packed, out=out),
        wanted=wanted,
        dtype=case.dtype,
        allowed=ROUNDING[case.dtype] * wanted.abs(),
    )


def _prepare_delta_linear(case: Case, backend: Backend, exact: Exact, draw: Draw) -> Call:
    x = draw(case.n_tokens, case.in_features)
    weight = draw(case.out_features, case.in_features)
    bias = draw(1, case.out_features)[0] if case.has_y else None
    product = x.double() @ weight.double().T
    base = product + (0.0 if bias is None else bias.double())
    wanted = base + x.double() @ exact.delta.T
    # The backbone's term is rounded before the delta's is added, and before that its product: seen
    # of cuBLAS with one token in bf16 on an H200, bit for bit.
    rounding = ROUNDING[case.dtype]
    allowed = torch.zeros_like(wanted)
    for step in (base, wanted) if bias is None else (product, base, wanted):
        allowed += rounding * (step.abs() + allowed)
    return Call(
        write=lambda out: out.copy_(backend.delta_linear(x, weight, exact.packed, bias)),
        wanted=wanted,
        dtype=case.dtype,
        allowed=allowed,
    )


# A case of bands makes an ExactMatrix, one of bits an ExactDirect.
_PREPARE: Final[dict[Op, Callable[[Case, Backend, Any, Draw], Call]]] = {
    "dequantise": _prepare_dequantise,
    "shrink": _prepare_shrink,
    "expand": _prepare_expand,
    "merge": _prepare_merge,
    "multiply": _prepare_multiply,
    "delta_linear": _prepare_delta_linear,
}
