"""What a client of the actor system holds while its request runs: the request going in, the deltas coming out.

A ``Generation`` is written by its request actor and read by one consumer, both on the event loop. Text waits in one
growing delta, not in a queue of them: a slow reader gets fewer, larger deltas, and memory stays bounded by the
request's own ``max_tokens``.

Several choices for one caller are several requests: each has a ``Generation``, an actor, a seed and a stream of events
of its own, and all but the first name that first one as their parent.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import msgspec

from gptoss.config import ProfileName, PromptVersion
from gptoss.engine.port import ChatMessage, TokenLogprob
from gptoss.errors import GptossError
from gptoss.messages.answer import AnswerShape, Part, TextPart, content_of, joined
from gptoss.messages.commands import AdmissionNote, CancelReason
from gptoss.messages.model import FinishReason
from gptoss.messages.sampling import SamplingParams
from gptoss.messages.trace_context import NO_TRACE, TraceContext


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the actor system takes it.

    Attributes:
        messages: the conversation; its bounds and the sampling bounds are checked by the request actor.
        prompt: text or token ids to go on from, instead of a conversation.
        model: the name the client asked for; empty means whatever is served.
        reasoning_effort: how much the model is to think, where it takes that; empty is its own default.
        shape: what the answer may be made of.
        add_special_tokens: whether ``prompt`` as text begins with the tokens that the tokenizer puts first.
        priority: lower runs first.
        timeout_s: bound on the request's whole life; None takes the server's setting.
        request_id: the caller's id; empty or already in use gets a fresh one.
        parent_id: the first choice of the call that this is a further choice of.
        cache_salt: requests share cached prefixes only with those of the same salt and the same ``user``.
        user: whom the caller acts for; recorded as a keyed hash.
        metadata: the caller's own notes; only their number is recorded.
        prompt_field: the field that the prompt stands in, for errors; empty is what it is called in chat or completions.
        length_field: the field that bounds the answer's length, for errors.
        profile: whose default length it takes, ``latency_first`` or ``quality_first``; empty is the server's.
        prompt_version: how the conversation is made into a prompt, see ``rendering``; empty is the server's.
    """

    messages: tuple[ChatMessage, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    sampling: SamplingParams = SamplingParams()
    model: str = ""
    endpoint: str = "embedded"
    stream: bool = True
    tools: tuple[dict[str, Any], ...] = ()
    reasoning_effort: str = ""
    shape: AnswerShape = AnswerShape()
    add_special_tokens: bool = True
    priority: int = 0
    timeout_s: float | None = None
    session_id: str = ""
    traceparent: str = ""
    request_id: str = ""
    parent_id: str = ""
    cache_salt: str = ""
    user: str = ""
    metadata: dict[str, str] = {}
    prompt_field: str = ""
    length_field: str = "max_tokens"
    profile: ProfileName | Literal[""] = ""
    prompt_version: PromptVersion | Literal[""] = ""


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What has become available since the last delta.

    Attributes:
        text: as the engine decoded it, tags and thoughts and all.
        found: what a parser found in it; None where none reads along, and all of the text is visible.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    found: tuple[Part, ...] | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """What was said, as typed parts: thoughts, visible text, tool calls."""
        if self.found is not None:
            return self.found
        return (TextPart("content", self.text),) if self.text else ()


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """True token counts."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a request ended; exactly one of ``finish_reason`` and ``error`` is set.

    ``tool_calls`` is a stop after which somebody has to call tools.
    """

    finish_reason: FinishReason | Literal["tool_calls"] | None = None
    usage: Usage = Usage()
    stop_reason: str | int | None = None
    error: GptossError | None = None


Notice = Literal["first_byte", "slow", "disconnect"]


class Generation:
    """One running request, as its consumer sees it.

    ``admission`` says how it was let in or refused, once that is decided.

    Iterate over it for the deltas. The iteration ends when the request has; a failed or refused request raises its
    ``GptossError`` there. Leaving early needs ``cancel``.

    Attributes:
        trace: where the request stands in its caller's trace, or in its own.
    """

    def __init__(
        self,
        *,
        request_id: str,
        model: str,
        created_s: int,
        on_cancel: Callable[[CancelReason], object],
        on_notice: Callable[[Notice, float], object],
        trace: TraceContext = NO_TRACE,
    ) -> None:
        self.request_id = request_id
        self.model = model
        self.created_s = created_s
        self.trace = trace
        self.max_tokens = 0
        self.prompt_tokens = 0
        self.outcome: Outcome | None = None
        self.admission: AdmissionNote | None = None
        self._on_cancel = on_cancel
        self._on_notice = on_notice
        self._next: Delta | None = None  # what waits, while it is one delta; more of them are gathered below
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._parts: list[Part] = []
        self._admitted = asyncio.Event()
        self._news = asyncio.Event()

    # ---- the consumer's side

    async def admitted(self) -> None:
        """Wait until the request may run, so that a refusal can still be answered with its own HTTP status.

        Raises:
            GptossError: the request was refused or failed before it was admitted.
        """
        await self._admitted.wait()
        if self.outcome is not None and self.outcome.error is not None:
            raise self.outcome.error

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while True:
            await self._news.wait()
            self._news.clear()
            delta = self.take()
            if delta is not None:
                yield delta
            if self.outcome is not None and not self._has_more():
                if self.outcome.error is not None:
                    raise self.outcome.error
                return

    def take(self) -> Delta | None:
        """What has become available, without waiting; None when nothing has."""
        if not self._has_more():
            return None
        if self._next is not None:
            delta, self._next = self._next, None
            return delta
        delta = Delta(
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            found=tuple(joined(self._parts)),
        )
        self._texts.clear()
        self._token_ids.clear()
        self._logprobs.clear()
        self._parts.clear()
        return delta

    def announce(self, news: asyncio.Event) -> None:
        """From now on set ``news`` when there is something to take, so that one consumer can wait for several."""
        if self._news.is_set():
            news.set()
        self._news = news

    async def text(self) -> str:
        """The visible text of the whole answer. Raises as iteration does."""
        return "".join([content_of(delta.parts) async for delta in self])

    def cancel(self, reason: CancelReason = "client") -> None:
        """Stop the request; without effect once it has ended."""
        if self.outcome is None:
            self._on_cancel(reason)

    def first_byte_sent(self) -> None:
        """Tell that the first byte of the answer left for the client."""
        self._on_notice("first_byte", 0.0)

    def client_slow(self, stalled_ms: float) -> None:
        """Tell that the client does not read; the request is cancelled."""
        self._on_notice("slow", stalled_ms)

    def client_disconnected(self) -> None:
        """Tell that the client is gone; the request is cancelled."""
        self._on_notice("disconnect", 0.0)

    # ---- the request actor's side

    def put_admitted(self, max_tokens: int, note: AdmissionNote | None = None) -> None:
        """The request may run; ``note`` says how that came."""
        self.max_tokens = max_tokens
        self.admission = note
        self._admitted.set()

    def put(self, delta: Delta) -> None:
        """Hand over what a step produced; its parts are joined."""
        if not (delta.text or delta.token_ids or delta.found):
            return
        if not self._has_more():
            self._next = delta
        else:
            if self._next is not None:
                self._gather(self._next)
                self._next = None
            self._gather(delta)
        self._news.set()

    def _gather(self, delta: Delta) -> None:
        if delta.text:
            self._texts.append(delta.text)
        self._token_ids.extend(delta.token_ids)
        if delta.logprobs:
            self._logprobs.extend(delta.logprobs)
        self._parts.extend(delta.parts)

    def end(self, outcome: Outcome) -> None:
        """Hand over how the request ended; only the first call counts."""
        if self.outcome is None:
            self.outcome = outcome
            self._admitted.set()
            self._news.set()

    def _has_more(self) -> bool:
        return bool(self._next or self._texts or self._token_ids or self._parts)
