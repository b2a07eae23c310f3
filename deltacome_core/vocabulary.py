"""The delta of an embedding or output head: its rows as they are, or as coordinates in a basis."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from deltacome_core.bitpack import pack_codes
from deltacome_core.factorise import pack_factor
from deltacome_core.packed import PackedFactor, PackedRows
from deltacome_core.quantize import largest_codes, round_to_nearest
from deltacome_core.recipe import Recipe
from deltacome_core.rows import BASIS_BITS, BASIS_GROUP, choose_rank, is_scaled

# Rows widened to float32 at once: 8192 rows of 4096 take 128 MiB a copy.
_ROWS_AT_ONCE = 8192
# Share of the mean count that every token is given, seen or not.
_UNSEEN = 0.05
_DAMPING = 0.01
# Basis and base scale are fitted in turns, since each depends on the other.
_SCALE_TURNS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyUse:
    """How a vocabulary is used on the calibration text.

    counts: float32 [rows of the fine-tune], how often each token occurs; hessian: float32
    [cols, cols], mean of x x^T over what the rows are multiplied with, None for a table that is
    only looked up.
    """

    counts: torch.Tensor
    hessian: torch.Tensor | None


def pack_vocabulary(
    name: str,
    base: torch.Tensor,
    tuned: torch.Tensor,
    recipe: Recipe,
    *,
    device: torch.device,
    use: VocabularyUse | None = None,
) -> PackedRows:
    """Quantise the rows of a vocabulary that changed; rows the backbone lacks stay exact.

    Args:
        name: tensor name.
        base: float [base rows, cols] in its own dtype.
        tuned: float [rows, cols] in its own dtype, rows >= base rows.
        recipe: gives the bits and the budget.
        device: where the work is done.
        use: makes a basis fit what is looked up and multiplied; without it all rows count alike.

    Returns:
        The packed rows, on the host.
    """
    rows, cols = base.shape
    changed = _find_changed(base, tuned[:rows])
    rank = choose_rank(rows, cols, int(changed.sum()), recipe)
    basis = base_scale = None
    pairs = partial(_changed_pairs, base, tuned, changed, device)
    if rank is None:
        pieces = [_round_rows(ours - theirs, recipe) for theirs, ours, _ in pairs()]
    else:
        has_scale = is_scaled(rows, int(changed.sum()))
        basis, base_scale, pieces = _fit_basis(
            pairs, rank=rank, has_scale=has_scale, device=device, use=use
        )
    return PackedRows(
        name=name,
        rows=rows,
        cols=cols,
        changed=changed,
        factor=_stack(pieces),
        new_rows=tuned[rows:].clone() if tuned.shape[0] > rows else None,
        basis=basis,
        base_scale=base_scale,
    )


def count_changed_rows(base: torch.Tensor, tuned: torch.Tensor) -> int:
    """Count the rows of a vocabulary that carry codes.

    Args:
        base: float [base rows, cols].
        tuned: float [rows, cols], rows >= base rows.

    Returns:
        How many of the backbone's rows differ.
    """
    return int(_find_changed(base, tuned[: len(base)]).sum())


def _find_changed(base: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    pairs = zip(torch.split(old, _ROWS_AT_ONCE), torch.split(base, _ROWS_AT_ONCE), strict=True)
    return torch.cat([(ours != theirs.to(ours.dtype)).any(dim=1) for ours, theirs in pairs])


def _changed_pairs(
    base: torch.Tensor, tuned: torch.Tensor, changed: torch.Tensor, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield changed rows of backbone and fine-tune, float32 on the device, and which they are."""
    for index in torch.split(changed.nonzero()[:, 0], _ROWS_AT_ONCE):
        if index.numel():
            yield base[index].to(device).float(), tuned[index].to(device).float(), index


def _round_rows(delta: torch.Tensor, recipe: Recipe) -> PackedFactor:
    top = largest_codes(recipe.embedding_bits, len(delta), delta.device)
    factor = round_to_nearest(delta, top, group_size=recipe.group_size, clip_search=True)
    return pack_factor(factor, recipe.embedding_bits, recipe.group_size)


