"""What the supervisor does around each child: bring the inputs, keep the outputs."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.errors import UserError
from hub import backbones, blobs, parts
from hub.jobs import Lease
from hub.models import Job, Repo, Revision
from hub.publishing import Publication
from hub.storage import get_store
from workers.candidates import files_of, find_candidates
from workers.config import read_config
from workers.publish import (
    EVALUATION_NAME,
    VERIFICATION_NAME,
    describe_backbone,
    describe_delta,
)
from workers.spec import Candidate, StepSpec
from workers.supervise import ChildHandle, Listener, run_child
from workers.workspace import materialise

Outputs = dict[str, Any]


class Rejected(UserError):  # noqa: N818 (an outcome, not a mistake)
    """The delta was made and did not pass: it stops here and is never published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt of one step. `persist` makes a database write outlast a restart of the server."""

    job: Job
    lease: Lease
    workspace: Path
    child: ChildHandle
    listen: Listener
    persist: Callable[[Callable[[], Any]], Any]

    def outputs_of(self, step: str) -> Outputs:
        outputs: Outputs = self.job.steps.get(name=step).outputs
        return outputs

    def run_child(self, **fields: Any) -> Outputs:
        (self.workspace / "reports").mkdir(exist_ok=True)
        asked, config = self.job.upload.spec, read_config()
        spec = StepSpec(
            step=self.lease.step,
            kind=self.job.kind,
            workspace=self.workspace,
            parent_pid=os.getpid(),
            device=config.device,
            recipe=asked.get("recipe", ""),
            bits_per_param=asked.get("bits_per_param"),
            address_bytes=config.child_address_bytes,
            file_bytes=config.child_file_bytes,
            **fields,
        )
        return run_child(spec, self.child, self.listen)

    def bring_upload(self) -> None:
        files = {
            file.path: parts.assemble_file(file).sha256
            for file in self.job.upload.files.select_related("blob")
        }
        materialise(get_store(), files, self.workspace / "tuned")

    def bring_backbone(self) -> None:
        backbone = Revision.objects.get(pk=self.outputs_of("ingest")["backbone"])
        materialise(get_store(), files_of(backbone), self.workspace / "backbone")

    def bring_delta(self) -> None:
        files = self.outputs_of("compress")["files"]
        materialise(get_store(), files, self.workspace / "made")

    def keep(self, path: Path) -> str:
        """Store a file and return its sha256."""
        return str(self.persist(lambda: blobs.keep_file(path)).sha256)


def ingest(attempt: Attempt) -> Outputs:
    attempt.bring_upload()
    candidates = []
    if attempt.job.kind == Repo.Kind.DELTA:
        candidates = find_candidates(attempt.job)
    brought = tuple(
        _bring_candidate(attempt, item, only=len(candidates) == 1) for item in candidates
    )
    found = attempt.run_child(candidates=brought)
    return {**found, "tensors": _keep_tensor_table(attempt)}


def _keep_tensor_table(attempt: Attempt) -> str:
    """Store tensors.json, by which later fine-tunes are compared before they are uploaded."""
    layout = open_checkpoint(attempt.workspace / "tuned").layout
    hashes = json.loads((attempt.workspace / "reports" / "hashes.json").read_text())
    path = attempt.workspace / "reports" / backbones.TENSORS_FILE
    path.write_bytes(backbones.dump_tensors(layout, hashes))
    return attempt.keep(path)


def _bring_candidate(attempt: Attempt, revision: Revision, *, only: bool) -> Candidate:
    """A single candidate is compared by its table alone; rivals are compared by their weights."""
    folder = attempt.workspace / "candidates" / str(revision.pk)
    files = files_of(revision)
    wanted = {backbones.TENSORS_FILE: files[backbones.TENSORS_FILE]} if only else files
    materialise(get_store(), wanted, folder)
    return Candidate(revision=str(revision.pk), folder=str(folder))


def compress(attempt: Attempt) -> Outputs:
    attempt.bring_upload()
    attempt.bring_backbone()
    found = attempt.run_child()
    made = sorted(path for path in (attempt.workspace / "delta").iterdir() if path.is_file())
    return {**found, "files": {path.name: attempt.keep(path) for path in made}}


def verify(attempt: Attempt) -> Outputs:
    _bring_all(attempt)
    found = attempt.run_child()
    if found["failed"] is not None:
        raise Rejected("verification_failed", **found["failed"])
    return {**found, "report": attempt.keep(attempt.workspace / "reports" / VERIFICATION_NAME)}


def evaluate(attempt: Attempt) -> Outputs:
    _bring_all(attempt)
    found = attempt.run_child()
    if not found["scores"]:
        return found
    return {**found, "report": attempt.keep(attempt.workspace / "reports" / EVALUATION_NAME)}


def publish(attempt: Attempt) -> Publication:
    if attempt.job.kind == Repo.Kind.BACKBONE:
        return describe_backbone(attempt.job, attempt.outputs_of("ingest"))
    steps = {step.name: step.outputs for step in attempt.job.steps.all()}
    return describe_delta(attempt.job, steps)


def _bring_all(attempt: Attempt) -> None:
    attempt.bring_upload()
    attempt.bring_backbone()
    attempt.bring_delta()


STAGES: dict[str, Callable[[Attempt], Outputs]] = {
    "ingest": ingest,
    "compress": compress,
    "verify": verify,
    "evaluate": evaluate,
}
