"""Folders of model files, fetched once from the blob store and checked by digest."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltacome_core.errors import UserError
from workers.engine.errors import bad_request, broken, too_busy
from workers.fetch import BlobReader, fetch_blob

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One revision as the hub names it: its digest and the sha256 of each file."""

    digest: str
    files: Mapping[str, str]

    @property
    def key(self) -> str:
        """Name of the folder: made from the contents, so a wrong digest cannot alias another."""
        canonical = json.dumps(dict(self.files), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    backbone: Snapshot
    delta: Snapshot | None

    @property
    def fingerprint(self) -> str:
        parts = (self.backbone, self.delta) if self.delta else (self.backbone,)
        return "fp_" + "_".join(part.key[:12] for part in parts)


def parse_target(header: str | None) -> Target:
    if header is None:
        raise bad_request("The request names no model files.", None, code="target_missing")
    try:
        raw = json.loads(header)
        backbone = _parse_snapshot(raw["backbone"])
        delta = None if raw.get("delta") is None else _parse_snapshot(raw["delta"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise bad_request(
            "The model files are not well described.", None, code="target_invalid"
        ) from error
    return Target(backbone=backbone, delta=delta)


def _parse_snapshot(raw: Any) -> Snapshot:
    files = dict(raw["files"])
    for path, sha256 in files.items():
        if not _SAFE_NAME.fullmatch(path) or not _SHA256.fullmatch(sha256):
            raise ValueError(path)
    return Snapshot(digest=str(raw["digest"]), files=files)


class SnapshotCache:
    """Content-addressed folders under `root`; a file enters only when its sha256 is right."""

    def __init__(self, root: Path, blobs: BlobReader) -> None:
        self._root = root
        self._blobs = blobs

    def materialise(self, snapshot: Snapshot) -> Path:
        folder = self._root / "snapshots" / snapshot.key
        folder.mkdir(parents=True, exist_ok=True)
        for path, sha256 in snapshot.files.items():
            target = folder / path
            if not target.exists():
                self._fetch(sha256, target)
        return folder

    def forget(self, target: Target) -> None:
        """Drop the files of a model that turned out damaged; they are fetched again next time."""
        for snapshot in (target.backbone, target.delta):
            if snapshot is not None:
                shutil.rmtree(self._root / "snapshots" / snapshot.key, ignore_errors=True)

    def _fetch(self, sha256: str, target: Path) -> None:
        try:
            fetch_blob(self._blobs, sha256, target)
        except UserError:
            raise
        except Exception as error:
            if _is_missing(error):
                raise broken(
                    f"The store has lost {target.name} of this model.", code="blob_missing"
                ) from error
            raise too_busy(
                f"{target.name} of this model cannot be fetched now.",
                code="store_unreachable",
                retry_after_s=5,
            ) from error


def _is_missing(error: Exception) -> bool:
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return isinstance(error, FileNotFoundError) or code in {"NoSuchKey", "404"}
