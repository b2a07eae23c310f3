from collections.abc import Mapping
from typing import Any

from hub.models import ApiToken, AuditEvent, User


def record(
    actor: User,
    action: str,
    object_name: str,
    *,
    token: ApiToken | None = None,
    detail: Mapping[str, Any] | None = None,
) -> None:
    AuditEvent.objects.create(
        actor=actor, token=token, action=action, object=object_name, detail=dict(detail or {})
    )
