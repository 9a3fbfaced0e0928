"""For operators: replacing an engine, and settings of the running server."""

from typing import get_type_hints

import msgspec
from aiohttp import web

from gptoss.config import LIVE, Settings
from gptoss.errors import ConfigError, ExecutorNotFound, RequestError
from gptoss.http.body import MIB, read_json_body
from gptoss.http.context import CONTEXT
from gptoss.http.decode import BodyDecoder
from gptoss.http.errors import json_response

_TYPES = get_type_hints(Settings, include_extras=True)
SettingsChange = msgspec.defstruct(
    "SettingsChange",
    [(name, _TYPES[name] | msgspec.UnsetType, msgspec.UNSET) for name in LIVE],
    frozen=True,
    kw_only=True,
    namespace={"__doc__": "The body of ``POST /admin/settings``: the settings to change."},
)
CHANGE = BodyDecoder(SettingsChange)


async def restart_executor(request: web.Request) -> web.StreamResponse:
    """``POST /admin/executors/{name}/restart``: 200 when its engine is about to be replaced, 404 without such an executor."""
    name = request.match_info["name"]
    if not request.app[CONTEXT].restart_executor(name):
        raise ExecutorNotFound(f"no executor is called {name[:128]!a}; /health lists them", param="name")
    return json_response({"executor": name, "object": "executor", "status": "restarting"})


async def show_settings(request: web.Request) -> web.StreamResponse:
    """``GET /admin/settings``: every setting that can change while the server runs."""
    return json_response({"object": "settings", "settings": request.app[CONTEXT].live_settings()})


async def change_settings(request: web.Request) -> web.StreamResponse:
    """``POST /admin/settings``: a JSON object of settings. All of them are changed, or none."""
    context = request.app[CONTEXT]
    limit_bytes = context.settings.body_limit_mb * MIB
    body = await read_json_body(request, limit_bytes=limit_bytes, timeout_s=context.timing.body_s)
    wire, others = CHANGE.decode(body)
    given = {name: value for name in LIVE if (value := getattr(wire, name)) is not msgspec.UNSET}
    try:
        changed = context.change_settings({**given, **others})
    except ConfigError as error:
        raise RequestError(error.message, param=next(iter(others), "settings")) from None
    return json_response({"object": "settings", "changed": changed, "settings": context.live_settings()})
