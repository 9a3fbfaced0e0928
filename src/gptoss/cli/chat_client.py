"""The chat's conversation with a server: whatever speaks OpenAI's streaming chat completions."""

from collections.abc import AsyncGenerator
from typing import Any, Literal

import aiohttp
import msgspec

from gptoss.clock import NS_PER_S, Clock
from gptoss.errors import GptossError, NotReady

CONNECT_S = 10.0
LINE_BYTES_MAX = 2**22


class Piece(msgspec.Struct, frozen=True):
    """More of an answer: of what is said, or of what is thought."""

    kind: Literal["content", "reasoning"]
    text: str


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta
    finish_reason: str | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Fault(msgspec.Struct, frozen=True):
    message: str


class _Chunk(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Fault | None = None


class _Model(msgspec.Struct, frozen=True):
    id: str


class _Models(msgspec.Struct, frozen=True):
    data: list[_Model]


class Answer(msgspec.Struct, kw_only=True):
    """An answer as far as it has come. Times are seconds."""

    request_id: str = ""
    text: str = ""
    finish_reason: str = ""
    completion_tokens: int = 0
    first_s: float = 0.0
    total_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Pace after the first token; 0 where there is none to tell."""
        rest_s = self.total_s - self.first_s
        return (self.completion_tokens - 1) / rest_s if self.completion_tokens > 1 and rest_s > 0 else 0.0


class ChatClient:
    """A client of one server. Close it in the end.

    Args:
        url: of the server.
        api_key: sent as a bearer token; None sends none.
        clock: for durations.
    """

    def __init__(self, url: str, api_key: str | None, clock: Clock) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        self._session = aiohttp.ClientSession(headers=headers, timeout=timeout, read_bufsize=LINE_BYTES_MAX)
        self._clock = clock

    async def close(self) -> None:
        """Let go of the connection."""
        await self._session.close()

    async def models(self) -> list[str]:
        """The names of what the server has.

        Raises:
            NotReady: nothing answers there.
            GptossError: what answers does not speak OpenAI's API.
        """
        try:
            async with self._session.get(f"{self.url}/v1/models") as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise NotReady(f"no server answers at {self.url} ({error})") from None
        try:
            return [model.id for model in msgspec.json.decode(body, type=_Models).data]
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise GptossError(f"{self.url} answers, but not as OpenAI's API does") from None

    async def ask(self, fields: dict[str, Any], answer: Answer) -> AsyncGenerator[Piece]:
        """Ask, and give what comes; ``answer`` is filled as it does. Leaving early stops the server's work.

        Raises:
            GptossError: the server refuses, fails, or is gone.
        """
        began_ns = self._clock.monotonic_ns()

        def seconds() -> float:
            return (self._clock.monotonic_ns() - began_ns) / NS_PER_S

        body = {**fields, "stream": True, "stream_options": {"include_usage": True}}
        try:
            async with self._session.post(f"{self.url}/v1/chat/completions", json=body) as response:
                answer.request_id = response.headers.get("X-Request-ID", "")
                if response.status != 200:  # noqa: PLR2004 - HTTP's OK
                    raise GptossError(_refusal(await response.read(), response.status))
                async for line in response.content:
                    for piece in self._pieces(line, answer):
                        answer.first_s = answer.first_s or seconds()
                        answer.text += piece.text if piece.kind == "content" else ""
                        yield piece
                answer.total_s = seconds()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise NotReady(f"the server at {self.url} is gone: {error}") from None
        finally:
            answer.total_s = answer.total_s or seconds()

    def _pieces(self, line: bytes, answer: Answer) -> list[Piece]:
        """What a line of the stream holds."""
        data = line.strip().removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            return []
        try:
            chunk = msgspec.json.decode(data, type=_Chunk)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise GptossError(f"the server at {self.url} sends what is no chat completion") from None
        if chunk.error is not None:
            raise GptossError(chunk.error.message)
        if chunk.usage is not None:
            answer.completion_tokens = chunk.usage.completion_tokens
        pieces: list[Piece] = []
        for choice in chunk.choices:
            answer.finish_reason = choice.finish_reason or answer.finish_reason
            if thought := choice.delta.reasoning or choice.delta.reasoning_content:
                pieces.append(Piece("reasoning", thought))
            if choice.delta.content:
                pieces.append(Piece("content", choice.delta.content))
        return pieces


def _refusal(body: bytes, status: int) -> str:
    try:
        fault = msgspec.json.decode(body, type=_Chunk).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        fault = None
    return fault.message if fault is not None else f"the server answers {status}"
