"""Write a delta: parts that survive a crash first, then one folder that appears whole."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deltacome_core import strict_json
from deltacome_core.atomic import new_folder, sync_folder, write_file
from deltacome_core.checkpoint import Layout
from deltacome_core.delta_folder import hash_file
from deltacome_core.entries import (
    EMPTY_ROWS_BITS,
    EMPTY_ROWS_GROUP,
    DeltaEntry,
    DirectEntry,
    ExactEntry,
    LowRankEntry,
    MatrixEntry,
    RowsEntry,
    UnchangedEntry,
    expected_tensors,
    needs_backbone,
    site_order,
)
from deltacome_core.entries_json import entry_to_json, parse_entries
from deltacome_core.errors import InternalError
from deltacome_core.fields import invalid
from deltacome_core.layout import Group
from deltacome_core.manifest import (
    MANIFEST_NAME,
    DeltaManifest,
    manifest_to_json,
)
from deltacome_core.packed import (
    CodedTensor,
    ExactTensor,
    PackedDirect,
    PackedLinear,
    PackedMatrix,
    PackedRows,
    PackedStack,
    PackedTensor,
)
from deltacome_core.payload import matrix_to_payload, rows_to_payload
from deltacome_core.safetensors_file import (
    Chunks,
    TensorSource,
    chunks_of,
    read_chunks,
    read_header,
    write_safetensors,
)
from deltacome_core.shards import DATA_METADATA, MAX_SHARD_BYTES, cut_shards
from deltacome_core.tensors import dtype_name, tensor_bytes

_ENTRIES_TENSOR = "entries"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A finished piece of a delta on disk; with_feedback counts its calibrated matrices."""

    path: Path
    entries: tuple[DeltaEntry, ...]
    fingerprint: str
    with_feedback: int


def _common(groups: set[Group], name: str) -> Group:
    if len(groups) != 1:
        raise InternalError(f"{name}: the bands have scale groups {sorted(groups)}")
    return next(iter(groups))


def _describe_matrix(matrix: PackedMatrix, dtype: str) -> LowRankEntry:
    factors = [factor for band in matrix.bands for factor in (band.u, band.v)]
    symmetric = {factor.zero is None for factor in factors}
    if len(symmetric) != 1:
        raise InternalError(f"{matrix.name}: only some factors have zero points")
    return LowRankEntry(
        name=matrix.name,
        dtype=dtype,
        shape=(matrix.out_features, matrix.in_features),
        group=site_order(matrix.name)[0],
        bands=matrix.rank_bands,
        group_u=_common({band.u.group for band in matrix.bands}, matrix.name),
        group_v=_common({band.v.group for band in matrix.bands}, matrix.name),
        symmetric=symmetric.pop(),
    )


def _describe_direct(matrix: PackedDirect, dtype: str) -> DirectEntry:
    return DirectEntry(
        name=matrix.name,
        dtype=dtype,
        shape=(matrix.out_features, matrix.in_features),
        group=site_order(matrix.name)[0],
        bits=matrix.factor.bits,
        group_codes=matrix.factor.group,
        symmetric=matrix.factor.zero is None,
    )


def _describe_stack(stack: PackedStack, dtype: str) -> MatrixEntry:
    first, *others = (
        replace(
            _describe_matrix(piece, dtype)
            if isinstance(piece, PackedMatrix)
            else _describe_direct(piece, dtype),
            name=stack.name,
            group=site_order(stack.name)[0],
        )
        for piece in stack.slices
    )
    if any(other != first for other in others):
        raise InternalError(f"{stack.name}: the slices have different bits, ranks or groups")
    return replace(first, shape=stack.shape, transposed=stack.transposed)


def _describe_rows(rows: PackedRows, dtype: str) -> RowsEntry:
    n_new = 0 if rows.new_rows is None else len(rows.new_rows)
    factor = rows.factor
    return RowsEntry(
        name=rows.name,
        dtype=dtype,
        shape=(rows.rows + n_new, rows.cols),
        base_rows=rows.rows,
        n_changed=0 if factor is None else factor.rows,
        bits=EMPTY_ROWS_BITS if factor is None else factor.bits,
        group_rows=EMPTY_ROWS_GROUP if factor is None else factor.group,
        symmetric=factor is not None and factor.zero is None,
        rank=None if rows.basis is None else len(rows.basis),
        scaled=rows.base_scale is not None,
    )


