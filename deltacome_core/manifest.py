"""What a delta says of itself: delta.json both ways, every field checked."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltacome_core import strict_json
from deltacome_core.entries import (
    CodedEntry,
    DeltaEntry,
    needs_backbone,
)
from deltacome_core.entries_json import entry_to_json, parse_entries
from deltacome_core.errors import UserError
from deltacome_core.fields import Fields, invalid
from deltacome_core.file_names import is_plain_name
from deltacome_core.precision import NATIVE, SCHEMES, Precision
from deltacome_core.safetensors_file import MAX_TENSORS, check_tensor_name

FORMAT_NAME = "deltacome"
FORMAT_VERSION = 1
MANIFEST_NAME = "delta.json"
DATA_NAME = "delta.safetensors"
MAX_MANIFEST_BYTES = 32 << 20
MAX_FILES = 256
MAX_SETTINGS = 64
_MATRIX_DIMENSIONS = 2

_SHARD = re.compile(r"\Adelta-\d{5}-of-\d{5}\.safetensors\Z")
_SETTING = re.compile(r"\A[a-z][a-z0-9_]{0,63}\Z")
_ENDINGS = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneRecord:
    """The backbone a delta needs: its checkpoint digest, and sha256 by tensor it reads.

    Both are of the files as they are stored; `precision` says what the delta is added to when
    that is something else.
    """

    digest: str
    tensors: dict[str, str]
    precision: Precision | None = None

    @property
    def served_as(self) -> str:
        """What the delta is added to: the name of a scheme, or "native" for the stored weights."""
        return NATIVE if self.precision is None else self.precision.scheme

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {"digest": self.digest, "tensors": self.tensors}
        if self.precision is not None:
            rounded = sorted(self.precision.tensors)
            document["precision"] = {"scheme": self.precision.scheme, "tensors": rounded}
        return document


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuneRecord:
    """The checkpoint a delta stands for; `size_bytes` is that of its weight files."""

    digest: str
    size_bytes: int
    dtype: str
    n_params: int
    architecture: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeRecord:
    """What the delta was asked to be: the recipe's name and its settings, for people to read.

    Entries alone say how the bytes are laid out, so a reader needs to know no setting.
    """

    name: str
    settings: Mapping[str, str | float | bool | None]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **self.settings}


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """The text the quantiser looked at, and how many matrices were quantised with its help."""

    source: str
    n_tokens: int
    sha256: str
    n_matrices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaManifest:
    """The content of delta.json; `files` names every file but delta.json itself."""

    recipe: RecipeRecord
    backbone: BackboneRecord
    fine_tune: FineTuneRecord
    entries: tuple[DeltaEntry, ...]
    files: dict[str, FileRecord]
    tools: dict[str, str]
    calibration: CalibrationRecord | None = None

    @property
    def data_files(self) -> tuple[str, ...]:
        return tuple(name for name in sorted(self.files) if is_data_file(name))


def is_data_file(name: str) -> bool:
    """Tell whether a file of a delta holds packed tensors.

    Args:
        name: file name.

    Returns:
        True for delta.safetensors and its shards.
    """
    return name == DATA_NAME or bool(_SHARD.match(name))


def manifest_to_json(manifest: DeltaManifest) -> bytes:
    """Write delta.json.

    Args:
        manifest: the manifest.

    Returns:
        Canonical JSON: equal manifests give equal bytes.
    """
    files = {
        name: {"sha256": record.sha256, "size": record.size_bytes}
        for name, record in manifest.files.items()
    }
    calibration = None if manifest.calibration is None else asdict(manifest.calibration)
    document = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "recipe": manifest.recipe.to_json(),
        "backbone": manifest.backbone.to_json(),
        "fine_tune": asdict(manifest.fine_tune),
        "entries": [entry_to_json(entry) for entry in manifest.entries],
        "files": files,
        "tools": manifest.tools,
        "calibration": calibration,
    }
    return strict_json.dumps_canonical(document)


def _parse_recipe(fields: Fields) -> RecipeRecord:
    keys = [key for key in fields.keys(limit=MAX_SETTINGS) if key != "name"]
    for key in keys:
        if not _SETTING.match(key):
            raise fields.invalid(f"{key[:80]!a} is no name of a setting")
    settings = {key: fields.scalar(key) for key in keys}
    return RecipeRecord(name=fields.text("name"), settings=settings)


def _parse_files(fields: Fields) -> dict[str, FileRecord]:
    files = {}
    for name in fields.keys(limit=MAX_FILES):
        is_plain = is_plain_name(name) and ".." not in name
        if not is_plain or not (name.endswith(_ENDINGS) or name.startswith("LICENSE")):
            raise UserError("name_unsafe", name=ascii(name[:80]))
        record = fields.child(name)
        files[name] = FileRecord(sha256=record.sha256("sha256"), size_bytes=record.natural("size"))
        record.done()
    lowered = {name.lower() for name in files}
    if len(lowered) != len(files) or MANIFEST_NAME in lowered:
        raise invalid("two files have names that differ only in case, or delta.json names itself")
    return files


def _parse_backbone(fields: Fields) -> BackboneRecord:
    tensors = fields.child("tensors")
    names = tensors.keys(limit=MAX_TENSORS)
    for name in names:
        check_tensor_name(name)
    record = BackboneRecord(
        digest=fields.sha256("digest"),
        tensors={name: tensors.sha256(name) for name in names},
        # Deltas of a backbone served as it is stored say nothing, as did all before there was it.
        precision=_parse_precision(fields.child("precision")) if fields.has("precision") else None,
    )
    fields.done()
    return record


def _parse_precision(fields: Fields) -> Precision:
    scheme = fields.text("scheme")
    if scheme not in SCHEMES:
        raise UserError("precision_unknown", name=scheme, known=sorted(SCHEMES))
    names = fields.items("tensors", limit=MAX_TENSORS)
    if not all(isinstance(name, str) for name in names) or names != sorted(set(names)):
        raise fields.invalid("tensors is not a sorted list of different names")
    for name in names:
        check_tensor_name(name)
    fields.done()
    return Precision(scheme=scheme, tensors=frozenset(names))


def _parse_fine_tune(fields: Fields) -> FineTuneRecord:
    record = FineTuneRecord(
        digest=fields.sha256("digest"),
        size_bytes=fields.natural("size_bytes"),
        dtype=fields.text("dtype"),
        n_params=fields.natural("n_params"),
        architecture=fields.text("architecture"),
    )
    fields.done()
    return record


def _parse_calibration(fields: Fields) -> CalibrationRecord:
    record = CalibrationRecord(
        source=fields.text("source"),
        n_tokens=fields.natural("n_tokens"),
        sha256=fields.sha256("sha256"),
        n_matrices=fields.natural("n_matrices"),
    )
    fields.done()
    return record


def _check_backbone_names(entries: Iterable[DeltaEntry], known: Mapping[str, str]) -> None:
    for entry in entries:
        if needs_backbone(entry) and entry.name not in known:
            raise invalid(f"{entry.name} has no hash of its backbone tensor")


def _check_precision(precision: Precision | None, entries: Iterable[DeltaEntry]) -> None:
    if precision is None:
        return
    for entry in entries:
        if isinstance(entry, CodedEntry):
            raise invalid(f"{entry.name} is coded, but its backbone is served with fewer bits")
        if entry.name in precision.tensors and len(entry.shape) < _MATRIX_DIMENSIONS:
            raise invalid(f"{entry.name} is no matrix, but its backbone is rounded")


def parse_manifest(raw: bytes) -> DeltaManifest:
    """Read delta.json.

    Args:
        raw: bytes of the file.

    Returns:
        The manifest; every number in it has been checked against its limits.

    Raises:
        UserError: delta_invalid, delta_version_unsupported, name_unsafe, precision_unknown.
    """
    if len(raw) > MAX_MANIFEST_BYTES:
        raise invalid(f"{MANIFEST_NAME} has {len(raw)} bytes, the limit is {MAX_MANIFEST_BYTES}")
    try:
        document = strict_json.loads(raw)
    except ValueError as error:
        raise invalid(f"{MANIFEST_NAME} is not valid JSON ({str(error)[:120]})") from None
    fields = Fields(document, where=MANIFEST_NAME)
    if fields.text("format") != FORMAT_NAME:
        raise invalid(f"{MANIFEST_NAME} does not describe a delta")
    version = fields.natural("format_version")
    if version != FORMAT_VERSION:
        raise UserError("delta_version_unsupported", found=version, supported=FORMAT_VERSION)
    tools = fields.child("tools")
    has_calibration = fields.take("calibration") is not None
    manifest = DeltaManifest(
        recipe=_parse_recipe(fields.child("recipe")),
        backbone=_parse_backbone(fields.child("backbone")),
        fine_tune=_parse_fine_tune(fields.child("fine_tune")),
        entries=parse_entries(fields.take("entries")),
        files=_parse_files(fields.child("files")),
        tools={name: tools.text(name) for name in tools.keys(limit=MAX_FILES)},
        calibration=_parse_calibration(fields.child("calibration")) if has_calibration else None,
    )
    fields.done()
    _check_backbone_names(manifest.entries, manifest.backbone.tensors)
    _check_precision(manifest.backbone.precision, manifest.entries)
    return manifest


def read_manifest(folder: Path) -> DeltaManifest:
    """Read the manifest of a delta folder.

    Args:
        folder: folder with delta.json.

    Returns:
        The manifest.

    Raises:
        UserError: file_missing, and everything parse_manifest raises.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise UserError("file_missing", file=MANIFEST_NAME)
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise invalid(f"{MANIFEST_NAME} is larger than {MAX_MANIFEST_BYTES} bytes")
    return parse_manifest(path.read_bytes())
