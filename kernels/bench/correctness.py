"""The arena kernels against float64, before anything is timed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from deltacome_core.layout import RankBand
from deltacome_core.packed import PackedDirect, PackedLinear
from kernels import serving
from kernels.arena import ArenaSpec, DeltaArena
from kernels.bench.models import BITDELTA, COME, HUB, Layout, Pool
from kernels.fragments import FAST_PLANES, PLANES
from kernels.image import Site, build_image
from kernels.plan import StepPlan

# Relative L2 error of the delta term. Four planes carry all bits of an fp32, two carry 15, of which
# hidden values far below their band's bound use fewer: seen are 2e-7 and 1e-3.
LIMITS: Final = {PLANES: 2e-6, FAST_PLANES: 1.5e-2}
# A result in 16 bits is the sum rounded once; the term is as large as what it is added to here.
ROUNDED: Final = 4e-3
_ODD_BANDS: Final = (
    RankBand(8, 3),
    RankBand(4, 37),
    RankBand(3, 41),
    RankBand(2, 130),
    RankBand(1, 19),
)
_ODD: Final = Layout(
    name="odd",
    square=_ODD_BANDS,
    wide=_ODD_BANDS,
    group_v=(1, 0),
    group_u=(0, 1),
    symmetric=True,
)
_FEWER_BANDS: Final = (RankBand(8, 3), RankBand(3, 41), RankBand(2, 130))
_ODD_TILES: Final = replace(
    _ODD,
    name="odd-tiles",
    square=_FEWER_BANDS,
    wide=_FEWER_BANDS,
    group_v=(1, 128),
    group_u=(1, 128),
    symmetric=False,
)
# Recipes in one arena are compiled twice for each width: two widths say what all would.
_SOME_BANDS: Final = (RankBand(3, 128), RankBand(2, 640))
_SOME: Final = replace(_ODD, name="some", square=_SOME_BANDS, wide=_SOME_BANDS)
_SOME_TILES: Final = replace(_ODD_TILES, name="some-tiles", square=_SOME_BANDS, wide=_SOME_BANDS)
ACTIVATIONS: Final = Path(__file__).parent / "activations.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCase:
    """Deltas of these layouts in one arena, and the slots of a batch by number, -1 the backbone."""

    layouts: tuple[Layout, ...]
    slots: tuple[int, ...]
    outs: tuple[int, ...] = (4096, 1024)
    width: int = 4096
    planes: int = PLANES
    outliers: bool = False
    recorded: str = ""

    def __str__(self) -> str:
        layouts = "+".join(layout.name for layout in self.layouts)
        flags = "-outliers" if self.outliers else ""
        flags += f"-smollm2-{self.recorded}" if self.recorded else ""
        sizes = f"{'+'.join(map(str, self.outs))}x{self.width}"
        return f"{layouts}-{sizes}-t{len(self.slots)}-p{self.planes}{flags}"


def list_cases() -> Iterator[BatchCase]:
    """Cases for a device: published and odd shapes, mixed recipes, precisions, group sizes."""
    for layout, planes in product((HUB, COME, BITDELTA), (PLANES, FAST_PLANES)):
        yield BatchCase(layouts=(layout, layout), slots=(0, 1, -1, 0), planes=planes)
    # The busiest of eight tenants has 23 tokens.
    skewed = tuple(token * token // 512 for token in range(64))
    for planes in (PLANES, FAST_PLANES):
        yield BatchCase(layouts=(HUB,) * 8, slots=skewed, outs=(4096, 4096, 1024), planes=planes)
    many = tuple([0] * 9 + [1] * 3 + [-1] * 2 + [2] * 5)
    yield BatchCase(layouts=(_SOME, _SOME_TILES, BITDELTA), slots=many)
    yield BatchCase(layouts=(HUB, HUB, HUB), slots=many)
    yield BatchCase(layouts=(HUB,), slots=(0,), outs=(4096,), width=11008, outliers=True)
    yield BatchCase(layouts=(HUB,), slots=(0, -1), planes=FAST_PLANES, outliers=True)
    for layout, planes in product((_ODD, _ODD_TILES), (PLANES, FAST_PLANES)):
        slots = (0, 1, 0, -1)
        yield BatchCase(
            layouts=(layout, layout), slots=slots, outs=(417, 96), width=300, planes=planes
        )
    for planes, (key, width) in product(
        (PLANES, FAST_PLANES), (("28.qkv", 576), ("28.down", 1536))
    ):
        yield BatchCase(
            layouts=(_ODD,), slots=(0,) * 8, outs=(576,), width=width, planes=planes, recorded=key
        )


def exact_delta(matrix: PackedLinear) -> torch.Tensor:
    """float64 [out, in] of a packed matrix."""
    if isinstance(matrix, PackedDirect):
        return matrix.dequantise().double()
    left = torch.cat([band.u.dequantise() for band in matrix.bands], dim=1).double()
    right = torch.cat([band.v.dequantise() for band in matrix.bands]).double()
    return left @ (right * matrix.sigma.double()[:, None])


def draw_inputs(case: BatchCase, generator: torch.Generator) -> torch.Tensor:
    """bf16 [tokens, in] of a case: random, with outliers, or recorded from a real model.

    Args:
        case: the case.
        generator: of the random ones.

    Returns:
        The inputs.
    """
    if case.recorded:
        # Made by benchmarks/record_activations.py.
        return load_file(ACTIVATIONS)[case.recorded][: len(case.slots)]
    x = torch.randn(len(case.slots), case.width, generator=generator)
    if case.outliers:
        # A few channels of a language model are hundreds of times the others.
        channels = torch.randperm(case.width, generator=generator)[:4]
        x[:, channels] *= 300
    return x.bfloat16()


def exact_terms(
    case: BatchCase, deltas: Sequence[Mapping[str, PackedLinear]], x: torch.Tensor
) -> torch.Tensor:
    """float64 [tokens, outputs] of a case, 0 for the backbone's tokens."""
    wanted = torch.zeros(len(x), sum(case.outs), dtype=torch.float64, device=x.device)
    for token, number in enumerate(case.slots):
        if number >= 0:
            parts = [exact_delta(matrix.to(x.device)) for matrix in deltas[number].values()]
            wanted[token] = torch.cat(parts) @ x[token].double()
    return wanted


