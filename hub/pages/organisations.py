from django import forms
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.shortcuts import redirect
from django.urls import reverse
from django.views.decorators.http import require_http_methods, require_POST

from deltacome_core.errors import UserError
from hub import organisations
from hub.access import Right, page_access, require_in, signed_in
from hub.models import Membership

from .page import crumbs, current_user, flag_error, flash_error, flash_good, page

NAME_HINT = "Letters, digits, dots, dashes and underscores: the first part of its models' names."
ROLE_HINT = (
    "Readers see private models. Maintainers also upload, retry and withdraw. Owners also change"
    " visibility and who is in it."
)


class OrganisationForm(forms.Form):
    name = forms.CharField(max_length=63, help_text=NAME_HINT)


class MemberForm(forms.Form):
    username = forms.CharField(
        max_length=63, widget=forms.TextInput({"autocomplete": "off", "autocapitalize": "none"})
    )
    role = forms.ChoiceField(
        choices=Membership.Role.choices, initial=Membership.Role.READER, help_text=ROLE_HINT
    )


@signed_in
@page_access
@require_http_methods(["GET", "POST"])
def index(request: HttpRequest) -> HttpResponseBase:
    user = current_user(request)
    form = OrganisationForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        try:
            org = organisations.create(form.cleaned_data["name"], user)
        except UserError as error:
            flag_error(form, "name", error)
        else:
            flash_good(request, f"{org} is made. Say who is in it.")
            return redirect("organisation", name=org.name)
    context = {
        "section": "organisations",
        "crumbs": crumbs("Organisations"),
        "form": form,
        "memberships": organisations.list_memberships(user),
    }
    return page(request, "organisations/index.html", context, status=422 if form.errors else 200)


@signed_in
@page_access
@require_http_methods(["GET", "POST"])
def detail(request: HttpRequest, name: str) -> HttpResponseBase:
    """Who is in it; a POST lets somebody in or changes what they are."""
    user = current_user(request)
    mine = organisations.get_membership(user, name)
    org = mine.namespace
    form = MemberForm(request.POST or None)
    if request.method == "POST":
        require_in(user, org, Right.ADMIN)
        if form.is_valid():
            try:
                put = organisations.put_member(user, org, **form.cleaned_data)
            except UserError as error:
                flag_error(form, "username", error)
            else:
                flash_good(request, f"{put.user} is {put.get_role_display().lower()} of {org}.")
                return redirect("organisation", name=org.name)
    context = {
        "section": "organisations",
        "crumbs": crumbs(("Organisations", reverse("organisations")), org.name),
        "org": org,
        "members": org.memberships.select_related("user").order_by("user__username"),
        "is_owner": mine.role == Membership.Role.OWNER,
        "form": form,
    }
    return page(request, "organisations/detail.html", context, status=422 if form.errors else 200)


@signed_in
@page_access
@require_POST
def remove(request: HttpRequest, name: str, username: str) -> HttpResponseBase:
    user = current_user(request)
    org = organisations.get_membership(user, name).namespace
    try:
        organisations.remove_member(user, org, username)
    except UserError as error:
        if error.code != "last_owner":
            raise
        flash_error(request, error)
        return redirect("organisation", name=org.name)
    is_self = username.lower() == user.username.lower()
    flash_good(request, f"You left {org}." if is_self else f"{username} is no longer in {org}.")
    return redirect("organisations") if is_self else redirect("organisation", name=org.name)
