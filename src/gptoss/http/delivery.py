"""Waiting for a request on behalf of a client, without losing sight of that client.

aiohttp does not cancel a handler whose client has gone unless its server was told to, and an embedder's server may
not have been. So every wait here wakes each ``tick_s`` seconds and lets the caller look.
"""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from gptoss.actors.generation import Delta, Generation
from gptoss.http.context import CLOSING

Look = Callable[[], Awaitable[None]]
"""Looks at the client; raises ``ConnectionError`` or ``TimeoutError`` when there is no use in going on."""


async def wait_admitted(generation: Generation, tick_s: float, look: Look) -> None:
    """Wait until the request may run.

    Raises:
        GptossError: it was refused or failed first.
        ConnectionError, TimeoutError: from ``look``.
    """
    while True:
        try:
            async with asyncio.timeout(tick_s):
                await generation.admitted()
        except TimeoutError:
            await look()
        else:
            return


class Deltas:
    """The deltas of a generation, one at a time; ``look`` is called for every ``tick_s`` seconds without one."""

    def __init__(self, generation: Generation, tick_s: float, look: Look) -> None:
        self._generation = generation
        self._iterator = aiter(generation)
        self._tick_s = tick_s
        self._look = look

    async def next(self) -> Delta | None:
        """The next delta; None after the last. Raises as ``wait_admitted`` does."""
        while True:
            try:
                async with asyncio.timeout(self._tick_s):
                    return await anext(self._iterator, None)
            except TimeoutError:
                # A wait that was cut short ends its iterator, not the generation: nothing was taken, so a new one
                # goes on where this one was.
                self._iterator = aiter(self._generation)
                await self._look()


def tell_cancelled(generation: Generation, request: web.Request) -> None:
    """Pass on that the handler itself was cancelled: the server closes, or else the client has gone."""
    if request.app[CLOSING].is_set():
        generation.cancel("shutdown")
    else:
        generation.client_disconnected()
