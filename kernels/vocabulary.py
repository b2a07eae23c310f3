"""Embeddings and heads of resident deltas: rows for tokens, and the head as one more site."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from deltacome_core.bitpack import pack_codes, unpack_codes
from deltacome_core.errors import InternalError, UserError
from deltacome_core.layout import scale_shape
from deltacome_core.packed import PackedDirect, PackedFactor, PackedRows
from kernels.streams import send


def head_matrix(rows: PackedRows) -> PackedDirect:
    """The delta of an output head as a direct matrix, for a site of an arena.

    A head whose rows are coordinates is a site of as many inputs as its basis has ranks: what it
    multiplies is `EmbeddingTable.project` of its input.

    Args:
        rows: packed rows of the head on the CPU; scales of whole or parts of single rows.

    Returns:
        [rows of the backbone, cols, or ranks of the basis]; a row that did not change has scales
        of 0.

    Raises:
        UserError: arena_recipe_unknown, no row changed or rows share a scale.
    """
    factor = rows.factor
    if factor is None or factor.group[0] != 1:
        raise UserError("arena_recipe_unknown", name=rows.name, reason="no scale for single rows")
    if factor.rows == rows.rows:
        return PackedDirect(name=rows.name, factor=factor)

    def spread(grid: torch.Tensor) -> torch.Tensor:
        full = grid.new_zeros((rows.rows, grid.shape[1]))
        full[rows.changed] = grid
        return full

    full = replace(
        factor,
        codes=spread(factor.codes),
        scale=spread(factor.scale),
        zero=None if factor.zero is None else spread(factor.zero),
        rows=rows.rows,
    )
    return PackedDirect(name=rows.name, factor=full)


def pad_ranks(rows: PackedRows, ranks: int) -> PackedRows:
    """The same rows with more coordinates, in directions of length 0.

    A table and a site have one rank for all; a budget gives more where fewer rows changed.

    Args:
        rows: packed rows with a basis.
        ranks: as many as the basis has, or more.

    Returns:
        Rows of the same values.

    Raises:
        InternalError: the rows are no coordinates, or have more of them.
    """
    factor, basis = rows.factor, rows.basis
    if factor is None or basis is None or factor.cols > ranks:
        raise InternalError(f"{rows.name} cannot have {ranks} coordinates")
    if factor.cols == ranks:
        return rows
    codes = unpack_codes(factor.codes, factor.bits, factor.cols)
    more = count_groups(ranks, factor.group[1]) - factor.scale.shape[1]
    padded = replace(
        factor,
        codes=pack_codes(functional.pad(codes, (0, ranks - factor.cols)), factor.bits),
        scale=functional.pad(factor.scale, (0, more)),
        zero=None if factor.zero is None else functional.pad(factor.zero, (0, more)),
        cols=ranks,
    )
    long = functional.pad(basis, (0, 0, 0, ranks - factor.cols))
    return replace(rows, factor=padded, basis=long)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    places: torch.Tensor
    factor: PackedFactor | None
    zero: torch.Tensor
    basis: torch.Tensor | None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """What the kernels read, in the order of the table."""
        codes, scale = (
            (None, None) if self.factor is None else (self.factor.codes, self.factor.scale)
        )
        return self.places, codes, scale, self.zero, self.basis


@dataclass(frozen=True, slots=True, kw_only=True)
class RowKind:
    """How rows are packed; `width` counts codes of a row, with a basis its ranks."""

    cols: int
    width: int
    bits: int
    group: int
    has_zero: bool
    has_basis: bool


class EmbeddingTable:
    """Packed embedding rows of the deltas in the slots of an arena, one kind for all."""

    def __init__(self, *, n_slots: int, like: PackedRows, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._kind = self.read_kind(like)
        self._held: list[_Held | None] = [None] * n_slots
        self._table = torch.zeros((n_slots, 5), dtype=torch.int64, device=self.device)

    @staticmethod
    def read_kind(rows: PackedRows) -> RowKind:
        """Say how rows are packed: kernels are compiled for just this.

        Args:
            rows: packed rows of a delta.

        Returns:
            Their kind.

        Raises:
            UserError: arena_recipe_unknown, no row changed or rows share a scale.
        """
        factor = rows.factor
        if factor is None or factor.group[0] != 1:
            reason = "no scale for single rows"
            raise UserError("arena_recipe_unknown", name=rows.name, reason=reason)
        return RowKind(
            cols=rows.cols,
            width=factor.cols,
            bits=factor.bits,
            group=factor.group[1],
            has_zero=factor.zero is not None,
            has_basis=rows.basis is not None,
        )

    def put(self, slot: int, rows: PackedRows) -> None:
        """Hold a delta's rows.

        Args:
            slot: of its matrices in the arena.
            rows: packed rows; the bytes are copied to the device.

        Raises:
            UserError: arena_recipe_unknown, the rows are packed in another way.
        """
        if self.read_kind(rows) != self._kind:
            raise UserError("arena_recipe_unknown", name=rows.name, reason="rows of another kind")
        packed = rows.to(self.device)
        if packed.factor is None:
            raise InternalError(f"{rows.name} lost its rows")
        places = torch.where(packed.changed, packed.changed.cumsum(0) - 1, -1).int()
        self._hold(slot, places, packed.factor, packed.basis)

    def put_basis(self, slot: int, rows: PackedRows) -> None:
        """Hold what `project` needs of a head, whose rows themselves are a site of the arena.

        Args:
            slot: of its matrices in the arena.
            rows: packed rows with a basis; `add_rows` finds none of them.

        Raises:
            UserError: arena_recipe_unknown, the rows are packed in another way.
        """
        if self.read_kind(rows) != self._kind:
            raise UserError("arena_recipe_unknown", name=rows.name, reason="rows of another kind")
        nowhere = torch.full((rows.rows,), -1, dtype=torch.int32, device=self.device)
        self._hold(slot, nowhere, None, rows.basis)

    def _hold(
        self,
        slot: int,
        places: torch.Tensor,
        factor: PackedFactor | None,
        basis: torch.Tensor | None,
    ) -> None:
        zero = None if factor is None else factor.zero
        held = _Held(
            places=places,
            factor=factor,
            zero=torch.zeros(1, dtype=torch.uint8, device=self.device) if zero is None else zero,
            basis=None if basis is None else basis.to(self.device).bfloat16().contiguous(),
        )
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in held.tensors]
        self._table[slot] = send(np.array(addresses, dtype=np.int64), self.device)
        self._held[slot] = held

    def drop(self, slot: int) -> None:
        """Let go of a delta's rows; no token may name the slot until others are put there.

        Args:
            slot: of `put`; one without rows stays so.
        """
        self._held[slot] = None

    def size_bytes(self, slot: int) -> int:
        """Count what a slot's rows take on the device.

        Args:
            slot: any slot.

        Returns:
            Bytes; 0 where nothing is held.
        """
        held = self._held[slot]
        tensors = () if held is None else held.tensors
        return sum(0 if one is None else one.numel() * one.element_size() for one in tensors)

    def check_slots(self, slots: Sequence[int]) -> None:
        """Refuse a slot without rows.

        Args:
            slots: of the tokens, -1 for the backbone.

        Raises:
            UserError: arena_slot_unknown.
        """
        for slot in set(slots) - {-1}:
            if not 0 <= slot < len(self._held) or self._held[slot] is None:
                raise UserError("arena_slot_unknown", slot=slot, n_slots=len(self._held))

    def add_rows(self, y: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Add each token's embedding delta to the backbone's row, in place.

        Args:
            y: bf16, fp16 or fp32 [tokens, cols], columns adjacent.
            ids: int32 [tokens], rows of the backbone's vocabulary.
            slots: int32 [tokens] on the device, checked with `check_slots`; -1 for the backbone.

        Returns:
            y, each sum rounded once; but for that exact in fp32, or within 2e-6 (relative L2 of the
            delta) where rows are coordinates in a basis.
        """
        if self.device.type != "cuda":
            return self.add_rows_plainly(y, ids, slots)
        from kernels.triton_ops.launch_rows import launch_gather

        kind = self._kind
        launch_gather(
            y,
            ids,
            slots,
            self._table,
            cols=kind.cols,
            width=kind.width,
            bits=kind.bits,
            group=kind.group,
            has_zero=kind.has_zero,
            has_basis=kind.has_basis,
        )
        return y

    def add_rows_plainly(
        self, y: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """What `add_rows` does, in plain torch; arguments and result are the same.

        Args:
            y: same.
            ids: same.
            slots: same.

        Returns:
            y.
        """
        for token, (row, slot) in enumerate(zip(ids.tolist(), slots.tolist(), strict=True)):
            held = None if slot < 0 else self._held[slot]
            place = -1 if held is None else int(held.places[row])
            factor = None if held is None else held.factor
            if held is not None and factor is not None and place >= 0:
                one = replace(
                    factor,
                    codes=factor.codes[place : place + 1],
                    scale=factor.scale[place : place + 1],
                    zero=None if factor.zero is None else factor.zero[place : place + 1],
                    rows=1,
                )
                values = one.dequantise()[0]
                if held.basis is not None:
                    values = values @ held.basis.float()
                y[token] = (y[token].float() + values).to(y.dtype)
        return y

    def project(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Read inputs of a head through the bases of their deltas.

        Args:
            x: bf16, fp16 or fp32 [tokens, cols], columns adjacent.
            slots: int32 [tokens] on the device, checked with `check_slots`; -1 for the backbone.

        Returns:
            fp32 [tokens, ranks], what the head's site of `head_matrix` multiplies; 0 for the
            backbone, within 2e-6 of the exact one (relative L2) for the others.

        Raises:
            InternalError: rows of this table have no basis.
        """
        if not self._kind.has_basis:
            raise InternalError("these rows are no coordinates")
        if self.device.type != "cuda":
            return self.project_plainly(x, slots)
        from kernels.triton_ops.launch_rows import launch_project

        hidden = torch.empty(len(x), self._kind.width, device=x.device)
        launch_project(x, slots, self._table, hidden)
        return hidden

    def project_plainly(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """What `project` does, in plain torch; arguments and result are the same.

        Args:
            x: same.
            slots: same.

        Returns:
            Same.
        """
        hidden = torch.zeros(len(x), self._kind.width, device=x.device)
        for token, slot in enumerate(slots.tolist()):
            held = None if slot < 0 else self._held[slot]
            if held is not None and held.basis is not None:
                hidden[token] = held.basis.float() @ x[token].float()
        return hidden


def count_groups(width: int, group: int) -> int:
    """Scales of one row.

    Args:
        width: codes of the row.
        group: codes that share a scale, 0 for all.

    Returns:
        Their number.
    """
    return scale_shape(1, width, (1, group))[1]
