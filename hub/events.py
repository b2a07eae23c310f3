"""Live job events: a Redis Stream per job. Losing it loses nothing but liveness."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from uuid import UUID

import redis
import redis.asyncio
from django.conf import settings
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

log = logging.getLogger(__name__)

STREAM_MAX_EVENTS = 20_000
STREAM_TTL_S = 14 * 24 * 3600
TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    id: str
    type: str
    data: Mapping[str, Any]


def stream_key(job_id: UUID | str) -> str:
    return f"job:{job_id}:events"


@lru_cache(maxsize=4)
def connect(url: str) -> redis.Redis:
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        protocol=2,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )


def connect_async(url: str) -> redis.asyncio.Redis:
    """Open a connection for one reader, which waits up to one heartbeat for an event."""
    return redis.asyncio.Redis.from_url(
        url,
        decode_responses=True,
        protocol=2,
        socket_timeout=settings.SSE_HEARTBEAT_S + 5 * TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        retry=AsyncRetry(NoBackoff(), 0),
    )


def publish_event(job_id: UUID | str, event_type: str, data: Mapping[str, Any]) -> None:
    """Append to the job's stream; the people who watch may miss it, the job never does."""
    try:
        pipe = connect(settings.REDIS_URL).pipeline(transaction=False)
        fields = {"type": event_type, "data": json.dumps(dict(data))}
        pipe.xadd(stream_key(job_id), fields, maxlen=STREAM_MAX_EVENTS, approximate=True)  # type: ignore[arg-type]
        pipe.expire(stream_key(job_id), STREAM_TTL_S)
        pipe.execute()
    except redis.RedisError as error:
        log.warning("event_not_sent", extra={"job_id": str(job_id), "reason": str(error)})


async def read_events(
    job_id: UUID | str, last_id: str, *, block_ms: int, client: redis.asyncio.Redis
) -> list[Event]:
    """Wait for events after `last_id`; an empty list means that none came in time.

    Raises:
        redis.RedisError: Redis is away.
    """
    found: Any = await client.xread({stream_key(job_id): last_id}, count=500, block=block_ms)
    entries = found[0][1] if found else []
    return [
        Event(id=entry_id, type=fields["type"], data=json.loads(fields["data"]))
        for entry_id, fields in entries
    ]


def is_reachable() -> bool:
    try:
        return bool(connect(settings.REDIS_URL).ping())
    except redis.RedisError:
        return False
