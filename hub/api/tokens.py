from datetime import timedelta
from uuid import UUID

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from deltacome_core.errors import UserError
from hub import catalog, tokens
from hub.api.auth import InBrowser, SignedIn, current_token, current_user
from hub.api.serializers import (
    NewTokenSerializer,
    TokenRequestSerializer,
    TokenSerializer,
    WhoamiSerializer,
)
from hub.api.views import AFTER, errors, page_response, page_schema, query


class Tokens(APIView):
    permission_classes = [InBrowser]

    @extend_schema(
        operation_id="list_tokens",
        parameters=[AFTER],
        responses={200: page_schema("TokenPage", TokenSerializer)} | errors(),
    )
    def get(self, request: Request) -> Response:
        mine = current_user(request).tokens.all()
        page = catalog.page_of(mine, after=query(request, "after"))
        return page_response(page, TokenSerializer)

    @extend_schema(
        operation_id="create_token",
        request=TokenRequestSerializer,
        responses={201: NewTokenSerializer} | errors(),
    )
    def post(self, request: Request) -> Response:
        asked = TokenRequestSerializer(data=request.data)
        asked.is_valid(raise_exception=True)
        token, secret = tokens.mint(
            current_user(request),
            asked.validated_data["name"],
            scopes=asked.validated_data["scopes"],
            expires_in=timedelta(days=asked.validated_data["expires_in_days"]),
        )
        printed = TokenSerializer(token).data | {"token": secret}
        return Response(printed, status=201, headers={"Cache-Control": "no-store"})


class TokenDetail(APIView):
    permission_classes = [InBrowser]

    @extend_schema(operation_id="revoke_token", responses={204: None} | errors())
    def delete(self, request: Request, token_id: UUID) -> Response:
        user = current_user(request)
        token = user.tokens.filter(pk=token_id).first()
        if token is None:
            raise UserError("not_found")
        tokens.revoke(token, user)
        return Response(status=204)


class Whoami(APIView):
    permission_classes = [SignedIn]

    @extend_schema(operation_id="whoami", responses={200: WhoamiSerializer} | errors())
    def get(self, request: Request) -> Response:
        user, token = current_user(request), current_token(request)
        caller = {
            "username": user.username,
            "memberships": user.memberships.select_related("namespace"),
            "scopes": token.scopes if token else None,
        }
        return Response(WhoamiSerializer(caller).data)
