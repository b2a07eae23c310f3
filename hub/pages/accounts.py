from typing import Any

from django import forms
from django.conf import settings
from django.contrib.auth import login
from django.http import Http404, HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, resolve_url
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.debug import sensitive_post_parameters
from django.views.decorators.http import require_http_methods

from deltacome_core.errors import UserError
from hub import accounts

from .page import flag_error, page

NAME_HINT = "Letters, digits, dots, dashes and underscores. It is also your namespace."


class SignUpForm(forms.Form):
    username = forms.CharField(
        max_length=63,
        label="Username",
        help_text=NAME_HINT,
        widget=forms.TextInput({"autocomplete": "username", "autocapitalize": "none"}),
    )
    email = forms.EmailField(
        required=False, label="E-mail, optional", widget=forms.EmailInput({"autocomplete": "email"})
    )
    password = forms.CharField(
        widget=forms.PasswordInput({"autocomplete": "new-password"}),
        strip=False,
        help_text="Eight characters or more, and not a common word.",
    )


def _safe_next(request: HttpRequest) -> str:
    wanted = request.POST.get("next", request.GET.get("next", ""))
    is_ours = url_has_allowed_host_and_scheme(
        wanted, allowed_hosts={request.get_host()}, require_https=request.is_secure()
    )
    return wanted if is_ours else resolve_url(settings.LOGIN_REDIRECT_URL)


@sensitive_post_parameters("password")
@require_http_methods(["GET", "POST"])
def signup(request: HttpRequest) -> HttpResponseBase:
    if not settings.SIGNUP_OPEN:
        raise Http404
    if request.user.is_authenticated:
        return redirect(_safe_next(request))
    form = SignUpForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        made = _sign_up(request, form)
        if made is not None:
            return made
    context: dict[str, Any] = {"form": form, "next": _safe_next(request), "section": "signup"}
    return page(request, "accounts/signup.html", context, status=422 if form.errors else 200)


def _sign_up(request: HttpRequest, form: SignUpForm) -> HttpResponse | None:
    fields = form.cleaned_data
    try:
        user = accounts.sign_up(fields["username"], fields["email"], password=fields["password"])
    except UserError as error:
        flag_error(form, "username" if error.code == "name_taken" else None, error)
        return None
    login(request, user)
    return redirect(_safe_next(request))
