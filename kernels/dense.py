"""Resident deltas as plain matrices: prompts of hundreds of tokens, and whole fine-tunes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from deltacome_core.errors import UserError
from deltacome_core.packed import PackedDirect, PackedFactor, PackedMatrix
from kernels.arena import DeltaArena
from kernels.directory import EXPAND_RECORDS, RECORD_INTS, SHRINK_RECORDS, WIDTHS


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseFactors:
    """One matrix of a site: scale * left @ right, or scale * left, at outputs first_row and on.

    Values are doubled so that odd multiples of a half become whole numbers, exact in 16 bits.
    """

    first_row: int
    left: torch.Tensor
    right: torch.Tensor | None

    @property
    def scale(self) -> float:
        return 0.5 if self.right is None else 0.25


class Unfolder:
    """Room for the factors of one matrix, used again for the next so that they stay in cache."""

    def __init__(self, arena: DeltaArena, *, dtype: torch.dtype) -> None:
        self.arena = arena
        self.dtype = dtype
        self._room: dict[str, torch.Tensor] = {}

    def _take(self, key: str, rows: int, columns: int) -> torch.Tensor:
        size = rows * columns
        room = self._room.get(key)
        if room is None or room.numel() < size:
            room = torch.empty(size, dtype=self.dtype, device=self.arena.device)
            self._room[key] = room
        return room[:size].view(rows, columns)

    def each(self, slot: int, site: int) -> Iterator[DenseFactors]:
        """Unfold the matrices of a site one after the other; each is overwritten by the next.

        Args:
            slot: whose delta.
            site: number of the site.

        Returns:
            The matrices that differ from the backbone's, in the dtype of this unfolder.

        Raises:
            UserError: arena_slot_unknown.
        """
        image = None if slot == -1 else self.arena.images[slot]
        if image is None:
            raise UserError("arena_slot_unknown", slot=slot, n_slots=self.arena.n_slots)
        where = self.arena.spec.sites[site]
        first_row = band = 0
        for number, (name, out) in enumerate(zip(where.parts, where.out_features, strict=True)):
            matrix = image.matrices.get(name)
            if isinstance(matrix, PackedMatrix):
                yield self._unfold_matrix(slot, site, (number, band, first_row), matrix)
                band += len(matrix.bands)
            elif isinstance(matrix, PackedDirect):
                left = self._take("left", out, where.in_features)
                self._unfold_factor(
                    slot, site, self._output(number, matrix.factor), left, matrix.factor
                )
                yield DenseFactors(first_row=first_row, left=left, right=None)
            first_row += out

    def _output(self, part: int, factor: PackedFactor) -> int:
        return EXPAND_RECORDS + (part * len(WIDTHS) + WIDTHS.index(factor.bits)) * RECORD_INTS

    def _unfold_matrix(
        self, slot: int, site: int, place: tuple[int, int, int], matrix: PackedMatrix
    ) -> DenseFactors:
        part, band, first_row = place
        left = self._take("left", matrix.out_features, matrix.rank)
        right = self._take("right", matrix.rank, matrix.in_features)
        first = 0
        for number, packed in enumerate(matrix.bands, start=band):
            last = first + packed.rank
            at = SHRINK_RECORDS + number * RECORD_INTS
            self._unfold_factor(slot, site, at, right[first:last], packed.v)
            self._unfold_factor(
                slot, site, self._output(part, packed.u), left[:, first:last], packed.u
            )
            first = last
        return DenseFactors(first_row=first_row, left=left, right=right)

    def _unfold_factor(
        self, slot: int, site: int, at: int, out: torch.Tensor, factor: PackedFactor
    ) -> None:
        from kernels.triton_ops.unfold import unfold

        record = self.arena.directory[slot, site, at:]
        grouped = bool(factor.zero is not None or factor.group[1] not in {0, 1, factor.cols})
        unfold(record, self.arena.table, slot, out, bits=factor.bits, is_grouped=grouped)


def multiply_prompt(
    y: torch.Tensor, x: torch.Tensor, unfolder: Unfolder, slot: int, site: int
) -> torch.Tensor:
    """Add the delta of one tenant to the outputs of many of its tokens, in place.

    The factors are unfolded once and multiplied by the device's library: above a handful of tokens
    that beats reading codes once a group.

    Args:
        y: [tokens, out of all parts] in the unfolder's dtype.
        x: [tokens, in] in the same dtype.
        unfolder: of the arena.
        slot: the tokens' delta.
        site: number of the site.

    Returns:
        y; the delta term within 4e-3 of the exact one (relative L2) in bf16.

    Raises:
        UserError: arena_slot_unknown.
    """
    for factors in unfolder.each(slot, site):
        own = y[:, factors.first_row : factors.first_row + len(factors.left)]
        hidden = x if factors.right is None else x @ factors.right.T
        torch.addmm(own, hidden, factors.left.T, alpha=factors.scale, out=own)
    return y


def merge_site(
    weight: torch.Tensor, unfolder: Unfolder, slot: int, site: int, *, out: torch.Tensor
) -> torch.Tensor:
    """The fine-tune's weight at a site, W + U V or W + D.

    Args:
        weight: [out of all parts, in] of the backbone in the unfolder's dtype.
        unfolder: of the arena.
        slot: whose delta.
        site: number of the site.
        out: of the weight's shape, overwritten; not the weight, which stays the backbone's.

    Returns:
        out, within 4e-3 of the exact weight (relative L2) in bf16.

    Raises:
        UserError: arena_slot_unknown.
    """
    changed = []
    for factors in unfolder.each(slot, site):
        rows = slice(factors.first_row, factors.first_row + len(factors.left))
        changed.append(rows)
        if factors.right is None:
            torch.add(weight[rows], factors.left, alpha=factors.scale, out=out[rows])
        else:
            torch.addmm(
                weight[rows], factors.left, factors.right, alpha=factors.scale, out=out[rows]
            )
    first = 0
    for size in unfolder.arena.spec.sites[site].out_features:
        if not any(rows.start == first for rows in changed):
            out[first : first + size].copy_(weight[first : first + size])
        first += size
    return out
