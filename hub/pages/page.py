"""What every page needs: breadcrumbs, and a user's error shown as a message."""

from dataclasses import dataclass
from typing import Any

from django.contrib import messages as flash
from django.forms import Form
from django.http import HttpRequest
from django.template.response import TemplateResponse
from django.urls import reverse

from deltacome_core.errors import UserError
from deltacome_core.messages import Message
from hub import messages
from hub.models import Repo, User

GOOD = "good"
BAD = "bad"


@dataclass(frozen=True, slots=True, kw_only=True)
class Crumb:
    text: str
    url: str = ""


def crumbs(*trail: tuple[str, str] | str) -> list[Crumb]:
    """Start at the models; the last entry has no address because it is this page."""
    entries = [Crumb(text="Models", url=reverse("explore"))]
    for entry in trail:
        text, url = (entry, "") if isinstance(entry, str) else entry
        entries.append(Crumb(text=text, url=url))
    return entries


def explain(error: UserError) -> Message:
    return messages.explain(error.code, error.params)


def page(
    request: HttpRequest, template: str, context: dict[str, Any], *, status: int = 200
) -> TemplateResponse:
    return TemplateResponse(request, template, context, status=status)


def current_user(request: HttpRequest) -> User:
    """Return the visitor of a page behind `signed_in`.

    Raises:
        UserError: not_signed_in.
    """
    if not isinstance(request.user, User):
        raise UserError("not_signed_in")
    return request.user


def flash_good(request: HttpRequest, text: str) -> None:
    flash.add_message(request, flash.SUCCESS, text, extra_tags=GOOD)


def flash_error(request: HttpRequest, error: UserError) -> None:
    message = explain(error)
    flash.add_message(request, flash.ERROR, f"{message.title}. {message.what} {message.do}", BAD)


def flag_error(form: Form, field: str | None, error: UserError) -> None:
    """Show on a form, at a field where one is to blame, what was refused."""
    message = explain(error)
    form.add_error(field, f"{message.what} {message.do}")


def repo_url(repo: Repo, page_name: str = "repo") -> str:
    return reverse(page_name, args=[repo.namespace.name, repo.name])
