"""A delta as it is kept: packed factors, matrices and rows, and what they mean as numbers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch

from deltacome_core.bitpack import unpack_codes, words_per_row
from deltacome_core.entries import CodedEntry
from deltacome_core.errors import InternalError
from deltacome_core.exact_product import multiply_factors
from deltacome_core.layout import Group, RankBand, scale_shape

_CODED_CHUNK_BYTES = 8 << 20


def _spread(grid: torch.Tensor, size: int, group: int, *, dim: int) -> torch.Tensor:
    if group == 1:
        return grid
    if group == 0:
        shape = list(grid.shape)
        shape[dim] = size
        return grid.expand(shape)
    return grid.repeat_interleave(group, dim=dim).narrow(dim, 0, size)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedFactor:
    """One quantised matrix; value = (code - zero) * scale, scales shared by groups.

    codes int32 [rows, words_per_row(cols, bits)], scale f16 and zero u8 of
    `scale_shape(rows, cols, group)`; zero None = symmetric, the zero point is (2^bits - 1) / 2.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    rows: int
    cols: int
    group: Group

    def __post_init__(self) -> None:
        grid = scale_shape(self.rows, self.cols, self.group)
        wanted = (self.rows, words_per_row(self.cols, self.bits))
        if tuple(self.codes.shape) != wanted or self.codes.dtype != torch.int32:
            raise InternalError(f"codes are {self.codes.dtype} {tuple(self.codes.shape)}")
        if tuple(self.scale.shape) != grid or self.scale.dtype != torch.float16:
            raise InternalError(f"scales are {self.scale.dtype} {tuple(self.scale.shape)}")
        if self.zero is not None and (
            tuple(self.zero.shape) != grid or self.zero.dtype != torch.uint8
        ):
            raise InternalError(f"zeros are {self.zero.dtype} {tuple(self.zero.shape)}")

    @property
    def size_bytes(self) -> int:
        arrays = [self.codes, self.scale] + ([] if self.zero is None else [self.zero])
        return sum(array.numel() * array.element_size() for array in arrays)

    def to(self, device: torch.device | str) -> "PackedFactor":
        return replace(
            self,
            codes=self.codes.to(device),
            scale=self.scale.to(device),
            zero=None if self.zero is None else self.zero.to(device),
        )

    def dequantise(self) -> torch.Tensor:
        """Give the numbers the codes stand for.

        Returns:
            f32 [rows, cols] on the device of the codes.

        Source: docs/format.md, "From codes to numbers".
        """
        codes = unpack_codes(self.codes, self.bits, self.cols)
        group_rows, group_cols = self.group

        def spread(grid: torch.Tensor) -> torch.Tensor:
            tall = _spread(grid.float(), self.rows, group_rows, dim=0)
            return _spread(tall, self.cols, group_cols, dim=1)

        values = codes.float()
        if self.zero is None:
            values -= ((1 << self.bits) - 1) / 2
        else:
            values -= spread(self.zero)
        values *= spread(self.scale)
        return values


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBand:
    """The singular vectors of one rank band: u [out, rank], v [rank, in]."""

    u: PackedFactor
    v: PackedFactor

    def __post_init__(self) -> None:
        if self.u.cols != self.v.rows or self.u.bits != self.v.bits:
            raise InternalError(f"U has rank {self.u.cols}, V has rank {self.v.rows}")

    @property
    def rank(self) -> int:
        return self.v.rows

    @property
    def bits(self) -> int:
        return self.v.bits

    def to(self, device: torch.device | str) -> "PackedBand":
        return replace(self, u=self.u.to(device), v=self.v.to(device))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedMatrix:
    """The low-rank delta of one linear layer; sigma f32 [R] in the order of the bands."""

    name: str
    out_features: int
    in_features: int
    sigma: torch.Tensor
    bands: tuple[PackedBand, ...]

    def __post_init__(self) -> None:
        if tuple(self.sigma.shape) != (self.rank,) or self.sigma.dtype != torch.float32:
            raise InternalError(f"{self.name}: sigma is {tuple(self.sigma.shape)}")
        for band in self.bands:
            if (band.u.rows, band.v.cols) != (self.out_features, self.in_features):
                raise InternalError(f"{self.name}: a band is {band.u.rows} x {band.v.cols}")

    @property
    def rank(self) -> int:
        return sum(band.rank for band in self.bands)

    @property
    def rank_bands(self) -> tuple[RankBand, ...]:
        return tuple(RankBand(band.bits, band.rank) for band in self.bands)

    @property
    def size_bytes(self) -> int:
        factors = sum(band.u.size_bytes + band.v.size_bytes for band in self.bands)
        return factors + self.sigma.numel() * self.sigma.element_size()

    @property
    def factors_size_bytes(self) -> int:
        return self.rank * (self.in_features + self.out_features) * torch.float32.itemsize

    def to(self, device: torch.device | str) -> "PackedMatrix":
        bands = tuple(band.to(device) for band in self.bands)
        return replace(self, sigma=self.sigma.to(device), bands=bands)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantise both factors.

        Returns:
            U f32 [out, R] and V f32 [R, in] with sigma folded into V; their product is the delta.
        """
        left = torch.cat([band.u.dequantise() for band in self.bands], dim=1)
        right = torch.cat([band.v.dequantise() for band in self.bands])
        return left, right * self.sigma[:, None]

    def dequantise(self) -> torch.Tensor:
        """Multiply the factors out; the same bits on every machine and device.

        Returns:
            f32 [out, in], the sum over bands of U diag(sigma) V.

        Source: docs/format.md, "From codes to numbers".
        """
        left = torch.cat([band.u.dequantise() for band in self.bands], dim=1)
        right = torch.cat([band.v.dequantise() for band in self.bands])
        return multiply_factors(left.double(), right.double() * self.sigma.double()[:, None])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedDirect:
    """The delta of one linear layer, quantised as it is: factor [out, in]."""

    name: str
    factor: PackedFactor

    @property
    def out_features(self) -> int:
        return self.factor.rows

    @property
    def in_features(self) -> int:
        return self.factor.cols

    @property
    def size_bytes(self) -> int:
        return self.factor.size_bytes

    @property
    def factors_size_bytes(self) -> int:
        return self.out_features * self.in_features * torch.float32.itemsize

    def to(self, device: torch.device | str) -> "PackedDirect":
        return replace(self, factor=self.factor.to(device))

    def factors(self) -> tuple[torch.Tensor]:
        """Dequantise the matrix.

        Returns:
            The delta f32 [out, in] alone: the product of one factor.
        """
        return (self.factor.dequantise(),)

    def dequantise(self) -> torch.Tensor:
        """Give the numbers the codes stand for.

        Returns:
            f32 [out, in].
        """
        return self.factor.dequantise()


PackedLinear = PackedMatrix | PackedDirect


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedStack:
    """The delta of a tensor [n, rows, cols], or of a matrix that is stored [in, out].

    slices: one matrix per index of the first dimension, all of one kind with the same bits and
    ranks; transposed: a slice of the tensor is the transpose of its matrix.
    """

    name: str
    shape: tuple[int, ...]
    slices: tuple[PackedLinear, ...]
    transposed: bool

    def __post_init__(self) -> None:
        rows, cols = self.shape[-2:]
        wanted = (cols, rows) if self.transposed else (rows, cols)
        if len(self.slices) != prod(self.shape[:-2]):
            raise InternalError(f"{self.name}: {len(self.slices)} slices for {self.shape}")
        if any((piece.out_features, piece.in_features) != wanted for piece in self.slices):
            raise InternalError(f"{self.name}: a slice is not {wanted[0]} x {wanted[1]}")

    @property
    def size_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.slices)

    def to(self, device: torch.device | str) -> "PackedStack":
        return replace(self, slices=tuple(piece.to(device) for piece in self.slices))

    def dequantise(self) -> torch.Tensor:
        """Give the delta of the whole tensor.

        Returns:
            f32 of `shape`.
        """
        deltas = torch.stack([piece.dequantise() for piece in self.slices])
        return (deltas.mT if self.transposed else deltas).reshape(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedRows:
    """The delta of an embedding or output head, row by row.

    rows and cols are those of the backbone; changed bool [rows] marks the rows that carry codes;
    factor [n_changed, cols] or None when no row changed; new_rows [n_new, cols] are vocabulary
    rows the backbone lacks, exact in the fine-tune's dtype. With a basis bf16 [rank, cols] the
    factor is [n_changed, rank]: coordinates in it. base_scale f32 [1] multiplies the backbone's
    rows, all of which have changed then, before the delta is added.
    """

    name: str
    rows: int
    cols: int
    changed: torch.Tensor
    factor: PackedFactor | None
    new_rows: torch.Tensor | None
    basis: torch.Tensor | None = None
    base_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if tuple(self.changed.shape) != (self.rows,) or self.changed.dtype != torch.bool:
            raise InternalError(f"{self.name}: the row map is {tuple(self.changed.shape)}")
        n_changed = int(self.changed.sum())
        width = self.cols if self.basis is None else len(self.basis)
        packed = (0, width) if self.factor is None else (self.factor.rows, self.factor.cols)
        if packed != (n_changed, width):
            raise InternalError(f"{self.name}: {n_changed} rows changed, {packed} are packed")
        if self.new_rows is not None and self.new_rows.shape[1:] != (self.cols,):
            raise InternalError(f"{self.name}: new rows are {tuple(self.new_rows.shape)}")

    @property
    def size_bytes(self) -> int:
        factor = 0 if self.factor is None else self.factor.size_bytes
        new = 0 if self.new_rows is None else self.new_rows.numel() * self.new_rows.element_size()
        basis = 0 if self.basis is None else self.basis.numel() * self.basis.element_size()
        scale = 0 if self.base_scale is None else self.base_scale.element_size()
        return -(-self.rows // 8) + factor + basis + scale + new

    def to(self, device: torch.device | str) -> "PackedRows":
        return replace(
            self,
            changed=self.changed.to(device),
            factor=None if self.factor is None else self.factor.to(device),
            new_rows=None if self.new_rows is None else self.new_rows.to(device),
            basis=None if self.basis is None else self.basis.to(device),
            base_scale=None if self.base_scale is None else self.base_scale.to(device),
        )

    def dequantise_changed(self) -> torch.Tensor:
        """Give what is added to the rows that changed; the same bits on every machine and device.

        Returns:
            f32 [n_changed, cols].

        Source: docs/format.md, "Payload of rows".
        """
        if self.factor is None:
            return torch.zeros((0, self.cols), device=self.changed.device)
        coordinates = self.factor.dequantise()
        if self.basis is None:
            return coordinates
        return multiply_factors(coordinates.double(), self.basis.double())

    def dequantise(self) -> torch.Tensor:
        """Give what is added to the rows the backbone has, once they are scaled.

        Returns:
            f32 [rows, cols], zero where nothing changed.
        """
        delta = torch.zeros((self.rows, self.cols), device=self.changed.device)
        delta[self.changed] = self.dequantise_changed()
        return delta


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExactTensor:
    """A tensor kept whole in the fine-tune's dtype: norms, biases, and what nothing else fits."""

    name: str
    value: torch.Tensor

    @property
    def size_bytes(self) -> int:
        return self.value.numel() * self.value.element_size()

    def to(self, device: torch.device | str) -> "ExactTensor":
        return replace(self, value=self.value.to(device))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CodedTensor:
    """A tensor coded exactly against the backbone's; `read` gives (start, size) of its bytes."""

    entry: CodedEntry
    read: Callable[[int, int], memoryview]

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def size_bytes(self) -> int:
        return self.entry.size_bytes

    def chunks(self) -> Iterator[memoryview]:
        for start in range(0, self.size_bytes, _CODED_CHUNK_BYTES):
            yield self.read(start, min(_CODED_CHUNK_BYTES, self.size_bytes - start))


PackedTensor = PackedLinear | PackedStack | PackedRows | ExactTensor | CodedTensor
