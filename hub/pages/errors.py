"""The pages a visitor meets when something is refused."""

from django.http import HttpRequest
from django.http.response import HttpResponseBase

from deltacome_core.errors import UserError
from hub import messages

from .page import explain, page

# Statuses with a page of their own words; the others are explained by their code.
OWN_PAGES = frozenset({413, 429})


def show_refusal(request: HttpRequest, error: UserError) -> HttpResponseBase:
    status = messages.http_status(error.code)
    template = f"{status}.html" if status in OWN_PAGES else "error.html"
    return page(request, template, {"message": explain(error)}, status=status)
