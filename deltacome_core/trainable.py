"""Modules that apply packed tensors to activations, with some of what they store free to move.

What can move is written as a relative change that starts at 0: floats, and the codes of a
vocabulary's coordinates; those of matrices never move. Every number is rounded to its stored type
in the forward pass, and gradients pass the rounding unchanged.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import embedding, linear, pad

from deltacome_core.bitpack import pack_codes, unpack_codes
from deltacome_core.errors import InternalError
from deltacome_core.packed import (
    ExactTensor,
    PackedFactor,
    PackedMatrix,
    PackedRows,
    PackedTensor,
)

Numbers = Mapping[str, torch.Tensor]
# Verification lets the norms of a trained delta differ so far from the fine-tune's.
_MAX_NORM_CHANGE = 0.2
# All rows at once move much further than one number of many.
_BASE_SCALE_STEP = 0.1
# A change of 1 moves a coordinate by so many times the range of its codes: training that takes
# steps of some thousandths moves it by a few codes in each.
_COORDINATE_STEP = 4.0


class Trainable(Protocol):
    """Something stored that can move."""

    numbers: dict[str, tuple[int, ...]]
    """Shape of each set of relative changes, by its kind; sets of one kind are trained as one."""

    def use(self, changes: Numbers) -> None:
        """Compute with these changes, float32 on the device, from now on."""

    def pack(self, changes: Numbers) -> PackedTensor:
        """Give the packed tensor with these changes, on the host."""


def _as_stored(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round in the forward pass, pass the gradient on."""
    return values + (values.to(dtype).float() - values).detach()


