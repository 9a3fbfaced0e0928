"""``/health`` and its kin, ``/stats``, ``/memory_stats`` and ``/metrics``: the live projection as JSON and text.

``/health/live`` says that the event loop turns; ``/health/ready`` that requests sent now would be served.
"""

from aiohttp import web

from gptoss.http.context import CONTEXT
from gptoss.http.errors import json_response


async def health(request: web.Request) -> web.StreamResponse:
    """``GET /health``: a summary, 200 whatever it says; probes belong at ``/health/ready``."""
    return json_response(request.app[CONTEXT].health())


async def live(_: web.Request) -> web.StreamResponse:
    """``GET /health/live``."""
    return json_response({"status": "alive"})


async def ready(request: web.Request) -> web.StreamResponse:
    """``GET /health/ready``: 200, or 503 with the reason."""
    is_ready, reason = request.app[CONTEXT].readiness()
    body = {"ready": is_ready, "reason": reason}
    return json_response(body) if is_ready else json_response(body, status=503, headers={"Retry-After": "1"})


async def stats(request: web.Request) -> web.StreamResponse:
    """``GET /stats``."""
    context = request.app[CONTEXT]
    await context.caught_up()
    return json_response(context.stats())


async def memory_stats(request: web.Request) -> web.StreamResponse:
    """``GET /memory_stats``."""
    context = request.app[CONTEXT]
    await context.caught_up()
    return json_response(context.memory_stats())


async def metrics(request: web.Request) -> web.StreamResponse:
    """``GET /metrics``, as Prometheus or OpenMetrics text by ``Accept``."""
    body, content_type = await request.app[CONTEXT].metrics(request.headers.get("Accept", ""))
    return web.Response(body=body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})
