"""Two ways in, never mixed: a bearer token ignores cookies, a session needs the CSRF header."""

from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib.auth.models import AnonymousUser
from django.http import HttpRequest
from rest_framework import authentication, exceptions, permissions
from rest_framework.negotiation import BaseContentNegotiation
from rest_framework.request import Request

from deltacome_core.errors import UserError
from hub import tokens
from hub.models import ApiToken, User

if TYPE_CHECKING:
    # Its settings import this module.
    from rest_framework.views import APIView

BEARER = "Bearer "


def find_token(request: HttpRequest) -> ApiToken | None:
    """Return the token of the Authorization header, or None when there is no such header.

    Raises:
        UserError: not_signed_in when the header does not hold a live token.
    """
    header = request.headers.get("Authorization")
    if header is None:
        return None
    token = tokens.find(header.removeprefix(BEARER)) if header.startswith(BEARER) else None
    if token is None:
        raise UserError("not_signed_in")
    return token


def authenticate(request: HttpRequest) -> User | AnonymousUser:
    """Name the caller of a read-only view that is not a DRF view.

    Raises:
        UserError: not_signed_in; permission_denied for a token that may only ask models.
    """
    token = find_token(request)
    if token is None:
        return request.user
    if not may_read(token):
        raise UserError("permission_denied")
    return token.user


def may_read(token: ApiToken) -> bool:
    return bool({ApiToken.Scope.READ, ApiToken.Scope.WRITE} & set(token.scopes))


class TokenAuthentication(authentication.BaseAuthentication):
    def authenticate(self, request: Request) -> tuple[User, ApiToken] | None:
        token = find_token(request._request)  # noqa: SLF001  DRF has no public name for it
        return None if token is None else (token.user, token)

    def authenticate_header(self, _request: Request) -> str:
        return "Bearer"


class SessionAuthentication(authentication.SessionAuthentication):
    def authenticate(self, request: Request) -> Any:
        if "Authorization" in request.headers:
            return None
        try:
            return super().authenticate(request)
        except exceptions.PermissionDenied:
            raise UserError("csrf_failed") from None


class Refuse(permissions.BasePermission):
    """The default: a view without its own rule answers nobody."""

    def has_permission(self, _request: Request, _view: "APIView") -> bool:
        return False


class Anyone(permissions.BasePermission):
    """Open to visitors; a token still needs the scope of the method."""

    scope: ClassVar = ApiToken.Scope.WRITE

    def has_permission(self, request: Request, _view: "APIView") -> bool:
        token = request.auth
        if not isinstance(token, ApiToken):
            return True
        is_enough = self.scope in token.scopes
        return is_enough or (request.method in permissions.SAFE_METHODS and may_read(token))


class SignedIn(Anyone):
    def has_permission(self, request: Request, view: "APIView") -> bool:
        if not request.user.is_authenticated:
            raise UserError("not_signed_in")
        return super().has_permission(request, view)


class SaysWhoIsIn(SignedIn):
    """A token that uploads for a pipeline must not be able to let people in."""

    scope = ApiToken.Scope.MEMBERS


class InBrowser(SignedIn):
    """A person at a keyboard: a leaked token must not be able to make or end tokens."""

    def has_permission(self, request: Request, view: "APIView") -> bool:
        if request.auth is not None:
            raise UserError("session_required")
        return super().has_permission(request, view)


class JSONAlways(BaseContentNegotiation):
    """There is one representation, whatever the client says it accepts."""

    def select_parser(self, _request: Request, parsers: Any) -> Any:
        return parsers[0] if parsers else None

    def select_renderer(self, _request: Request, renderers: Any, _suffix: Any = None) -> Any:
        return renderers[0], renderers[0].media_type


def current_user(request: Request) -> User:
    """Return the caller of a view that only signed-in callers reach."""
    if not isinstance(request.user, User):
        raise UserError("not_signed_in")
    return request.user


def current_token(request: Request) -> ApiToken | None:
    return request.auth if isinstance(request.auth, ApiToken) else None
