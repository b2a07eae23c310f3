"""The scratch folder of one job: what its steps read, leave half done, and hand over."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from uuid import UUID

from django.conf import settings
from django.db.models import Q

from hub import jobs
from hub.models import Job
from hub.storage import BlobStore
from workers.fetch import fetch_blob

_FETCHED_NAME = ".fetched.json"
_KEPT_AFTER_FAILURE_S = 24 * 3600


def workspaces_root() -> Path:
    return Path(settings.DATA_DIR) / "workspaces"


def open_workspace(job_id: UUID) -> Path:
    folder = workspaces_root() / str(job_id)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_workspace(job_id: UUID) -> None:
    shutil.rmtree(workspaces_root() / str(job_id), ignore_errors=True)


def materialise(store: BlobStore, files: Mapping[str, str], folder: Path) -> None:
    """Make `folder` hold exactly these files (path -> sha256); what is there already stays.

    A later step or attempt on the same machine finds them; on another one they are fetched anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / _FETCHED_NAME
    fetched: dict[str, str] = json.loads(note.read_text()) if note.exists() else {}
    for path in fetched.keys() - files.keys():
        (folder / path).unlink(missing_ok=True)
    for path, sha256 in files.items():
        if fetched.get(path) == sha256 and (folder / path).exists():
            continue
        fetch_blob(store, sha256, folder / path)
    partial = note.with_name(f"{_FETCHED_NAME}.{os.getpid()}")
    partial.write_text(json.dumps(dict(files)))
    partial.replace(note)


def prune_workspaces() -> int:
    """Remove the folders of jobs that are over; failed ones keep theirs for a day of retries."""
    root = workspaces_root()
    folders = {folder.name: folder for folder in root.iterdir()} if root.is_dir() else {}
    over = Q(state__in=[Job.State.DONE, Job.State.REJECTED, Job.State.CANCELLED]) | Q(
        state=Job.State.FAILED, finished_at__lt=jobs.from_now(-_KEPT_AFTER_FAILURE_S)
    )
    finished = Job.objects.filter(over, pk__in=[name for name in folders if _is_uuid(name)])
    removed = [str(pk) for pk in finished.values_list("pk", flat=True)]
    for name in removed:
        shutil.rmtree(folders[name], ignore_errors=True)
    return len(removed)


def _is_uuid(name: str) -> bool:
    try:
        return str(UUID(name)) == name
    except ValueError:
        return False
