"""HTTP clients without HTTP: what a chat completions handler does for them, with clients that are slow or go away.

A client waits for its admission and takes deltas as the HTTP handlers do, by the same ``http.choices``, and tells the
gateway what they tell. What it saw is kept, to be compared with what the fake engine must have produced.
"""

import asyncio

import msgspec

from gptoss.actors.gateway import Gateway
from gptoss.actors.generation import Delta, GenerateRequest, Generation, Outcome
from gptoss.clock import Clock
from gptoss.engine.port import ChatMessage
from gptoss.errors import GptossError
from gptoss.http.choices import Choices
from gptoss.messages.sampling import SamplingParams
from gptoss.simulation.scenario import Arrival

CANARY = "canary-7f3a"
"""Stands in every prompt and stop string; it may show up in no control event, log line or metric."""
TICK_S = 1.0
STALL_S = 2.0
LOOK_S = 0.05
MS_PER_S = 1000.0


class Seen(msgspec.Struct):
    """What a client saw of its request.

    Attributes:
        request_id: empty until it was submitted.
        is_whole: it read to the end.
        error: code of the error that ended it.
        left_ns: when it told that it wants no more; 0 if it never did.
    """

    arrival: Arrival
    request_id: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list[int])
    text: str = ""
    is_whole: bool = False
    error: str = ""
    left_ns: int = 0
    generation: Generation | None = None

    @property
    def outcome(self) -> Outcome | None:
        """How the request ended; None if it has not."""
        return None if self.generation is None else self.generation.outcome


class Client:
    """One client; faults change how it behaves.

    Attributes:
        delay_s: how long it takes over each delta.
    """

    def __init__(self, arrival: Arrival, gateway: Gateway, clock: Clock) -> None:
        self.seen = Seen(arrival)
        self.delay_s = 0.0
        self._gateway = gateway
        self._clock = clock
        self._is_gone = False
        self._stalled_since_s: float | None = None

    # ---- faults

    def cancel(self) -> None:
        """Ask for the end of the request."""
        if self.seen.generation is not None:
            self._leave()
            self.seen.generation.cancel()

    def disconnect(self) -> None:
        """Close the connection."""
        self._is_gone = True

    def stall(self) -> None:
        """Read nothing more."""
        self._stalled_since_s = self._now_s()

    # ---- its life

    async def live(self) -> None:
        """Send the request and take the answer, or as much of it as this client takes."""
        generation = self._gateway.submit(_request(self.seen.arrival))
        self.seen.generation = generation
        self.seen.request_id = generation.request_id
        try:
            choices = Choices([generation], TICK_S)
            await choices.admitted(self._look)
            generation.first_byte_sent()
            while (found := await choices.next(self._look)) is not None:
                if isinstance(found[1], Delta):
                    await self._take(found[1].token_ids, found[1].text)
            self.seen.is_whole = True
        except TimeoutError:
            self._leave()
            generation.client_slow(STALL_S * MS_PER_S)
        except ConnectionError:
            self._leave()
            generation.client_disconnected()
        except GptossError as error:
            self.seen.error = error.code
            self.seen.is_whole = True
        while generation.outcome is None:  # noqa: ASYNC110 - nobody reads any more, so nobody is told
            await asyncio.sleep(LOOK_S)

    def _leave(self) -> None:
        self.seen.left_ns = self.seen.left_ns or self._clock.monotonic_ns()

    async def _take(self, token_ids: tuple[int, ...], text: str) -> None:
        """As a handler writes to a socket: waits while the client does not read, and looks at it."""
        await self._look()
        while self._stalled_since_s is not None:
            await asyncio.sleep(LOOK_S)
            await self._look()
        self.seen.token_ids.extend(token_ids)
        self.seen.text += text
        if self.delay_s:
            await asyncio.sleep(self.delay_s)

    async def _look(self) -> None:
        if self._is_gone:
            raise ConnectionResetError("the client is gone")
        if self._stalled_since_s is not None and self._now_s() - self._stalled_since_s >= STALL_S:
            raise TimeoutError("the client has taken nothing for too long")

    def _now_s(self) -> float:
        return self._clock.monotonic_ns() / 1e9


def _request(arrival: Arrival) -> GenerateRequest:
    words = " ".join([CANARY, *("word" for _ in range(arrival.prompt_tokens - 1))])
    return GenerateRequest(
        messages=() if arrival.flaw == "empty" else (ChatMessage(role="user", content=words),),
        sampling=SamplingParams(max_tokens=arrival.max_tokens, seed=arrival.seed, stop=(CANARY,)),
        model="another" if arrival.flaw == "model" else "",
        endpoint="simulated",
        priority=arrival.priority,
        timeout_s=arrival.timeout_s,
        session_id=arrival.session_id,
        user=arrival.user,
        request_id=arrival.request_id,
    )
