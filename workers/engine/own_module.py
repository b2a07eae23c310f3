"""A fine-tune as a model of its own: other modules over the weights of the shared backbone."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from deltacome_core.checkpoint import Checkpoint
from deltacome_core.container import Delta
from deltacome_core.entries import DeltaEntry, MatrixEntry, needs_backbone
from deltacome_core.errors import UserError
from deltacome_core.packed import PackedLinear
from deltacome_core.parameters import Piece, locate_parameters
from deltacome_core.reconstruct import apply_entry
from deltacome_core.tensors import TORCH_DTYPES, load_tensor
from kernels import delta_linear


class DeltaLinear(nn.Module):
    """A linear layer of the backbone plus the packed delta of one fine-tune.

    With `factors` (U [out, rank], V [rank, in] with sigma; or a direct matrix [out, in] alone) the
    delta runs as plain products; without, the kernel reads the packed codes.
    """

    def __init__(
        self,
        linear: nn.Linear,
        matrix: PackedLinear,
        factors: tuple[torch.Tensor, ...] | None,
    ) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self._matrix = matrix
        self._factors = factors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._factors is not None:
            base = functional.linear(x, self.weight, self.bias)
            for factor in reversed(self._factors):
                x = x @ factor.T
            return base + x
        return delta_linear(x, self.weight, self._matrix, self.bias)


def fill_module(
    module: Any, backbone: Any, delta: Delta, files: Checkpoint, *, device: str
) -> dict[str, PackedLinear]:
    """Give every parameter its tensor; return the matrices that run beside their linear layer."""
    base = dict(backbone.named_parameters(remove_duplicate=False))
    wanted = _untied_parameters(module)
    matrices: dict[str, PackedLinear] = {}
    own: dict[str, torch.Tensor] = {}
    places = locate_tensors(module, delta.entries.values())
    for entry in delta.entries.values():
        packed = delta.load(entry.name)
        if packed is None:
            continue
        place = places.get(entry.name)
        if place is None or place.parameter not in wanted:
            raise UserError("architecture_unknown", reason=f"it has no parameter {entry.name}")
        name = place.parameter
        if isinstance(packed, PackedLinear) and runs_packed(module, entry, place):
            matrices[name] = packed.to(device)
            continue
        # From the files: in memory the backbone may be narrower than what a delta was made from.
        source = load_tensor(files, entry.name) if needs_backbone(entry) else None
        # Rounded to the fine-tune's dtype first: the very numbers its checkpoint had.
        exact = apply_entry(source, packed, dtype=TORCH_DTYPES[entry.dtype])
        exact = exact.to(device=device, dtype=wanted[name].dtype)
        if place.piece.block == ():
            own[name] = exact
        else:
            whole = own.setdefault(name, base[name].detach().clone())
            whole[place.piece.block] = exact.mT if place.piece.transposed else exact
    for name, parameter in wanted.items():
        tensor = own.get(name, base.get(name))
        if tensor is None or tensor.shape != parameter.shape:
            raise UserError("tensor_missing", tensors=[name])
        assign_parameter(module, name, nn.Parameter(tensor.detach(), requires_grad=False))
    module.tie_weights()
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))
    return matrices


def _untied_parameters(module: Any) -> dict[str, torch.Tensor]:
    """Every parameter but those that `tie_weights` will point at another one."""
    tied = set(getattr(module, "all_tied_weights_keys", ()) or ())
    return {
        name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if name not in tied
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The parameter that a tensor of the files fills, wholly or in part."""

    parameter: str
    piece: Piece


def locate_tensors(module: Any, entries: Iterable[DeltaEntry]) -> dict[str, Place]:
    layout = {entry.name: (entry.dtype, entry.shape) for entry in entries}
    return {
        piece.tensor: Place(parameter=name, piece=piece)
        for name, pieces in locate_parameters(module, layout).items()
        for piece in pieces
    }


def runs_packed(module: Any, entry: DeltaEntry, place: Place | None) -> bool:
    """Whether a matrix can stay packed: it is all of the weight of a linear layer."""
    if place is None or place.piece.block != () or not isinstance(entry, MatrixEntry):
        return False
    return entry.is_plain and _is_linear(module, place.parameter)


def assign_parameter(module: Any, name: str, parameter: nn.Parameter) -> None:
    layer, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(layer), leaf, parameter)


def _is_linear(module: Any, name: str) -> bool:
    layer, _, leaf = name.rpartition(".")
    return leaf == "weight" and type(module.get_submodule(layer)) is nn.Linear


def own_bytes(module: Any, backbone: Any) -> int:
    shared = {tensor.data_ptr() for tensor in backbone.parameters()}
    own = {t.data_ptr(): t for t in module.parameters() if t.data_ptr() not in shared}
    return sum(tensor.numel() * tensor.element_size() for tensor in own.values())
