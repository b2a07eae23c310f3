"""Entries of delta.json as plain JSON, both ways, every field checked."""

from math import prod
from typing import Any

from deltacome_core.entries import (
    CodedEntry,
    DeltaEntry,
    DirectEntry,
    ExactEntry,
    LowRankEntry,
    RowsEntry,
    UnchangedEntry,
    group_of,
)
from deltacome_core.fields import Fields, invalid
from deltacome_core.layout import PLANES, Group, RankBand
from deltacome_core.safetensors_file import ITEM_BYTES, MAX_RANK, MAX_TENSORS, check_tensor_name

MAX_DIMENSION = 2**31 - 1
MAX_BANDS = 8
MAX_GROUP = 1 << 16
_MATRIX_DIMENSIONS = 2
_STACK_DIMENSIONS = 3


def entry_to_json(entry: DeltaEntry) -> dict[str, Any]:
    """Write one entry as the object that delta.json holds.

    Args:
        entry: any kind of entry.

    Returns:
        An object of plain values.
    """
    common = {"name": entry.name, "dtype": entry.dtype, "shape": list(entry.shape)}
    if isinstance(entry, LowRankEntry):
        return common | {
            "kind": "lowrank",
            "group": entry.group,
            "bands": [[band.bits, band.rank] for band in entry.bands],
            "group_u": list(entry.group_u),
            "group_v": list(entry.group_v),
            "symmetric": entry.symmetric,
            "transposed": entry.transposed,
        }
    if isinstance(entry, DirectEntry):
        return common | {
            "kind": "direct",
            "group": entry.group,
            "bits": entry.bits,
            "group_codes": list(entry.group_codes),
            "symmetric": entry.symmetric,
            "transposed": entry.transposed,
        }
    if isinstance(entry, RowsEntry):
        rows = {
            "kind": "rows",
            "base_rows": entry.base_rows,
            "n_changed": entry.n_changed,
            "bits": entry.bits,
            "group_rows": list(entry.group_rows),
            "symmetric": entry.symmetric,
        }
        if entry.rank is not None:
            rows["rank"] = entry.rank
        return common | rows | ({"scaled": True} if entry.scaled else {})
    if isinstance(entry, CodedEntry):
        return common | {
            "kind": "coded",
            "base_rows": entry.base_rows,
            "size_bytes": entry.size_bytes,
            "sha256": entry.sha256,
        }
    return common | {"kind": "exact" if isinstance(entry, ExactEntry) else "unchanged"}


def _shape(fields: Fields, counts: set[int]) -> tuple[int, ...]:
    shape = fields.naturals("shape", limit=MAX_DIMENSION)
    if len(shape) not in counts or 0 in shape:
        raise fields.invalid(f"the shape is {list(shape)}")
    return shape


def _group(fields: Fields, key: str) -> Group:
    group = fields.naturals(key, limit=MAX_GROUP, count=2)
    return group[0], group[1]


def _bits(fields: Fields) -> int:
    bits = fields.natural("bits")
    if bits not in PLANES:
        raise fields.invalid(f"bits is {bits}")
    return bits


def _payload_group(fields: Fields, name: str) -> str:
    group = fields.text("group")
    if group != group_of(name):
        raise fields.invalid(f"the group is not {group_of(name)}")
    return group


def _parse_lowrank(fields: Fields, name: str, dtype: str) -> LowRankEntry:
    shape = _shape(fields, {_MATRIX_DIMENSIONS, _STACK_DIMENSIONS})
    bands = []
    for pair in fields.items("bands", limit=MAX_BANDS):
        band = Fields({"band": pair}, where=fields.where)
        bits, rank = band.naturals("band", limit=MAX_DIMENSION, count=2)
        if bits not in PLANES or rank == 0:
            raise fields.invalid(f"a rank band is {rank} @ {bits} bits")
        bands.append(RankBand(bits, rank))
    if not 0 < sum(band.rank for band in bands) <= min(shape[-2:]):
        raise fields.invalid("the ranks do not fit the shape")
    return LowRankEntry(
        name=name,
        dtype=dtype,
        shape=shape,
        group=_payload_group(fields, name),
        bands=tuple(bands),
        group_u=_group(fields, "group_u"),
        group_v=_group(fields, "group_v"),
        symmetric=fields.flag("symmetric"),
        transposed=fields.flag("transposed"),
    )