def measure_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2 distance from what was wanted in float64."""
    return float((found.double() - wanted).norm() / wanted.norm())


def _poison(plan: StepPlan) -> None:
    for planes in (plan.x_planes, plan.h_planes):
        planes.fill_(85)
    for worth in (plan.x_step, plan.x_norm):
        worth.fill_(torch.nan)


def _site(case: BatchCase) -> Site:
    parts = tuple(f"part{number}" for number in range(len(case.outs)))
    return Site(name="site", parts=parts, out_features=case.outs, in_features=case.width)


def cover_case(case: BatchCase) -> ArenaSpec:
    """What the arena of a case is built for, its site being number 0.

    Args:
        case: the case.

    Returns:
        The spec; that of one delta of each layout.
    """
    site, pool = _site(case), Pool(0)
    layouts = dict.fromkeys(case.layouts)
    images = [build_image((site,), pool.delta((site,), layout)) for layout in layouts]
    return ArenaSpec.covering((site,), images)


def run_case(case: BatchCase, device: torch.device | str, *, seed: int = 0) -> dict[str, Any]:
    """Run a case and say how it went.

    Args:
        case: the case.
        device: where the kernels run.
        seed: of all numbers.

    Returns:
        Errors against float64, of the term, of outputs it was added to and of the whole layer, and
        what was checked bit for bit; `passed` sums it up.
    """
    pool = Pool(seed)
    site = _site(case)
    deltas = [pool.delta((site,), layout) for layout in case.layouts]
    images = [build_image((site,), delta) for delta in deltas]
    arena = DeltaArena(cover_case(case), n_slots=len(images), device=device, operand_order=True)
    held = [arena.load(image) for image in images]
    slots = [held[slot] if slot >= 0 else -1 for slot in case.slots]
    x = draw_inputs(case, torch.Generator().manual_seed(seed)).to(device)
    plan = StepPlan(arena, n_tokens=len(slots), planes=case.planes)

    def run(base: torch.Tensor, rows: torch.Tensor, order: list[int]) -> torch.Tensor:
        _poison(plan)
        plan.assign([slots[token] for token in order])
        return serving.add_delta(base.clone(), rows, plan, 0)

    wanted = exact_terms(case, deltas, x)
    forward = list(range(len(slots)))
    zeros = torch.zeros(wanted.shape, device=device)
    term = run(zeros, x, forward)
    base = torch.randn(wanted.shape, device=device).bfloat16()
    rounded = run(base, x, forward)
    order = torch.randperm(len(slots), generator=torch.Generator().manual_seed(1)).tolist()
    alone = [token for token, number in enumerate(case.slots) if number < 0]
    error = measure_error(term, wanted)
    error_rounded = measure_error(rounded, base.double() + wanted)
    weight = torch.randn(site.total_out, case.width, device=device).bfloat16()
    plan.assign(slots)
    layer = serving.delta_linear(x, weight, arena, 0, plan)
    error_layer = measure_error(layer, x.double() @ weight.double().T + wanted)
    flags = {
        "is_repeatable": torch.equal(run(base, x, forward), rounded),
        "is_order_free": torch.equal(run(base[order], x[order], order), rounded[order]),
        "backbone_is_exact": torch.equal(rounded[alone], base[alone]),
    }
    limit = LIMITS[case.planes]
    is_close = error <= limit and max(error_rounded, error_layer) <= ROUNDED + limit
    return {
        "case": str(case),
        "error": error,
        "limit": limit,
        "error_rounded": error_rounded,
        "error_layer": error_layer,
        **flags,
        "passed": is_close and all(flags.values()),
    }
