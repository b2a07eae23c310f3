"""Who may see and do what. Everything is fetched through `visible_to`, then a right is required."""

from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar
from uuid import UUID

from django.contrib.auth.models import AnonymousUser
from django.contrib.auth.views import redirect_to_login
from django.core.exceptions import PermissionDenied
from django.db.models import Model
from django.http import Http404, HttpRequest
from django.http.response import HttpResponseBase

from deltacome_core.errors import UserError
from hub.models import Job, Membership, Namespace, Repo, Upload, User

AnyUser = User | AnonymousUser
Row = TypeVar("Row", bound=Model)
PageArguments = ParamSpec("PageArguments")
Page = Callable[Concatenate[HttpRequest, PageArguments], HttpResponseBase]


class Right(StrEnum):
    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


Role = Membership.Role
ROLES: dict[Right, frozenset[str]] = {
    Right.READ: frozenset({Role.READER, Role.MAINTAINER, Role.OWNER}),
    Right.WRITE: frozenset({Role.MAINTAINER, Role.OWNER}),
    Right.ADMIN: frozenset({Role.OWNER}),
}


def may(user: AnyUser, repo: Repo, right: str) -> bool:
    if right == Right.READ:
        return Repo.objects.visible_to(user).filter(pk=repo.pk).exists()
    return holds(user, repo.namespace, right)


def holds(user: AnyUser, namespace: Namespace, right: str) -> bool:
    if not isinstance(user, User) or not user.is_active:
        return False
    roles = ROLES[Right(right)]
    return Membership.objects.filter(namespace=namespace, user=user, role__in=roles).exists()


def require(user: AnyUser, repo: Repo, right: str) -> None:
    """Refuse what the user's role does not allow.

    Raises:
        UserError: not_found when the repo is invisible, not_signed_in, permission_denied.
    """
    if not may(user, repo, Right.READ):
        raise UserError("not_found")
    if right != Right.READ:
        require_in(user, repo.namespace, right)


def require_in(user: AnyUser, namespace: Namespace, right: str) -> None:
    """Refuse what the user's role in the namespace does not allow.

    Raises:
        UserError: not_signed_in, permission_denied.
    """
    if not user.is_authenticated:
        raise UserError("not_signed_in")
    if not holds(user, namespace, right):
        raise UserError("permission_denied")


def get_repo(user: AnyUser, namespace: str, name: str) -> Repo:
    """Find a repo among those the user may see.

    Raises:
        UserError: not_found.
    """
    repos = Repo.objects.visible_to(user).named(namespace, name).select_related("namespace")
    return _found(repos.first())


def get_upload(user: AnyUser, upload_id: UUID | str) -> Upload:
    """Find the user's own upload; it dies with the right to write to its repo.

    Raises:
        UserError: not_found, permission_denied.
    """
    if not isinstance(user, User):
        raise UserError("not_found")
    mine = Upload.objects.filter(pk=upload_id, owner=user)
    upload = _found(mine.select_related("repo__namespace", "backbone__repo__namespace").first())
    require(user, upload.repo, Right.WRITE)
    return upload


def get_job(user: AnyUser, job_id: UUID | str) -> Job:
    """Find a job of a namespace the user is a member of.

    Raises:
        UserError: not_found.
    """
    jobs = Job.objects.visible_to(user).select_related("revision__repo__namespace", "owner")
    return _found(jobs.filter(pk=job_id).first())


def _found(row: Row | None) -> Row:
    if row is None:
        raise UserError("not_found")
    return row


def signed_in(page: "Page[PageArguments]") -> "Page[PageArguments]":
    """Send a visitor of this page to the sign-in form first."""

    @wraps(page)
    def guarded(
        request: HttpRequest, /, *args: PageArguments.args, **kwargs: PageArguments.kwargs
    ) -> HttpResponseBase:
        if not request.user.is_authenticated:
            return redirect_to_login(request.get_full_path())
        return page(request, *args, **kwargs)

    return guarded


def page_access(page: "Page[PageArguments]") -> "Page[PageArguments]":
    """Turn the refusals of this module into what a browser expects: sign in, 404 or 403."""

    @wraps(page)
    def guarded(
        request: HttpRequest, /, *args: PageArguments.args, **kwargs: PageArguments.kwargs
    ) -> HttpResponseBase:
        try:
            return page(request, *args, **kwargs)
        except UserError as error:
            if error.code == "not_signed_in":
                return redirect_to_login(request.get_full_path())
            if error.code in {"not_found", "revision_unknown"}:
                raise Http404 from error
            if error.code == "permission_denied":
                raise PermissionDenied from error
            raise

    return guarded
