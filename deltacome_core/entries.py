"""What a delta keeps of each tensor: six kinds of entry, where their bytes lie, and as JSON."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from deltacome_core.checkpoint import Layout, is_vocabulary_tensor
from deltacome_core.fields import Fields, invalid
from deltacome_core.layout import (
    PLANES,
    Group,
    Payload,
    RankBand,
    direct_payload,
    matrix_payload,
    rows_payload,
)
from deltacome_core.safetensors_file import ITEM_BYTES, MAX_RANK, MAX_TENSORS, check_tensor_name

REST_GROUP = "rest"
MAX_DIMENSION = 2**31 - 1
MAX_BANDS = 8
MAX_GROUP = 1 << 16
# Below this a low-rank form of both factors and their scales is no smaller than the matrix.
MIN_LOWRANK_DIMENSION = 32
# What an entry of no changed rows says about its codes, so that equal deltas give equal bytes.
EMPTY_ROWS_BITS = 4
EMPTY_ROWS_GROUP = (1, 128)

_MATRIX_DIMENSIONS = 2
_STACK_DIMENSIONS = 3
_LAYER = re.compile(r"\A(.+?\.\d+)\.")
_SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrices:
    """A matrix, or a stack of them [n, rows, cols], in the payload of its group.

    transposed: the tensor is stored [in, out] or [n, in, out], the codes are those of [out, in].
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    group: str
    transposed: bool = False

    @property
    def n_slices(self) -> int:
        return prod(self.shape[:-2])

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is one matrix [out, in], as linear layers have it."""
        return len(self.shape) == _MATRIX_DIMENSIONS and not self.transposed

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of one slice."""
        rows, cols = self.shape[-2:]
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def payload(self) -> Payload:
        """Layout of one slice; the slices follow each other."""
        raise NotImplementedError

    @property
    def size_bytes(self) -> int:
        return self.n_slices * self.payload.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankEntry(_Matrices):
    """Matrices kept as rank bands, all slices with the same ones."""

    bands: tuple[RankBand, ...]
    group_u: Group
    group_v: Group
    symmetric: bool

    @property
    def payload(self) -> Payload:
        return matrix_payload(
            *self.matrix_shape,
            bands=self.bands,
            group_u=self.group_u,
            group_v=self.group_v,
            symmetric=self.symmetric,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectEntry(_Matrices):
    """Matrices quantised as they are."""

    bits: int
    group_codes: Group
    symmetric: bool

    @property
    def payload(self) -> Payload:
        return direct_payload(
            *self.matrix_shape, bits=self.bits, group=self.group_codes, symmetric=self.symmetric
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsEntry:
    """An embedding or output head: quantised changes of old rows, new rows exact.

    rank: the codes of a row are its coordinates in a basis of so many rows, which lies behind them;
    None: they are the change itself.
    """

    name: str
    dtype: str
    shape: tuple[int, int]
    base_rows: int
    n_changed: int
    bits: int
    group_rows: Group
    symmetric: bool
    rank: int | None = None

    @property
    def n_new(self) -> int:
        return self.shape[0] - self.base_rows

    @property
    def payload(self) -> Payload:
        return rows_payload(
            self.base_rows,
            self.shape[1],
            n_changed=self.n_changed,
            bits=self.bits,
            group=self.group_rows,
            symmetric=self.symmetric,
            rank=self.rank,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactEntry:
    """A tensor kept whole."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedEntry:
    """A tensor coded exactly; its first `base_rows` rows grew from the backbone's.

    A tensor without dimensions counts as one row. `sha256` is that of the tensor's own bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    base_rows: int
    size_bytes: int
    sha256: str

    @property
    def n_predicted(self) -> int:
        return self.base_rows * prod(self.shape[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class UnchangedEntry:
    """A tensor that equals the backbone's after a cast to `dtype`; it costs no bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]


MatrixEntry = LowRankEntry | DirectEntry
DeltaEntry = MatrixEntry | RowsEntry | ExactEntry | CodedEntry | UnchangedEntry


def needs_backbone(entry: DeltaEntry) -> bool:
    """Tell whether a tensor can only be rebuilt from the backbone's tensor of its name.

    Args:
        entry: any kind of entry.

    Returns:
        False for what is kept whole or coded without a base.
    """
    if isinstance(entry, CodedEntry):
        return entry.base_rows > 0
    return not isinstance(entry, ExactEntry)


def backbone_shape(entry: DeltaEntry) -> tuple[int, ...]:
    """Give the shape that the backbone's tensor of an entry must have.

    Args:
        entry: one that needs the backbone.

    Returns:
        The entry's shape, without the rows that the backbone lacks.
    """
    if isinstance(entry, RowsEntry | CodedEntry) and entry.shape:
        return (entry.base_rows, *entry.shape[1:])
    return entry.shape


def is_lowrank_shape(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a changed tensor is kept as rank bands, by its name and shape.

    Args:
        name: tensor name; norms and biases are kept exactly, vocabularies by rows.
        shape: of the fine-tune's tensor.

    Returns:
        True for matrices, and for stacks of matrices such as the experts of one layer.
    """
    if len(shape) not in {_MATRIX_DIMENSIONS, _STACK_DIMENSIONS} or is_vocabulary_tensor(name):
        return False
    # gpt-oss keeps the biases of its experts as a matrix [experts, out].
    is_small = "norm" in name or name.endswith("bias")
    return not is_small and min(shape[-2:]) >= MIN_LOWRANK_DIMENSION


def slice_name(name: str, index: int) -> str:
    """Name one matrix of a stack, for example "model.layers.0.mlp.experts.down_proj[3]"."""
    return f"{name}[{index}]"


def group_of(name: str) -> str:
    """Name the payload a matrix lies in.

    Args:
        name: tensor name.

    Returns:
        The prefix up to and with the first number (the layer), or "rest".
    """
    match = _LAYER.match(name)
    return match[1] if match else REST_GROUP


def layer_order(group: str) -> tuple[str, int]:
    """Give the key that sorts payloads as they lie in a delta.

    Args:
        group: what group_of returned.

    Returns:
        (prefix, number of the layer); what lies outside the layers has the number -1.
    """
    prefix, _, number = group.rpartition(".")
    return (prefix, int(number)) if number.isdigit() else (group, -1)


def site_order(name: str) -> tuple[str, int, str]:
    """Give the key that sorts matrices as they lie in a payload.

    Args:
        name: tensor name.

    Returns:
        (group, place among q k v o gate up down, name); fused projections become neighbours.
    """
    parts = name.split(".")
    place = next((at for at, site in enumerate(_SITES) if site in parts), len(_SITES))
    return group_of(name), place, name


def expected_tensors(entries: Iterable[DeltaEntry]) -> Layout:
    """Say which tensors the data files hold for a list of entries.

    Args:
        entries: entries of a manifest.

    Returns:
        dtype and shape by tensor name, in the order of the entries; a group's payload stands
        where its first matrix does and is as long as its matrices together.

    Raises:
        UserError: delta_invalid when two entries claim one tensor.
    """
    groups: set[str] = set()
    layout: Layout = {}

    def add(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        if name in layout:
            raise invalid(f"two entries claim the tensor {name}")
        layout[name] = (dtype, shape)

    for entry in entries:
        if isinstance(entry, MatrixEntry):
            stored = f"packed.{entry.group}"
            if entry.group not in groups:
                groups.add(entry.group)
                add(stored, "U8", (0,))
            layout[stored] = ("U8", (layout[stored][1][0] + entry.size_bytes,))
        elif isinstance(entry, RowsEntry):
            add(f"packed.{entry.name}", "U8", (entry.payload.size_bytes,))
            if entry.n_new:
                add(f"new.{entry.name}", entry.dtype, (entry.n_new, entry.shape[1]))
        elif isinstance(entry, ExactEntry):
            add(f"exact.{entry.name}", entry.dtype, entry.shape)
        elif isinstance(entry, CodedEntry):
            add(f"coded.{entry.name}", "U8", (entry.size_bytes,))
    return layout


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
        return common | rows | ({} if entry.rank is None else {"rank": entry.rank})
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
    return RowsEntry(
        name=name,
        dtype=dtype,
        shape=(rows, cols),
        base_rows=base_rows,
        n_changed=n_changed,
        bits=_bits(fields),
        group_rows=_group(fields, "group_rows"),
        symmetric=fields.flag("symmetric"),
        rank=_basis_rank(fields, cols if n_changed else 0),
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
