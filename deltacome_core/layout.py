"""Where every byte of a packed matrix lies; the arithmetic of docs/format.md, without torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

# Bit planes of a tile, in file order, low bits first.
PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (2, 2), 8: (8,)}
TILE_CODES = 128
WORD_BITS = 32
MATRIX_ALIGNMENT_BYTES = 256
SECTION_ALIGNMENT_BYTES = 16

SectionDtype = Literal["F32", "F16", "BF16", "U32", "U8"]
ITEM_BYTES: dict[SectionDtype, int] = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}

Group = tuple[int, int]


@dataclass(frozen=True, slots=True)
class RankBand:
    """`rank` consecutive singular vectors kept at `bits` bits per code."""

    bits: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One array inside a payload; `start` counts from the first byte of the payload."""

    key: str
    dtype: SectionDtype
    shape: tuple[int, ...]
    start: int

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def align_up(offset: int, boundary: int) -> int:
    """Round an offset up to a boundary.

    Args:
        offset: bytes.
        boundary: bytes, > 0.

    Returns:
        The smallest multiple of `boundary` that is not below `offset`.
    """
    return -(-offset // boundary) * boundary


def words_per_row(n: int, bits: int) -> int:
    """Count the uint32 words of one packed row of codes.

    Args:
        n: codes in the row.
        bits: 1, 2, 3, 4 or 8.

    Returns:
        Words over all tiles and planes; a partial tile rounds up plane by plane.
    """
    full, rest = divmod(n, TILE_CODES)
    words_full = full * TILE_CODES * bits // WORD_BITS
    return words_full + sum(-(-rest * width // WORD_BITS) for width in PLANES[bits])


def scale_shape(rows: int, cols: int, group: Group) -> tuple[int, int]:
    """Give the shape of the scale grid of a factor.

    Args:
        rows: rows of the factor.
        cols: columns of the factor.
        group: codes that share a scale, (along rows, along columns); 0 = the whole dimension.

    Returns:
        (ceil(rows / group rows), ceil(cols / group columns)).
    """
    group_rows, group_cols = group
    return (
        -(-rows // group_rows) if group_rows else min(rows, 1),
        -(-cols // group_cols) if group_cols else min(cols, 1),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorShape:
    """Everything the byte layout of one packed factor depends on."""

    key: str
    rows: int
    cols: int
    bits: int
    group: Group
    symmetric: bool

    def arrays(self) -> Iterator[tuple[str, SectionDtype, tuple[int, ...]]]:
        grid = scale_shape(self.rows, self.cols, self.group)
        yield f"{self.key}.codes", "U32", (self.rows, words_per_row(self.cols, self.bits))
        yield f"{self.key}.scale", "F16", grid
        if not self.symmetric:
            yield f"{self.key}.zero", "U8", grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """The sections of one matrix and the bytes they take, padding included."""

    sections: tuple[Section, ...]
    size_bytes: int


def _place(arrays: Iterator[tuple[str, SectionDtype, tuple[int, ...]]]) -> Payload:
    sections = []
    end = 0
    for key, dtype, shape in arrays:
        start = align_up(end, SECTION_ALIGNMENT_BYTES)
        section = Section(key=key, dtype=dtype, shape=shape, start=start)
        sections.append(section)
        end = start + section.size_bytes
    return Payload(sections=tuple(sections), size_bytes=align_up(end, MATRIX_ALIGNMENT_BYTES))


def matrix_factors(
    out_features: int,
    in_features: int,
    *,
    bands: Sequence[RankBand],
    group_u: Group,
    group_v: Group,
    symmetric: bool,
) -> Iterator[FactorShape]:
    """List the factors of a matrix in file order: V then U of each band.

    Args:
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        bands: rank bands in file order.
        group_u: scale group of U [out, rank].
        group_v: scale group of V [rank, in].
        symmetric: whether zero points are absent.

    Returns:
        Iterator of factor shapes; keys are "0.v", "0.u", "1.v", ...
    """
    for number, band in enumerate(bands):
        yield FactorShape(
            key=f"{number}.v",
            rows=band.rank,
            cols=in_features,
            bits=band.bits,
            group=group_v,
            symmetric=symmetric,
        )
        yield FactorShape(
            key=f"{number}.u",
            rows=out_features,
            cols=band.rank,
            bits=band.bits,
            group=group_u,
            symmetric=symmetric,
        )


def matrix_payload(
    out_features: int,
    in_features: int,
    *,
    bands: Sequence[RankBand],
    group_u: Group,
    group_v: Group,
    symmetric: bool,
) -> Payload:
    """Place the sections of a low-rank matrix.

    Args:
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        bands: rank bands in file order.
        group_u: scale group of U [out, rank].
        group_v: scale group of V [rank, in].
        symmetric: whether zero points are absent.

    Returns:
        Sections "sigma" [R], then codes, scale and zero of V and U for each band.
    """

    def arrays() -> Iterator[tuple[str, SectionDtype, tuple[int, ...]]]:
        yield "sigma", "F32", (sum(band.rank for band in bands),)
        for factor in matrix_factors(
            out_features,
            in_features,
            bands=bands,
            group_u=group_u,
            group_v=group_v,
            symmetric=symmetric,
        ):
            yield from factor.arrays()

    return _place(arrays())


def direct_factor(
    out_features: int, in_features: int, *, bits: int, group: Group, symmetric: bool
) -> FactorShape:
    """Give the one factor of a matrix that is quantised as it is.

    Args:
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        bits: 1, 2, 3, 4 or 8.
        group: scale group of the codes [out, in].
        symmetric: whether zero points are absent.

    Returns:
        The factor, of key "direct".
    """
    return FactorShape(
        key="direct",
        rows=out_features,
        cols=in_features,
        bits=bits,
        group=group,
        symmetric=symmetric,
    )


def direct_payload(
    out_features: int, in_features: int, *, bits: int, group: Group, symmetric: bool
) -> Payload:
    """Place the sections of a matrix that is quantised as it is.

    Args:
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        bits: 1, 2, 3, 4 or 8.
        group: scale group of the codes [out, in].
        symmetric: whether zero points are absent.

    Returns:
        Sections "direct.codes", "direct.scale" and, unless symmetric, "direct.zero".
    """
    factor = direct_factor(out_features, in_features, bits=bits, group=group, symmetric=symmetric)
    return _place(factor.arrays())


def rows_payload(
    base_rows: int,
    cols: int,
    *,
    n_changed: int,
    bits: int,
    group: Group,
    symmetric: bool,
    rank: int | None = None,
    scaled: bool = False,
) -> Payload:
    """Place the sections of a quantised row delta.

    Args:
        base_rows: rows of the backbone's tensor.
        cols: columns of the tensor.
        n_changed: rows that carry codes.
        bits: 1, 2, 3, 4 or 8.
        group: scale group of the codes [n_changed, rank or cols].
        symmetric: whether zero points are absent.
        rank: of the basis that the codes are coordinates in; None: they are the rows themselves.
        scaled: whether the backbone's rows are multiplied by a number.

    Returns:
        Sections "changed" (one bit per base row), then codes, scale and zero, then the basis and
        the base scale.
    """
    factor = FactorShape(
        key="rows",
        rows=n_changed,
        cols=cols if rank is None else rank,
        bits=bits,
        group=group,
        symmetric=symmetric,
    )

    def arrays() -> Iterator[tuple[str, SectionDtype, tuple[int, ...]]]:
        yield "changed", "U8", (-(-base_rows // 8),)
        yield from factor.arrays()
        if rank is not None:
            yield "basis", "BF16", (rank, cols)
        if scaled:
            yield "base_scale", "F32", (1,)

    return _place(arrays())
