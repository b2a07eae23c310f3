"""The pages a visitor meets when something is refused."""

from collections.abc import Awaitable, Callable

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from deltacome_core.errors import UserError
from hub import messages

from .page import explain, page

# Statuses with a page of their own words; the others are explained by their code.
OWN_PAGES = frozenset({413, 429})


class RefusalPages:
    """Middleware: what a page raises for the user to put right is shown, never a crash."""

    async_capable = True
    sync_capable = True

    def __init__(
        self, get_response: Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]
    ) -> None:
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponseBase | None:
        return show_refusal(request, error) if isinstance(error, UserError) else None


def show_refusal(request: HttpRequest, error: UserError) -> HttpResponseBase:
    status = messages.http_status(error.code)
    template = f"{status}.html" if status in OWN_PAGES else "error.html"
    return page(request, template, {"message": explain(error)}, status=status).render()
