"""The choices of one call, read as one: whatever any of them has next, without losing sight of the client.

Rules:
- A choice that fails fails the call: nobody can use half of the choices they asked for.
- aiohttp does not cancel a handler whose client has gone unless its server was told to, and an embedder's server may
  not have been. So every wait wakes each ``tick_s`` seconds and lets the caller look.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from gptoss.actors.generation import Delta, GenerateRequest, Generation, Outcome
from gptoss.http.context import RequestGateway
from gptoss.messages.commands import CancelReason

Look = Callable[[], Awaitable[None]]
"""Looks at the client; raises ``ConnectionError`` or ``TimeoutError`` when there is no use in going on."""


def start_choices(gateway: RequestGateway, requests: Sequence[GenerateRequest]) -> tuple[Generation, ...]:
    """Submit the choices of one call: the first bears its name, the others add ``-1``, ``-2`` and so on to it.

    They start together. The engine's prefix cache takes the prompt of the later ones from the first, block by block.
    """
    first = gateway.submit(requests[0])
    others = [
        gateway.submit(
            msgspec.structs.replace(request, request_id=f"{first.request_id}-{index}", parent_id=first.request_id)
        )
        for index, request in enumerate(requests[1:], start=1)
    ]
    return (first, *others)


class Choices:
    """Running choices, in the order of their index.

    Args:
        generations: one for each choice.
        tick_s: how often a wait lets the caller look.
    """

    def __init__(self, generations: Sequence[Generation], tick_s: float) -> None:
        self.generations = generations
        self._tick_s = tick_s
        self._news = asyncio.Event()
        for generation in generations:
            generation.announce(self._news)
        self._open = list(range(len(generations)))
        self._ready: deque[tuple[int, Delta | Outcome]] = deque()
        self._tick: asyncio.TimerHandle | None = None
        self._is_tick = False

    async def admitted(self, look: Look) -> None:
        """Wait until the first choice may run.

        Raises:
            GptossError: a choice was refused or failed first.
            ConnectionError, TimeoutError: from ``look``.
        """
        is_admitted = False
        while not is_admitted:
            try:
                async with asyncio.timeout(self._tick_s):
                    await self.generations[0].admitted()
                is_admitted = True
            except TimeoutError:
                await look()
            for generation in self.generations:
                _raise_failure(generation.outcome)

    @property
    def has_news(self) -> bool:
        """Whether ``next`` answers without waiting."""
        return bool(self._ready) or not self._open

    async def next(self, look: Look) -> tuple[int, Delta | Outcome] | None:
        """What a choice has next, with its index: a delta, or once how it ended. None after the last.

        Raises:
            GptossError: a choice failed.
            ConnectionError, TimeoutError: from ``look``.
        """
        while not self._ready:
            if not self._open:
                return None
            await self._wait(look)
            self._collect()
        index, found = self._ready.popleft()
        if isinstance(found, Outcome):
            _raise_failure(found)
        return index, found

    async def _wait(self, look: Look) -> None:
        """Wait for news. One timer serves all waits until it fires: a stream waits once for each token."""
        if self._tick is None:
            self._tick = asyncio.get_running_loop().call_later(self._tick_s, self._ring)
        await self._news.wait()
        self._news.clear()
        if self._is_tick:
            self._is_tick = False
            await look()

    def _ring(self) -> None:
        self._tick = None
        self._is_tick = True
        self._news.set()

    def close(self) -> None:
        """Wait no more."""
        if self._tick is not None:
            self._tick.cancel()

    def cancel(self, reason: CancelReason) -> None:
        """Stop what still runs."""
        for generation in self.generations:
            generation.cancel(reason)

    def _collect(self) -> None:
        for index in tuple(self._open):
            generation = self.generations[index]
            delta = generation.take()
            if delta is not None:
                self._ready.append((index, delta))
            if generation.outcome is not None:
                self._open.remove(index)
                self._ready.append((index, generation.outcome))


def _raise_failure(outcome: Outcome | None) -> None:
    if outcome is not None and outcome.error is not None:
        raise outcome.error
