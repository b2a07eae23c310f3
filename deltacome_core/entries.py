"""What a delta keeps of each tensor: six kinds of entry, where their bytes lie, and as JSON."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from deltacome_core.checkpoint import Layout, is_vocabulary_tensor
from deltacome_core.fields import invalid
from deltacome_core.layout import (
    Group,
    Payload,
    RankBand,
    direct_payload,
    matrix_payload,
    rows_payload,
)

REST_GROUP = "rest"
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


# Asked several times for each of hundreds of matrices while a delta is opened and read.
_lowrank_payload = lru_cache(maxsize=4096)(matrix_payload)


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankEntry(_Matrices):
    """Matrices kept as rank bands, all slices with the same ones."""

    bands: tuple[RankBand, ...]
    group_u: Group
    group_v: Group
    symmetric: bool

    @property
    def payload(self) -> Payload:
        return _lowrank_payload(
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
    None: they are the change itself. scaled: the backbone's rows are multiplied by a number first.
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
    scaled: bool = False

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
            scaled=self.scaled,
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
