from dataclasses import dataclass
from typing import Any
from uuid import UUID

from django.http import HttpRequest, QueryDict
from django.http.response import HttpResponseBase
from django.views.decorators.http import require_safe

from deltacome_core.budget import Budget, check_budget, fit_recipe
from deltacome_core.errors import UserError
from deltacome_core.plan import DeltaPlan, Subject, plan_delta
from deltacome_core.recipe import DEFAULT_RECIPE, get_recipe
from deltacome_core.shards import tensor_size
from hub import access, backbones, catalog, messages, uploads
from hub.access import page_access, signed_in
from hub.models import Job, Repo, Upload
from hub.recipes import list_recipes

from . import reads
from .page import crumbs, current_user, explain, page


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeChoice:
    name: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileView:
    index: int
    path: str
    size_bytes: int
    n_held: int
    n_parts: int


@signed_in
@page_access
@require_safe
def new(request: HttpRequest) -> HttpResponseBase:
    user = current_user(request)
    open_uploads = Upload.objects.filter(owner=user, state=Upload.State.OPEN)
    context = {
        "section": "new",
        "crumbs": crumbs("Upload"),
        "namespaces": reads.list_writable_namespaces(user),
        "backbones": reads.list_names(request.user, Repo.Kind.BACKBONE),
        "chosen_backbone": request.GET.get("backbone", ""),
        "recipes": [RecipeChoice(name=name, label=label) for name, label in list_recipes().items()],
        "open_uploads": open_uploads.select_related("repo__namespace").order_by("-id"),
    }
    return page(request, "uploads/new.html", context)


@signed_in
@page_access
@require_safe
def estimate(request: HttpRequest) -> HttpResponseBase:
    """The size a delta would have, as a fragment for the form."""
    context: dict[str, Any] = {"estimate": None}
    try:
        context["estimate"] = _estimate(request, request.GET)
    except UserError as error:
        context["estimate_error"] = explain(error)
    return page(request, "uploads/estimate.html", context)


def _estimate(request: HttpRequest, form: QueryDict) -> DeltaPlan | None:
    name = form.get("backbone", "")
    if not name:
        return None
    try:
        asked = form.get("bits_per_param", "")
        budget = Budget.of_bits(float(asked) if asked else None)
    except ValueError:
        raise UserError("budget_invalid") from None
    recipe = get_recipe(form.get("recipe", DEFAULT_RECIPE))
    check_budget(recipe, budget)
    revision = catalog.find_revision(request.user, name)
    if revision.repo.kind != Repo.Kind.BACKBONE:
        raise UserError("backbone_kind", repo=str(revision.repo))
    layout = backbones.read_layout(revision)
    source_bytes = sum(tensor_size(dtype, shape) for dtype, shape in layout.values())
    subject = Subject(layout=layout, source_bytes=source_bytes)
    return plan_delta(subject, fit_recipe(subject, recipe, budget) if budget else recipe)


@signed_in
@page_access
@require_safe
def resume(request: HttpRequest, upload_id: UUID) -> HttpResponseBase:
    """What is held of an upload; the browser fills in the rest once the folder is chosen again."""
    upload = access.get_upload(request.user, upload_id)
    status = uploads.upload_status(upload)
    files = [
        FileView(
            index=file.index,
            path=file.path,
            size_bytes=file.size_bytes,
            n_held=len(file.parts),
            n_parts=file.n_parts,
        )
        for file in status
    ]
    part = upload.part_size_bytes
    context = {
        "section": "new",
        "crumbs": crumbs(("Upload", "/new"), str(upload.repo)),
        "upload": upload,
        "is_open": upload.state == Upload.State.OPEN,
        "files": files,
        "total_bytes": sum(file.size_bytes for file in files),
        "held_bytes": sum(min(file.n_held * part, file.size_bytes) for file in files),
        "refusal": messages.explain(**upload.refusal) if upload.refusal else None,
        "job": Job.objects.filter(upload=upload).first(),
    }
    return page(request, "uploads/resume.html", context)
