"""Rows and files for tests. Each function makes one thing and returns it."""

import hashlib
import json
import struct
from datetime import timedelta
from itertools import count

from django.db.models.functions import Now

from hub import accounts, blobs, jobs, organisations, tokens
from hub.models import (
    Evaluation,
    File,
    Job,
    Membership,
    Namespace,
    Repo,
    Revision,
    Upload,
    UploadFile,
    User,
    Verification,
)

PASSWORD = "correct horse battery"
_numbers = count(1)
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I64": 8}
# A backbone of two matrices and a norm: enough to fit or to differ.
TENSORS = {
    "model.embed_tokens.weight": ("BF16", [64, 32]),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", [32, 32]),
    "model.norm.weight": ("BF16", [32]),
}


def make_user(username=None, **fields):
    user = accounts.sign_up(username or f"user{next(_numbers)}", "", password=PASSWORD)
    User.objects.filter(pk=user.pk).update(**fields) if fields else None
    return user


def make_org(name=None, *, owner, **members):
    """Make an organisation; `members` maps a role to users."""
    org = organisations.create(name or f"org{next(_numbers)}", owner)
    for role, users in members.items():
        for user in users:
            organisations.set_role(org, user, role)
    return org


def namespace_of(user):
    return Namespace.objects.get(name=user.username)


def make_token(user, *scopes):
    """Return the secret of a new token."""
    _, secret = tokens.mint(
        user, "test", scopes=scopes or ("read", "write"), expires_in=timedelta(days=1)
    )
    return secret


def make_repo(namespace, name=None, *, kind="delta", visibility="public", **fields):
    owner = Membership.objects.filter(namespace=namespace, role="owner").first().user
    return Repo.objects.create(
        namespace=namespace,
        name=name or f"repo{next(_numbers)}",
        kind=kind,
        visibility=visibility,
        **{"created_by": owner} | fields,
    )


def make_blob(content):
    return blobs.keep_chunks([content])


def make_file(revision, path, content):
    return File.objects.create(revision=revision, path=path, blob=make_blob(content))


def make_revision(repo, *, state="PUBLISHED", files=None, **fields):
    """Make a revision with files; the number follows the last one."""
    is_out = state in {"PUBLISHED", "YANKED"}
    digest = hashlib.sha256(f"{repo.pk}{next(_numbers)}".encode()).hexdigest()
    defaults = {
        "number": repo.revisions.exclude(number=None).count() + 1 if is_out else None,
        "digest": digest if is_out else None,
        "published_at": Now() if is_out else None,
        "created_by": repo.created_by,
        "size_bytes": 1000,
        "source_size_bytes": 16_000,
        "n_params": 8000,
        "bits_per_param": 1.0,
    }
    revision = Revision.objects.create(repo=repo, state=state, **defaults | fields)
    for path, content in (files or {"README.md": b"# A model\n"}).items():
        make_file(revision, path, content)
    revision.refresh_from_db()
    return revision


def make_backbone(namespace, name=None, *, tensors=None, visibility="public", **fields):
    """Make a published backbone whose tensors.json describes `tensors`."""
    repo = make_repo(namespace, name, kind="backbone", visibility=visibility)
    table = {
        key: {"dtype": dtype, "shape": shape, "sha256": hashlib.sha256(key.encode()).hexdigest()}
        for key, (dtype, shape) in (tensors or TENSORS).items()
    }
    files = {
        "tensors.json": json.dumps(table).encode(),
        "config.json": b"{}",
    }
    return make_revision(repo, files=files, checkpoint_digest="b" * 64, **fields)


def make_verification(revision, *, grade="A", **fields):
    scores = {"recovery": 0.995, "kl": 0.001, "top1": 0.99, "ppl_ratio": 1.001}
    return Verification.objects.create(
        revision=revision, grade=grade, **scores | {"report": {"grade": grade}} | fields
    )


def make_evaluation(revision, task="arithmetic", **accuracies):
    """Make one row per subject: make_evaluation(r, backbone=.1, finetune=.9, delta=.9)."""
    return [
        Evaluation.objects.create(
            revision=revision, task=task, subject=subject, accuracy=accuracy, n=200, se=0.02
        )
        for subject, accuracy in accuracies.items()
    ]


def make_upload(repo, *, owner=None, state="SEALED", files=None, **fields):
    """Make an upload whose files are blobs already."""
    upload = Upload.objects.create(
        repo=repo,
        owner=owner or repo.created_by,
        state=state,
        part_size_bytes=4096,
        expires_at=jobs.from_now(3600),
        **fields,
    )
    for index, (path, content) in enumerate((files or {}).items()):
        UploadFile.objects.create(
            upload=upload,
            index=index,
            path=path,
            size_bytes=len(content),
            header_ok=True,
            blob=make_blob(content),
        )
    upload.refresh_from_db()
    return upload


def make_job(repo, *, state="QUEUED", step=None, files=None, spec=None, backbone=None, **fields):
    """Make a job with its sealed upload and its draft revision."""
    upload = make_upload(repo, files=files, spec=spec or {}, backbone=backbone)
    revision = make_revision(
        repo, state="DRAFT", files={"README.md": b"draft\n"}, backbone=backbone
    )
    job = Job.objects.create(
        kind=repo.kind,
        owner=upload.owner,
        upload=upload,
        revision=revision,
        state=state,
        step=step or jobs.STEPS[repo.kind][0],
        **fields,
    )
    job.refresh_from_db()
    return job


def safetensors_bytes(tensors=None, *, metadata=None, fill=1):
    """Build a valid file: {name: (dtype, shape)} -> bytes."""
    header, position = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, shape) in (tensors or TENSORS).items():
        size = DTYPE_BYTES[dtype]
        for dimension in shape:
            size *= dimension
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes([fill]) * position


def header_of(content):
    """Return the first bytes of a safetensors file: length and header."""
    return content[: 8 + struct.unpack("<Q", content[:8])[0]]
