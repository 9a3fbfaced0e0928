"""``/v1/models``: what is served, by its served name and no other."""

from typing import Literal

import msgspec
from aiohttp import web

from gptoss.clock import NS_PER_S
from gptoss.errors import ModelNotFound
from gptoss.http.context import CONTEXT
from gptoss.http.errors import json_response


class ModelBody(msgspec.Struct, frozen=True):
    """A model, with vLLM's fields beside OpenAI's. ``max_model_len`` is null until the model is loaded."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None


class ModelList(msgspec.Struct, frozen=True):
    """The answer of ``GET /v1/models``."""

    object: Literal["list"]
    data: list[ModelBody]


STARTED_S: web.AppKey[int] = web.AppKey("started_s", int)


async def list_models(request: web.Request) -> web.StreamResponse:
    """``GET /v1/models``."""
    return json_response(ModelList("list", [_model(request)]))


async def show_model(request: web.Request) -> web.StreamResponse:
    """``GET /v1/models/{id}``; an id may hold slashes, as hub names do."""
    wanted = request.match_info["model"]
    if wanted != request.app[CONTEXT].gateway.served_model:
        raise ModelNotFound(f"the model {wanted[:256]!a} does not exist here", param="model")
    return json_response(_model(request))


def started_s(app: web.Application) -> int:
    """Unix time for a model's ``created``."""
    return app[CONTEXT].clock.wall_ns() // NS_PER_S


def _model(request: web.Request) -> ModelBody:
    gateway = request.app[CONTEXT].gateway
    return ModelBody(
        id=gateway.served_model,
        object="model",
        created=request.app[STARTED_S],
        owned_by="gptoss",
        root=gateway.served_model,
        parent=None,
        max_model_len=gateway.max_model_len or None,
    )
