"""A delta on its way to a slab: bytes to copy, jobs that put them in order, directory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from deltacome_core.packed import PackedDirect, PackedLinear
from kernels.directory import MAX_RECORDS, Part, Record, encode_site
from kernels.fragments import (
    MOST_AHEAD,
    STEP_BYTES,
    WORD_COLUMNS,
    count_pairs,
    count_steps,
    words_of,
)
from kernels.image_jobs import (
    CODES_JOB,
    FACTORS_JOB,
    GROUPS_JOB,
    JOB_FIELDS,
    PIECE_ALIGNMENT_BYTES,
    JobWriter,
    count_elements,
    refuse,
)
from kernels.image_matrices import add_matrix

# Copies this long reach the rate of the bus; two of them are staged on the device at a time.
CHUNK_BYTES: Final = 32 << 20
# Bytes that may be copied to a device for one that is asked for.
_MOST_SPREAD: Final = 1.25


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
    def input_pairs(self) -> int:
        """Pairs of steps that its input fills."""
        return count_pairs(count_steps(self.in_features))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Bytes u8 [size] to be copied at once, the jobs that read them, and the largest one's size."""

    source: torch.Tensor
    first_job: int
    n_jobs: int
    n_elements: int

    @property
    def size(self) -> int:
        return len(self.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One matrix of a site: its outputs, its hidden values from `first` on, columns of its left."""

    first_row: int
    rows: int
    first: int
    columns: int
    is_direct: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteNeeds:
    """What one delta asks of an arena at one site: rows of its bands, pairs of hidden values.

    has_several: a matrix whose rank bands do not share a record.
    """

    shrink_rows: tuple[int, ...]
    hidden_pairs: int
    widths: frozenset[int]
    has_groups: bool
    has_several: bool
    has_direct: bool
    has_factors: bool

    def blocks(self, rows: int) -> int:
        """Programs of a shrink whose programs take `rows` rows each."""
        return sum(-(-band // rows) for band in self.shrink_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """Everything of one delta that its slab is made from.

    cuts: by site, the matrices that differ from the backbone's. They, needs and the directory are
    all that is asked for once the bytes are on a device.
    """

    chunks: tuple[Chunk, ...]
    jobs: torch.Tensor
    directory: torch.Tensor
    slab_bytes: int
    needs: tuple[SiteNeeds, ...]
    cuts: tuple[tuple[Cut, ...], ...]
    matrices: Mapping[str, PackedLinear]

    @property
    def source_bytes(self) -> int:
        return sum(chunk.size for chunk in self.chunks)


def _padded(size: int) -> int:
    return words_of(size) * WORD_COLUMNS


@dataclass(frozen=True, slots=True, kw_only=True)
class _SiteImage:
    entry: npt.NDArray[np.int32]
    needs: SiteNeeds
    cuts: tuple[Cut, ...]


def _add_site(writer: JobWriter, site: Site, matrices: Mapping[str, PackedLinear]) -> _SiteImage:
    shrink: list[Record] = []
    parts: list[Part | None] = []
    cuts: list[Cut] = []
    pair = column = first_row = 0
    named = zip(site.parts, site.out_features, strict=True)
    for number, (name, out) in enumerate(named):
        matrix = matrices.get(name)
        if matrix is None:
            parts.append(None)
            first_row += out
            continue
        if (matrix.out_features, matrix.in_features) != (out, site.in_features):
            raise refuse(name, f"{matrix.out_features} x {matrix.in_features} at {site.name}")
        part, records = add_matrix(
            writer, matrix, number=number, first_row=first_row, pair=pair, row=column
        )
        is_direct = isinstance(matrix, PackedDirect)
        columns = site.in_features if is_direct else sum(_padded(band.rows) for band in records)
        cuts.append(
            Cut(
                first_row=first_row,
                rows=out,
                first=column,
                columns=columns,
                is_direct=is_direct,
            )
        )
        parts.append(part)
        shrink += records
        if not is_direct:
            column += columns
            pair += sum(record.pairs for record in part.expand)
        first_row += out
    if len(shrink) > MAX_RECORDS:
        raise refuse(site.name, f"{len(shrink)} rank bands at one site")
    writer.end_site()
    outputs = [record for part in parts if part is not None for record in part.expand]
    has_direct = any(cut.is_direct for cut in cuts)
    has_several = any(part is not None and len(part.expand) > 1 for part in parts)
    return _SiteImage(
        entry=encode_site(shrink, parts),
        needs=_sum_needs(
            shrink, outputs, hidden_pairs=pair, has_several=has_several, has_direct=has_direct
        ),
        cuts=tuple(cuts),
    )


def _read_widths(shrink: list[Record], outputs: list[Record]) -> frozenset[int]:
    """Bits of all codes: a record of the second stage may have bands of several."""
    seconds = {record.target.bits for record in shrink if record.target is not None}
    return frozenset(seconds | {record.bits for record in shrink + outputs})


def _sum_needs(
    shrink: list[Record],
    outputs: list[Record],
    *,
    hidden_pairs: int,
    has_several: bool,
    has_direct: bool,
) -> SiteNeeds:
    records = shrink + outputs
    return SiteNeeds(
        shrink_rows=tuple(_padded(record.rows) for record in shrink),
        hidden_pairs=hidden_pairs,
        widths=_read_widths(shrink, outputs),
        has_groups=any(record.groups for record in records),
        has_several=has_several,
        has_direct=has_direct,
        has_factors=any(record.factors for record in outputs),
    )


def _add_sites(
    writer: JobWriter, sites: Sequence[Site], matrices: Mapping[str, PackedLinear]
) -> list[_SiteImage]:
    """Sites in their own order, laid out in that of the matrices: the next ones may not be read."""
    places = {name: place for place, name in enumerate(matrices)}
    first = [min(places.get(name, len(places)) for name in site.parts) for site in sites]
    order = sorted(range(len(sites)), key=first.__getitem__)
    found = {number: _add_site(writer, sites[number], matrices) for number in order}
    return [found[number] for number in range(len(sites))]


def _is_readable(writer: JobWriter) -> bool:
    """Whether the memory can be copied as it is: the bytes of each site lie close together."""
    border = writer.memory_bytes
    return not any(
        span.high - span.low > _MOST_SPREAD * span.n_bytes or span.low < border < span.high
        for span in writer.spans
    )


def _cut(
    writer: JobWriter, copied: torch.Tensor, jobs: npt.NDArray[np.int64]
) -> Iterator[tuple[int, Chunk]]:
    """Chunks that end where a site ends, each with its place in the source."""
    border = writer.memory_bytes
    first_job, low = 0, -1
    for number, span in enumerate(writer.spans):
        low = span.low if low < 0 else low
        if number + 1 < len(writer.spans):
            following = writer.spans[number + 1]
            goes_on = following.low >= span.high and following.high - low <= CHUNK_BYTES
            if goes_on and not low < border <= following.low:
                continue
        start = low - low % PIECE_ALIGNMENT_BYTES
        is_copied = writer.memory is None or low >= border
        base, first = (copied, start - border) if is_copied else (writer.memory, start)
        if base is not None and span.high > start:
            source = base[first : first + span.high - start]
            n_elements = count_elements(jobs[first_job : span.last_job])
            yield (
                start,
                Chunk(
                    source=source,
                    first_job=first_job,
                    n_jobs=span.last_job - first_job,
                    n_elements=n_elements,
                ),
            )
        first_job, low = span.last_job, -1


def _relative(jobs: npt.NDArray[np.int64], start: int) -> None:
    """Count source places from the start of the chunk; -1 stays absent."""
    fields = {CODES_JOB: (1,), FACTORS_JOB: (1, 5, 7), GROUPS_JOB: (1, 3)}
    for kind, columns in fields.items():
        for column in columns:
            chosen = (jobs[:, 0] == kind) & (jobs[:, column] >= 0)
            jobs[chosen, column] -= start


def _copy_pieces(writer: JobWriter, *, pin: bool) -> torch.Tensor:
    first = writer.memory_bytes
    size_bytes = max(writer.source_bytes - first, 1)
    copied = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pin)
    # Plain copies of memory: torch would take sixty times as long for so many pieces of bytes.
    target = copied.numpy()
    for start, array in writer.pieces:
        data = array.contiguous().flatten().view(torch.uint8).numpy()
        target[start - first : start - first + len(data)] = data
    return copied


def _host_tensor(array: npt.NDArray[np.generic], *, pin: bool) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if pin else tensor


def build_image(
    sites: Sequence[Site],
    matrices: Mapping[str, PackedLinear],
    *,
    pin: bool = False,
    memory: torch.Tensor | None = None,
) -> Image:
    """Lay a delta out for a slab.

    Args:
        sites: where its matrices are used; a matrix of no site is left out.
        matrices: packed matrices on the CPU by name; absent ones are unchanged. Sites are laid out
            in the order of their first ones.
        pin: copy the bytes into page-locked memory, from which a GPU reads at full rate.
        memory: u8, one piece that matrices are views of, page-locked if `pin`. If those of a site
            lie side by side, as they do in a delta's file, they are not copied.

    Returns:
        The image.

    Raises:
        UserError: arena_recipe_unknown, a matrix has a shape or scale groups no kernel reads.
    """
    writer = JobWriter(memory=memory)
    found = _add_sites(writer, sites, matrices)
    if memory is not None and not _is_readable(writer):
        return build_image(sites, matrices, pin=pin)
    jobs = np.array(writer.jobs, dtype=np.int64).reshape(-1, JOB_FIELDS)
    chunks = []
    for start, chunk in _cut(writer, _copy_pieces(writer, pin=pin), jobs):
        _relative(jobs[chunk.first_job : chunk.first_job + chunk.n_jobs], start)
        chunks.append(chunk)
    return Image(
        chunks=tuple(chunks),
        jobs=_host_tensor(jobs, pin=pin),
        directory=_host_tensor(np.stack([site.entry for site in found]), pin=pin),
        # Steps beyond the last are loaded too; nothing is multiplied with what they are.
        slab_bytes=writer.slab_bytes + MOST_AHEAD * 2 * STEP_BYTES,
        needs=tuple(site.needs for site in found),
        cuts=tuple(site.cuts for site in found),
        matrices=matrices,
    )
