"""Server-sent events of one job: replay, then live, in one code path."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing
from uuid import UUID

import redis
import redis.asyncio
from asgiref.sync import sync_to_async
from django.conf import settings
from django.http import HttpRequest, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.views.decorators.csrf import csrf_exempt

from deltacome_core.errors import UserError
from hub import access, events, jobs
from hub.access import AnyUser
from hub.api.auth import authenticate
from hub.api.errors import error_response
from hub.api.views import release_connection
from hub.events import Event
from hub.models import Job, JobEvent

EVENT_ID = re.compile(r"\A\d{1,15}-\d{1,19}\Z")
FIRST_ID = "0-0"
RETRY_S = 1.0
HEARTBEAT = ": hb\n\n"


@csrf_exempt
async def job_events(request: HttpRequest, job_id: UUID) -> HttpResponseBase:
    if request.method != "GET":
        return error_response(UserError("method_not_allowed", method=str(request.method)))
    try:
        user = await sync_to_async(_authorise)(request, job_id)
    except UserError as error:
        return error_response(error)
    asked = request.headers.get("Last-Event-ID", FIRST_ID)
    if not EVENT_ID.match(asked):
        return error_response(
            UserError("invalid", **{"Last-Event-ID": ["It is no id of an event."]})
        )
    body = _print(_follow(job_id, user, last_id=asked))
    response = StreamingHttpResponse(body, content_type="text/event-stream")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    return response


async def _print(found: AsyncIterator[Event | None]) -> AsyncIterator[str]:
    async for event in found:
        if event is None:
            yield HEARTBEAT
        else:
            yield f"id: {event.id}\nevent: {event.type}\ndata: {json.dumps(dict(event.data))}\n\n"


async def _follow(job_id: UUID, user: AnyUser, *, last_id: str) -> AsyncIterator[Event | None]:
    """Yield events after `last_id` until the job has ended; None keeps the line alive."""
    # Two cursors: ids made from rows carry the database's clock, those of the stream Redis's.
    stream_id = last_id
    # Both sources tell a move, each at the time of its own clock; here it is told once.
    told: set[int] = set()
    block_ms = 1
    async with aclosing(events.connect_async(settings.REDIS_URL)) as client:
        while True:
            try:
                found = await events.read_events(
                    job_id, stream_id, block_ms=block_ms, client=client
                )
            except redis.RedisError:
                await asyncio.sleep(RETRY_S)
                found = []
            for event in _untold(found, told):
                yield event
                if event.type == "done":
                    return
            if found:
                stream_id = last_id = found[-1].id
                continue
            # Nothing came, and the stream may be lost: the rows have the last word.
            is_over, missed = await sync_to_async(_read_rows)(job_id, user, last_id)
            for event in _untold(missed, told):
                last_id = max(last_id, event.id, key=_sort_key)
                yield event
            if is_over:
                return
            if block_ms > 1:
                yield None
            block_ms = int(settings.SSE_HEARTBEAT_S * 1000)


def _untold(found: Iterable[Event], told: set[int]) -> Iterator[Event]:
    """Leave out the moves that were told before; those that pass count as told."""
    for event in found:
        number = event.data.get("event")
        if number not in told:
            yield event
        if number is not None:
            told.add(number)


def _authorise(request: HttpRequest, job_id: UUID) -> AnyUser:
    try:
        user = authenticate(request)
        if not user.is_authenticated:
            raise UserError("not_signed_in")
        access.get_job(user, job_id)
        return user
    finally:
        release_connection()


def _read_rows(job_id: UUID, user: AnyUser, last_id: str) -> tuple[bool, list[Event]]:
    """Return whether nothing more will come, and what the rows tell beyond `last_id`."""
    try:
        job = access.get_job(user, job_id)
    except UserError:
        # The right to see the job ended meanwhile.
        return True, []
    else:
        rows = list(job.events.all())
        missed = [
            _event_of(job, row) for row in rows if _sort_key(_row_id(row)) > _sort_key(last_id)
        ]
        if job.is_finished and not any(event.type == "done" for event in missed):
            missed.append(Event(id=last_id, type="done", data=jobs.describe(job)))
        return job.is_finished, missed
    finally:
        release_connection()


def _event_of(job: Job, row: JobEvent) -> Event:
    is_last = job.is_finished and row.new == job.state
    told = {"state": row.new, "step": row.step, "attempt": row.attempt}
    data = jobs.describe(job) if is_last else told
    return Event(
        id=_row_id(row),
        type="done" if is_last else "stage",
        data=data | {"event": row.pk},
    )


def _row_id(row: JobEvent) -> str:
    return f"{int(row.at.timestamp() * 1000)}-{row.pk}"


def _sort_key(event_id: str) -> tuple[int, int]:
    milliseconds, number = event_id.split("-")
    return int(milliseconds), int(number)
