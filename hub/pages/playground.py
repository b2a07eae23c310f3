from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.views.decorators.csrf import ensure_csrf_cookie
from django.views.decorators.http import require_safe

from hub.access import page_access
from hub.models import Repo

from . import reads
from .page import crumbs, page

COLUMNS = 2
DEFAULTS = {"mode": "chat", "prompt": "", "max": "128", "t": "0", "seed": "1"}


@ensure_csrf_cookie
@page_access
@require_safe
def index(request: HttpRequest) -> HttpResponseBase:
    """Two models side by side; the address holds the models, the prompt and the sampling."""
    deltas = reads.list_names(request.user, Repo.Kind.DELTA)
    backbones = reads.list_names(request.user, Repo.Kind.BACKBONE)
    chosen = [name.removesuffix("@latest") for name in request.GET.getlist("d") if name][:COLUMNS]
    fallback = [*backbones[:1], *deltas[:1]]
    chosen += [name for name in fallback if name not in chosen][: COLUMNS - len(chosen)]
    context = {
        "section": "playground",
        "crumbs": crumbs("Playground"),
        "deltas": deltas,
        "backbones": backbones,
        # A pinned revision is in none of the lists, but it must stay chosen.
        "columns": [
            {"number": number, "chosen": name, "is_listed": name in {*deltas, *backbones}}
            for number, name in enumerate((*chosen, "", "")[:COLUMNS], start=1)
        ],
        "state": {name: request.GET.get(name, value) for name, value in DEFAULTS.items()},
    }
    return page(request, "playground/index.html", context)
