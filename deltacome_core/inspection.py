"""What a delta costs, byte by byte, without torch."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from deltacome_core.delta_folder import open_folder
from deltacome_core.entries import (
    CodedEntry,
    DeltaEntry,
    DirectEntry,
    ExactEntry,
    LowRankEntry,
    MatrixEntry,
    RowsEntry,
    UnchangedEntry,
)
from deltacome_core.manifest import MANIFEST_NAME, DeltaManifest
from deltacome_core.safetensors_file import ITEM_BYTES

_KINDS: dict[type[DeltaEntry], str] = {
    LowRankEntry: "lowrank",
    DirectEntry: "direct",
    RowsEntry: "rows",
    ExactEntry: "exact",
    CodedEntry: "coded",
    UnchangedEntry: "unchanged",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeReport:
    """Where the bytes go; the six add up to the size of the data files plus delta.json."""

    codes: int
    scales: int
    embeddings: int
    exact: int
    coded: int
    header: int

    @property
    def total_bytes(self) -> int:
        parts = (self.codes, self.scales, self.embeddings, self.exact, self.coded, self.header)
        return sum(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectReport:
    """A delta at a glance; `ratio` is the fine-tune's weight files over all of the delta.

    payload_bytes is that of the data files: 0 where the fine-tune equals the backbone.
    """

    manifest: DeltaManifest
    sizes: SizeReport
    total_bytes: int
    payload_bytes: int
    sidecar_bytes: int
    n_params: int
    bits_per_param: float
    ratio: float
    entries_by_kind: dict[str, int]

    @property
    def n_matrices(self) -> int:
        """Quantised matrices beside the vocabularies, each slice of a stack as one."""
        entries = self.manifest.entries
        return sum(entry.n_slices for entry in entries if isinstance(entry, MatrixEntry))

    def to_json(self) -> dict[str, object]:
        calibration = self.manifest.calibration
        return {
            "recipe": self.manifest.recipe.to_json(),
            "backbone_digest": self.manifest.backbone.digest,
            "backbone_precision": self.manifest.backbone.served_as,
            "fine_tune": asdict(self.manifest.fine_tune),
            "total_bytes": self.total_bytes,
            "payload_bytes": self.payload_bytes,
            "bytes": asdict(self.sizes),
            "sidecar_bytes": self.sidecar_bytes,
            "n_params": self.n_params,
            "bits_per_param": self.bits_per_param,
            "ratio": self.ratio,
            "entries": self.entries_by_kind,
            "n_matrices": self.n_matrices,
            "with_feedback": None if calibration is None else calibration.n_matrices,
        }


def _payload_bytes(entry: MatrixEntry) -> tuple[int, int]:
    codes = scales = 0
    for section in entry.payload.sections:
        if section.key.endswith(".codes"):
            codes += section.size_bytes
        else:
            scales += section.size_bytes
    return codes * entry.n_slices, scales * entry.n_slices


def _measure(manifest: DeltaManifest, *, exact_bytes: int, total_bytes: int) -> SizeReport:
    codes = scales = embeddings = coded = 0
    for entry in manifest.entries:
        if isinstance(entry, MatrixEntry):
            of_codes, of_scales = _payload_bytes(entry)
            codes += of_codes
            scales += of_scales
        elif isinstance(entry, RowsEntry):
            embeddings += sum(section.size_bytes for section in entry.payload.sections)
            embeddings += entry.n_new * entry.shape[1] * ITEM_BYTES[entry.dtype]
        elif isinstance(entry, CodedEntry):
            coded += entry.size_bytes
    return SizeReport(
        codes=codes,
        scales=scales,
        embeddings=embeddings,
        exact=exact_bytes,
        coded=coded,
        header=total_bytes - codes - scales - embeddings - exact_bytes - coded,
    )


def inspect_delta(folder: Path, *, verify_digests: bool = False) -> InspectReport:
    """Account for every byte of a delta.

    Args:
        folder: the delta.
        verify_digests: whether to hash every file first.

    Returns:
        Sizes by purpose (scales include zero points and singular values; header includes
        delta.json and alignment), sidecars apart.

    Raises:
        UserError: everything open_folder raises.
    """
    delta = open_folder(folder, verify_digests=verify_digests)
    manifest = delta.manifest
    data_bytes = sum(manifest.files[name].size_bytes for name in manifest.data_files)
    all_bytes = sum(record.size_bytes for record in manifest.files.values())
    total_bytes = data_bytes + (folder / MANIFEST_NAME).stat().st_size
    exact_bytes = sum(
        at.info.size_bytes for name, at in delta.stored.items() if name.startswith("exact.")
    )
    n_params = manifest.fine_tune.n_params
    return InspectReport(
        manifest=manifest,
        sizes=_measure(manifest, exact_bytes=exact_bytes, total_bytes=total_bytes),
        total_bytes=total_bytes,
        payload_bytes=data_bytes,
        sidecar_bytes=all_bytes - data_bytes,
        n_params=n_params,
        bits_per_param=total_bytes * 8 / max(n_params, 1),
        ratio=manifest.fine_tune.size_bytes / total_bytes,
        entries_by_kind=dict(Counter(_KINDS[type(entry)] for entry in manifest.entries)),
    )
