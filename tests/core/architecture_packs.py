"""The pair of each class, compressed once for all tests of a process."""

from dataclasses import dataclass
from pathlib import Path

import architectures
import torch
from architectures import ARCHITECTURES

from deltacome_core.compress import compress_checkpoint
from deltacome_core.compress_report import CompressReport
from deltacome_core.container import open_delta
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint

COME = get_recipe("come", matrix_bits=4.0)
FREE = get_recipe("datafree", matrix_bits=4.0)


@dataclass(frozen=True, kw_only=True)
class Packed:
    folder: Path
    report: CompressReport

    @property
    def base(self):
        return self.folder / "base"

    @property
    def tuned(self):
        return self.folder / "tuned"

    @property
    def delta(self):
        return open_delta(self.folder / "come")


def pack_class(name, folder):
    """Compress the pair of a class, with calibration and without, and rebuild the first."""
    base, tuned = architectures.save_pair(folder, ARCHITECTURES[name])
    report = compress_checkpoint(base, tuned, folder / "come", COME)
    compress_checkpoint(base, tuned, folder / "free", FREE)
    reconstruct_checkpoint(base, folder / "come", folder / "back")
    return Packed(folder=folder, report=report)


def multiply_out(matrix):
    total = torch.zeros(matrix.out_features, matrix.in_features, dtype=torch.float64)
    sigma = matrix.sigma.double()
    for band in matrix.bands:
        scaled = band.u.dequantise().double() * sigma[: band.rank]
        total += scaled @ band.v.dequantise().double()
        sigma = sigma[band.rank :]
    return total
