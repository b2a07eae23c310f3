from typing import Any

from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.utils import extend_schema
from drf_spectacular.views import SpectacularAPIView
from rest_framework.renderers import JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from deltacome_core.errors import UserError
from hub.api.auth import Anyone


class TokenScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    target_class = "hub.api.auth.TokenAuthentication"
    name = "token"

    def get_security_definition(self, _auto_schema: Any) -> dict[str, Any]:
        return {"type": "http", "scheme": "bearer", "bearerFormat": "dch_…"}


class SessionScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    target_class = "hub.api.auth.SessionAuthentication"
    name = "session"

    def get_security_definition(self, _auto_schema: Any) -> dict[str, Any]:
        return {"type": "apiKey", "in": "cookie", "name": "sessionid"}


class Schema(SpectacularAPIView):
    permission_classes = [Anyone]

    def handle_exception(self, exc: Exception) -> Response:
        # The schema is YAML; an error is JSON like every other.
        self.request.accepted_renderer = JSONRenderer()
        self.request.accepted_media_type = JSONRenderer.media_type
        return super().handle_exception(exc)


class Nothing(APIView):
    """What no route matches still answers in the API's own shape."""

    permission_classes = [Anyone]

    @extend_schema(exclude=True)
    def get(self, _request: Request, **_path: str) -> Response:
        raise UserError("not_found")

    post = put = patch = delete = get
