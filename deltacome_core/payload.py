"""Packed tensors to payload bytes and back, section by section; see docs/format.md."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from deltacome_core.bitpack import used_bits
from deltacome_core.entries import (
    DirectEntry,
    LowRankEntry,
    MatrixEntry,
    RowsEntry,
    slice_name,
)
from deltacome_core.errors import InternalError
from deltacome_core.fields import invalid
from deltacome_core.layout import FactorShape, Payload, Section, direct_factor, matrix_factors
from deltacome_core.packed import (
    PackedBand,
    PackedDirect,
    PackedFactor,
    PackedLinear,
    PackedMatrix,
    PackedRows,
    PackedStack,
)
from deltacome_core.tensors import tensor_bytes

# With the largest half as scale, 255 steps and 2^31 ranks the delta stays below the largest float.
MAX_SIGMA = 2.0**40
MAX_BASE_SCALE = 2.0**10
_MAX_FLOAT = float(np.finfo(np.float32).max)
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.int32,
    "U8": torch.uint8,
}


def _assemble(payload: Payload, arrays: dict[str, torch.Tensor]) -> bytes:
    raw = bytearray(payload.size_bytes)
    for section in payload.sections:
        data = tensor_bytes(arrays[section.key])
        if len(data) != section.size_bytes:
            raise InternalError(f"section {section.key} has {len(data)} bytes")
        raw[section.start : section.start + section.size_bytes] = data
    return bytes(raw)


def _factor_arrays(key: str, factor: PackedFactor) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{key}.codes", factor.codes
    yield f"{key}.scale", factor.scale
    if factor.zero is not None:
        yield f"{key}.zero", factor.zero


def matrix_to_payload(entry: MatrixEntry, matrix: PackedLinear) -> bytes:
    """Lay a matrix out as it is stored.

    Args:
        entry: what the manifest will say of it.
        matrix: the packed matrix, or one slice of a stack.

    Returns:
        entry.payload.size_bytes bytes.
    """
    if isinstance(matrix, PackedDirect):
        return _assemble(entry.payload, dict(_factor_arrays("direct", matrix.factor)))
    arrays = {"sigma": matrix.sigma}
    for number, band in enumerate(matrix.bands):
        arrays |= dict(_factor_arrays(f"{number}.v", band.v))
        arrays |= dict(_factor_arrays(f"{number}.u", band.u))
    return _assemble(entry.payload, arrays)


def rows_to_payload(entry: RowsEntry, rows: PackedRows) -> bytes:
    """Lay the quantised part of a row delta out as it is stored.

    Args:
        entry: what the manifest will say of it.
        rows: the packed rows.

    Returns:
        entry.payload.size_bytes bytes.
    """
    bitmap = np.packbits(rows.changed.cpu().numpy(), bitorder="little")
    arrays = {"changed": torch.from_numpy(bitmap)}
    if rows.factor is None:
        empty = torch.empty(0, dtype=torch.uint8)
        arrays |= dict.fromkeys(("rows.codes", "rows.scale", "rows.zero"), empty)
    else:
        arrays |= dict(_factor_arrays("rows", rows.factor))
    if rows.basis is not None:
        arrays["basis"] = rows.basis
    if rows.base_scale is not None:
        arrays["base_scale"] = rows.base_scale
    return _assemble(entry.payload, arrays)


def _view(payload: torch.Tensor, section: Section) -> torch.Tensor:
    raw = payload[section.start : section.start + section.size_bytes]
    return raw.view(_DTYPES[section.dtype]).view(section.shape)


def _views(payload: torch.Tensor, layout: Payload) -> dict[str, torch.Tensor]:
    if payload.dtype != torch.uint8 or payload.shape != (layout.size_bytes,):
        raise InternalError(f"the payload is {payload.dtype} {tuple(payload.shape)}")
    return {section.key: _view(payload, section) for section in layout.sections}


def _factor(views: dict[str, torch.Tensor], shape: FactorShape) -> PackedFactor:
    return PackedFactor(
        codes=views[f"{shape.key}.codes"],
        scale=views[f"{shape.key}.scale"],
        zero=views.get(f"{shape.key}.zero"),
        bits=shape.bits,
        rows=shape.rows,
        cols=shape.cols,
        group=shape.group,
    )


def matrix_from_payload(entry: MatrixEntry, payload: torch.Tensor) -> PackedLinear:
    """See a matrix in the bytes it is stored as; nothing is copied.

    Args:
        entry: what the manifest says of it.
        payload: u8 [entry.payload.size_bytes], at least 16-byte aligned, on any device.

    Returns:
        A matrix whose arrays are views of `payload`; of a stack, the matrix of one slice.
    """
    if isinstance(entry, DirectEntry):
        return _direct_from_payload(entry, payload)
    return _lowrank_from_payload(entry, payload)


def _direct_from_payload(entry: DirectEntry, payload: torch.Tensor) -> PackedDirect:
    shape = direct_factor(
        *entry.matrix_shape, bits=entry.bits, group=entry.group_codes, symmetric=entry.symmetric
    )
    return PackedDirect(name=entry.name, factor=_factor(_views(payload, entry.payload), shape))


def _lowrank_from_payload(entry: LowRankEntry, payload: torch.Tensor) -> PackedMatrix:
    views = _views(payload, entry.payload)
    out_features, in_features = entry.matrix_shape
    shapes = matrix_factors(
        out_features,
        in_features,
        bands=entry.bands,
        group_u=entry.group_u,
        group_v=entry.group_v,
        symmetric=entry.symmetric,
    )
    factors = [_factor(views, shape) for shape in shapes]
    bands = zip(factors[::2], factors[1::2], strict=True)
    return PackedMatrix(
        name=entry.name,
        out_features=out_features,
        in_features=in_features,
        sigma=views["sigma"],
        bands=tuple(PackedBand(v=v, u=u) for v, u in bands),
    )


def matrices_from_payload(entry: MatrixEntry, payload: torch.Tensor) -> PackedLinear | PackedStack:
    """See quantised matrices in the bytes they are stored as, and check their numbers.

    Args:
        entry: what the manifest says of it.
        payload: u8 [entry.size_bytes] on the CPU.

    Returns:
        A matrix [out, in], or for every other tensor a stack; views of `payload`.

    Raises:
        UserError: delta_invalid.
    """
    layout = entry.payload
    slices = []
    for index, raw in enumerate(torch.split(payload, layout.size_bytes)):
        matrix = matrix_from_payload(entry, raw)
        if not entry.is_plain:
            matrix = replace(matrix, name=slice_name(entry.name, index))
        check_packed(matrix, raw, layout)
        slices.append(matrix)
    if entry.is_plain:
        return slices[0]
    return PackedStack(
        name=entry.name, shape=entry.shape, slices=tuple(slices), transposed=entry.transposed
    )


def rows_from_payload(
    entry: RowsEntry, payload: torch.Tensor, new_rows: torch.Tensor | None
) -> PackedRows:
    """See a row delta in the bytes it is stored as.

    Args:
        entry: what the manifest says of it.
        payload: u8 [entry.payload.size_bytes] on the CPU.
        new_rows: [n_new, cols] in the fine-tune's dtype, or None.

    Returns:
        The packed rows.

    Raises:
        UserError: delta_invalid when the row map does not mark exactly n_changed rows.
    """
    views = _views(payload, entry.payload)
    bits = np.unpackbits(views["changed"].numpy(), bitorder="little")
    changed = torch.from_numpy(bits).to(torch.bool)
    if int(changed.sum()) != entry.n_changed or bool(changed[entry.base_rows :].any()):
        raise invalid(f"{entry.name}: the row map does not mark {entry.n_changed} rows")
    shape = FactorShape(
        key="rows",
        rows=entry.n_changed,
        cols=entry.shape[1] if entry.rank is None else entry.rank,
        bits=entry.bits,
        group=entry.group_rows,
        symmetric=entry.symmetric,
    )
    return PackedRows(
        name=entry.name,
        rows=entry.base_rows,
        cols=entry.shape[1],
        changed=changed[: entry.base_rows],
        factor=_factor(views, shape) if entry.n_changed else None,
        new_rows=new_rows,
        basis=views.get("basis"),
        base_scale=views.get("base_scale"),
    )


def _is_magnitude(values: torch.Tensor, *, most: float = _MAX_FLOAT) -> bool:
    """Whether no number is negative, NaN, infinite or above `most`; -0 is fine."""
    array = values.numpy()
    # numpy, since arrays are small and many: torch takes several times as long to begin. A NaN
    # is what least and largest are when there is one, and no comparison with it holds.
    return not array.size or (float(array.min()) >= 0 and float(array.max()) <= most)


@lru_cache(maxsize=1024)
def _find_unused(cols: int, bits: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Words of a row that have bits beyond the codes, and those bits; few shapes make a model."""
    unused = ~used_bits(cols, bits)
    columns = unused.nonzero().flatten()
    return columns.numpy(), unused[columns].numpy()


