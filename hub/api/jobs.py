import time
from uuid import UUID

from django.conf import settings
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from deltacome_core.errors import UserError
from hub import access, catalog, jobs
from hub.api.auth import SignedIn
from hub.api.serializers import JobSerializer
from hub.api.views import AFTER, errors, page_response, page_schema, query, release_connection
from hub.models import Job

MAX_WAIT_S = 30.0
POLL_S = 0.5


class Jobs(APIView):
    permission_classes = [SignedIn]

    @extend_schema(
        operation_id="list_jobs",
        parameters=[OpenApiParameter("state", str, enum=Job.State.values), AFTER],
        responses={200: page_schema("JobPage", JobSerializer)} | errors(),
    )
    def get(self, request: Request) -> Response:
        found = Job.objects.visible_to(request.user)
        state = query(request, "state")
        if state not in {"", *Job.State.values}:
            raise UserError("invalid", state=["It is not a state of a job."])
        if state:
            found = found.filter(state=state)
        found = found.select_related("revision__repo__namespace").prefetch_related("steps")
        page = catalog.page_of(found, after=query(request, "after"))
        return page_response(page, JobSerializer)


class JobDetail(APIView):
    permission_classes = [SignedIn]

    @extend_schema(
        operation_id="get_job",
        parameters=[OpenApiParameter("wait", float, description="Seconds to wait for its end.")],
        responses={200: JobSerializer} | errors(),
    )
    def get(self, request: Request, job_id: UUID) -> Response:
        job = access.get_job(request.user, job_id)
        deadline = time.monotonic() + _wait_s(query(request, "wait"))
        while not job.is_finished and time.monotonic() < deadline:
            release_connection()
            time.sleep(min(POLL_S, settings.HEARTBEAT_S))
            job = access.get_job(request.user, job_id)
        return Response(JobSerializer(job).data)


class JobCancel(APIView):
    permission_classes = [SignedIn]

    @extend_schema(
        operation_id="cancel_job", request=None, responses={200: JobSerializer} | errors(409)
    )
    def post(self, request: Request, job_id: UUID) -> Response:
        job = access.get_job(request.user, job_id)
        access.require(request.user, job.repo, access.Right.WRITE)
        jobs.cancel(job)
        return Response(JobSerializer(job).data)


class JobRetry(APIView):
    permission_classes = [SignedIn]

    @extend_schema(
        operation_id="retry_job", request=None, responses={202: JobSerializer} | errors(409)
    )
    def post(self, request: Request, job_id: UUID) -> Response:
        job = access.get_job(request.user, job_id)
        access.require(request.user, job.repo, access.Right.WRITE)
        jobs.retry(job)
        return Response(JobSerializer(job).data, status=202)


def _wait_s(text: str) -> float:
    try:
        wanted = float(text or 0)
    except ValueError:
        raise UserError("invalid", wait=["It is not a number of seconds."]) from None
    return min(max(wanted, 0.0), MAX_WAIT_S) if wanted == wanted else 0.0  # noqa: PLR0124  NaN
