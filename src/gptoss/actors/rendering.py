"""Prompts as token ids, and tokens as text, within a time limit.

Templates are bounded in their steps, and tokenizers are linear; the time limit is for whatever those bounds missed. The
thread of a rendering that runs into it goes on until a bound of its own ends it, but nobody waits for it.

Rendering happens on a thread, since a long prompt or a bad template would hold up everybody's tokens. A short prompt without tools
or a grammar is rendered on the event loop (``is_quick``): there and back costs more than the work. Whether this model's
template is fit for that is found out: the first is rendered on a thread, and whenever one was more work than ``QUICK_NS``, the
next ``SLOW_PENALTY`` are again.

Prompt versions say what is done to a conversation before the model's template or library renders it:

    SYS/v1    nothing: the messages as they came
    SYS/v2    one without a system message begins with ``SYSTEM_V2``

A version never changes; another wording is another version. The same messages give the same ids under the same version.
"""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec

from gptoss.actors.generation import GenerateRequest
from gptoss.actors.system import System
from gptoss.clock import NS_PER_S
from gptoss.config import PromptVersion
from gptoss.engine.answer_port import OutputParser
from gptoss.engine.port import ChatMessage, RenderedPrompt, Renderer
from gptoss.errors import RequestError
from gptoss.messages.sampling import check_bound_sampling

RENDER_TIMEOUT_S = 10.0
QUICK_CHARS = 2_000
QUICK_MESSAGES = 20
QUICK_NS = 5_000_000
SLOW_PENALTY = 100
SYSTEM_V2 = "You are a careful assistant. Answer what was asked, plainly and in order, and say so when you do not know."

T = TypeVar("T")