def describe(packed: PackedTensor, *, dtype: str) -> DeltaEntry:
    """Say in the manifest's terms what a packed tensor is.

    Args:
        packed: a matrix, a stack of them, rows, an exact or a coded tensor.
        dtype: data type of the fine-tune's tensor, as safetensors spells it.

    Returns:
        Its entry.

    Raises:
        InternalError: the tensor mixes what an entry can say only once.
    """
    if isinstance(packed, PackedMatrix):
        return _describe_matrix(packed, dtype)
    if isinstance(packed, PackedDirect):
        return _describe_direct(packed, dtype)
    if isinstance(packed, PackedStack):
        return _describe_stack(packed, dtype)
    if isinstance(packed, PackedRows):
        if packed.new_rows is not None and dtype_name(packed.new_rows.dtype) != dtype:
            raise InternalError(f"{packed.name}: new rows are {packed.new_rows.dtype}")
        return _describe_rows(packed, dtype)
    if isinstance(packed, CodedTensor):
        return packed.entry
    if dtype_name(packed.value.dtype) != dtype:
        raise InternalError(f"{packed.name}: the value is {packed.value.dtype}")
    return ExactEntry(name=packed.name, dtype=dtype, shape=tuple(packed.value.shape))


def _stored_bytes(packed: PackedTensor, entry: DeltaEntry) -> Iterator[tuple[str, Chunks]]:
    if isinstance(packed, PackedLinear) and isinstance(entry, MatrixEntry):
        yield f"packed.{entry.group}", matrix_to_payload(entry, packed)
    elif isinstance(packed, PackedStack) and isinstance(entry, MatrixEntry):
        for piece in packed.slices:
            yield f"packed.{entry.group}", matrix_to_payload(entry, piece)
    elif isinstance(packed, PackedRows) and isinstance(entry, RowsEntry):
        yield f"packed.{entry.name}", rows_to_payload(entry, packed)
        if packed.new_rows is not None and entry.n_new:
            yield f"new.{entry.name}", tensor_bytes(packed.new_rows)
    elif isinstance(packed, ExactTensor):
        yield f"exact.{entry.name}", tensor_bytes(packed.value)
    elif isinstance(packed, CodedTensor):
        yield f"coded.{entry.name}", packed.chunks()


def _join(pieces: Iterable[Chunks]) -> Iterator[bytes | bytearray | memoryview]:
    for piece in pieces:
        yield from chunks_of(piece)


def write_part(
    path: Path,
    tensors: Iterable[PackedTensor | UnchangedEntry],
    *,
    layout: Layout,
    fingerprint: str,
    with_feedback: int = 0,
) -> Part:
    """Store a piece of a delta, usually one layer; the file appears whole or not at all.

    Args:
        path: file to create or replace.
        tensors: what to store; unchanged tensors are given as their entries.
        layout: dtype and shape by tensor name of the fine-tune.
        fingerprint: identifies the inputs and settings the piece was made from.
        with_feedback: how many of its matrices were quantised with the Hessian of their input.

    Returns:
        The part.
    """
    entries: list[DeltaEntry] = []
    data: dict[str, list[Chunks]] = {}
    for item in sorted(tensors, key=lambda tensor: site_order(tensor.name)):
        if isinstance(item, UnchangedEntry):
            entries.append(item)
            continue
        entry = describe(item, dtype=layout[item.name][0])
        if entry.shape != layout[item.name][1]:
            raise InternalError(f"{item.name} is {entry.shape}, not {layout[item.name][1]}")
        entries.append(entry)
        for name, chunk in _stored_bytes(item, entry):
            data.setdefault(name, []).append(chunk)
    listed = strict_json.dumps_canonical([entry_to_json(entry) for entry in entries])
    expected = expected_tensors(entries)
    sources: list[TensorSource] = [(_ENTRIES_TENSOR, "U8", (len(listed),), listed)]
    sources += [(name, *expected[name], _join(pieces)) for name, pieces in data.items()]
    temporary = path.with_name(f".{path.name}.partial")
    temporary.unlink(missing_ok=True)
    metadata = {"fingerprint": fingerprint, "with_feedback": str(with_feedback)}
    write_safetensors(temporary, sources, metadata)
    temporary.replace(path)
    sync_folder(path.parent)
    return Part(
        path=path, entries=tuple(entries), fingerprint=fingerprint, with_feedback=with_feedback
    )


