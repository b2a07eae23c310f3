"""An upload is opened: what was asked for is checked, and room is reserved under a name."""

import hashlib
import json
from dataclasses import asdict, dataclass

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.db.models import Sum

from deltacome_core.budget import Budget, check_budget
from deltacome_core.errors import UserError
from deltacome_core.recipe import DEFAULT_RECIPE, get_recipe
from hub import access, catalog, storage, upload_files
from hub.jobs import from_now
from hub.models import Namespace, Repo, Revision, Upload, UploadFile, User
from hub.models.repo import validate_repo_name


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSpec:
    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadSpec:
    repo: str
    kind: str
    files: tuple[FileSpec, ...]
    backbone: str | None = None
    recipe: str = DEFAULT_RECIPE
    bits_per_param: float | None = None
    visibility: str = Repo.Visibility.PRIVATE
    description: str = ""

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def open_upload(owner: User, spec: UploadSpec, *, idempotency_key: str | None = None) -> Upload:
    """Reserve room for a checkpoint; the same key and request give the same upload.

    Raises:
        UserError: what is wrong with the request, the right, the quota or the disk.
    """
    request_sha256 = hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()
    if idempotency_key is not None:
        before = Upload.objects.filter(owner=owner, idempotency_key=idempotency_key).first()
        if before is not None:
            return _same_request(before, request_sha256)
    upload_files.check_files([(file.path, file.size_bytes) for file in spec.files])
    if spec.kind == Repo.Kind.DELTA:
        check_budget(get_recipe(spec.recipe), Budget.of_bits(spec.bits_per_param))
    storage.require_space(spec.size_bytes)
    try:
        with transaction.atomic():
            return _create_upload(owner, spec, idempotency_key, request_sha256)
    except IntegrityError:
        # Two requests with one key arrived together: the first has won.
        before = Upload.objects.filter(owner=owner, idempotency_key=idempotency_key).first()
        if before is None or idempotency_key is None:
            raise
        return _same_request(before, request_sha256)


def _create_upload(
    owner: User, spec: UploadSpec, idempotency_key: str | None, request_sha256: str
) -> Upload:
    repo = _find_or_create_repo(owner, spec)
    _check_limits(owner, repo.namespace, spec)
    backbone = _named_backbone(owner, spec.backbone) if spec.backbone else None
    delta_spec = {"recipe": spec.recipe, "bits_per_param": spec.bits_per_param}
    upload = Upload.objects.create(
        repo=repo,
        owner=owner,
        spec=delta_spec if spec.kind == Repo.Kind.DELTA else {},
        part_size_bytes=settings.UPLOAD_PART_BYTES,
        backbone=backbone,
        idempotency_key=idempotency_key,
        request_sha256=request_sha256,
        expires_at=from_now(settings.UPLOAD_TTL_S),
    )
    UploadFile.objects.bulk_create(
        UploadFile(upload=upload, index=index, path=file.path, size_bytes=file.size_bytes)
        for index, file in enumerate(spec.files)
    )
    upload.refresh_from_db()
    return upload


def _find_or_create_repo(owner: User, spec: UploadSpec) -> Repo:
    namespace_name, _, name = spec.repo.partition("/")
    namespace = Namespace.objects.filter(name__iexact=namespace_name).first()
    if namespace is None:
        raise UserError("not_found")
    # The right is asked before the repo is looked up: a stranger learns nothing of its names.
    access.require_in(owner, namespace, access.Right.WRITE)
    try:
        validate_repo_name(name)
    except ValidationError:
        raise UserError("name_unsafe", name=ascii(name[:80])) from None
    repo = Repo.objects.named(namespace_name, name).select_related("namespace").first()
    if repo is None:
        return Repo.objects.create(
            namespace=namespace,
            name=name,
            kind=spec.kind,
            visibility=spec.visibility,
            description=spec.description,
            created_by=owner,
        )
    if not Repo.objects.kept().filter(pk=repo.pk).exists():
        # An upload that came to nothing does not decide what the name is used for.
        repo.kind, repo.visibility, repo.description = spec.kind, spec.visibility, spec.description
        repo.save(update_fields=["kind", "visibility", "description"])
    if repo.kind != spec.kind:
        raise UserError("repo_kind", repo=str(repo), kind=repo.kind)
    return repo


def _named_backbone(owner: User, name: str) -> Revision:
    revision = catalog.find_revision(owner, name)
    if revision.repo.kind != Repo.Kind.BACKBONE:
        raise UserError("backbone_kind", repo=str(revision.repo))
    return revision


def _check_limits(owner: User, namespace: Namespace, spec: UploadSpec) -> None:
    n_open = Upload.objects.filter(owner=owner, state=Upload.State.OPEN).count()
    if n_open >= settings.UPLOAD_MAX_OPEN:
        raise UserError("too_many_uploads", count=n_open, limit=settings.UPLOAD_MAX_OPEN)
    in_files = Revision.objects.filter(repo__namespace=namespace)
    held = in_files.aggregate(total=Sum("files__blob__size_bytes"))["total"] or 0
    arriving = UploadFile.objects.filter(
        upload__repo__namespace=namespace, upload__state=Upload.State.OPEN
    ).aggregate(total=Sum("size_bytes"))
    if held + (arriving["total"] or 0) + spec.size_bytes > settings.NAMESPACE_QUOTA_BYTES:
        raise UserError(
            "quota_exceeded",
            namespace=namespace.name,
            quota_bytes=settings.NAMESPACE_QUOTA_BYTES,
        )


def _same_request(upload: Upload, request_sha256: str) -> Upload:
    if upload.request_sha256 != request_sha256:
        raise UserError("idempotency_conflict")
    return upload
