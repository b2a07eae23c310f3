from django.conf import settings
from django.contrib.auth import views as auth
from django.urls import path

from . import (
    accounts,
    explore,
    jobs,
    organisations,
    planner,
    playground,
    repos,
    tokens,
    uploads,
)

login = auth.LoginView.as_view(
    template_name="accounts/login.html",
    redirect_authenticated_user=True,
    extra_context={"section": "login", "signup_open": settings.SIGNUP_OPEN},
)

urlpatterns = [
    path("", explore.index, name="explore"),
    path("new", uploads.new, name="upload-new"),
    path("new/estimate", uploads.estimate, name="upload-estimate"),
    path("new/<uuid:upload_id>", uploads.resume, name="upload"),
    path("jobs", jobs.index, name="jobs"),
    path("jobs/<uuid:job_id>", jobs.detail, name="job"),
    path("jobs/<uuid:job_id>/state", jobs.state, name="job-state"),
    path("jobs/<uuid:job_id>/cancel", jobs.cancel, name="job-cancel"),
    path("jobs/<uuid:job_id>/retry", jobs.retry, name="job-retry"),
    path("playground", playground.index, name="playground"),
    path("planner", planner.index, name="planner"),
    path("settings/tokens", tokens.index, name="tokens"),
    path("settings/tokens/<uuid:token_id>/revoke", tokens.revoke, name="token-revoke"),
    path("settings/organisations", organisations.index, name="organisations"),
    path("settings/organisations/<str:name>", organisations.detail, name="organisation"),
    path(
        "settings/organisations/<str:name>/members/<str:username>/remove",
        organisations.remove,
        name="member-remove",
    ),
    path("accounts/signup", accounts.signup, name="signup"),
    path("accounts/login", login, name="login"),
    path("accounts/logout", auth.LogoutView.as_view(), name="logout"),
    path("<str:namespace>/<str:name>", repos.overview, name="repo"),
    path("<str:namespace>/<str:name>/files", repos.files, name="repo-files"),
    path("<str:namespace>/<str:name>/verification", repos.verification, name="repo-verification"),
    path("<str:namespace>/<str:name>/evaluations", repos.evaluations, name="repo-evaluations"),
    path("<str:namespace>/<str:name>/yank", repos.yank, name="repo-yank"),
    path("<str:namespace>/<str:name>/visibility", repos.visibility, name="repo-visibility"),
]
