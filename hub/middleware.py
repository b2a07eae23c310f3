from collections.abc import Awaitable, Callable

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase

from deltacome_core.errors import UserError
from hub.api.errors import error_response

CONTENT_SECURITY_POLICY = (
    "default-src 'none';"
    " script-src 'self';"
    " style-src 'self';"
    " img-src 'self' data:;"
    " font-src 'self';"
    " connect-src 'self';"
    " worker-src 'self';"
    " form-action 'self';"
    " base-uri 'none';"
    " frame-ancestors 'none';"
    " require-trusted-types-for 'script';"
    " trusted-types hub htmx"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}


class SecurityHeaders:
    async_capable = True
    sync_capable = True

    def __init__(
        self, get_response: Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]
    ) -> None:
        self.get_response = get_response
        self.is_async = iscoroutinefunction(get_response)
        if self.is_async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        response = refuse_nul(request) or self.get_response(request)
        if not self.is_async and isinstance(response, HttpResponseBase):
            return add_headers(response)
        return self._add_later(response)

    async def _add_later(
        self, response: HttpResponseBase | Awaitable[HttpResponseBase]
    ) -> HttpResponseBase:
        return add_headers(response if isinstance(response, HttpResponseBase) else await response)


def refuse_nul(request: HttpRequest) -> HttpResponseBase | None:
    """No name of ours holds a NUL, and PostgreSQL refuses a query that does."""
    if "\0" in request.path_info or "%00" in request.META.get("QUERY_STRING", ""):
        return error_response(UserError("invalid", address=["It holds a NUL."]))
    return None


def add_headers(response: HttpResponseBase) -> HttpResponseBase:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    if isinstance(response, HttpResponse) and "Cache-Control" not in response.headers:
        response.headers["Cache-Control"] = "private, no-cache"
    return response
