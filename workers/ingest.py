"""Look at every byte of an upload: is it a checkpoint, is it sound, and what did it come from."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deltacome_core.checkpoint import (
    Checkpoint,
    check_config,
    open_checkpoint,
    read_json_object,
)
from deltacome_core.delta import scan_checkpoint
from deltacome_core.distance import measure_distance, refuse_stranger
from deltacome_core.quantised import refuse_quantised
from workers.report import Report
from workers.spec import Candidate, StepSpec

HASHES_NAME = "hashes.json"
TENSORS_NAME = "tensors.json"


def run(spec: StepSpec, report: Report) -> dict[str, Any]:
    """Check the checkpoint in `spec.tuned` and find its backbone among `spec.candidates`.

    Raises:
        UserError: whatever is wrong with the upload.
    """
    checkpoint = open_checkpoint(spec.tuned)
    refuse_quantised(checkpoint.layout)
    for sidecar in sorted(spec.tuned.glob("*.json")):
        check_config(read_json_object(sidecar, code="not_a_checkpoint"), file=sidecar.name)
    report.log(f"reading {len(checkpoint.tensors)} tensors")
    scanned = scan_checkpoint(checkpoint)
    (spec.reports / HASHES_NAME).write_text(json.dumps(scanned.hashes))
    return {
        "digest": scanned.digest,
        "n_params": checkpoint.n_params,
        "source_size_bytes": checkpoint.size_bytes,
        "dtype": checkpoint.dtype,
        "architecture": checkpoint.architecture,
        "backbone": find_backbone(checkpoint, scanned.hashes, spec.candidates),
    }


def find_backbone(
    checkpoint: Checkpoint, hashes: Mapping[str, str], candidates: Iterable[Candidate]
) -> str | None:
    """Pick the candidate this fine-tune is nearest to, judged by the weights themselves.

    Tensors left as they were give it away; where none was, the smallest difference does. A single
    candidate is taken as it is: only its table is here, and compression compares the weights.

    Raises:
        UserError: backbone_unrelated when it is a stranger to all of several candidates.
    """
    tables = {candidate: _read_hashes(Path(candidate.folder)) for candidate in candidates}
    if len(tables) < 2:  # noqa: PLR2004 (nothing to choose between)
        return next((candidate.revision for candidate in tables), None)
    equal = {
        candidate: sum(hashes.get(name) == sha256 for name, sha256 in table.items())
        for candidate, table in tables.items()
    }
    most = max(equal.values())
    nearest = [candidate for candidate in tables if equal[candidate] == most]
    distances = {
        candidate: measure_distance(open_checkpoint(Path(candidate.folder)), checkpoint)
        for candidate in nearest
    }
    found = min(nearest, key=distances.__getitem__)
    refuse_stranger(distances[found])
    return found.revision


def _read_hashes(folder: Path) -> dict[str, str]:
    tensors = json.loads((folder / TENSORS_NAME).read_bytes())
    return {name: tensor["sha256"] for name, tensor in tensors.items()}