def _check_factor(name: str, factor: PackedFactor) -> None:
    if not _is_magnitude(factor.scale):
        raise invalid(f"{name}: a scale is negative or not finite")
    if factor.zero is not None and bool((factor.zero > (1 << factor.bits) - 1).any()):
        raise invalid(f"{name}: a zero point lies outside the codes")
    columns, unused = _find_unused(factor.cols, factor.bits)
    if len(columns) and bool((factor.codes.numpy()[:, columns] & unused).any()):
        raise invalid(f"{name}: a bit that belongs to no code is set")


def _check_padding(name: str, payload: torch.Tensor, layout: Payload) -> None:
    raw = payload.numpy()
    end = 0
    for start, size_bytes in [(s.start, s.size_bytes) for s in layout.sections]:
        if start > end and raw[end:start].any():
            raise invalid(f"{name}: a padding byte is not 0")
        end = start + size_bytes
    if raw[end : layout.size_bytes].any():
        raise invalid(f"{name}: a padding byte is not 0")


def check_packed(packed: PackedLinear | PackedRows, payload: torch.Tensor, layout: Payload) -> None:
    """Refuse numbers no writer produces, before any arithmetic meets them.

    Args:
        packed: what was read.
        payload: u8, the bytes it was read from, on the CPU.
        layout: where the sections lie.

    Raises:
        UserError: delta_invalid for a scale or singular value that is negative or not finite, a
            singular value above MAX_SIGMA, a number of a basis beyond it, a base scale above
            MAX_BASE_SCALE, a zero point outside the codes, or a bit set that belongs to nothing.
    """
    factors: Iterable[PackedFactor | None]
    if isinstance(packed, PackedMatrix):
        if not _is_magnitude(packed.sigma, most=MAX_SIGMA):
            raise invalid(f"{packed.name}: a singular value is negative, too large or not finite")
        factors = [factor for band in packed.bands for factor in (band.v, band.u)]
    else:
        factors = [packed.factor]
    basis = packed.basis if isinstance(packed, PackedRows) else None
    # A comparison with NaN is false.
    if basis is not None and not bool((basis.abs() <= MAX_SIGMA).all()):
        raise invalid(f"{packed.name}: a number of the basis is too large or not finite")
    scale = packed.base_scale if isinstance(packed, PackedRows) else None
    if scale is not None and not 0 <= float(scale) <= MAX_BASE_SCALE:
        raise invalid(f"{packed.name}: the base scale is negative, too large or not finite")
    for factor in factors:
        if factor is not None:
            _check_factor(packed.name, factor)
    _check_padding(packed.name, payload, layout)
