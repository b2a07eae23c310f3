from django.db import models
from django.db.models.functions import Now

from .account import User
from .base import UUIDModel
from .repo import Blob, Repo, Revision, validate_sha256


class Upload(UUIDModel):
    class State(models.TextChoices):
        OPEN = "OPEN"
        SEALED = "SEALED"
        ABORTED = "ABORTED"
        REFUSED = "REFUSED"

    repo = models.ForeignKey(Repo, models.PROTECT, related_name="uploads")
    owner = models.ForeignKey(User, models.PROTECT, related_name="uploads")
    state = models.CharField(max_length=8, choices=State, default=State.OPEN)
    # recipe, bits_per_param: what the compress step is asked to do.
    spec = models.JSONField(default=dict)
    part_size_bytes = models.PositiveIntegerField()
    # Named by the uploader, or found from the headers' tensor names and shapes.
    backbone = models.ForeignKey(Revision, models.PROTECT, null=True, related_name="+")
    # Counts of the layout comparison once every header is in and fits the backbone.
    layout = models.JSONField(null=True)
    # code, params of the error that ended it: a header, or the layout, was not accepted.
    refusal = models.JSONField(null=True)
    idempotency_key = models.CharField(max_length=100, null=True)  # noqa: DJ001  NULL = not given
    request_sha256 = models.CharField(max_length=64)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    expires_at = models.DateTimeField()
    sealed_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["owner", "idempotency_key"], name="upload_once")
        ]
        indexes = [models.Index(fields=["state", "expires_at"], name="upload_by_expiry")]

    def __str__(self) -> str:
        return f"upload {self.id} to {self.repo}"


class UploadFile(UUIDModel):
    upload = models.ForeignKey(Upload, models.CASCADE, related_name="files")
    index = models.PositiveIntegerField()
    path = models.CharField(max_length=200)
    size_bytes = models.BigIntegerField()
    header_ok = models.BooleanField(default=False)
    header_sha256 = models.CharField(max_length=64, blank=True)
    # Set when the parts are assembled: the whole file, by its digest.
    blob = models.ForeignKey(Blob, models.PROTECT, null=True, related_name="upload_files")

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["upload", "index"], name="upload_file_index"),
            models.UniqueConstraint(fields=["upload", "path"], name="upload_file_path"),
        ]
        ordering = ["index"]

    def __str__(self) -> str:
        return self.path

    @property
    def needs_header(self) -> bool:
        return self.path.endswith(".safetensors")


class Part(UUIDModel):
    upload_file = models.ForeignKey(UploadFile, models.CASCADE, related_name="parts")
    number = models.PositiveIntegerField()
    sha256 = models.CharField(max_length=64, validators=[validate_sha256])
    size_bytes = models.PositiveIntegerField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["upload_file", "number"], name="part_number")
        ]

    def __str__(self) -> str:
        return f"{self.upload_file} part {self.number}"
