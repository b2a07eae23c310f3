from django.urls import path

from hub.api import (
    downloads,
    job_events,
    jobs,
    organisations,
    repos,
    schema,
    tokens,
    uploads,
    votes,
)

REPO = "repos/<str:namespace>/<str:name>"
REVISION = f"{REPO}/revisions/<str:revision>"
UPLOAD = "uploads/<uuid:upload_id>"
ORG = "orgs/<str:org>"

urlpatterns = [
    path("uploads", uploads.Uploads.as_view(), name="api-uploads"),
    path(UPLOAD, uploads.UploadDetail.as_view(), name="api-upload"),
    path(
        f"{UPLOAD}/files/<int:index>/header",
        uploads.UploadHeader.as_view(),
        name="api-upload-header",
    ),
    path(
        f"{UPLOAD}/files/<int:index>/parts/<int:number>",
        uploads.UploadPart.as_view(),
        name="api-upload-part",
    ),
    path(f"{UPLOAD}/seal", uploads.UploadSeal.as_view(), name="api-upload-seal"),
    path("repos", repos.Repos.as_view(), name="api-repos"),
    path(REPO, repos.RepoDetail.as_view(), name="api-repo"),
    path(f"{REPO}/aliases/<str:alias>", repos.RepoAlias.as_view(), name="api-alias"),
    path(f"{REPO}/revisions", repos.Revisions.as_view(), name="api-revisions"),
    path(REVISION, repos.RevisionDetail.as_view(), name="api-revision"),
    path(f"{REVISION}/yank", repos.RevisionYank.as_view(), name="api-revision-yank"),
    path(
        f"{REVISION}/files/<str:path>", downloads.RevisionFile.as_view(), name="api-revision-file"
    ),
    path("jobs", jobs.Jobs.as_view(), name="api-jobs"),
    path("jobs/<uuid:job_id>", jobs.JobDetail.as_view(), name="api-job"),
    path("jobs/<uuid:job_id>/cancel", jobs.JobCancel.as_view(), name="api-job-cancel"),
    path("jobs/<uuid:job_id>/retry", jobs.JobRetry.as_view(), name="api-job-retry"),
    path("jobs/<uuid:job_id>/events", job_events.job_events, name="api-job-events"),
    path("orgs", organisations.Organisations.as_view(), name="api-orgs"),
    path(ORG, organisations.OrganisationDetail.as_view(), name="api-org"),
    path(f"{ORG}/members", organisations.Members.as_view(), name="api-members"),
    path(f"{ORG}/members/<str:username>", organisations.MemberDetail.as_view(), name="api-member"),
    path("tokens", tokens.Tokens.as_view(), name="api-tokens"),
    path("tokens/<uuid:token_id>", tokens.TokenDetail.as_view(), name="api-token"),
    path("votes", votes.Votes.as_view(), name="api-votes"),
    path("whoami", tokens.Whoami.as_view(), name="api-whoami"),
    path("schema", schema.Schema.as_view(), name="api-schema"),
    path("<path:rest>", schema.Nothing.as_view(), name="api-nothing"),
]
