"""What operators and their machines ask: alive, ready, counts, and what is in memory."""

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from workers.engine.service import Engine

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


async def healthz(request: Request) -> Response:
    engine = _engine(request)
    return JSONResponse(
        {
            "status": "draining" if engine.scheduler.is_draining else "ok",
            "device": engine.config.device,
            "running": engine.scheduler.running,
            "waiting": engine.scheduler.waiting,
            "preparing_kernels": engine.residency.is_preparing,
            "resident_models": len(engine.residency.resident_keys()),
            "resident_bytes": engine.residency.resident_bytes,
        }
    )


async def live(request: Request) -> Response:
    """Whether a restart would help: the thread that computes has ended."""
    is_alive = _engine(request).scheduler.is_alive
    return JSONResponse({"live": is_alive}, status_code=200 if is_alive else 503)


async def ready(request: Request) -> Response:
    """Whether new requests are taken."""
    scheduler = _engine(request).scheduler
    is_ready = scheduler.is_alive and not scheduler.is_draining
    return JSONResponse({"ready": is_ready}, status_code=200 if is_ready else 503)


async def metrics(request: Request) -> Response:
    return PlainTextResponse(_engine(request).metrics.render(), media_type=_METRICS_TYPE)


async def show_status(request: Request) -> Response:
    """Every model in memory, with what its canary proved. Asked with the hub's secret."""
    return JSONResponse({"models": _engine(request).residency.describe()})


PUBLIC_ROUTES = (
    Route("/healthz", healthz),
    Route("/health/live", live),
    Route("/health/ready", ready),
    Route("/metrics", metrics),
)
