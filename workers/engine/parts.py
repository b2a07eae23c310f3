"""What of a delta the shared model can serve, and the delta cut into those parts."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from deltacome_core.checkpoint import Checkpoint
from deltacome_core.container import Delta
from deltacome_core.entries import (
    DeltaEntry,
    MatrixEntry,
    RowsEntry,
    UnchangedEntry,
    needs_backbone,
)
from deltacome_core.packed import PackedLinear, PackedRows
from deltacome_core.reconstruct import apply_entry
from deltacome_core.tensors import TORCH_DTYPES, load_tensor

# Of a config.json, what changes no number inside the decoder.
_HARMLESS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "max_position_embeddings",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "vocab_size",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Names of the parameters that the shared model can have one of for each tenant."""

    matrices: frozenset[str]
    vectors: Mapping[str, int]
    embedding: str
    head: str

    @property
    def is_tied(self) -> bool:
        return self.embedding == self.head


class ArrivingMatrices(Mapping[str, PackedLinear]):
    """Matrices by parameter, in the order of their files; each is read when it is first asked for.

    Whoever goes through them in that order works on one while the next ones arrive.
    """

    def __init__(self, readers: Mapping[str, Callable[[], PackedLinear]]) -> None:
        """Read nothing yet; each reader is called once at most."""
        self._readers = readers
        self._found: dict[str, PackedLinear] = {}

    def __getitem__(self, name: str) -> PackedLinear:
        if name not in self._found:
            self._found[name] = self._readers[name]()
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def beside(self, matrices: Mapping[str, PackedLinear]) -> "ArrivingMatrices":
        """These, and behind them others that are there."""
        own = {name: partial(self.__getitem__, name) for name in self}
        more = {name: partial(matrices.__getitem__, name) for name in matrices}
        return ArrivingMatrices(own | more)


@dataclass(slots=True, kw_only=True)
class TenantParts:
    """A delta as the shared model takes it; a dense table is all of the fine-tune's rows.

    memory: u8, what the matrices are views of, if that is one piece.
    """

    memory: torch.Tensor | None = None
    matrices: ArrivingMatrices = field(default_factory=lambda: ArrivingMatrices({}))
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    embedding: PackedRows | torch.Tensor | None = None
    head: PackedRows | torch.Tensor | None = None

    def to_json(self) -> dict[str, int]:
        """How much of the model is changed, for the status page."""
        return {
            "matrices": len(self.matrices),
            "vectors": len(self.vectors),
            "tables": sum(part is not None for part in (self.embedding, self.head)),
        }


def same_decoder(base_dir: Path, tuned_dir: Path) -> bool:
    """Whether two configurations describe the same computation, so that one model serves both."""
    base, tuned = (
        json.loads((folder / "config.json").read_text()) for folder in (base_dir, tuned_dir)
    )
    return _relevant(base) == _relevant(tuned)


def _relevant(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _relevant(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _HARMLESS and value is not None
    }


def is_shareable(entries: Collection[DeltaEntry], names: Mapping[str, str], places: Places) -> bool:
    """Whether each changed tensor has its place in the shared model.

    Args:
        entries: of the delta.
        names: the whole parameter that each tensor fills; one that fills a part is absent.
        places: of the shared model.
    """
    for entry in entries:
        if isinstance(entry, UnchangedEntry):
            continue
        name = names.get(entry.name)
        if name is None:
            return False
        if name in (places.embedding, places.head):
            if not isinstance(entry, RowsEntry):
                return False
        elif name in places.matrices:
            if not isinstance(entry, MatrixEntry) or not entry.is_plain:
                return False
        elif name not in places.vectors or entry.shape != (places.vectors[name],):
            return False
    return True


def read_parts(
    delta: Delta,
    names: Mapping[str, str],
    places: Places,
    files: Checkpoint,
    *,
    keep_packed: bool,
) -> TenantParts:
    """Read a delta for which `is_shareable` holds; its matrices wait until they are asked for.

    Args:
        delta: the delta.
        names: the parameter that each tensor fills.
        places: of the shared model.
        files: checkpoint of the backbone.
        keep_packed: leave tables of embeddings packed, as a GPU takes them.

    Raises:
        UserError: delta_invalid and kin from reading, then or when a matrix is asked for.
    """
    parts = TenantParts(matrices=_find_matrices(delta, names))
    for entry in delta.entries.values():
        name = names.get(entry.name, "")
        packed = None if name in parts.matrices else delta.load(entry.name)
        if packed is None:
            continue
        if isinstance(packed, PackedRows) and keep_packed:
            table: PackedRows | torch.Tensor = packed
        else:
            # From the files: in memory the backbone may be narrower than what the delta is for.
            source = load_tensor(files, entry.name) if needs_backbone(entry) else None
            # Rounded to the fine-tune's dtype first: the very numbers its checkpoint had.
            table = apply_entry(source, packed, dtype=TORCH_DTYPES[entry.dtype])
        if name in places.vectors and isinstance(table, torch.Tensor):
            parts.vectors[name] = table
        if name == places.embedding:
            parts.embedding = table
        if name == places.head:
            parts.head = table
    return parts


def list_others(delta: Delta) -> list[str]:
    """Stored tensors that are no matrices: `read_parts` reads these, and they lie at the end."""
    matrices = {f"packed.{group}" for group in delta.groups}
    return [stored for stored in delta.folder.stored if stored not in matrices]


def _find_matrices(delta: Delta, names: Mapping[str, str]) -> ArrivingMatrices:
    entries = [entry for entry in delta.entries.values() if isinstance(entry, MatrixEntry)]

    def place(entry: MatrixEntry) -> tuple[str, int]:
        at = delta.folder.stored[f"packed.{entry.group}"]
        return at.file.name, at.start + delta.offsets[entry.name]

    def read(name: str) -> PackedLinear:
        # Those in slices have no place in the shared model.
        return cast("PackedLinear", delta.load(name))

    return ArrivingMatrices(
        {names[entry.name]: partial(read, entry.name) for entry in sorted(entries, key=place)}
    )
