from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from deltacome_core.errors import UserError
from hub import access, catalog, publishing
from hub.api.auth import Anyone, SignedIn, current_token, current_user
from hub.api.serializers import (
    AliasSerializer,
    RepoChangeSerializer,
    RepoSerializer,
    RevisionDetailSerializer,
    RevisionSerializer,
    YankSerializer,
)
from hub.api.views import AFTER, errors, page_response, page_schema, query
from hub.models import Repo, Revision


class Repos(APIView):
    permission_classes = [Anyone]

    @extend_schema(
        operation_id="list_repos",
        parameters=[
            OpenApiParameter("kind", str, enum=Repo.Kind.values),
            OpenApiParameter("q", str, description="Words of the name or description."),
            OpenApiParameter("backbone", str, description="namespace/name of a backbone."),
            AFTER,
        ],
        responses={200: page_schema("RepoPage", RepoSerializer)} | errors(),
    )
    def get(self, request: Request) -> Response:
        kind = query(request, "kind")
        if kind not in {"", *Repo.Kind.values}:
            raise UserError("invalid", kind=["It is not a kind of repo."])
        repos = catalog.list_repos(
            request.user, kind=kind, q=query(request, "q"), backbone=query(request, "backbone")
        )
        page = catalog.page_of(repos, after=query(request, "after"))
        latest = catalog.latest_revisions(page.items)
        readable = catalog.readable_backbones(request.user, latest.values())
        return page_response(page, RepoSerializer, latest=latest, readable=readable)


class RepoDetail(APIView):
    permission_classes = [Anyone]

    @extend_schema(operation_id="get_repo", responses={200: RepoSerializer} | errors())
    def get(self, request: Request, namespace: str, name: str) -> Response:
        return _print_repo(request, access.get_repo(request.user, namespace, name))

    @extend_schema(
        operation_id="update_repo",
        request=RepoChangeSerializer,
        responses={200: RepoSerializer} | errors(),
    )
    def patch(self, request: Request, namespace: str, name: str) -> Response:
        repo = access.get_repo(request.user, namespace, name)
        access.require(request.user, repo, access.Right.WRITE)
        change = RepoChangeSerializer(data=request.data)
        change.is_valid(raise_exception=True)
        if "visibility" in change.validated_data:
            access.require(request.user, repo, access.Right.ADMIN)
        publishing.update_repo(
            repo, current_user(request), token=current_token(request), **change.validated_data
        )
        return _print_repo(request, repo)


class Revisions(APIView):
    permission_classes = [Anyone]

    @extend_schema(
        operation_id="list_revisions",
        parameters=[AFTER],
        responses={200: page_schema("RevisionPage", RevisionSerializer)} | errors(),
    )
    def get(self, request: Request, namespace: str, name: str) -> Response:
        repo = access.get_repo(request.user, namespace, name)
        page = catalog.page_of(catalog.list_revisions(repo), after=query(request, "after"))
        readable = catalog.readable_backbones(request.user, page.items)
        return page_response(page, RevisionSerializer, readable=readable)


class RevisionDetail(APIView):
    permission_classes = [Anyone]

    @extend_schema(
        operation_id="get_revision", responses={200: RevisionDetailSerializer} | errors()
    )
    def get(self, request: Request, namespace: str, name: str, revision: str) -> Response:
        repo = access.get_repo(request.user, namespace, name)
        found = catalog.get_revision(repo, revision)
        return _print_revision(request, found, RevisionDetailSerializer)


class RevisionYank(APIView):
    permission_classes = [SignedIn]

    @extend_schema(
        operation_id="yank_revision",
        request=YankSerializer,
        responses={200: RevisionSerializer} | errors(409),
    )
    def post(self, request: Request, namespace: str, name: str, revision: str) -> Response:
        repo = access.get_repo(request.user, namespace, name)
        access.require(request.user, repo, access.Right.WRITE)
        asked = YankSerializer(data=request.data)
        asked.is_valid(raise_exception=True)
        found = catalog.get_revision(repo, revision)
        publishing.yank_revision(
            found,
            current_user(request),
            reason=asked.validated_data["reason"],
            token=current_token(request),
        )
        return _print_revision(request, found, RevisionSerializer)


class RepoAlias(APIView):
    permission_classes = [SignedIn]

    @extend_schema(
        operation_id="set_alias",
        request=AliasSerializer,
        responses={200: RevisionSerializer} | errors(422),
    )
    def put(self, request: Request, namespace: str, name: str, alias: str) -> Response:
        repo = access.get_repo(request.user, namespace, name)
        access.require(request.user, repo, access.Right.WRITE)
        asked = AliasSerializer(data=request.data)
        asked.is_valid(raise_exception=True)
        revision = catalog.get_revision(repo, asked.validated_data["revision"])
        publishing.set_alias(
            repo, alias, revision, current_user(request), token=current_token(request)
        )
        return _print_revision(request, revision, RevisionSerializer)


def _print_repo(request: Request, repo: Repo) -> Response:
    latest = catalog.latest_revisions([repo])
    readable = catalog.readable_backbones(request.user, latest.values())
    return Response(RepoSerializer(repo, context={"latest": latest, "readable": readable}).data)


def _print_revision(
    request: Request, revision: Revision, serializer: type[RevisionSerializer]
) -> Response:
    readable = catalog.readable_backbones(request.user, [revision])
    return Response(serializer(revision, context={"readable": readable}).data)
