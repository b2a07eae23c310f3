"""What a delta will weigh, from headers alone; no torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

from deltacome_core.bands import largest_rank, limit_bytes
from deltacome_core.checkpoint import Layout, is_vocabulary_tensor
from deltacome_core.entries import (
    DeltaEntry,
    DirectEntry,
    ExactEntry,
    LowRankEntry,
    RowsEntry,
    UnchangedEntry,
    is_lowrank_shape,
    needs_backbone,
    site_order,
)
from deltacome_core.layout import RankBand, direct_payload
from deltacome_core.manifest import (
    BackboneRecord,
    CalibrationRecord,
    DeltaManifest,
    FileRecord,
    FineTuneRecord,
    RecipeRecord,
    manifest_to_json,
)
from deltacome_core.recipe import Recipe
from deltacome_core.rows import BASIS_BITS, BASIS_GROUP, choose_rank, is_scaled, vocabulary_bytes
from deltacome_core.safetensors_file import encode_header
from deltacome_core.shards import DATA_METADATA, cut_shards, tensor_size

_MATRIX_DIMENSIONS = 2
_SHA256 = "0" * 64
# Stands for every digest, size and count of a manifest that is not known yet.
_LARGE = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is known of a fine-tune before its delta is made.

    backbone: None where it has the fine-tune's shapes; unchanged: tensors that cost nothing;
    changed_rows: by vocabulary, all rows where it is not known; sidecars: names of further files.
    """

    layout: Layout
    source_bytes: int
    backbone: Layout | None = None
    unchanged: Collection[str] = ()
    changed_rows: Mapping[str, int] = field(default_factory=dict)
    sidecars: Collection[str] = ()

    @property
    def n_params(self) -> int:
        return sum(prod(shape) for _, shape in self.layout.values())

    def base_rows(self, name: str) -> int:
        """Rows of a vocabulary that the backbone has too."""
        rows = self.layout[name][1][0]
        return rows if self.backbone is None else min(rows, self.backbone[name][1][0])


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaPlan:
    """Sizes of a delta by what they are for, all overhead counted.

    matrix_bytes of rank bands is met from below, but for the last vector of each layer; the others
    are exact. header_bytes holds file headers and delta.json. What the lossless recipe leaves of a
    tensor depends on its numbers: whole tensors are counted.
    """

    recipe: Recipe
    n_matrices: int
    matrix_bytes: int
    vocabulary_bytes: int
    exact_bytes: int
    header_bytes: int
    source_bytes: int
    n_params: int

    @property
    def total_bytes(self) -> int:
        parts = (self.matrix_bytes, self.vocabulary_bytes, self.exact_bytes, self.header_bytes)
        return sum(parts)

    @property
    def ratio(self) -> float:
        return self.source_bytes / self.total_bytes

    @property
    def bits_per_param(self) -> float:
        return 8 * self.total_bytes / max(1, self.n_params)


