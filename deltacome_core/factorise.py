"""From the delta of a tensor to its packed form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from deltacome_core.bands import Allowance, largest_rank, plan_bands
from deltacome_core.bitpack import pack_codes
from deltacome_core.device_memory import return_spare
from deltacome_core.errors import InternalError
from deltacome_core.gptq import Feedback, prepare_feedback, quantise_with_feedback
from deltacome_core.layout import Group, RankBand
from deltacome_core.packed import (
    PackedBand,
    PackedFactor,
    PackedLinear,
    PackedMatrix,
)
from deltacome_core.quantize import (
    QuantisedFactor,
    largest_codes,
    round_to_nearest,
    unbias_sigma,
)
from deltacome_core.recipe import Recipe
from deltacome_core.svd import truncated_svd
from deltacome_core.vectors import (
    QuantisedVectors,
    prepare_columns,
    quantise_rows,
    quantise_side_by_side,
)
from deltacome_core.walk import Walks


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedDelta:
    """delta float32 [out, in] of one matrix."""

    name: str
    delta: torch.Tensor

    def to(self, device: torch.device) -> "NamedDelta":
        return NamedDelta(name=self.name, delta=self.delta.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorisedMatrix:
    """A packed matrix on the host, and ||reconstruction - delta|| / ||delta||."""

    packed: PackedLinear
    relative_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decomposed:
    source: NamedDelta
    bands: tuple[RankBand, ...]
    left: torch.Tensor
    sigma: torch.Tensor
    right: torch.Tensor


def factorise_matrices(
    deltas: Sequence[NamedDelta],
    recipe: Recipe,
    *,
    hessian: torch.Tensor | None,
    bands: Mapping[str, tuple[RankBand, ...]] | None = None,
    allowance: Allowance | None = None,
    walks: Walks | None = None,
) -> tuple[FactorisedMatrix, ...]:
    """Decompose and quantise the deltas of matrices that read the same input.

    V goes first, with the Hessian of the input; then U with the Hessian that the quantised V leaves
    it. Rows of V are independent, so all bands of all matrices share one pass.

    Args:
        deltas: float32 [out, in] each, one `in` for all, on the device that does the work, none
            too small for the recipe.
        recipe: gives the rank bands and the quantiser.
        hessian: float32 [in, in], mean of x x^T; None rounds without feedback.
        bands: of matrices whose bands were chosen before, by name.
        allowance: bytes that matrices before these left; what these leave is added.
        walks: of matrices before these, to be used again.

    Returns:
        One packed matrix per delta, in order.

    Source: Delta-CoMe (arXiv 2406.08903), section 3; H_U = S V H V^T S replaces its second sweep.
    """
    spare, fixed = allowance or Allowance(), bands or {}
    decomposed = [_decompose(each, recipe, fixed.get(each.name), spare) for each in deltas]
    if recipe.grid == "vector":
        return _factorise_vectors(decomposed, recipe, hessian, walks or Walks())
    tops = [_codes_by_row(item.bands, item.right.device) for item in decomposed]
    rights = torch.cat([item.right for item in decomposed])
    quantised = _quantise(rights, torch.cat(tops), _feedback(hessian, recipe), recipe)
    counts = [item.right.shape[0] for item in decomposed]
    pieces = _split_rows(quantised, counts)
    return tuple(
        _finish(item, piece, recipe, hessian=hessian)
        for item, piece in zip(decomposed, pieces, strict=True)
    )


def _decompose(
    source: NamedDelta,
    recipe: Recipe,
    bands: tuple[RankBand, ...] | None,
    allowance: Allowance,
) -> _Decomposed:
    out_features, in_features = source.delta.shape
    spare_bytes = allowance.spare_bytes
    widest = largest_rank(out_features, in_features, recipe, spare_bytes=spare_bytes)
    if not widest:
        raise InternalError(f"{source.name} is too small for {recipe.matrix_bits:g} bits")
    left, sigma, right = truncated_svd(source.delta, widest)
    if bands is None:
        energies = sigma.double().square().tolist()
        bands = plan_bands(
            out_features, in_features, recipe, energies=energies, spare_bytes=spare_bytes
        )
        allowance.settle(out_features, in_features, recipe, bands)
    rank = sum(band.rank for band in bands)
    return _Decomposed(
        source=source, bands=bands, left=left[:, :rank], sigma=sigma[:rank], right=right[:rank]
    )


def _codes_by_row(bands: Sequence[RankBand], device: torch.device) -> torch.Tensor:
    return torch.cat([largest_codes(band.bits, band.rank, device) for band in bands])


def _feedback(hessian: torch.Tensor | None, recipe: Recipe) -> Feedback | None:
    if hessian is None:
        return None
    return prepare_feedback(hessian, group_size=recipe.group_size, damping=recipe.damping)


def _quantise(
    values: torch.Tensor, max_code: torch.Tensor, feedback: Feedback | None, recipe: Recipe
) -> QuantisedFactor:
    if feedback is not None:
        return quantise_with_feedback(values, max_code, feedback)
    # A calibrated recipe without a Hessian is GPTQ with the identity: plain min-max rounding.
    return round_to_nearest(values, max_code, group_size=recipe.group_size, clip_search=False)


def _split_rows(factor: QuantisedFactor, counts: Sequence[int]) -> list[QuantisedFactor]:
    pieces = []
    start = 0
    for count in counts:
        rows = slice(start, start + count)
        pieces.append(
            QuantisedFactor(
                codes=factor.codes[rows],
                scale=factor.scale[rows],
                zero=None if factor.zero is None else factor.zero[rows],
                group_size=factor.group_size,
                max_code=factor.max_code[rows],
            )
        )
        start += count
    return pieces


def _finish(
    item: _Decomposed, right: QuantisedFactor, recipe: Recipe, *, hessian: torch.Tensor | None
) -> FactorisedMatrix:
    lefts: list[QuantisedFactor] = []
    rights = _split_rows(right, [band.rank for band in item.bands])
    start = 0
    for band, right_band in zip(item.bands, rights, strict=True):
        columns = slice(start, start + band.rank)
        left_hessian = None
        if hessian is not None:
            reading = right_band.dequantise() * item.sigma[columns, None]  # [rank, in]
            left_hessian = reading @ hessian @ reading.T
        left = item.left[:, columns].contiguous()
        top = largest_codes(band.bits, left.shape[0], left.device)
        lefts.append(_quantise(left, top, _feedback(left_hessian, recipe), recipe))
        start += band.rank
    packed = tuple(
        PackedBand(
            u=pack_factor(left, band.bits, recipe.group_size),
            v=pack_factor(right_band, band.bits, recipe.group_size),
        )
        for band, left, right_band in zip(item.bands, lefts, rights, strict=True)
    )
    left_values = torch.cat([factor.dequantise() for factor in lefts], dim=1)
    return _pack_matrix(item, packed, item.sigma, left_values, right.dequantise())


def _factorise_vectors(
    decomposed: Sequence[_Decomposed],
    recipe: Recipe,
    hessian: torch.Tensor | None,
    walks: Walks,
) -> tuple[FactorisedMatrix, ...]:
    bits = [_bits_by_vector(item.bands, item.right.device) for item in decomposed]
    rights = _quantise_rights(decomposed, bits, recipe, hessian, walks)
    counts = [len(widths) for widths in bits]
    values = torch.split(rights.values[0], counts)
    own = None
    if hessian is not None:
        readings = [
            right * item.sigma[:, None] for item, right in zip(decomposed, values, strict=True)
        ]
        own = [
            prepare_columns((reading @ hessian @ reading.T)[None], damping=recipe.damping)
            for reading in readings
        ]
    lefts = quantise_side_by_side([item.left for item in decomposed], bits, own, walks=walks)
    parts = zip(
        decomposed,
        lefts,
        values,
        torch.split(rights.codes[0], counts),
        torch.split(rights.scale[0], counts),
        strict=True,
    )
    return tuple(
        _finish_vectors(item, left, right, packed_right=(codes, scale), hessian=hessian)
        for item, left, right, codes, scale in parts
    )


def _quantise_rights(
    decomposed: Sequence[_Decomposed],
    bits: list[torch.Tensor],
    recipe: Recipe,
    hessian: torch.Tensor | None,
    walks: Walks,
) -> QuantisedVectors:
    """Quantise the V of all matrices together; the factor of their Hessian ends with it."""
    feedback = None
    if hessian is not None:
        # A decomposition leaves blocks of other sizes than the factor's.
        return_spare(hessian.device)
        feedback = prepare_columns(hessian[None], damping=recipe.damping)
    return quantise_rows(
        torch.cat([item.right for item in decomposed])[None],
        torch.cat(bits)[None],
        feedback,
        headroom=recipe.headroom,
        walks=walks,
    )


def _bits_by_vector(bands: Sequence[RankBand], device: torch.device) -> torch.Tensor:
    widths = [width for band in bands for width in [band.bits] * band.rank]
    return torch.tensor(widths, dtype=torch.int64, device=device)


def _finish_vectors(
    item: _Decomposed,
    lefts: QuantisedVectors,
    right: torch.Tensor,
    *,
    packed_right: tuple[torch.Tensor, torch.Tensor],
    hessian: torch.Tensor | None,
) -> FactorisedMatrix:
    left = lefts.values
    sigma = unbias_sigma(
        item.sigma,
        left=item.left,
        right=item.right,
        rounded_left=left,
        rounded_right=right,
        hessian=hessian,
    )
    right_codes, right_scale = packed_right
    bands = []
    start = 0
    for band in item.bands:
        at = slice(start, start + band.rank)
        start += band.rank
        bands.append(
            PackedBand(
                u=_pack_vectors(lefts.codes[:, at], lefts.scale[None, at], band.bits, (0, 1)),
                v=_pack_vectors(right_codes[at], right_scale[at, None], band.bits, (1, 0)),
            )
        )
    return _pack_matrix(item, tuple(bands), sigma, left, right)


def _pack_vectors(
    codes: torch.Tensor, scale: torch.Tensor, bits: int, group: Group
) -> PackedFactor:
    rows, cols = codes.shape
    return PackedFactor(
        codes=pack_codes(codes.contiguous(), bits).cpu(),
        scale=scale.half().cpu().contiguous(),
        zero=None,
        bits=bits,
        rows=rows,
        cols=cols,
        group=group,
    )


def _pack_matrix(
    item: _Decomposed,
    bands: tuple[PackedBand, ...],
    sigma: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
) -> FactorisedMatrix:
    delta = item.source.delta
    error = torch.linalg.vector_norm((left * sigma) @ right - delta)
    size = torch.linalg.vector_norm(delta).clamp_min(1e-30)
    packed = PackedMatrix(
        name=item.source.name,
        out_features=delta.shape[0],
        in_features=delta.shape[1],
        sigma=sigma.cpu(),
        bands=bands,
    )
    return FactorisedMatrix(packed=packed, relative_error=float(error / size))


def pack_factor(factor: QuantisedFactor, bits: int, group_size: int) -> PackedFactor:
    """Pack codes into words and move everything to the host.

    Args:
        factor: codes uint8 [rows, cols] and their grid.
        bits: width of the codes.
        group_size: columns that share a scale.

    Returns:
        The factor as stored.
    """
    rows, cols = factor.codes.shape
    return PackedFactor(
        codes=pack_codes(factor.codes, bits).cpu(),
        scale=factor.scale.cpu(),
        zero=None if factor.zero is None else factor.zero.cpu(),
        bits=bits,
        rows=rows,
        cols=cols,
        group=(1, group_size),
    )
