"""What goes in and what comes out; serializers check and print, they never save."""

from collections.abc import Mapping
from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from deltacome_core.recipe import DEFAULT_RECIPE
from hub import jobs, messages
from hub.models import ApiToken, Job, Membership, Repo, Revision, Upload, Vote
from hub.recipes import list_recipes
from hub.upload_opening import FileSpec, UploadSpec
from hub.uploads import upload_status

MAX_TOKEN_DAYS = 365


class ErrorSerializer(serializers.Serializer[Any]):
    code = serializers.CharField()
    message = serializers.CharField()
    do = serializers.CharField()
    fields_ = serializers.DictField()

    def get_fields(self) -> dict[str, serializers.Field[Any, Any, Any, Any]]:
        # `fields` is DRF's own name, so the attribute carries an underscore.
        found = super().get_fields()
        found["fields"] = found.pop("fields_")
        return found


class FileSpecSerializer(serializers.Serializer[Any]):
    path = serializers.CharField(max_length=200)
    size_bytes = serializers.IntegerField(min_value=0, max_value=2**63 - 1)


class UploadSpecSerializer(serializers.Serializer[Any]):
    repo = serializers.CharField(max_length=200)
    kind = serializers.ChoiceField(choices=Repo.Kind.choices)
    backbone = serializers.CharField(max_length=300, allow_null=True, default=None)
    recipe = serializers.CharField(
        max_length=40,
        default=DEFAULT_RECIPE,
        help_text="; ".join(f"`{name}`: {label}" for name, label in list_recipes().items()),
    )
    bits_per_param = serializers.FloatField(
        min_value=0.01,
        max_value=16.0,
        allow_null=True,
        default=None,
        help_text="Budget of the whole delta per parameter of the fine-tune, met within 1 % from "
        "below: 1.0 is 1/16 of a bf16 checkpoint. By default the recipe's own sizes.",
    )
    visibility = serializers.ChoiceField(
        choices=Repo.Visibility.choices, default=Repo.Visibility.PRIVATE
    )
    description = serializers.CharField(max_length=10_000, allow_blank=True, default="")
    files = FileSpecSerializer(many=True, allow_empty=False)

    def spec(self) -> UploadSpec:
        fields = dict(self.validated_data)
        files = tuple(FileSpec(**file) for file in fields.pop("files"))
        return UploadSpec(files=files, **fields)


class EndErrorSerializer(serializers.Serializer[Any]):
    code = serializers.CharField()
    message = serializers.CharField()
    do = serializers.CharField()


def _explained(code: str, params: Mapping[str, Any]) -> dict[str, str]:
    message = messages.explain(code, params)
    return {"code": code, "message": f"{message.title}. {message.what}", "do": message.do}


class FileStatusSerializer(serializers.Serializer[Any]):
    index = serializers.IntegerField()
    path = serializers.CharField()
    size_bytes = serializers.IntegerField()
    needs_header = serializers.BooleanField()
    header_ok = serializers.BooleanField()
    n_parts = serializers.IntegerField()
    parts = serializers.ListField(child=serializers.IntegerField())


class UploadSerializer(serializers.ModelSerializer[Upload]):
    repo = serializers.CharField()
    backbone = serializers.SerializerMethodField()
    part_size_bytes = serializers.IntegerField()
    layout = serializers.DictField(allow_null=True)
    files = serializers.SerializerMethodField()
    job = serializers.SerializerMethodField()
    refusal = serializers.SerializerMethodField()

    class Meta:
        model = Upload
        fields = ["id", "repo", "state", "part_size_bytes", "backbone", "layout", "files"]
        fields += ["job", "refusal", "created_at", "expires_at"]

    def get_backbone(self, upload: Upload) -> str | None:
        return str(upload.backbone) if upload.backbone else None

    @extend_schema_field(FileStatusSerializer(many=True))
    def get_files(self, upload: Upload) -> Any:
        return FileStatusSerializer(upload_status(upload), many=True).data

    def get_job(self, upload: Upload) -> str | None:
        job = Job.objects.filter(upload=upload).first()
        return str(job.pk) if job else None

    @extend_schema_field(EndErrorSerializer(allow_null=True))
    def get_refusal(self, upload: Upload) -> Any:
        if upload.refusal is None:
            return None
        return _explained(upload.refusal["code"], upload.refusal["params"])


