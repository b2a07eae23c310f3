"""Deltas of every kind at one site, in an arena on a CPU, and what they give in float64."""

from dataclasses import replace

import torch

from deltacome_core.layout import RankBand
from kernels.arena import ArenaSpec, DeltaArena
from kernels.bench.correctness import exact_delta
from kernels.bench.models import Layout, Pool
from kernels.image import Site, build_image

BY_VECTOR = Layout(
    name="vector",
    square=(),
    wide=(RankBand(8, 2), RankBand(4, 5), RankBand(3, 33)),
    group_v=(1, 0),
    group_u=(0, 1),
    symmetric=True,
)
BY_TILE = replace(
    BY_VECTOR,
    name="tile",
    wide=(RankBand(3, 2), RankBand(2, 7)),
    group_v=(1, 128),
    group_u=(1, 128),
    symmetric=False,
)
DIRECT = replace(BY_VECTOR, name="direct", group_v=(0, 0), direct_bits=1)
SITE = Site(name="qk", parts=("q", "k"), out_features=(17, 16), in_features=70)


def draw(layout, *, seed=0, site=SITE, without=()):
    delta = Pool(seed).delta((site,), layout)
    return {name: matrix for name, matrix in delta.items() if name not in without}


def build_arena(deltas, *, n_slots=None, site=SITE, operand_order=True):
    images = [build_image((site,), delta) for delta in deltas]
    spec = ArenaSpec.covering((site,), images)
    n_slots = len(images) if n_slots is None else n_slots
    arena = DeltaArena(spec, n_slots=n_slots, device="cpu", operand_order=operand_order)
    return arena, [arena.load(image) for image in images]


def expected_terms(deltas, numbers, x, site=SITE):
    wanted = torch.zeros(len(x), site.total_out, dtype=torch.float64)
    for token, number in enumerate(numbers):
        first = 0
        for name, out in zip(site.parts, site.out_features, strict=True):
            if number >= 0 and name in deltas[number]:
                wanted[token, first : first + out] = (
                    exact_delta(deltas[number][name]) @ x[token].double()
                )
            first += out
    return wanted


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())