def _fit_basis(
    pairs: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]],
    *,
    rank: int,
    has_scale: bool,
    device: torch.device,
    use: VocabularyUse | None,
) -> tuple[torch.Tensor, torch.Tensor | None, list[PackedFactor]]:
    """Find the directions that matter most and round each row's coordinates in them.

    Rows are weighted by the fourth root of their counts and directions by H^(1/4), midway between
    no weights and full ones (ADR 11).
    """
    whiten = None if use is None or use.hessian is None else _root(use.hessian.to(device))
    moments = _measure_moments(pairs(), whiten, _row_weights(use, device))
    base_scale = torch.ones(1, device=device)
    if has_scale:
        base_scale += _fit_shrinkage(moments, rank)
    energies, directions = torch.linalg.eigh(moments.of_rest(float(base_scale) - 1))
    directions = directions[:, -rank:].flip(1)  # [cols, rank]
    # Coordinates of size one in every direction, so that a row's share one scale.
    size = energies[-rank:].flip(0).clamp_min(0.0) / moments.total
    size = size.sqrt().clamp_min(1e-30)
    reading = directions if whiten is None else whiten[0] @ directions
    writing = directions.T if whiten is None else directions.T @ whiten[1]
    reading = (reading / size).float()
    pieces = [
        _round_coordinates((ours - theirs * base_scale) @ reading) for theirs, ours, _ in pairs()
    ]
    basis = (writing * size[:, None]).to(torch.bfloat16).cpu()
    return basis, base_scale.cpu() if has_scale else None, pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moments:
    """Second moments float64 [cols, cols] of changes D and rows B of the backbone.

    change D^T D, cross D^T B, base B^T B, rows weighted and whitened; total is the sum of the
    squared weights.
    """

    change: torch.Tensor
    cross: torch.Tensor
    base: torch.Tensor
    total: float

    def of_rest(self, shrinkage: float) -> torch.Tensor:
        """Moments of D - shrinkage * B."""
        return self.change - shrinkage * (self.cross + self.cross.T) + shrinkage**2 * self.base


def _measure_moments(
    pairs: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    whiten: tuple[torch.Tensor, torch.Tensor] | None,
    weights: torch.Tensor | None,
) -> _Moments:
    change = cross = base = torch.zeros(())
    total = 0.0
    for theirs, ours, index in pairs:
        both = torch.stack([ours - theirs, theirs]).double()
        if whiten is not None:
            both = both @ whiten[0]
        if weights is not None:
            own = weights[index.to(weights.device)]
            both *= own[:, None]
            total += float(own.square().sum())
        else:
            total += len(index)
        moved, rows = both
        change = change.to(both) + moved.T @ moved
        cross = cross.to(both) + moved.T @ rows
        base = base.to(both) + rows.T @ rows
    return _Moments(change=change, cross=cross, base=base, total=total)


def _fit_shrinkage(moments: _Moments, rank: int) -> float:
    """Say by which share of themselves all rows moved: of training with weight decay, below 0.

    Such a move has the backbone's own rank. It is read off where the basis is not, since there it
    is not mixed with what was learnt.
    """
    shrinkage = 0.0
    for _ in range(_SCALE_TURNS):
        rest = torch.linalg.eigh(moments.of_rest(shrinkage)).eigenvectors[:, :-rank]
        moved = ((moments.cross @ rest) * rest).sum()
        size = ((moments.base @ rest) * rest).sum()
        shrinkage = float(moved / size.clamp_min(1e-30))
    return shrinkage


def _root(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return H^(1/4) and its inverse, float64, H damped."""
    exact = hessian.double()
    exact = exact + _DAMPING * exact.diagonal().mean() * torch.eye(
        len(exact), dtype=torch.float64, device=exact.device
    )
    energies, vectors = torch.linalg.eigh(exact)
    roots = energies.clamp_min(1e-300) ** 0.25
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def _row_weights(use: VocabularyUse | None, device: torch.device) -> torch.Tensor | None:
    if use is None:
        return None
    counts = use.counts.to(device).double()
    weights: torch.Tensor = (counts / counts.mean().clamp_min(1e-30) + _UNSEEN) ** 0.25
    return weights


def _round_coordinates(coordinates: torch.Tensor) -> PackedFactor:
    rows, rank = coordinates.shape
    group = BASIS_GROUP[1]
    n_groups = -(-rank // group)
    padded = torch.nn.functional.pad(coordinates, (0, n_groups * group - rank))
    largest = padded.view(rows, n_groups, group).abs().amax(dim=2)
    top = (1 << BASIS_BITS) - 1
    scale = (largest * 2 / top).half()
    spread = scale.float().repeat_interleave(group, dim=1)[:, :rank]
    codes = coordinates / torch.where(spread > 0, spread, 1.0) + top / 2
    codes = codes.round_().clamp_(0, top).to(torch.uint8)
    return PackedFactor(
        codes=pack_codes(codes, BASIS_BITS).cpu(),
        scale=scale.cpu(),
        zero=None,
        bits=BASIS_BITS,
        rows=rows,
        cols=rank,
        group=BASIS_GROUP,
    )


def _stack(pieces: Sequence[PackedFactor]) -> PackedFactor | None:
    if not pieces:
        return None
    first = pieces[0]
    zeros = [piece.zero for piece in pieces if piece.zero is not None]
    return PackedFactor(
        codes=torch.cat([piece.codes for piece in pieces]),
        scale=torch.cat([piece.scale for piece in pieces]),
        zero=torch.cat(zeros) if zeros else None,
        bits=first.bits,
        rows=sum(piece.rows for piece in pieces),
        cols=first.cols,
        group=first.group,
    )