def read_part(path: Path) -> Part:
    """Open a piece stored by write_part.

    Args:
        path: the file.

    Returns:
        The part.

    Raises:
        UserError: delta_invalid, and everything read_header raises.
    """
    header = read_header(path)
    places = {info.name: info for info in header.tensors}
    if _ENTRIES_TENSOR not in places or "fingerprint" not in header.metadata:
        raise invalid(f"{path.name} is not a part of a delta")
    at = places[_ENTRIES_TENSOR]
    raw = b"".join(read_chunks(path, header.data_start + at.start, at.size_bytes))
    try:
        listed = strict_json.loads(raw)
    except ValueError as error:
        raise invalid(f"{path.name}: {error}") from None
    entries = parse_entries(listed)
    found = {name: (info.dtype, info.shape) for name, info in places.items()}
    if expected_tensors(entries) != {k: v for k, v in found.items() if k != _ENTRIES_TENSOR}:
        raise invalid(f"{path.name} does not hold what its entries say")
    return Part(
        path=path,
        entries=entries,
        fingerprint=header.metadata["fingerprint"],
        with_feedback=int(header.metadata.get("with_feedback", "0")),
    )


def _stream(places: Sequence[tuple[Path, int, int]]) -> Iterator[bytes]:
    for path, start, size_bytes in places:
        yield from read_chunks(path, start, size_bytes)


def _collect(parts: Sequence[Part]) -> dict[str, list[tuple[Path, int, int]]]:
    """Say where the bytes of each stored tensor lie, part by part."""
    places: dict[str, list[tuple[Path, int, int]]] = {}
    for part in parts:
        header = read_header(part.path)
        for info in header.tensors:
            place = (part.path, header.data_start + info.start, info.size_bytes)
            places.setdefault(info.name, []).append(place)
    return places


def _write_data(
    folder: Path, parts: Sequence[Part], entries: Sequence[DeltaEntry], max_shard_bytes: int
) -> None:
    places, layout = _collect(parts), expected_tensors(entries)
    for file, names in cut_shards(layout, max_bytes=max_shard_bytes).items():
        sources = [(name, *layout[name], _stream(places[name])) for name in names]
        write_safetensors(folder / file, sources, DATA_METADATA)


def write_delta(
    out: Path,
    parts: Sequence[Path],
    *,
    head: DeltaManifest,
    sidecars: Iterable[Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> DeltaManifest:
    """Join parts into a delta folder that appears whole or not at all.

    Args:
        out: folder to create.
        parts: files from write_part, in the order their entries shall have.
        head: recipe, backbone, fine-tune, tools and calibration; entries and files are filled
            in here, and backbone hashes that no entry needs are left out.
        sidecars: files to copy beside the data.
        max_shard_bytes: data beyond this go into a further file.

    Returns:
        The manifest as written.

    Raises:
        UserError: output_exists, and everything read_part raises.
    """
    opened = [read_part(path) for path in parts]
    entries = tuple(entry for part in opened for entry in part.entries)
    needed = {entry.name for entry in entries if needs_backbone(entry)}
    hashes = {name: head.backbone.tensors[name] for name in sorted(needed)}
    with new_folder(out) as folder:
        _write_data(folder, opened, entries, max_shard_bytes)
        for sidecar in sidecars:
            shutil.copyfile(sidecar, folder / sidecar.name)
        manifest = replace(
            head,
            backbone=replace(head.backbone, tensors=hashes),
            entries=entries,
            files={path.name: hash_file(path) for path in sorted(folder.iterdir())},
        )
        write_file(folder / MANIFEST_NAME, manifest_to_json(manifest))
    return manifest
