"""The whole fine-tune that a delta was made from, for as long as its own files are held."""

from collections.abc import Iterable
from uuid import UUID

from deltacome_core.checkpoint import MODEL_SIDECAR_NAMES, is_sidecar
from hub.models import Repo, Revision, UploadFile

# No repo and no alias may hold a colon: nothing else can have such a name.
SUFFIX = ":finetune"
TOKENIZER = "tokenizer"


def find_held(revisions: Iterable[Revision]) -> frozenset[UUID]:
    """Of these revisions, those whose fine-tune is still there, every file of it."""
    deltas = [item.pk for item in revisions if item.repo.kind == Repo.Kind.DELTA]
    files = UploadFile.objects.filter(upload__job__revision__in=deltas)
    held = files.exclude(blob=None).values_list("upload__job__revision", flat=True)
    let_go = files.filter(blob=None).values_list("upload__job__revision", flat=True)
    return frozenset(held) - frozenset(let_go)


def is_held(revision: Revision) -> bool:
    return revision.pk in find_held([revision])


def list_files(revision: Revision) -> dict[str, str]:
    """Map the files that make the fine-tune run to their digests.

    The text beside the weights comes from the delta, which has all of it; a tokenizer that came
    with neither is the backbone's, as it is when the delta answers.
    """
    uploaded = UploadFile.objects.filter(upload__job__revision=revision).exclude(blob=None)
    own = dict(uploaded.values_list("path", "blob_id"))
    files = _sidecars(revision) | {
        path: sha256 for path, sha256 in own.items() if _makes_it_run(path)
    }
    if revision.backbone and not any(path.startswith(TOKENIZER) for path in files):
        files = _sidecars(revision.backbone, TOKENIZER) | files
    return files


def _makes_it_run(path: str) -> bool:
    is_weights = path.endswith((".safetensors", ".safetensors.index.json"))
    return is_weights or is_sidecar(path, MODEL_SIDECAR_NAMES)


def _sidecars(revision: Revision, prefix: str = "") -> dict[str, str]:
    found = revision.files.filter(path__startswith=prefix).values_list("path", "blob_id")
    return {path: sha256 for path, sha256 in found if is_sidecar(path, MODEL_SIDECAR_NAMES)}