def _move(values: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """A magnitude times 1 + change, never negative, as the format demands."""
    return values * (1 + change).clamp_min(0.0)


def _whole_codes(factor: PackedFactor, dtype: torch.dtype) -> torch.Tensor:
    """Give 2 code - (2^bits - 1): odd numbers up to 255, which bfloat16 holds exactly."""
    codes = unpack_codes(factor.codes, factor.bits, factor.cols).to(dtype)
    return codes.mul_(2).sub_((1 << factor.bits) - 1)


def _move_codes(codes: torch.Tensor, moves: torch.Tensor, bits: int) -> torch.Tensor:
    """Add moves to whole codes, round to the nearest that exists, pass the gradient on."""
    moved = codes.float() + moves
    top = (1 << bits) - 1
    nearest = (2 * torch.floor(moved / 2) + 1).clamp(-top, top)
    return moved + (nearest - moved).detach()


def _pack_whole_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo _whole_codes, of float32 whole codes; on the host."""
    top = (1 << bits) - 1
    return pack_codes(((codes + top) / 2).round().to(torch.uint8).cpu(), bits)


def is_trained_norm(ours: torch.Tensor, truth: torch.Tensor) -> bool:
    """Tell whether the weights of a norm are within what training may change, and one rounding.

    Args:
        ours: float, what a delta holds.
        truth: float of the same shape and dtype, the fine-tune's.

    Returns:
        True if every weight is.
    """
    largest = (_MAX_NORM_CHANGE + torch.finfo(truth.dtype).eps) * truth.float().abs()
    return bool(((ours.float() - truth.float()).abs() <= largest).all())


class HeldLinear(nn.Module):
    """y = x W^T + b in float32, W held in its own type and widened while it is used."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return linear(states, self.weight.float(), self.bias)


class MovingLinear(HeldLinear):
    """y = x W^T + ((x V^T) s) U^T + b, W the backbone's; s moves.

    U and V are whole codes, s = sigma scale_u scale_v / 4 [rank] with the scale of each vector.
    """

    left: torch.Tensor
    right: torch.Tensor
    strength: torch.Tensor

    def __init__(
        self, packed: PackedMatrix, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        super().__init__(weight, bias)
        device, dtype = weight.device, weight.dtype
        self._packed = packed
        bands = [band.to(device) for band in packed.bands]
        self.register_buffer("left", torch.cat([_whole_codes(b.u, dtype) for b in bands], dim=1))
        self.register_buffer("right", torch.cat([_whole_codes(b.v, dtype) for b in bands]))
        scales = [b.u.scale[0].float() * b.v.scale[:, 0].float() for b in bands]
        self.register_buffer("strength", packed.sigma.to(device) * torch.cat(scales) / 4)
        kind = f"sigma.{packed.name.split('.')[-2]}.{packed.out_features}"
        self.numbers: dict[str, tuple[int, ...]] = {kind: (packed.rank,)}
        self._kind = kind
        self._now = self.strength

    def use(self, changes: Numbers) -> None:
        self._now = _move(self.strength, changes[self._kind])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        rows = states.flatten(0, -2)
        parts = linear(rows, self.right.float()) * self._now
        whole = torch.addmm(super().forward(rows), parts, self.left.float().T)
        return whole.view(*states.shape[:-1], -1)

    def pack(self, changes: Numbers) -> PackedTensor:
        change = changes[self._kind].cpu()
        return replace(self._packed, sigma=_move(self._packed.sigma, change))


class MovingNorm:
    """The weight of a norm, kept exactly by the delta; the module's own is replaced."""

    def __init__(self, packed: ExactTensor, module: nn.Module, device: torch.device) -> None:
        self._packed, self._module = packed, module
        self._value = packed.value.to(device).float()
        del module.weight
        module.weight = self._value
        self._kind = f"norm.{packed.name.split('.')[-2]}"
        self.numbers: dict[str, tuple[int, ...]] = {self._kind: tuple(self._value.shape)}

    def _moved(self, changes: Numbers) -> torch.Tensor:
        return self._value * (1 + changes[self._kind].clamp(-_MAX_NORM_CHANGE, _MAX_NORM_CHANGE))

    def use(self, changes: Numbers) -> None:
        self._module.weight = _as_stored(self._moved(changes), self._packed.value.dtype)

    def pack(self, changes: Numbers) -> PackedTensor:
        value = self._moved(changes).to(self._packed.value.dtype).cpu()
        return replace(self._packed, value=value)


class MovingRows(nn.Module):
    """A vocabulary whose changed rows are coordinates in a basis: looked up, and multiplied with.

    row = g base + (codes scale) basis; the codes, the scale of each group of them, the basis and,
    where there is one, the base scale g move. Rows that did not change and new rows stay.
    """

    base: torch.Tensor
    codes: torch.Tensor
    places: torch.Tensor
    new: torch.Tensor

    def __init__(self, packed: PackedRows, basis: torch.Tensor, base: torch.Tensor) -> None:
        super().__init__()
        device = base.device
        factor = packed.factor
        if factor is None:
            raise InternalError(f"{packed.name} has a basis, but no row that changed")
        self._packed, self._factor = packed, factor
        self.register_buffer("base", base)
        self.register_buffer("codes", _whole_codes(factor.to(device), base.dtype))
        changed = packed.changed.to(device)
        # Rows that did not change read a row of zeros behind the others.
        places = torch.where(changed, changed.cumsum(0) - 1, factor.rows)
        self.register_buffer("places", places)
        new = torch.empty((0, packed.cols)) if packed.new_rows is None else packed.new_rows
        self.register_buffer("new", new.to(device).float())
        self._all_changed = bool(packed.changed.all())
        self._scale = factor.scale.to(device).float()
        self._basis = basis.to(device).float()
        self._sizes = self._basis.square().mean(dim=1, keepdim=True).sqrt()
        self._base_scale = None if packed.base_scale is None else packed.base_scale.to(device)
        self.numbers: dict[str, tuple[int, ...]] = {
            f"scales.{packed.name}": tuple(self._scale.shape),
            f"codes.{packed.name}": (factor.rows, factor.cols),
            f"basis.{packed.name}": tuple(self._basis.shape),
        }
        if packed.base_scale is not None:
            self.numbers[f"base.{packed.name}"] = (1,)
        self.use({kind: torch.zeros(size, device=device) for kind, size in self.numbers.items()})

    def _moved(self, changes: Numbers) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        name = self._packed.name
        scale = _move(self._scale, changes[f"scales.{name}"])
        basis = self._basis + self._sizes * changes[f"basis.{name}"]
        if self._base_scale is None:
            return scale, basis, None
        return scale, basis, _move(self._base_scale, _BASE_SCALE_STEP * changes[f"base.{name}"])

    def _moved_codes(self, changes: Numbers) -> torch.Tensor:
        bits = self._factor.bits
        # Whole codes are two apart.
        moves = 2 * _COORDINATE_STEP * (1 << bits) * changes[f"codes.{self._packed.name}"]
        return _move_codes(self.codes, moves, bits)

    def use(self, changes: Numbers) -> None:
        scale, basis, self._now_base = self._moved(changes)
        scale = _as_stored(scale, torch.float16)
        if scale.shape[1] > 1:
            scale = scale.repeat_interleave(self._factor.group[1], dim=1)
            scale = scale[:, : self.codes.shape[1]]
        self._coordinates = self._moved_codes(changes) * (scale / 2)
        self._now_basis = _as_stored(basis, torch.bfloat16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look tokens up: int64 [...] to float32 [..., cols]."""
        known = ids.clamp_max(len(self.base) - 1)
        rows = embedding(known, self.base).float()
        if self._now_base is not None:
            rows = rows * self._now_base
        moved = embedding(self.places[known], pad(self._coordinates, (0, 0, 0, 1)))
        rows = rows + linear(moved, self._now_basis.T)
        if len(self.new):
            extra = (ids - len(self.base)).clamp_min(0)
            rows = torch.where((ids >= len(self.base))[..., None], self.new[extra], rows)
        return rows

    def multiply(self, states: torch.Tensor) -> torch.Tensor:
        """Multiply with every row: float32 [..., cols] to [..., rows of the fine-tune]."""
        logits = linear(states, self.base.float())
        if self._now_base is not None:
            logits = logits * self._now_base
        moved = linear(linear(states, self._now_basis), self._coordinates)
        if self._all_changed:
            logits = logits + moved
        else:
            index = self._packed.changed.to(states.device).nonzero()[:, 0]
            logits = logits.index_add(-1, index, moved)
        return torch.cat([logits, linear(states, self.new)], dim=-1) if len(self.new) else logits

    def pack(self, changes: Numbers) -> PackedTensor:
        scale, basis, base_scale = self._moved(changes)
        codes = _pack_whole_codes(self._moved_codes(changes), self._factor.bits)
        return replace(
            self._packed,
            factor=replace(self._factor, codes=codes, scale=scale.half().cpu()),
            basis=basis.to(torch.bfloat16).cpu(),
            base_scale=None if base_scale is None else base_scale.cpu(),
        )


class RowsHead(nn.Module):
    """Stands where an output head stood: logits from a vocabulary."""

    def __init__(self, rows: MovingRows) -> None:
        super().__init__()
        self._rows = rows

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self._rows.multiply(states)
