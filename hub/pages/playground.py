from dataclasses import dataclass

from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.views.decorators.csrf import ensure_csrf_cookie
from django.views.decorators.http import require_safe

from deltacome_core.errors import UserError
from hub import catalog, finetunes
from hub.access import AnyUser, page_access
from hub.models import Repo

from . import reads
from .page import crumbs, page

# The backbone, the fine-tune and up to four deltas.
MAX_COLUMNS = 6
DEFAULTS = {
    "mode": "chat",
    "prompt": "",
    "max": "128",
    "t": "0",
    "top_p": "1",
    "seed": "1",
    "blind": "",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    number: int
    chosen: str
    is_listed: bool
    is_shown: bool


@ensure_csrf_cookie
@page_access
@require_safe
def index(request: HttpRequest) -> HttpResponseBase:
    """Models side by side; the address holds the models, the prompt and the sampling."""
    deltas = reads.list_choices(request.user, Repo.Kind.DELTA)
    backbones = reads.list_choices(request.user, Repo.Kind.BACKBONE)
    asked = [name.removesuffix("@latest") for name in request.GET.getlist("d") if name]
    chosen = list(dict.fromkeys(asked))[:MAX_COLUMNS]
    if len(chosen) < 2:  # noqa: PLR2004  one alone is no comparison
        first = next(iter([*chosen, *(choice.name for choice in deltas)]), "")
        chosen = _surround(request.user, first, deltas, backbones)
    names = {choice.name for choice in (*deltas, *backbones)}
    names |= {choice.name + finetunes.SUFFIX for choice in deltas if choice.has_finetune}
    context = {
        "section": "playground",
        "crumbs": crumbs("Playground"),
        "deltas": deltas,
        "backbones": backbones,
        "suffix": finetunes.SUFFIX,
        "max_columns": MAX_COLUMNS,
        "columns": [
            Column(
                number=number,
                chosen=name,
                # A pinned revision is in none of the lists, but it must stay chosen.
                is_listed=name in names,
                is_shown=bool(name) or number <= 2,  # noqa: PLR2004  two to compare
            )
            for number, name in enumerate((*chosen, *[""] * MAX_COLUMNS)[:MAX_COLUMNS], start=1)
        ],
        "state": {name: request.GET.get(name, value) for name, value in DEFAULTS.items()},
    }
    return page(request, "playground/index.html", context)


def _surround(
    user: AnyUser, first: str, deltas: list[reads.Choice], backbones: list[reads.Choice]
) -> list[str]:
    """Put what a delta is to be held against beside it: its fine-tune and its backbone."""
    names = [first] if first else []
    if any(choice.name == first and choice.has_finetune for choice in deltas):
        names.append(first + finetunes.SUFFIX)
    backbone = _find_backbone(user, first) or next((choice.name for choice in backbones), "")
    return [*names, *([backbone] if backbone and backbone not in names else [])]


def _find_backbone(user: AnyUser, name: str) -> str:
    try:
        revision = catalog.find_revision(user, name.removesuffix(finetunes.SUFFIX))
    except UserError:
        return ""
    backbone = reads.visible_backbone(user, revision)
    return str(backbone.repo) if backbone else ""