class HeaderCheckedSerializer(serializers.Serializer[Any]):
    index = serializers.IntegerField()
    path = serializers.CharField()
    header_ok = serializers.BooleanField()
    backbone = serializers.CharField(allow_null=True)
    layout = serializers.DictField(allow_null=True)


class PartSerializer(serializers.Serializer[Any]):
    number = serializers.IntegerField()
    sha256 = serializers.CharField()
    size_bytes = serializers.IntegerField()


class RevisionNameSerializer(serializers.Serializer[Any]):
    repo = serializers.CharField()
    label = serializers.CharField()  # type: ignore[assignment]  # DRF's own `label` is unused here
    digest = serializers.SerializerMethodField()

    def get_digest(self, revision: Revision) -> str | None:
        return f"sha256:{revision.digest}" if revision.digest else None


class RevisionSerializer(serializers.ModelSerializer[Revision]):
    # Needs `readable` in its context: `catalog.readable_backbones` of what it prints.
    repo = serializers.CharField()
    label = serializers.CharField()  # type: ignore[assignment]  # as above
    digest = serializers.SerializerMethodField()
    backbone = serializers.SerializerMethodField()
    recipe = serializers.DictField()
    # Declared, because the bounds that Django derives differ from database to database.
    number = serializers.IntegerField(allow_null=True)
    size_bytes = serializers.IntegerField()
    source_size_bytes = serializers.IntegerField()
    n_params = serializers.IntegerField()
    ratio = serializers.FloatField()

    class Meta:
        model = Revision
        fields = ["id", "repo", "number", "label", "digest", "state", "backbone", "recipe"]
        fields += ["checkpoint_digest", "architecture", "dtype", "size_bytes"]
        fields += ["source_size_bytes", "ratio", "n_params", "bits_per_param"]
        fields += ["yank_reason", "created_at", "published_at"]

    def get_digest(self, revision: Revision) -> str | None:
        return f"sha256:{revision.digest}" if revision.digest else None

    @extend_schema_field(RevisionNameSerializer(allow_null=True))
    def get_backbone(self, revision: Revision) -> Any:
        backbone = revision.backbone
        if backbone is None or backbone.repo_id not in self.context["readable"]:
            return None
        return RevisionNameSerializer(backbone).data


class FileSerializer(serializers.Serializer[Any]):
    path = serializers.CharField()
    size_bytes = serializers.IntegerField(source="blob.size_bytes")
    sha256 = serializers.CharField(source="blob_id")


class VerificationSerializer(serializers.Serializer[Any]):
    grade = serializers.CharField()
    recovery = serializers.FloatField()
    kl = serializers.FloatField()
    top1 = serializers.FloatField()
    ppl_ratio = serializers.FloatField()
    report = serializers.DictField()


class EvaluationSerializer(serializers.Serializer[Any]):
    task = serializers.CharField()
    subject = serializers.CharField()
    accuracy = serializers.FloatField()
    n = serializers.IntegerField()
    se = serializers.FloatField()


class RevisionDetailSerializer(RevisionSerializer):
    files = FileSerializer(many=True)
    verification = serializers.SerializerMethodField()
    evaluations = EvaluationSerializer(many=True)

    class Meta(RevisionSerializer.Meta):
        fields = [*RevisionSerializer.Meta.fields, "files", "verification", "evaluations"]

    @extend_schema_field(VerificationSerializer(allow_null=True))
    def get_verification(self, revision: Revision) -> Any:
        found = getattr(revision, "verification", None)
        return VerificationSerializer(found).data if found else None


class RepoSerializer(serializers.ModelSerializer[Repo]):
    namespace = serializers.CharField()
    full_name = serializers.CharField(source="__str__")
    latest = serializers.SerializerMethodField()

    class Meta:
        model = Repo
        fields = ["id", "namespace", "name", "full_name", "kind", "visibility", "description"]
        fields += ["latest", "created_at", "updated_at"]

    @extend_schema_field(RevisionSerializer(allow_null=True))
    def get_latest(self, repo: Repo) -> Any:
        revision = self.context["latest"].get(repo.pk)
        return RevisionSerializer(revision, context=self.context).data if revision else None


class RepoChangeSerializer(serializers.Serializer[Any]):
    description = serializers.CharField(max_length=10_000, allow_blank=True, required=False)
    visibility = serializers.ChoiceField(choices=Repo.Visibility.choices, required=False)