def _parse_direct(fields: Fields, name: str, dtype: str) -> DirectEntry:
    return DirectEntry(
        name=name,
        dtype=dtype,
        shape=_shape(fields, {_MATRIX_DIMENSIONS, _STACK_DIMENSIONS}),
        group=_payload_group(fields, name),
        bits=_bits(fields),
        group_codes=_group(fields, "group_codes"),
        symmetric=fields.flag("symmetric"),
        transposed=fields.flag("transposed"),
    )


def _parse_rows(fields: Fields, name: str, dtype: str) -> RowsEntry:
    rows, cols = _shape(fields, {_MATRIX_DIMENSIONS})
    base_rows = fields.natural("base_rows", limit=rows)
    if base_rows == 0:
        raise fields.invalid("base_rows is 0")
    n_changed = fields.natural("n_changed", limit=base_rows)
    rank = _basis_rank(fields, cols if n_changed else 0)
    scaled = fields.has("scaled") and fields.flag("scaled")
    if scaled and (rank is None or n_changed != base_rows):
        raise fields.invalid("scaled needs a basis, and all rows of the backbone changed")
    return RowsEntry(
        name=name,
        dtype=dtype,
        shape=(rows, cols),
        base_rows=base_rows,
        n_changed=n_changed,
        bits=_bits(fields),
        group_rows=_group(fields, "group_rows"),
        symmetric=fields.flag("symmetric"),
        rank=rank,
        scaled=scaled,
    )


def _basis_rank(fields: Fields, most: int) -> int | None:
    if not fields.has("rank"):
        return None
    rank = fields.natural("rank", limit=most)
    if rank == 0:
        raise fields.invalid("rank is 0")
    return rank


def _any_shape(fields: Fields, dtype: str) -> tuple[int, ...]:
    shape = fields.naturals("shape", limit=MAX_DIMENSION)
    if len(shape) > MAX_RANK or prod(shape) * ITEM_BYTES[dtype] >= 2**63:
        raise fields.invalid("the shape is too large")
    return shape


def _parse_coded(fields: Fields, name: str, dtype: str) -> CodedEntry:
    shape = _any_shape(fields, dtype)
    return CodedEntry(
        name=name,
        dtype=dtype,
        shape=shape,
        base_rows=fields.natural("base_rows", limit=shape[0] if shape else 1),
        size_bytes=fields.natural("size_bytes"),
        sha256=fields.sha256("sha256"),
    )


def _parse_entry(fields: Fields) -> DeltaEntry:
    name = fields.text("name")
    check_tensor_name(name)
    fields = fields.at(name)
    kind, dtype = fields.text("kind"), fields.text("dtype")
    if dtype not in ITEM_BYTES:
        raise fields.invalid("the dtype is unknown")
    entry: DeltaEntry
    if kind == "lowrank":
        entry = _parse_lowrank(fields, name, dtype)
    elif kind == "direct":
        entry = _parse_direct(fields, name, dtype)
    elif kind == "rows":
        entry = _parse_rows(fields, name, dtype)
    elif kind == "coded":
        entry = _parse_coded(fields, name, dtype)
    elif kind in {"exact", "unchanged"}:
        shape = _any_shape(fields, dtype)
        of_kind = ExactEntry if kind == "exact" else UnchangedEntry
        entry = of_kind(name=name, dtype=dtype, shape=shape)
    else:
        raise fields.invalid("the kind is unknown")
    fields.done()
    return entry


def parse_entries(raw: Any) -> tuple[DeltaEntry, ...]:
    """Check a list of entries.

    Args:
        raw: parsed JSON.

    Returns:
        The entries in file order.

    Raises:
        UserError: delta_invalid, name_unsafe.
    """
    listed = Fields({"entries": raw}, where="delta.json").items("entries", limit=MAX_TENSORS)
    entries = tuple(_parse_entry(Fields(item, where="an entry")) for item in listed)
    if len({entry.name for entry in entries}) != len(entries):
        raise invalid("an entry is listed twice")
    return entries
