"""Second moments of what a layer multiplies its weights with, seen while the layer runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from deltacome_core.entries import slice_name
from deltacome_core.parameters import Piece

_MATRIX, _STACK = 2, 3
_HALF = (torch.bfloat16, torch.float16)
# Rows of a moment added at once: of one 28672 wide, 0.5 GB instead of 3.3.
_COLUMNS_AT_ONCE = 4096
# Where the factors stand in the arguments of each product; only `linear` reads [out, in].
_PRODUCTS: dict[Callable[..., Any], tuple[int, int]] = {
    functional.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.bmm: (0, 1),
    torch.matmul: (0, 1),
    torch.mm: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.mm: (0, 1),
    torch.Tensor.bmm: (0, 1),
    torch.Tensor.__matmul__: (0, 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedHessian:
    """Mean of x x^T over all tokens, float32 [in, in], for the weights that read the same x.

    weights: checkpoint tensors, slices of stacks as "name[index]"; transposed: the checkpoint
    keeps them [in, out].
    """

    weights: tuple[str, ...]
    hessian: torch.Tensor
    transposed: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """The checkpoint tensors that the weights lie in, each once."""
        return tuple(dict.fromkeys(name.partition("[")[0] for name in self.weights))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Label:
    """A matrix of the checkpoint inside a matrix of the model."""

    name: str
    rows: slice
    cols: slice
    transposed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    """A matrix of the model, found by the address of its first element."""

    shape: tuple[int, ...]
    labels: tuple[_Label, ...]

    def reading(self, dimension: int) -> list[tuple[str, bool]]:
        """Name the weights whose input is that dimension, and whether each is stored [in, out].

        A weight that holds only a part of the input has no Hessian of its own.
        """
        found = []
        for label in self.labels:
            taken = (label.rows, label.cols)[dimension]
            if taken.indices(self.shape[dimension]) == (0, self.shape[dimension], 1):
                found.append((label.name, (dimension == 0) != label.transposed))
        return found


class LayerMoments(TorchFunctionMode):
    """Sums x^T x per distinct input; products that are handed the same tensor share one sum.

    A product is known by its weight's address. So it does not matter whether a module of the
    library does it, or a loop over experts that reads slices of one parameter.
    """

    def __init__(self, layer: nn.Module, pieces: Mapping[str, tuple[Piece, ...]]) -> None:
        super().__init__()
        self._sites: dict[int, _Site] = {}
        for name, parameter in layer.named_parameters():
            if name in pieces:
                self._sites |= _find_sites(parameter.detach(), pieces[name])
        self._leader: dict[tuple[int, int], tuple[int, int]] = {}
        self._sums: dict[tuple[int, int], torch.Tensor] = {}
        self._tokens: dict[tuple[int, int], int] = {}
        self._last: tuple[tuple[int, int], torch.Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            x, weight = (args[at] if at < len(args) else None for at in _PRODUCTS[func])
            if isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor):
                self._see(x, weight, input_dimension=1 if func is functional.linear else 0)
        return func(*args, **(kwargs or {}))

    def _see(self, x: torch.Tensor, weight: torch.Tensor, *, input_dimension: int) -> None:
        if weight.ndim == _STACK:
            if x.ndim == _STACK and weight.data_ptr() in self._sites:
                for rows, piece in zip(x, weight, strict=True):
                    self._see(rows, piece, input_dimension=input_dimension)
            return
        site = self._sites.get(weight.data_ptr())
        if site is None or weight.ndim != _MATRIX:
            return
        if tuple(weight.shape) == site.shape and weight.is_contiguous():
            self._add(x, (weight.data_ptr(), input_dimension))
        elif tuple(weight.T.shape) == site.shape and weight.T.is_contiguous():
            self._add(x, (weight.data_ptr(), 1 - input_dimension))

    def _add(self, x: torch.Tensor, key: tuple[int, int]) -> None:
        if key not in self._leader:
            # Held until the next distinct input, so the identity cannot be reused.
            shared = self._last is not None and self._last[1] is x
            self._leader[key] = self._last[0] if shared and self._last else key
            if not shared:
                self._last = (key, x)
        if self._leader[key] != key:
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        if key not in self._sums:
            shape = rows.shape[1], rows.shape[1]
            self._sums[key] = torch.zeros(shape, dtype=torch.float32, device=rows.device)
            self._tokens[key] = 0
        add_moment(self._sums[key], rows)
        self._tokens[key] += rows.shape[0]

    def finish(self) -> list[SharedHessian]:
        """Give the means, and keep nothing; inputs that were never other than 0 have none.

        Returns:
            One Hessian per distinct input and orientation, in the order they were first seen.
        """
        self._last = None
        sums, self._sums = self._sums, {}
        found: list[SharedHessian] = []
        for leader, total in sums.items():
            if not bool(total.diagonal().any()):
                continue
            hessian = total.div_(self._tokens[leader])
            weights: dict[bool, list[str]] = {}
            for (address, dimension), other in self._leader.items():
                if other == leader:
                    for name, transposed in self._sites[address].reading(dimension):
                        weights.setdefault(transposed, []).append(name)
            found += [
                SharedHessian(weights=tuple(names), hessian=hessian, transposed=transposed)
                for transposed, names in weights.items()
            ]
        return found


def add_moment(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add up second moments.

    Args:
        total: float32 [cols, cols], changed in place.
        rows: float [n, cols] on the same device.
    """
    if rows.is_cuda and rows.dtype in _HALF:
        # Products of half-width numbers are exact in float32, where matrix units add them up.
        for start in range(0, len(total), _COLUMNS_AT_ONCE):
            some = slice(start, start + _COLUMNS_AT_ONCE)
            total[some] += torch.mm(rows[:, some].T, rows, out_dtype=torch.float32)
        return
    wide = rows.float()
    total.addmm_(wide.T, wide)


def _find_sites(parameter: torch.Tensor, pieces: tuple[Piece, ...]) -> dict[int, _Site]:
    """List the matrices of a parameter: itself, or each slice of a stack."""
    if parameter.ndim == _MATRIX:
        labels = tuple(_label(piece.tensor, piece.block, piece) for piece in pieces)
        return {parameter.data_ptr(): _Site(shape=tuple(parameter.shape), labels=labels)}
    if parameter.ndim != _STACK:
        return {}
    sites = {}
    for index, matrix in enumerate(parameter):
        labels = tuple(label for piece in pieces for label in _labels_of_slice(piece, index))
        sites[matrix.data_ptr()] = _Site(shape=tuple(matrix.shape), labels=labels)
    return sites


def _labels_of_slice(piece: Piece, index: int) -> list[_Label]:
    first, *block = piece.block or (slice(None),)
    if isinstance(first, int):
        return [_label(piece.tensor, tuple(block), piece)] if first == index else []
    # A stack in the checkpoint too; only a whole one numbers its slices as the parameter does.
    return [] if first.start else [_label(slice_name(piece.tensor, index), tuple(block), piece)]


def _label(name: str, block: tuple[int | slice, ...], piece: Piece) -> _Label:
    taken = [at for at in block if isinstance(at, slice)] or [slice(None), slice(None)]
    rows, cols = taken
    return _Label(name=name, rows=rows, cols=cols, transposed=piece.transposed)
