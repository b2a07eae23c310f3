"""Where each parameter of a model lies in its checkpoint, and filling it from there."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from deltacome_core.checkpoint import Checkpoint, Layout
from deltacome_core.tensors import load_tensor

Block = tuple[int | slice, ...]
# Rows and columns of a probe: different, and divisible by the ways in which projections are fused.
_PROBE_SIZES = (12, 24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A checkpoint tensor inside a parameter: parameter[block], transposed where it says so."""

    tensor: str
    block: Block = ()
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    """Numbers that no other probe has, in the place of a parameter of `shape`."""

    name: str
    shape: tuple[int, ...]
    first: int
    values: torch.Tensor


def locate_parameters(model: Any, layout: Layout) -> dict[str, tuple[Piece, ...]]:
    """Map parameters to the checkpoint tensors that hold them.

    Most have the same name in both, with or without the base model's prefix. For the others the
    library is asked what it would save: it renames, and cuts fused parameters such as the experts
    of a layer into one tensor each.

    Args:
        model: a transformers model; its parameters may be on the meta device.
        layout: dtype and shape by name of the tensors that are looked up.

    Returns:
        The pieces that together fill a parameter; tied ones, and those kept in a form that only
        the library can read, are absent.
    """
    prefix = f"{model.base_model_prefix}."
    located: dict[str, tuple[Piece, ...]] = {}
    unnamed: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        candidates = (name, name.removeprefix(prefix), prefix + name)
        found = [item for item in candidates if item in layout and layout[item][1] == shape]
        if found:
            located[name] = (Piece(tensor=found[0]),)
        else:
            unnamed[name] = shape
    return located | _locate_converted(model, unnamed, layout)


def _make_probes(shapes: Mapping[str, tuple[int, ...]]) -> list[_Probe]:
    small = {}
    for name, shape in shapes.items():
        # Experts are counted by the library, so the first dimension of a stack stays as it is.
        leading = shape[:1] if len(shape) > len(_PROBE_SIZES) else ()
        sizes = leading + _PROBE_SIZES[: len(shape) - len(leading)]
        small[name] = sizes + (1,) * (len(shape) - len(sizes))
    starts = accumulate((prod(sizes) for sizes in small.values()), initial=0)
    return [
        _Probe(
            name=name,
            shape=shapes[name],
            first=first,
            values=torch.arange(first, first + prod(sizes)).view(sizes),
        )
        for (name, sizes), first in zip(small.items(), starts, strict=False)
    ]


def _locate_converted(
    model: Any, shapes: Mapping[str, tuple[int, ...]], layout: Layout
) -> dict[str, tuple[Piece, ...]]:
    """Send small numbered tensors through the library's conversion and see where they come out."""
    probes = _make_probes(shapes)
    if not probes:
        return {}
    try:
        saved = revert_weight_conversion(model, {probe.name: probe.values for probe in probes})
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError):
        return {}
    firsts = [probe.first for probe in probes]
    pieces: dict[str, list[Piece]] = {}
    filled: dict[str, int] = {}
    for tensor, values in saved.items():
        probe = probes[bisect_right(firsts, int(values.min())) - 1]
        piece = _find_piece(probe, tensor, values)
        if piece is None or tensor not in layout:
            continue
        if layout[tensor][1] != _piece_shape(probe.shape, piece):
            continue
        pieces.setdefault(probe.name, []).append(piece)
        filled[probe.name] = filled.get(probe.name, 0) + values.numel()
    whole = {probe.name for probe in probes if filled.get(probe.name) == probe.values.numel()}
    return {name: tuple(found) for name, found in pieces.items() if name in whole}


def _find_piece(probe: _Probe, tensor: str, values: torch.Tensor) -> Piece | None:
    """Say which block of a probe the values are; None when they are no block of it."""
    places = values.flatten() - probe.first
    if int(places.max()) >= probe.values.numel():
        return None
    block: list[int | slice] = []
    real: list[int | slice] = []
    corners = torch.unravel_index(places, probe.values.shape)
    for size, probe_size, at in zip(probe.shape, probe.values.shape, corners, strict=True):
        start, stop = int(at.min()), int(at.max()) + 1
        if size * start % probe_size or size * stop % probe_size:
            return None
        block.append(slice(start, stop))
        real.append(slice(size * start // probe_size, size * stop // probe_size))
    if values.ndim < probe.values.ndim and isinstance(real[0], slice):
        block[0] = real[0] = real[0].start
    found = probe.values[tuple(block)]
    if torch.equal(found, values):
        return Piece(tensor=tensor, block=tuple(real))
    if found.ndim > 1 and torch.equal(found.mT, values):
        return Piece(tensor=tensor, block=tuple(real), transposed=True)
    return None


def _piece_shape(shape: tuple[int, ...], piece: Piece) -> tuple[int, ...]:
    sizes = [
        len(range(size)[at])
        for size, at in zip(shape, piece.block, strict=True)
        if isinstance(at, slice)
    ]
    return (*sizes[:-2], sizes[-1], sizes[-2]) if piece.transposed else tuple(sizes)


def read_parameter(
    load: Callable[[str], torch.Tensor], pieces: tuple[Piece, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    """Read one parameter from the tensors that hold it.

    Args:
        load: gives a tensor of the checkpoint by its name.
        pieces: where the parameter lies, from locate_parameters.
        shape: of the parameter.

    Returns:
        The parameter in the dtype of what was loaded, on the CPU.
    """
    values = load(pieces[0].tensor)
    if pieces[0].block == ():
        return values
    result = torch.empty(shape, dtype=values.dtype)
    for piece in pieces:
        values = load(piece.tensor)
        result[piece.block] = values.mT if piece.transposed else values
    return result


def fill_parameters(
    module: nn.Module,
    prefix: str,
    checkpoint: Checkpoint,
    located: Mapping[str, tuple[Piece, ...]],
    *,
    device: torch.device,
    skip: str | None = None,
) -> None:
    """Give each parameter of a module its values, cast to its dtype, and move its buffers.

    Args:
        module: changed in place.
        prefix: dotted name of the module in the model; empty for the model itself.
        checkpoint: where the values are read.
        located: pieces by the parameter's name in the model.
        device: where they go.
        skip: dotted name in the model of a part that stays as it is.
    """
    load = partial(load_tensor, checkpoint)
    for name, parameter in list(module.named_parameters()):
        in_model = f"{prefix}.{name}" if prefix else name
        if skip is not None and in_model.startswith(f"{skip}."):
            continue
        values = read_parameter(load, located[in_model], tuple(parameter.shape))
        owner, _, leaf = name.rpartition(".")
        values = values.to(device=device, dtype=parameter.dtype)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(device))


def empty_module(module: nn.Module) -> None:
    """Drop the values of each parameter of a module, in place."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.data.to("meta"), requires_grad=False))
