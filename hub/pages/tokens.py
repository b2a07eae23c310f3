from datetime import timedelta
from uuid import UUID

from django import forms
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.shortcuts import redirect
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST

from hub import tokens
from hub.access import page_access, signed_in
from hub.models import ApiToken

from .page import crumbs, current_user, flash_good, page

DEFAULT_DAYS = 90


class TokenForm(forms.Form):
    name = forms.CharField(max_length=100, help_text="What uses it, for example “CI of team NLP”.")
    scopes = forms.MultipleChoiceField(
        choices=ApiToken.Scope.choices,
        initial=[ApiToken.Scope.READ],
        widget=forms.CheckboxSelectMultiple,
        help_text="Write includes uploads, retries and yanking. Infer asks models and reads nothing"
        " else: the key for an application. Members says who is in the organisations you own.",
    )
    days = forms.IntegerField(
        min_value=1,
        max_value=tokens.MAX_AGE.days,
        initial=DEFAULT_DAYS,
        label="Valid for, days",
    )


@never_cache
@signed_in
@page_access
@require_http_methods(["GET", "POST"])
def index(request: HttpRequest) -> HttpResponseBase:
    """List and create; the secret is in the answer to the POST and nowhere else."""
    user = current_user(request)
    form = TokenForm(request.POST or None)
    token, secret = None, ""
    if request.method == "POST" and form.is_valid():
        fields = form.cleaned_data
        token, secret = tokens.mint(
            user,
            fields["name"],
            scopes=fields["scopes"],
            expires_in=timedelta(days=fields["days"]),
        )
        form = TokenForm()
    context = {
        "section": "tokens",
        "crumbs": crumbs("Tokens"),
        "form": form,
        "tokens": user.tokens.order_by("revoked_at", "-id"),
        "created": token,
        "secret": secret,
    }
    return page(request, "tokens/index.html", context, status=422 if form.errors else 200)


@signed_in
@page_access
@require_POST
def revoke(request: HttpRequest, token_id: UUID) -> HttpResponseBase:
    user = current_user(request)
    token = user.tokens.filter(pk=token_id).first()
    if token is not None:
        tokens.revoke(token, user)
        flash_good(request, f"{token.name} is revoked.")
    return redirect("tokens")