class YankSerializer(serializers.Serializer[Any]):
    reason = serializers.CharField(max_length=1000)


class AliasSerializer(serializers.Serializer[Any]):
    revision = serializers.CharField(max_length=100)


class StepSerializer(serializers.Serializer[Any]):
    name = serializers.CharField()
    seconds = serializers.FloatField()
    finished_at = serializers.DateTimeField()


class JobSerializer(serializers.ModelSerializer[Job]):
    repo = serializers.CharField()
    revision = serializers.SerializerMethodField()
    steps = serializers.SerializerMethodField()
    done_steps = StepSerializer(source="steps", many=True)
    attempt = serializers.IntegerField()
    max_attempts = serializers.IntegerField()
    progress = serializers.DictField()
    error = serializers.SerializerMethodField()

    class Meta:
        model = Job
        fields = ["id", "kind", "state", "step", "steps", "done_steps", "attempt", "max_attempts"]
        fields += ["progress", "error", "repo", "revision", "upload", "created_at", "finished_at"]

    def get_revision(self, job: Job) -> str | None:
        """The published revision's name, once there is one."""
        return job.revision.label if job.revision.number else None

    @extend_schema_field(serializers.ListField(child=serializers.CharField()))
    def get_steps(self, job: Job) -> tuple[str, ...]:
        return jobs.STEPS[job.kind]

    @extend_schema_field(EndErrorSerializer(allow_null=True))
    def get_error(self, job: Job) -> Any:
        return _explained(job.error_code, job.error_params) if job.error_code else None


class TokenRequestSerializer(serializers.Serializer[Any]):
    name = serializers.CharField(max_length=100)
    scopes = serializers.ListField(
        child=serializers.ChoiceField(choices=ApiToken.Scope.choices),
        min_length=1,
        max_length=len(ApiToken.Scope),
    )
    expires_in_days = serializers.IntegerField(min_value=1, max_value=MAX_TOKEN_DAYS, default=90)


class TokenSerializer(serializers.ModelSerializer[ApiToken]):
    scopes = serializers.ListField(child=serializers.CharField())

    class Meta:
        model = ApiToken
        fields = ["id", "name", "prefix", "scopes", "created_at", "expires_at", "last_used_at"]
        fields += ["revoked_at"]


class NewTokenSerializer(TokenSerializer):
    token = serializers.CharField(source="secret")

    class Meta(TokenSerializer.Meta):
        fields = [*TokenSerializer.Meta.fields, "token"]


class NamespaceSerializer(serializers.Serializer[Any]):
    name = serializers.CharField(source="namespace.name")
    kind = serializers.CharField(source="namespace.kind")
    role = serializers.CharField()


class OrganisationRequestSerializer(serializers.Serializer[Any]):
    name = serializers.CharField(max_length=63)


class OrganisationSerializer(serializers.Serializer[Any]):
    # Of the caller's own membership.
    name = serializers.CharField(source="namespace.name")
    role = serializers.ChoiceField(choices=Membership.Role.choices)
    created_at = serializers.DateTimeField(source="namespace.created_at")


class RoleSerializer(serializers.Serializer[Any]):
    role = serializers.ChoiceField(choices=Membership.Role.choices)


class MemberSerializer(serializers.Serializer[Any]):
    username = serializers.CharField(source="user.username")
    role = serializers.ChoiceField(choices=Membership.Role.choices)


class WhoamiSerializer(serializers.Serializer[Any]):
    username = serializers.CharField()
    namespaces = NamespaceSerializer(source="memberships", many=True)
    scopes = serializers.ListField(child=serializers.CharField(), allow_null=True)


class VoteSerializer(serializers.Serializer[Any]):
    left = serializers.CharField(max_length=300)
    right = serializers.CharField(max_length=300)
    outcome = serializers.ChoiceField(choices=Vote.Outcome.choices)
    # Prompt and settings in any form: only the digest is kept.
    question = serializers.CharField(max_length=100_000)


class TallySerializer(serializers.Serializer[Any]):
    """The votes of everybody on `left` against `right`, this one included."""

    opponent = serializers.CharField()
    wins = serializers.IntegerField()
    losses = serializers.IntegerField()
    ties = serializers.IntegerField()


class SealedSerializer(serializers.Serializer[Any]):
    job = JobSerializer()
