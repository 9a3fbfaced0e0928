"""A client of an OpenAI-compatible server that times what it is sent; every load test over HTTP goes through it.

Rules:
- Times are taken when bytes arrive. Chunks that arrive together have arrived at one time; a chunk counts once, however many
  tokens it brings.
- Whatever goes wrong is a code: the server's own where it named one, else the status or the kind of the broken
  connection. Nothing is raised.
- A stream that ends without ``[DONE]`` was cut off, and is no success.
"""

import itertools
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec

from gptoss.clock import NS_PER_S, Clock, SeededRng

WORDS = ("river", "stone", "cloud", "window", "garden", "market", "paper", "engine", "signal", "forest", "bridge", "candle",
         "mirror", "planet", "winter", "copper", "silver", "travel", "ocean", "harvest", "memory", "letter", "circle", "number")  # fmt: skip
OK = 200


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """What one request took, in seconds.

    Attributes:
        error: code of what went wrong; empty for an answer that came whole.
        status: 0 when there was no answer at all.
        retry_after_s: when a refusal said that it is worth to come again; 0 if it did not.
        ttft_s: until the first text; None when none came.
        tokens: of the output, by the server's own count where it gave one.
        gaps_s: between chunks of text.
        text: everything visible.
    """

    error: str = ""
    status: int = 0
    retry_after_s: float = 0.0
    ttft_s: float | None = None
    total_s: float = 0.0
    tokens: int = 0
    gaps_s: tuple[float, ...] = ()
    text: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Time for each token after the first."""
        return sum(self.gaps_s) / (self.tokens - 1) if self.tokens > 1 and self.gaps_s else None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk)


def words(rng: SeededRng, count: int) -> str:
    """Random common words."""
    return " ".join(rng.pick(WORDS) for _ in range(count))


def chat_body(messages: list[dict[str, str]], max_tokens: int, fields: dict[str, object]) -> dict[str, object]:
    """The body of a streamed, greedy chat completion that counts its tokens; ``fields`` go before the rest."""
    return {
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }


class ChatClient:
    """Chat completions of one server.

    Args:
        session: carries the connections.
        url: its ``/v1``.
        clock: for times.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, clock: Clock) -> None:
        self._session = session
        self._url = f"{url.rstrip('/')}/chat/completions"
        self.clock = clock

    async def ask(self, body: dict[str, object]) -> Timed:
        """Send one request and read its stream to the end."""
        begun_ns = self.clock.monotonic_ns()
        reading = _Reading(self.clock)
        try:
            async with self._session.post(self._url, json=body) as answer:
                status = answer.status
                if status == OK:
                    await reading.read(answer.content.iter_any())
                else:
                    reading.error = _refusal(status, await answer.read())
                    reading.retry_after_s = _seconds(answer.headers.get("Retry-After", ""))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            status, reading.error = 0, "timeout" if isinstance(error, TimeoutError) else "connection"
        return reading.timed(begun_ns, status)


class _Reading:
    """Reads one stream."""

    def __init__(self, clock: Clock) -> None:
        self.error = ""
        self.retry_after_s = 0.0
        self._clock = clock
        self._arrivals: list[int] = []
        self._texts: list[str] = []
        self._tokens = 0
        self._is_done = False

    async def read(self, blocks: AsyncIterator[bytes]) -> None:
        """Read to the end of the stream."""
        rest = b""
        async for block in blocks:
            now_ns = self._clock.monotonic_ns()
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    self._take(line[5:].strip(), now_ns)
        if not self._is_done and not self.error:
            self.error = "cut_off"

    def _take(self, data: bytes, now_ns: int) -> None:
        if data == b"[DONE]":
            self._is_done = True
            return
        try:
            chunk = _chunk.decode(data)
        except msgspec.MsgspecError:
            self.error = "not_a_chunk"
            return
        if chunk.error is not None:
            self.error = _code_of(chunk.error) or "error"
            return
        if chunk.usage is not None:
            self._tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            delta = choice.delta
            text = delta.content or delta.reasoning or delta.reasoning_content
            if text:
                self._arrivals.append(now_ns)
                if delta.content:
                    self._texts.append(text)

    def timed(self, begun_ns: int, status: int) -> Timed:
        """What it took, now that it is over."""
        times = self._arrivals
        return Timed(
            error=self.error,
            status=status,
            retry_after_s=self.retry_after_s,
            ttft_s=(times[0] - begun_ns) / NS_PER_S if times else None,
            total_s=(self._clock.monotonic_ns() - begun_ns) / NS_PER_S,
            tokens=self._tokens or len(times),
            gaps_s=tuple((after - before) / NS_PER_S for before, after in itertools.pairwise(times)),
            text="".join(self._texts),
        )


def _refusal(status: int, body: bytes) -> str:
    try:
        code = _code_of(msgspec.json.decode(body)["error"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        code = ""
    return f"{status} {code}".strip()


def _seconds(retry_after: str) -> float:
    """A ``Retry-After`` in seconds; 0 for none and for a date."""
    return float(retry_after) if retry_after.isdecimal() else 0.0


def _code_of(error: Any) -> str:
    """The code in OpenAI's error object, else its type."""
    if not isinstance(error, dict):
        return ""
    return str(error.get("code") or error.get("type") or "")[:64]  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
