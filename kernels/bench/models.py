"""Deltas of the shapes of real models with random codes: what the benchmark times."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from deltacome_core.layout import Group, RankBand, scale_shape, words_per_row
from deltacome_core.packed import (
    PackedBand,
    PackedDirect,
    PackedFactor,
    PackedLinear,
    PackedMatrix,
)
from kernels.image import Site

_POOL_WORDS: Final = 1 << 22


# Share of a delta's energy in its first singular values, a 4096 x 4096 matrix of a full fine-tune
# of a 7B: Delta-CoMe (arXiv 2406.08903), figure 1.
_MEASURED_SHARES: Final = {
    2: 0.022,
    34: 0.267,
    128: 0.45,
    256: 0.57,
    512: 0.71,
    1002: 0.84,
    1462: 0.90,
    2048: 0.95,
    4096: 1.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A recipe as kernels see it: bands for square, wide and deep matrices, and scale groups."""

    name: str
    square: tuple[RankBand, ...]
    wide: tuple[RankBand, ...]
    group_v: Group
    group_u: Group
    symmetric: bool
    direct_bits: int = 0
    deep: tuple[RankBand, ...] = ()

    def bands(self, out_features: int, in_features: int) -> tuple[RankBand, ...]:
        """Bands of one matrix."""
        if out_features == in_features:
            return self.square
        return self.deep if self.deep and in_features > out_features else self.wide


def measured_energies() -> list[float]:
    """Energies of 4096 directions, falling: straight lines between measured ones, log by log."""
    ranks, shares = (np.array([0, *found]) for found in zip(*_MEASURED_SHARES.items(), strict=True))
    middles = np.sqrt(np.maximum(ranks[:-1], 1) * ranks[1:])
    energies = np.diff(shares) / np.diff(ranks)
    directions = np.log(np.arange(1, 4097))
    found = np.exp(np.interp(directions, np.log(middles), np.log(energies)))
    return [float(energy) for energy in found / found.sum()]


# The default recipe at one bit a parameter: what it plans for `measured_energies`.
HUB: Final = Layout(
    name="hub",
    square=(RankBand(4, 16), RankBand(3, 96), RankBand(2, 704), RankBand(1, 271)),
    wide=(RankBand(4, 32), RankBand(3, 192), RankBand(2, 928), RankBand(1, 416)),
    deep=(RankBand(4, 32), RankBand(3, 192), RankBand(2, 944), RankBand(1, 384)),
    group_v=(1, 0),
    group_u=(0, 1),
    symmetric=True,
)
# The published bands with the packing of `come`; 1,428 ranks in MLP matrices (run.sh).
COME: Final = Layout(
    name="come",
    square=(RankBand(8, 2), RankBand(3, 32), RankBand(2, 968)),
    wide=(RankBand(8, 2), RankBand(3, 32), RankBand(2, 1396)),
    group_v=(1, 128),
    group_u=(1, 128),
    symmetric=False,
)
BITDELTA: Final = Layout(
    name="bitdelta",
    square=(),
    wide=(),
    group_v=(0, 0),
    group_u=(0, 0),
    symmetric=True,
    direct_bits=1,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a backbone's linear layers."""

    name: str
    n_layers: int
    hidden: int
    intermediate: int
    key_value: int

    def sites(self) -> tuple[Site, ...]:
        """Sites of all layers in order: q|k|v, o, gate|up, down."""
        return tuple(site for layer in range(self.n_layers) for site in self._layer(layer))

    def _layer(self, layer: int) -> Iterator[Site]:
        prefix = f"model.layers.{layer}"
        hidden, wide = self.hidden, self.intermediate
        for name, parts, outs, width in (
            ("qkv", ("q", "k", "v"), (hidden, self.key_value, self.key_value), hidden),
            ("o", ("o",), (hidden,), hidden),
            ("gate_up", ("gate", "up"), (wide, wide), hidden),
            ("down", ("down",), (hidden,), wide),
        ):
            yield Site(
                name=f"{prefix}.{name}",
                parts=tuple(f"{prefix}.{part}" for part in parts),
                out_features=outs,
                in_features=width,
            )


LLAMA_7B: Final = ModelShape(
    name="Llama-2-7B", n_layers=32, hidden=4096, intermediate=11008, key_value=4096
)


class Pool:
    """Random words that all factors of a delta are cut from."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._generator = generator
        self._words = torch.randint(
            -(1 << 31), (1 << 31) - 1, (_POOL_WORDS,), dtype=torch.int32, generator=generator
        )
        self._at = 0

    def words(self, rows: int, columns: int) -> torch.Tensor:
        """int32 [rows, columns] of random bits."""
        size = rows * columns
        if self._at + size > _POOL_WORDS:
            self._at = 0
        found = self._words[self._at : self._at + size]
        self._at += size
        if len(found) < size:
            found = self._words.repeat(-(-size // _POOL_WORDS))[:size]
        return found.view(rows, columns)

    def factor(
        self, rows: int, cols: int, *, bits: int, group: Group, symmetric: bool
    ) -> PackedFactor:
        """Draw a factor; bits beyond the last code are random too, no kernel reads them."""
        grid = scale_shape(rows, cols, group)
        levels = 1 << bits
        scale = (torch.rand(grid, generator=self._generator) * 2 / levels + 1 / levels).half()
        zero = torch.randint(levels, grid, generator=self._generator).to(torch.uint8)
        return PackedFactor(
            codes=self.words(rows, words_per_row(cols, bits)),
            scale=scale,
            zero=None if symmetric else zero,
            bits=bits,
            rows=rows,
            cols=cols,
            group=group,
        )

    def matrix(self, name: str, out: int, width: int, layout: Layout) -> PackedLinear:
        """Draw a packed matrix [out, width]."""
        if layout.direct_bits:
            factor = self.factor(
                out,
                width,
                bits=layout.direct_bits,
                group=layout.group_v,
                symmetric=layout.symmetric,
            )
            return PackedDirect(name=name, factor=factor)
        bands = layout.bands(out, width)
        rank = sum(band.rank for band in bands)
        return PackedMatrix(
            name=name,
            out_features=out,
            in_features=width,
            sigma=torch.rand(rank, generator=self._generator) * 0.1 + 0.01,
            bands=tuple(
                PackedBand(
                    u=self.factor(
                        out,
                        band.rank,
                        bits=band.bits,
                        group=layout.group_u,
                        symmetric=layout.symmetric,
                    ),
                    v=self.factor(
                        band.rank,
                        width,
                        bits=band.bits,
                        group=layout.group_v,
                        symmetric=layout.symmetric,
                    ),
                )
                for band in bands
            ),
        )

    def delta(self, sites: tuple[Site, ...], layout: Layout) -> dict[str, PackedLinear]:
        """Draw all matrices of a delta."""
        return {
            name: self.matrix(name, out, site.in_features, layout)
            for site in sites
            for name, out in zip(site.parts, site.out_features, strict=True)
        }
