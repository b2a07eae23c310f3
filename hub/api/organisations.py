from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from hub import access, catalog, organisations
from hub.api.auth import SaysWhoIsIn, current_token, current_user
from hub.api.serializers import (
    MemberSerializer,
    OrganisationRequestSerializer,
    OrganisationSerializer,
    RoleSerializer,
)
from hub.api.views import AFTER, errors, page_response, page_schema, query


class Organisations(APIView):
    permission_classes = [SaysWhoIsIn]

    @extend_schema(
        operation_id="list_organisations",
        parameters=[AFTER],
        responses={200: page_schema("OrganisationPage", OrganisationSerializer)} | errors(),
    )
    def get(self, request: Request) -> Response:
        """Organisations the caller is in, and as what."""
        mine = organisations.list_memberships(current_user(request))
        return page_response(
            catalog.page_of(mine, after=query(request, "after")), OrganisationSerializer
        )

    @extend_schema(
        operation_id="create_organisation",
        request=OrganisationRequestSerializer,
        responses={201: OrganisationSerializer} | errors(409, 422),
    )
    def post(self, request: Request) -> Response:
        """Make an organisation; the caller owns it. A token needs the scope `members`."""
        asked = OrganisationRequestSerializer(data=request.data)
        asked.is_valid(raise_exception=True)
        user = current_user(request)
        org = organisations.create(asked.validated_data["name"], user, token=current_token(request))
        mine = organisations.get_membership(user, org.name)
        return Response(OrganisationSerializer(mine).data, status=201)


class OrganisationDetail(APIView):
    permission_classes = [SaysWhoIsIn]

    @extend_schema(
        operation_id="get_organisation", responses={200: OrganisationSerializer} | errors()
    )
    def get(self, request: Request, org: str) -> Response:
        mine = organisations.get_membership(current_user(request), org)
        return Response(OrganisationSerializer(mine).data)


class Members(APIView):
    permission_classes = [SaysWhoIsIn]

    @extend_schema(
        operation_id="list_members",
        parameters=[AFTER],
        responses={200: page_schema("MemberPage", MemberSerializer)} | errors(),
    )
    def get(self, request: Request, org: str) -> Response:
        mine = organisations.get_membership(current_user(request), org)
        members = mine.namespace.memberships.select_related("user")
        return page_response(
            catalog.page_of(members, after=query(request, "after")), MemberSerializer
        )


class MemberDetail(APIView):
    permission_classes = [SaysWhoIsIn]

    @extend_schema(
        operation_id="put_member",
        request=RoleSerializer,
        responses={200: MemberSerializer} | errors(409, 422),
    )
    def put(self, request: Request, org: str, username: str) -> Response:
        """Let somebody in, or change what they are. A token needs the scope `members`."""
        user = current_user(request)
        found = organisations.get_membership(user, org).namespace
        access.require_in(user, found, access.Right.ADMIN)
        asked = RoleSerializer(data=request.data)
        asked.is_valid(raise_exception=True)
        member = organisations.put_member(
            user, found, username, asked.validated_data["role"], token=current_token(request)
        )
        return Response(MemberSerializer(member).data)

    @extend_schema(operation_id="remove_member", responses={204: None} | errors(409))
    def delete(self, request: Request, org: str, username: str) -> Response:
        """Take somebody out; everybody may leave. One who is not in it stays so."""
        user = current_user(request)
        found = organisations.get_membership(user, org).namespace
        organisations.remove_member(user, found, username, token=current_token(request))
        return Response(status=204)
