"""``/v1/models``: what is served, by its served name and no other."""

from typing import Any

from aiohttp import web

from gptoss.clock import NS_PER_S
from gptoss.errors import ModelNotFound
from gptoss.http.context import CONTEXT
from gptoss.http.errors import json_response

STARTED_S: web.AppKey[int] = web.AppKey("started_s", int)


async def list_models(request: web.Request) -> web.StreamResponse:
    """``GET /v1/models``."""
    return json_response({"object": "list", "data": [_model(request)]})


async def show_model(request: web.Request) -> web.StreamResponse:
    """``GET /v1/models/{id}``; an id may hold slashes, as hub names do."""
    wanted = request.match_info["model"]
    if wanted != request.app[CONTEXT].gateway.served_model:
        raise ModelNotFound(f"the model {wanted[:256]!a} does not exist here", param="model")
    return json_response(_model(request))


def started_s(app: web.Application) -> int:
    """Unix time for a model's ``created``."""
    return app[CONTEXT].clock.wall_ns() // NS_PER_S


def _model(request: web.Request) -> dict[str, Any]:
    served = request.app[CONTEXT].gateway.served_model
    return {"id": served, "object": "model", "created": request.app[STARTED_S], "owned_by": "gptoss"}
