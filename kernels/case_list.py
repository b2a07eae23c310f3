"""The cases that tests and `kernels.gpu_check` run: every op, width, layout and dtype."""

from collections.abc import Iterator
from itertools import product
from typing import Final

import torch

from deltacome_core.layout import Group, RankBand
from kernels import ACTIVATION_DTYPES
from kernels.cases import BITS, DIRECT_OPS, LOWRANK_OPS, OPS_ON_TOKENS, Case

MIXED: Final = (RankBand(8, 2), RankBand(3, 9), RankBand(2, 14), RankBand(1, 8))
GROUPS: Final[tuple[Group, ...]] = ((1, 128), (128, 1), (0, 1), (1, 0), (0, 0), (3, 50))


def _list_direct_cases() -> Iterator[Case]:
    for bits, dtype in product(BITS, ACTIVATION_DTYPES):
        for n_tokens in (1, 17):
            yield Case(
                op="multiply",
                direct_bits=bits,
                dtype=dtype,
                n_tokens=n_tokens,
                out_features=67,
                in_features=320,
            )
        yield Case(op="merge", direct_bits=bits, dtype=dtype, out_features=67, in_features=200)
    for bits, (turn, group) in product((1, 3), enumerate(GROUPS)):
        for op in DIRECT_OPS:
            symmetric = (turn + bits // 2) % 2 == 0
            yield Case(op=op, direct_bits=bits, group_v=group, symmetric=symmetric)
    yield Case(op="multiply", direct_bits=1, has_y=False)
    for dtype, n_tokens in product(ACTIVATION_DTYPES, (1, 2)):
        yield Case(
            op="delta_linear", direct_bits=1, dtype=dtype, n_tokens=n_tokens, has_y=n_tokens == 1
        )


def _list_lowrank_cases() -> Iterator[Case]:
    for bits, group, symmetric in product(BITS, GROUPS, (False, True)):
        bands = (RankBand(bits, 131),)
        yield Case(op="dequantise", bands=bands, group_u=group, symmetric=symmetric)
    for bits, dtype in product(BITS, ACTIVATION_DTYPES):
        bands = (RankBand(bits, 7),)
        for n_tokens in (1, 17):
            yield Case(op="shrink", bands=bands, dtype=dtype, n_tokens=n_tokens, in_features=320)
            yield Case(op="expand", bands=bands, dtype=dtype, n_tokens=n_tokens)
        yield Case(op="merge", bands=bands, dtype=dtype, out_features=67, in_features=200)
    for n_tokens in (3, 5, 15, 16):
        yield Case(op="shrink", bands=MIXED, n_tokens=n_tokens)
        yield Case(op="expand", bands=(RankBand(3, 131),), n_tokens=n_tokens, has_y=False)
    for dtype, symmetric in product(ACTIVATION_DTYPES, (False, True)):
        for op, n_tokens in product(OPS_ON_TOKENS, (1, 2)):
            yield Case(op=op, bands=MIXED, dtype=dtype, n_tokens=n_tokens, symmetric=symmetric)
        yield Case(op="merge", bands=MIXED, dtype=dtype, out_features=67, symmetric=symmetric)
    yield Case(op="merge", bands=(RankBand(3, 131),), out_features=67)
    yield Case(op="delta_linear", bands=(RankBand(4, 40),), has_y=False)
    for group_u, group_v in (((128, 1), (0, 1)), ((1, 0), (3, 50)), ((0, 0), (128, 1))):
        yield Case(op="merge", bands=MIXED, group_u=group_u, group_v=group_v, in_features=150)
        for op in OPS_ON_TOKENS:
            yield Case(op=op, bands=MIXED, group_u=group_u, group_v=group_v)


CASES: Final = (*_list_lowrank_cases(), *_list_direct_cases())
# The published 8+3+2 recipe on the layers of a 7B model, and the longest sum of one.
LARGE_BANDS: Final = (RankBand(8, 2), RankBand(3, 32), RankBand(2, 968))
_LARGE_LOWRANK: Final = tuple(
    Case(op=op, bands=LARGE_BANDS, out_features=4096, in_features=size, n_tokens=n, dtype=dtype)
    for op, size, n, dtype in (
        *product(LOWRANK_OPS, (4096,), (1, 64), (torch.bfloat16,)),
        ("shrink", 18944, 1, torch.float32),
        ("shrink", 18944, 17, torch.float32),
        ("merge", 11008, 1, torch.float32),
    )
)
_LARGE_DIRECT: Final = tuple(
    Case(
        op=op,
        direct_bits=1,
        out_features=4096,
        in_features=size,
        n_tokens=n,
        dtype=dtype,
        group_v=(0, 0),
        symmetric=True,
    )
    for op, size, n, dtype in (
        *product(DIRECT_OPS, (4096,), (1, 64), (torch.bfloat16,)),
        ("multiply", 18944, 1, torch.float32),
        ("multiply", 18944, 17, torch.float32),
    )
)
LARGE_CASES: Final = (*_LARGE_LOWRANK, *_LARGE_DIRECT)
