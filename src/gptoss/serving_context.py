"""The live system as the HTTP surface sees it: queries of the projections, each brought up to date first."""

import asyncio
from typing import Any

from aiohttp import web

from gptoss.app import ServingSystem
from gptoss.http.context import HttpContext
from gptoss.http.routes import make_app as make_http_app
from gptoss.messages.codec import as_json
from gptoss.telemetry.request_records import request_records
from gptoss.telemetry.system_snapshot import system_snapshot

PROFILE_TEMPERATURES = {"latency_first": 0.7, "quality_first": 0.8}


def make_app(serving: ServingSystem) -> web.Application:
    """An aiohttp application for a started ``ServingSystem``; mount it under any prefix with ``add_subapp``."""
    return make_http_app(http_context(serving))


def http_context(serving: ServingSystem) -> HttpContext:
    """What handlers need, filled from a started ``ServingSystem``."""
    projection, journal, system = serving.projection, serving.journal, serving.system

    async def metrics(accept: str) -> tuple[bytes, str]:
        await serving.caught_up()
        return serving.metrics.render(accept)

    async def events(request_id: str) -> list[dict[str, Any]]:
        return await asyncio.to_thread(lambda: [as_json(r) for r in request_records(journal, request_id)])

    async def snapshot() -> dict[str, Any]:
        await serving.caught_up()
        return system_snapshot(
            projection=projection,
            metrics=serving.metrics,
            settings=serving.settings,
            journal=journal.health,
            now_ns=system.now_ns(),
        )

    def readiness() -> tuple[bool, str]:
        state = projection.readiness(system.now_ns(), journal.health)
        return state.ready, state.reason

    return HttpContext(
        gateway=serving.gateway,
        settings=serving.settings,
        clock=serving.clock,
        health=lambda: projection.health(system.now_ns(), journal.health),
        readiness=readiness,
        stats=lambda: projection.stats(system.now_ns()),
        memory_stats=projection.memory_stats,
        metrics=metrics,
        recent_requests=projection.recent_requests,
        events=events,
        snapshot=snapshot,
        draining=lambda: serving.draining,
        default_temperature=PROFILE_TEMPERATURES[serving.settings.profile],
    )
