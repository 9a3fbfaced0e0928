"""An endpoint that generates: what its body is, and what call that makes. HTTP and batches come in by the same door."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from gptoss.http.answering import Call, answer_call
from gptoss.http.decode import BodyDecoder
from gptoss.http.intake import Caller, caller_of, decoded, read_wire, take


class Endpoint(msgspec.Struct, frozen=True):
    """See the module.

    Attributes:
        path: of the route.
        decoder: of its bodies.
        call_of: what a decoded body asks for; raises ``GptossError`` for what cannot be served.
    """

    path: str
    decoder: BodyDecoder[Any]
    call_of: Callable[[Any, Caller], Awaitable[Call]]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """The handler of its route."""

        async def read(request: web.Request) -> Call:
            return await self.call_of(await read_wire(request, self.decoder), caller_of(request))

        return await answer_call(request, await take(request, self.path, read))

    async def call(self, caller: Caller, body: bytes) -> Call:
        """The call that a body asks for. Raises ``GptossError`` for what cannot be served."""
        return await self.call_of(decoded(caller, self.decoder, body), caller)
