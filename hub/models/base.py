import secrets
import time
import uuid
from threading import Lock

from django.db import models

_lock = Lock()
_last = 0


def uuid7() -> uuid.UUID:
    """Return a time-ordered UUID (RFC 9562, version 7), rising within this process."""
    global _last  # noqa: PLW0603  the last value is what makes the next one larger
    with _lock:
        # 48 bits of milliseconds, then 12 bits that continue the clock below a millisecond.
        ticks = max(time.time_ns() * 4096 // 1_000_000, _last + 1)
        _last = ticks
    value = (ticks >> 12) << 80 | 0x7 << 76 | (ticks & 0xFFF) << 64
    return uuid.UUID(int=value | 0b10 << 62 | secrets.randbits(62))


class UUIDModel(models.Model):
    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)

    class Meta:
        abstract = True
