"""A body comes in: read within bounds, decoded, and recorded where it is refused.

Every endpoint with a body passes through ``read_wire``; those that start requests through ``take`` as well, so that a
refusal has an id, a record and an answer wherever it happens. What comes in a batch is decoded by the same ``decoded``.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from aiohttp import web

from gptoss.actors.generation import GenerateRequest
from gptoss.errors import GptossError, NotReady
from gptoss.http.body import MIB, read_json_body
from gptoss.http.context import CONTEXT, REQUEST_ID, HttpContext
from gptoss.http.decode import BodyDecoder
from gptoss.http.headers import session_id, traceparent, wanted_request_id
from gptoss.http.unsupported import unknown_fields

NAMED_FIELDS_MAX = 256
NAMED_FIELDS: web.AppKey[set[str]] = web.AppKey("named_fields", set)
"""Field names that the log has mentioned already."""

_Wire = TypeVar("_Wire", bound=msgspec.Struct)
_Call = TypeVar("_Call")
_log = logging.getLogger("gptoss.http")


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who calls, and what is around the call.

    Attributes:
        app: the application that is called.
        request_id: the id that the caller wishes; empty for none. ``session_id`` and ``traceparent`` likewise.
    """

    app: web.Application
    request_id: str = ""
    session_id: str = ""
    traceparent: str = ""

    @property
    def context(self) -> HttpContext:
        """The system around the application."""
        return self.app[CONTEXT]

    def sign(self, generate: GenerateRequest) -> GenerateRequest:
        """``generate`` under the caller's id, session and trace."""
        return msgspec.structs.replace(
            generate, request_id=self.request_id, session_id=self.session_id, traceparent=self.traceparent
        )

    def name_once(self, fields: tuple[str, ...]) -> None:
        """Tell the log of accepted fields without effect, each once; bounded, since clients choose the names."""
        named = self.app[NAMED_FIELDS]
        for field in fields:
            short = field[:64]
            if short not in named and len(named) < NAMED_FIELDS_MAX:
                named.add(short)
                _log.info("request field %a is accepted and has no effect here", short)


def caller_of(request: web.Request) -> Caller:
    """The caller as the headers name it."""
    return Caller(
        app=request.app,
        request_id=wanted_request_id(request),
        session_id=session_id(request),
        traceparent=traceparent(request),
    )


async def take(request: web.Request, endpoint: str, read: Callable[[web.Request], Awaitable[_Call]]) -> _Call:
    """What ``read`` makes of a request that is to start something.

    Raises:
        GptossError: from ``read``, or because the server shuts down; it is recorded, under the id that goes out.
    """
    context = request.app[CONTEXT]
    try:
        if context.draining():
            raise NotReady("the server is shutting down and takes no new requests", retry_after_s=5.0)
        return await read(request)
    except GptossError as error:
        request[REQUEST_ID] = context.gateway.reject(
            error, endpoint=endpoint, request_id=wanted_request_id(request), traceparent=traceparent(request)
        )
        raise


async def read_wire(request: web.Request, decoder: BodyDecoder[_Wire]) -> _Wire:
    """The body of a request. Fields that nobody knows are named once in the log.

    Raises:
        RequestError: it cannot be read, does not fit, or has a field that cannot be honoured.
    """
    context = request.app[CONTEXT]
    limit_bytes = context.settings.body_limit_mb * MIB
    body = await read_json_body(request, limit_bytes=limit_bytes, timeout_s=context.timing.body_s)
    return decoded(caller_of(request), decoder, body)


def decoded(caller: Caller, decoder: BodyDecoder[_Wire], body: bytes) -> _Wire:
    """The body as its type. Raises as ``read_wire`` does."""
    wire, others = decoder.decode(body)
    caller.name_once(unknown_fields(others))
    return wire