def plan_delta(subject: Subject, recipe: Recipe) -> DeltaPlan:
    """Add up what a delta will weigh.

    Args:
        subject: the fine-tune.
        recipe: how it will be compressed.

    Returns:
        The sizes.
    """
    planned = [_plan_tensor(subject, name, recipe) for name in subject.layout]
    return DeltaPlan(
        recipe=recipe,
        n_matrices=sum(each.n_matrices for each in planned),
        matrix_bytes=sum(each.matrix_bytes for each in planned),
        vocabulary_bytes=sum(each.vocabulary_bytes for each in planned),
        exact_bytes=sum(each.exact_bytes for each in planned),
        header_bytes=_header_bytes(subject, planned, recipe),
        source_bytes=subject.source_bytes,
        n_params=subject.n_params,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    entry: DeltaEntry
    n_matrices: int = 0
    matrix_bytes: int = 0
    vocabulary_bytes: int = 0
    exact_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        return self.matrix_bytes + self.vocabulary_bytes + self.exact_bytes


def payload_bytes(subject: Subject, recipe: Recipe) -> int:
    """Add up what a delta will weigh without its headers; cheap, for a search.

    Args:
        subject: the fine-tune.
        recipe: how it will be compressed.

    Returns:
        Bytes.
    """
    return sum(_plan_tensor(subject, name, recipe).size_bytes for name in subject.layout)


def _plan_tensor(subject: Subject, name: str, recipe: Recipe) -> _Planned:
    dtype, shape = subject.layout[name]
    known = subject.backbone is None or name in subject.backbone
    if name in subject.unchanged:
        return _Planned(entry=UnchangedEntry(name=name, dtype=dtype, shape=shape))
    if recipe.method != "lossless" and known:
        if len(shape) == _MATRIX_DIMENSIONS and is_vocabulary_tensor(name):
            return _plan_rows(subject, name, recipe)
        if is_lowrank_shape(name, shape):
            of_one = _matrix_bytes(shape[-2], shape[-1], recipe)
            if of_one:
                n_slices = prod(shape[:-2])
                return _Planned(
                    entry=_matrix_entry(name, dtype, shape, recipe),
                    n_matrices=n_slices,
                    matrix_bytes=n_slices * of_one,
                )
    exact = ExactEntry(name=name, dtype=dtype, shape=shape)
    return _Planned(entry=exact, exact_bytes=tensor_size(dtype, shape))


def _plan_rows(subject: Subject, name: str, recipe: Recipe) -> _Planned:
    dtype, (rows, cols) = subject.layout[name]
    base_rows = subject.base_rows(name)
    n_changed = subject.changed_rows.get(name, base_rows)
    rank = choose_rank(base_rows, cols, n_changed, recipe)
    entry = RowsEntry(
        name=name,
        dtype=dtype,
        shape=(rows, cols),
        base_rows=base_rows,
        n_changed=n_changed,
        bits=recipe.embedding_bits if rank is None else BASIS_BITS,
        group_rows=(1, recipe.group_size) if rank is None else BASIS_GROUP,
        symmetric=rank is not None,
        rank=rank,
        scaled=rank is not None and is_scaled(base_rows, n_changed),
    )
    new_bytes = tensor_size(dtype, (rows - base_rows, cols))
    packed = vocabulary_bytes(base_rows, cols, n_changed, recipe)
    return _Planned(entry=entry, vocabulary_bytes=packed + new_bytes)


@lru_cache(maxsize=4096)
def _matrix_bytes(out_features: int, in_features: int, recipe: Recipe) -> int:
    """Bytes of a matrix; 0 where it is too small to be worth its codes."""
    if recipe.method == "direct":
        return direct_payload(
            out_features, in_features, bits=1, group=recipe.group_codes, symmetric=True
        ).size_bytes
    # What whole vectors leave of it goes to the next matrix of the layer.
    fits = largest_rank(out_features, in_features, recipe)
    return limit_bytes(out_features, in_features, recipe) if fits else 0


def _matrix_entry(
    name: str, dtype: str, shape: tuple[int, ...], recipe: Recipe
) -> LowRankEntry | DirectEntry:
    group = site_order(name)[0]
    if recipe.method == "direct":
        return DirectEntry(
            name=name,
            dtype=dtype,
            shape=shape,
            group=group,
            bits=1,
            group_codes=recipe.group_codes,
            symmetric=True,
        )
    # As long as the bands of a matrix can be when they are written down.
    most = min(shape[-2:])
    widths = (8, 4, 3, 2, 1) if recipe.bands == "spectrum" else (8, 3, 2)
    return LowRankEntry(
        name=name,
        dtype=dtype,
        shape=shape,
        group=group,
        bands=tuple(RankBand(bits, most) for bits in widths),
        group_u=recipe.group_u,
        group_v=recipe.group_v,
        symmetric=recipe.is_symmetric,
    )


def _header_bytes(subject: Subject, planned: list[_Planned], recipe: Recipe) -> int:
    """Bytes of delta.json and of the data files' headers, alignment included, at most."""
    stored: Layout = {}
    for each in planned:
        entry = each.entry
        if isinstance(entry, LowRankEntry | DirectEntry):
            name = f"packed.{entry.group}"
            before = stored.get(name, ("U8", (0,)))[1][0]
            stored[name] = ("U8", (before + each.matrix_bytes,))
        elif isinstance(entry, RowsEntry):
            new_bytes = tensor_size(entry.dtype, (entry.n_new, entry.shape[1]))
            stored[f"packed.{entry.name}"] = ("U8", (each.vocabulary_bytes - new_bytes,))
            if entry.n_new:
                stored[f"new.{entry.name}"] = (entry.dtype, (entry.n_new, entry.shape[1]))
        elif isinstance(entry, ExactEntry):
            stored[f"exact.{entry.name}"] = (entry.dtype, entry.shape)
    shards = cut_shards(stored)
    headers = sum(
        len(encode_header([(name, *stored[name]) for name in names], DATA_METADATA))
        for names in shards.values()
    )
    return headers + len(_manifest(subject, planned, recipe, shards))


def _manifest(
    subject: Subject, planned: list[_Planned], recipe: Recipe, shards: Collection[str]
) -> bytes:
    entries = tuple(each.entry for each in planned)
    files = dict.fromkeys(
        [*shards, *subject.sidecars], FileRecord(sha256=_SHA256, size_bytes=_LARGE)
    )
    calibration = CalibrationRecord(
        source="calibration.jsonl", n_tokens=_LARGE, sha256=_SHA256, n_matrices=_LARGE
    )
    return manifest_to_json(
        DeltaManifest(
            recipe=RecipeRecord(name=recipe.name, settings=recipe.settings),
            backbone=BackboneRecord(
                digest=_SHA256,
                tensors={each.name: _SHA256 for each in entries if needs_backbone(each)},
            ),
            fine_tune=FineTuneRecord(
                digest=_SHA256,
                size_bytes=_LARGE,
                dtype="BF16",
                n_params=_LARGE,
                architecture="LlamaForCausalLM",
            ),
            entries=entries,
            files=files,
            tools={"deltacome": "0.0.0", "torch": "2.13.0+cu128"},
            calibration=calibration if recipe.calibrated else None,
        )
    )