class Rendering:
    """The renderer of a running system. Use it from the event loop.

    Args:
        system: whose threads do the work.
        renderer: of the served model.
        timeout_s: how long one call may take.
        version: of prompts, for requests that name none.
        on_loop: whether short prompts may be rendered on the event loop.
    """

    def __init__(
        self,
        system: System,
        renderer: Renderer,
        timeout_s: float = RENDER_TIMEOUT_S,
        version: PromptVersion = "SYS/v1",
        *,
        on_loop: bool = True,
    ) -> None:
        self._on_loop = on_loop
        self._to_prove = 1
        """So many short prompts are to be rendered on a thread before one may be on the loop."""
        self._version: PromptVersion = version
        self._system = system
        self._renderer = renderer
        self._timeout_s = timeout_s

    @property
    def takes_reasoning_effort(self) -> bool:
        """Whether prompts of the served model depend on ``reasoning_effort``."""
        return self._renderer.takes_reasoning_effort

    def version_of(self, request: GenerateRequest) -> str:
        """The version of its prompt; empty where no conversation is rendered."""
        return (request.prompt_version or self._version) if request.prompt is None else ""

    def today(self) -> str:
        """The date that prompts may tell, ``YYYY-MM-DD`` in UTC."""
        return datetime.fromtimestamp(self._system.clock.wall_ns() / NS_PER_S, tz=UTC).date().isoformat()

    async def prompt(
        self, request: GenerateRequest, *, date: str, add_generation_prompt: bool = True
    ) -> RenderedPrompt:
        """The prompt of ``request``.

        Raises:
            RequestError: it has none, or making it took too long; ``param`` is the field at fault.
        """

        def render() -> RenderedPrompt:
            return self.render(request, date=date, add_generation_prompt=add_generation_prompt)

        return await self._off_loop(render, prompt_param(request))

    def is_quick(self, request: GenerateRequest) -> bool:
        """Whether ``render`` may be called on the event loop."""
        return self._on_loop and not self._to_prove and _is_short(request)

    def render(self, request: GenerateRequest, *, date: str, add_generation_prompt: bool = True) -> RenderedPrompt:
        """The prompt of ``request``, made on this thread. Raises as ``prompt``, but for the time limit."""
        began_ns = self._system.clock.thread_ns()
        versioned = with_version(request, self.version_of(request))
        prompt = _render(self._renderer, versioned, date, add_generation_prompt=add_generation_prompt)
        if _is_short(request):
            is_slow = self._system.clock.thread_ns() - began_ns > QUICK_NS
            self._to_prove = SLOW_PENALTY if is_slow else max(0, self._to_prove - 1)
        return prompt

    def parser(self, request: GenerateRequest, prompt: RenderedPrompt, request_id: str) -> OutputParser | None:
        """What reads the answer; None where it goes on from a plain text, and is plain text itself."""
        if request.prompt is not None:
            return None
        opens = prompt.opens_reasoning
        return self._renderer.dialect.parser(
            _offered_tools(request), request.shape, opens_reasoning=opens, request_id=request_id
        )

    async def decode(self, token_ids: tuple[int, ...], param: str) -> str:
        """The text of the tokens in the field ``param``, special ones included. Raises as ``prompt``."""

        def decode() -> str:
            _check_vocabulary(self._renderer, token_ids, param)
            return self._renderer.decode(token_ids, skip_special_tokens=False)

        return await self._off_loop(decode, param)

    async def pieces(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        """Each token as the vocabulary writes it."""
        return await self._off_loop(lambda: self._renderer.pieces(token_ids), "tokens")

    async def _off_loop(self, work: Callable[[], T], param: str) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._system.run_in_thread(work)
        except TimeoutError:
            raise RequestError(f"{param} took longer than {self._timeout_s:g} s to render", param=param) from None


def _is_short(request: GenerateRequest) -> bool:
    """Whether making its prompt is little work, for all that is known of it."""
    shape = request.shape
    if request.tools or shape.format is not None or shape.tool_choice not in ("auto", "none"):
        return False
    prompt = request.prompt
    if prompt is not None:
        return len(prompt) <= QUICK_CHARS
    if len(request.messages) > QUICK_MESSAGES or any(message.tool_calls for message in request.messages):
        return False
    chars = (len(message.content or "") + len(message.reasoning or "") for message in request.messages)
    return sum(chars) <= QUICK_CHARS


def with_version(request: GenerateRequest, version: str) -> GenerateRequest:
    """The request with what its prompt's version adds to the conversation."""
    if version != "SYS/v2" or any(message.role == "system" for message in request.messages):
        return request
    system = ChatMessage(role="system", content=SYSTEM_V2)
    return msgspec.structs.replace(request, messages=(system, *request.messages))


def prompt_param(request: GenerateRequest) -> str:
    """The field that a request's prompt comes from."""
    return request.prompt_field or ("messages" if request.prompt is None else "prompt")


def _render(renderer: Renderer, request: GenerateRequest, date: str, *, add_generation_prompt: bool) -> RenderedPrompt:
    prompt = request.prompt
    if prompt is None:
        return _render_chat(renderer, request, date, add_generation_prompt=add_generation_prompt)
    if isinstance(prompt, str):
        token_ids = renderer.encode(prompt, add_special_tokens=request.add_special_tokens)
    else:
        token_ids = prompt
        _check_vocabulary(renderer, token_ids, "prompt")
    return RenderedPrompt(token_ids=token_ids, template="")


def _render_chat(
    renderer: Renderer, request: GenerateRequest, date: str, *, add_generation_prompt: bool
) -> RenderedPrompt:
    tools = _offered_tools(request)
    rendered = renderer.render_chat(
        request.messages,
        tools=tools,
        date=date,
        reasoning_effort=request.reasoning_effort,
        add_generation_prompt=add_generation_prompt,
    )
    grammar = renderer.dialect.grammar(tools, request.shape, opens_reasoning=rendered.opens_reasoning)
    if grammar:
        check_bound_sampling(request.sampling)
    return msgspec.structs.replace(rendered, grammar=grammar)


def _offered_tools(request: GenerateRequest) -> tuple[dict[str, Any], ...]:
    """The tools that the model is told of: none where it may call none."""
    return request.tools if request.shape.tool_choice != "none" else ()


def _check_vocabulary(renderer: Renderer, token_ids: tuple[int, ...], param: str) -> None:
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < renderer.vocab_size), None)
    if wrong is not None:
        raise RequestError(f"{param} has token id {wrong}; ids go from 0 to {renderer.vocab_size - 1}", param=param)
