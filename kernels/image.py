"""A delta on its way to a slab: bytes to copy, jobs that put them in order, directory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from deltacome_core.errors import UserError
from deltacome_core.layout import TILE_CODES
from deltacome_core.packed import PackedBand, PackedDirect, PackedFactor, PackedLinear
from kernels.directory import (
    MAX_RECORDS,
    SOURCE_HIDDEN,
    SOURCE_INPUT,
    Part,
    Record,
    encode_site,
)
from kernels.fragments import STEP_COLUMNS, UNIT_BYTES, FragmentShape

JOB_FIELDS: Final = 16
CODES_JOB: Final = 0
FACTORS_JOB: Final = 1
GROUPS_JOB: Final = 2
# Copies this long reach the rate of the bus; two of them are staged on the device at a time.
CHUNK_BYTES: Final = 32 << 20
_ALIGNMENT_BYTES: Final = 16
# A length that zeros cannot reach, far below any singular value worth a code.
_LEAST_BOUND: Final = 1e-12
# Activations are rounded to whole numbers and lengths to fp32: both are far below this.
_BOUND_MARGIN: Final = 1.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Matrices that share one input and lie side by side in one output, as q, k and v do."""

    name: str
    parts: tuple[str, ...]
    out_features: tuple[int, ...]
    in_features: int

    @property
    def total_out(self) -> int:
        return sum(self.out_features)

    @property
    def input_steps(self) -> int:
        return -(-self.in_features // STEP_COLUMNS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Bytes start .. start + size of an image's source, and the jobs that read them."""

    start: int
    size: int
    first_job: int
    n_jobs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteNeeds:
    """What one delta asks of an arena at one site: rows of its bands, steps of hidden values."""

    shrink_rows: tuple[int, ...]
    hidden_steps: int
    widths: frozenset[int]
    has_groups: bool
    has_plain: bool
    has_direct: bool
    has_factors: bool

    def blocks(self, rows: int) -> int:
        """Programs of a shrink whose programs take `rows` rows each."""
        return sum(-(-band // rows) for band in self.shrink_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """Everything of one delta that its slab is made from."""

    source: torch.Tensor
    chunks: tuple[Chunk, ...]
    jobs: torch.Tensor
    directory: torch.Tensor
    slab_bytes: int
    needs: tuple[SiteNeeds, ...]
    matrices: Mapping[str, PackedLinear]


def _refuse(name: str, reason: str) -> UserError:
    return UserError("arena_recipe_unknown", name=name, reason=reason)


@dataclass(slots=True)
class _Builder:
    pieces: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    source_bytes: int = 0
    slab_bytes: int = UNIT_BYTES
    jobs: list[list[int]] = field(default_factory=list)
    widths: set[int] = field(default_factory=set)
    has_direct: bool = False

    def place(self, array: torch.Tensor) -> int:
        """Take an array along; returns its first byte in the source."""
        start = -(-self.source_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.pieces.append((start, array))
        self.source_bytes = start + array.numel() * array.element_size()
        return start

    def reserve(self, size_bytes: int) -> int:
        """Room in the slab; returns its place in units."""
        place = self.slab_bytes // UNIT_BYTES
        self.slab_bytes += -(-size_bytes // UNIT_BYTES) * UNIT_BYTES
        return place

    def add_job(self, *fields: int) -> None:
        self.jobs.append([*fields, *[0] * (JOB_FIELDS - len(fields))])

    def add_codes(self, factor: PackedFactor) -> tuple[int, int]:
        """Jobs of a factor's codes; returns the places of the codes and of the third bit."""
        shape = FragmentShape(factor.rows, factor.cols, factor.bits)
        self.widths.add(factor.bits)
        source = self.place(factor.codes)
        low = self.reserve(shape.low_bytes)
        high = self.reserve(shape.high_bytes) if shape.high_bytes else 0
        n_pairs = -(-shape.steps // 2)
        whole_pairs = factor.cols // TILE_CODES * (TILE_CODES // STEP_COLUMNS // 2)
        for first, last, whole in ((0, whole_pairs, 1), (whole_pairs, n_pairs, 0)):
            if first < last:
                self.add_job(
                    CODES_JOB,
                    source,
                    low * UNIT_BYTES,
                    high * UNIT_BYTES,
                    factor.rows,
                    factor.cols,
                    factor.codes.shape[1],
                    factor.bits,
                    first,
                    last - first,
                    whole,
                )
        return low, high

    def add_groups(self, factor: PackedFactor) -> int:
        """Job of the scales and zero points of tiles; returns their place."""
        shape = FragmentShape(factor.rows, factor.cols, factor.bits)
        n_tiles = -(-factor.cols // TILE_CODES)
        place = self.reserve(n_tiles * shape.row_blocks * 16 * 4)
        self.add_job(
            GROUPS_JOB,
            self.place(factor.scale),
            place * UNIT_BYTES,
            -1 if factor.zero is None else self.place(factor.zero),
            factor.rows,
            factor.cols,
            factor.group[0] or factor.rows,
            factor.bits,
            factor.group[1] or factor.cols,
        )
        return place

    def add_factors(
        self,
        rows: int,
        sigma: torch.Tensor | None,
        scales: Sequence[tuple[torch.Tensor, int]],
    ) -> int:
        """Job of a row factor, sigma times the scales; returns its place."""
        place = self.reserve(rows * 4)
        fields = [-1, 1, -1, 1]
        for number, (scale, group) in enumerate(scales):
            fields[2 * number : 2 * number + 2] = [self.place(scale), group]
        first = -1 if sigma is None else self.place(sigma)
        self.add_job(FACTORS_JOB, first, place * UNIT_BYTES, 0, rows, *fields)
        return place


def _is_by_row(factor: PackedFactor) -> bool:
    return factor.zero is None and factor.group[1] in {0, factor.cols}


def _is_by_column(factor: PackedFactor) -> bool:
    """One scale a column, or one for all: it can be folded into what the column multiplies."""
    by_column = factor.group == (0, 1) or (factor.rows <= factor.group[0] and factor.group[1] == 1)
    return factor.zero is None and (by_column or factor.group == (0, 0))


def _check_tiles(name: str, factor: PackedFactor) -> None:
    if factor.group[1] % TILE_CODES and factor.group[1] < factor.cols:
        reason = f"a scale for {factor.group[0]} x {factor.group[1]} codes"
        raise _refuse(name, reason)


def _row_lengths(factor: PackedFactor) -> torch.Tensor:
    """Upper limit of the length of each row, f64 [rows]."""
    most = (1 << factor.bits) - 1
    if factor.zero is None:
        largest = factor.scale.double() * (most / 2)
    else:
        zero = factor.zero.double()
        largest = factor.scale.double() * torch.maximum(zero, most - zero)
    group = factor.group[0] or factor.rows
    rows = largest.amax(dim=1).repeat_interleave(group)[: factor.rows]
    return rows * sqrt(factor.cols)


def _add_band(
    builder: _Builder, name: str, band: PackedBand, sigma: torch.Tensor
) -> tuple[Record, Record, float]:
    """Records of V and U of one band, steps and part left at 0, and the bound of its h."""
    v, u = band.v, band.u
    folded = _is_by_column(u)
    codes, high = builder.add_codes(v)
    scales = [(v.scale, v.group[0] or v.rows)] if _is_by_row(v) else []
    lengths = _row_lengths(v) * sigma.double()
    if folded:
        scales.append((u.scale, 1 if u.scale.numel() > 1 else u.cols))
        lengths = lengths * u.scale.double().flatten()
    groups = 0
    if not _is_by_row(v):
        _check_tiles(name, v)
        groups = builder.add_groups(v)
    shape = FragmentShape(v.rows, v.cols, v.bits)
    first = Record(
        bits=v.bits,
        codes=codes,
        high=high,
        rows=v.rows,
        row_blocks=shape.row_blocks,
        steps=shape.steps,
        factors=builder.add_factors(v.rows, sigma, scales),
        groups=groups,
        first_step=0,
        part=0,
    )
    return first, _add_output(builder, name, u, scaled=not folded), float(lengths.max())


def _add_output(builder: _Builder, name: str, factor: PackedFactor, *, scaled: bool) -> Record:
    """Record of a factor whose rows are outputs; without `scaled` its scales lie elsewhere."""
    codes, high = builder.add_codes(factor)
    shape = FragmentShape(factor.rows, factor.cols, factor.bits)
    factors = groups = 0
    if scaled and _is_by_row(factor):
        group = factor.group[0] or factor.rows
        factors = builder.add_factors(factor.rows, None, [(factor.scale, group)])
    elif scaled:
        _check_tiles(name, factor)
        groups = builder.add_groups(factor)
    return Record(
        bits=factor.bits,
        codes=codes,
        high=high,
        rows=factor.rows,
        row_blocks=shape.row_blocks,
        steps=shape.steps,
        factors=factors,
        groups=groups,
        first_step=0,
        part=0,
    )


def _at(record: Record, *, step: int, part: int) -> Record:
    return Record(
        bits=record.bits,
        codes=record.codes,
        high=record.high,
        rows=record.rows,
        row_blocks=record.row_blocks,
        steps=record.steps,
        factors=record.factors,
        groups=record.groups,
        first_step=step,
        part=part,
    )


def _sum_needs(
    builder: _Builder, shrink: list[Record], outputs: list[Record], hidden_steps: int
) -> SiteNeeds:
    records = shrink + outputs
    return SiteNeeds(
        shrink_rows=tuple(-(-record.rows // STEP_COLUMNS) * STEP_COLUMNS for record in shrink),
        hidden_steps=hidden_steps,
        widths=frozenset(builder.widths),
        has_groups=any(record.groups for record in records),
        has_plain=not all(record.groups for record in records),
        has_direct=builder.has_direct,
        has_factors=any(record.factors for record in outputs),
    )


def _add_site(
    builder: _Builder, site: Site, matrices: Mapping[str, PackedLinear]
) -> tuple[npt.NDArray[np.int32], SiteNeeds]:
    shrink: list[Record] = []
    parts: list[Part | None] = []
    step = first_row = 0
    builder.widths, builder.has_direct = set(), False
    for number, (name, out) in enumerate(zip(site.parts, site.out_features, strict=True)):
        matrix = matrices.get(name)
        if matrix is None:
            parts.append(None)
            first_row += out
            continue
        if (matrix.out_features, matrix.in_features) != (out, site.in_features):
            raise _refuse(name, f"{matrix.out_features} x {matrix.in_features} at {site.name}")
        expand: list[Record] = []
        bound = _LEAST_BOUND
        first_step = step
        if isinstance(matrix, PackedDirect):
            builder.has_direct = True
            record = _add_output(builder, name, matrix.factor, scaled=True)
            expand.append(_at(record, step=0, part=number))
        else:
            first = 0
            for band in matrix.bands:
                sigma = matrix.sigma[first : first + band.rank]
                v, u, limit = _add_band(builder, name, band, sigma)
                shrink.append(_at(v, step=step, part=number))
                expand.append(_at(u, step=step, part=number))
                bound = max(bound, limit * _BOUND_MARGIN)
                step += u.steps
                first += band.rank
        if len({record.bits for record in expand}) < len(expand):
            raise _refuse(name, "two rank bands of one width")
        source = SOURCE_INPUT if isinstance(matrix, PackedDirect) else SOURCE_HIDDEN
        parts.append(
            Part(
                first_row=first_row,
                rows=out,
                bound=bound,
                source=source,
                first_step=first_step,
                expand=tuple(expand),
            )
        )
        first_row += out
    if len(shrink) > MAX_RECORDS:
        raise _refuse(site.name, f"{len(shrink)} rank bands at one site")
    outputs = [record for part in parts if part is not None for record in part.expand]
    return encode_site(shrink, parts), _sum_needs(builder, shrink, outputs, step)


def _cut(ends: list[tuple[int, int]]) -> Iterator[Chunk]:
    """Chunks that end where a site ends; `ends` are (source bytes, jobs) after each site."""
    start = first_job = 0
    for number, (end, last_job) in enumerate(ends):
        following = ends[number + 1][0] if number + 1 < len(ends) else None
        if following is None or following - start > CHUNK_BYTES:
            if end > start:
                yield Chunk(
                    start=start, size=end - start, first_job=first_job, n_jobs=last_job - first_job
                )
            start = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            first_job = last_job


def _relative(jobs: npt.NDArray[np.int64], start: int) -> None:
    """Count source places from the start of the chunk; -1 stays absent."""
    fields = {CODES_JOB: (1,), FACTORS_JOB: (1, 5, 7), GROUPS_JOB: (1, 3)}
    for kind, columns in fields.items():
        for column in columns:
            chosen = (jobs[:, 0] == kind) & (jobs[:, column] >= 0)
            jobs[chosen, column] -= start


def _host_tensor(array: npt.NDArray[np.generic], *, pin: bool) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if pin else tensor


def build_image(
    sites: Sequence[Site], matrices: Mapping[str, PackedLinear], *, pin: bool = False
) -> Image:
    """Lay a delta out for a slab.

    Args:
        sites: where its matrices are used; a matrix of no site is left out.
        matrices: packed matrices on the CPU by name; absent ones are unchanged.
        pin: copy the bytes into page-locked memory, from which a GPU reads at full rate.

    Returns:
        The image.

    Raises:
        UserError: arena_recipe_unknown, a matrix has a shape or scale groups no kernel reads.
    """
    builder = _Builder()
    entries, needs, ends = [], [], []
    for site in sites:
        entry, site_needs = _add_site(builder, site, matrices)
        entries.append(entry)
        needs.append(site_needs)
        ends.append((builder.source_bytes, len(builder.jobs)))
    chunks = tuple(_cut(ends))
    jobs = np.array(builder.jobs, dtype=np.int64).reshape(-1, JOB_FIELDS)
    for chunk in chunks:
        _relative(jobs[chunk.first_job : chunk.first_job + chunk.n_jobs], chunk.start)
    source = torch.empty(max(builder.source_bytes, 1), dtype=torch.uint8, pin_memory=pin)
    # Plain copies of memory: torch would take sixty times as long for so many pieces of bytes.
    target = source.numpy()
    for start, array in builder.pieces:
        data = array.contiguous().flatten().view(torch.uint8).numpy()
        target[start : start + len(data)] = data
    return Image(
        source=source,
        chunks=chunks,
        jobs=_host_tensor(jobs, pin=pin),
        directory=_host_tensor(np.stack(entries), pin=pin),
        slab_bytes=builder.slab_bytes,
        needs=tuple(needs),
        matrices=matrices,
    )
