from django.db import DatabaseError, connection
from django.http import HttpRequest, JsonResponse
from django.views.decorators.http import require_safe

from hub import events, storage


@require_safe
def healthz(_request: HttpRequest) -> JsonResponse:
    """Answer while the process lives; it looks at nothing else."""
    return JsonResponse({"status": "ok"})


@require_safe
def readyz(_request: HttpRequest) -> JsonResponse:
    """Tell what works. Without Redis the hub is slower, not broken, so that is no failure."""
    checks = {
        "database": _database_answers(),
        "storage": storage.is_writable(),
        "redis": events.is_reachable(),
    }
    is_ready = checks["database"] and checks["storage"]
    status = "ok" if all(checks.values()) else "degraded" if is_ready else "unavailable"
    return JsonResponse({"status": status, "checks": checks}, status=200 if is_ready else 503)


def _database_answers() -> bool:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except DatabaseError:
        return False
    return True
