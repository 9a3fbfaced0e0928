"""One request's actor: carries out what its lifecycle decides, and hands tokens to its consumer.

    RequestValidated  -> render the prompt, off the event loop unless it is short
    PromptRendered    -> keep its token ids as content
    RequestAdmitted   -> tell the consumer
    SamplingBound     -> submit to the executor that the router chose, after the tokens already delivered
    CancelRequested   -> tell the executor, if one has the request
    a terminal event  -> tell the consumer, stop

What the memory guard, admission and the router are told stands in ``Lifecycle.tells``. Tokens do not pass through the
decider: their journal entry is the executor's ``StepCommitted``.
"""

from array import array
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec

from gptoss.actors.decider import DeciderActor
from gptoss.actors.deliveries import CancelInEngine, TokensProduced
from gptoss.actors.directory import Directory, executor_name
from gptoss.actors.generation import Delta, GenerateRequest, Generation, Outcome, Usage
from gptoss.actors.lifecycle import Lifecycle, RequestState
from gptoss.actors.prompt_hashes import cache_salt, keyed_hash, prefix_hashes
from gptoss.actors.rendering import Rendering, prompt_param
from gptoss.actors.system import Timer
from gptoss.clock import NS_PER_S
from gptoss.config import PROFILES
from gptoss.engine.answer_port import OutputParser
from gptoss.engine.port import RenderedPrompt, Submit
from gptoss.errors import ActorError, EngineError, GptossError, Overloaded, RequestError, error_from
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.answer import Part, joined
from gptoss.messages.commands import Command
from gptoss.messages.envelope import Event
from gptoss.messages.sampling import SamplingParams


class RequestServices(msgspec.Struct, kw_only=True):
    """What every request actor needs.

    Attributes:
        max_model_len: 0 until an executor has loaded the model; the app sets it.
        lifecycle: decides for each of them.
        hmac_key: keys the prompt hashes in control events.
        keep_content: record prompt token ids and stop strings in the content family; ``keep_text``: the client's
            messages and the answer too.
        hashes_prefixes: whether there is a choice of executors, for which beginnings of prompts are hashed.
        queue_timeout_s: how long a request may wait for admission, once that is not what the settings said at the start.
    """

    lifecycle: Lifecycle
    directory: Directory
    rendering: Rendering
    served_model: str
    default_max_tokens: int
    request_timeout_s: float
    hmac_key: bytes
    keep_content: bool
    max_model_len: Callable[[], int]
    keep_text: bool = False
    hashes_prefixes: bool = False
    queue_timeout_s: float = 0.0


class RequestActor(DeciderActor[RequestState]):
    """Walks one request from its arrival to its single terminal event."""

    TAKES_SNAPSHOTS = False

    def __init__(
        self, request_id: str, request: GenerateRequest, generation: Generation, services: RequestServices
    ) -> None:
        super().__init__(services.lifecycle, services.directory)
        self._id = self.about = request_id
        self.trace = generation.trace
        self._request = request
        self._generation = generation
        self._services = services
        self._cache_salt = cache_salt(services.hmac_key, request.user, request.cache_salt)
        self._prompt: RenderedPrompt | None = None
        self._parser: OutputParser | None = None
        self._delivered = array("i")  # 4 bytes a token for as long as it runs, where a list of numbers has 36
        self._text: list[str] = []
        self._stopped_by = ""
        self._deadline: Timer | None = None
        self._deadline_ns = 0

    def on_start(self) -> None:
        """Begin at once, before any letter: a cancellation that is there already must find a request that has begun."""
        try:
            self._begin()
        except Exception:
            self.on_failure()  # an actor that could not start has no such end of its own
            raise

    def _begin(self) -> None:
        system, request = self.context.system, self._request
        now_ns = system.now_ns()
        timeout_s = request.timeout_s if request.timeout_s is not None else self._services.request_timeout_s
        self._deadline_ns = now_ns + int(timeout_s * NS_PER_S)
        self._deadline = system.send_after(
            timeout_s, self.context.ref, lambda: cmd.CancelRequest(now_ns=system.now_ns(), reason="deadline")
        )
        super().on_receive(
            cmd.BeginRequest(
                now_ns=now_ns,
                request_id=self._id,
                endpoint=request.endpoint,
                model=request.model,
                served_model=self._services.served_model,
                stream=request.stream,
                sampling=_without_text(request),
                num_stop_strings=len(request.sampling.stop),
                drawn_seed=system.rng.seed63(),
                max_model_len=self._services.max_model_len(),
                default_max_tokens=self._default_max_tokens(),
                priority=request.priority,
                deadline_ns=self._deadline_ns,
                session_id=request.session_id,
                traceparent=request.traceparent,
                num_messages=len(request.messages),
                is_chat=request.prompt is None,
                parent_id=request.parent_id,
                user_hmac=keyed_hash(self._services.hmac_key, request.user) if request.user else "",
                num_metadata=len(request.metadata),
                queue_timeout_s=self._services.queue_timeout_s,
                log_fault="" if (health := system.journal.health).ok else health.reason,
            )
        )

    def _default_max_tokens(self) -> int:
        profile = self._request.profile
        return PROFILES[profile].max_tokens if profile else self._services.default_max_tokens

    def on_receive(self, message: Command | TokensProduced) -> None:
        """Deliver tokens at once; everything else is a command to the lifecycle."""
        if isinstance(message, TokensProduced):
            self._deliver(message)
        elif isinstance(message, cmd.EngineDone):
            super().on_receive(self._read_to_end(message))
        else:
            super().on_receive(message)

    def on_stop(self) -> None:
        """Leave nobody waiting, even when the actor is stopped from outside."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._generation.end(Outcome(error=EngineError("the request's actor stopped before the request ended")))

    def on_failure(self, *_: object) -> None:
        """End the request after a crash of this actor, so that it holds nothing and its consumer is told."""
        if self.state.phase == "running":
            self._stop_in_engine()
        failed = cmd.FailRequest(
            now_ns=self._now(),
            code=ActorError.code,
            message="the request's actor failed",
            tokens_out=len(self._delivered),
        )
        super().on_receive(failed)
        self.on_stop()

    def react(self, event: Event) -> None:
        """Carry out what an event asks for."""
        reaction = self._REACTIONS.get(type(event))
        if reaction is not None:
            reaction(self, event)

    # ---- reactions, in the order of a request's life

    def _render(self, _: ev.RequestValidated) -> None:
        if self._services.keep_text:
            messages, tools = (
                msgspec.json.encode(part).decode() for part in (self._request.messages, self._request.tools)
            )
            received = ev.MessagesReceived(request_id=self._id, messages=messages, tools=tools)
            self.record(received, correlation=self._id)
        rendering, cause = self._services.rendering, self.event_pos
        date = rendering.today()
        if not rendering.is_quick(self._request):
            self.context.system.run_task(self._render_off_loop(date, cause), name=f"render/{self._id}")
            return
        try:
            prompt = rendering.render(self._request, date=date)
        except Exception as error:  # noqa: BLE001 - see _not_rendered
            self._not_rendered(error, cause)
        else:
            self._rendered(prompt, date, cause)

    async def _render_off_loop(self, date: str, cause: int) -> None:
        try:
            prompt = await self._services.rendering.prompt(self._request, date=date)
        except Exception as error:  # noqa: BLE001 - see _not_rendered
            self._not_rendered(error, cause)
        else:
            self._rendered(prompt, date, cause)

    def _not_rendered(self, error: Exception, cause: int) -> None:
        """End the request, also when a foreign renderer failed with something of its own."""
        if not isinstance(error, GptossError):
            self._fail("render", error)
            error = EngineError("the prompt could not be rendered")
        self._tell_unusable(error, cause)

    def _rendered(self, prompt: RenderedPrompt, date: str, cause: int) -> None:
        system, request, services = self.context.system, self._request, self._services
        rendering = services.rendering
        if not prompt.token_ids:
            param = prompt_param(request)
            self._tell_unusable(RequestError(f"{param} is empty; it needs at least one token", param=param), cause)
            return
        self._prompt = prompt
        self._parser = rendering.parser(request, prompt, self._id)
        ready = cmd.PromptReady(
            now_ns=system.now_ns(),
            prompt_tokens=len(prompt.token_ids),
            prompt_hmac=keyed_hash(self._services.hmac_key, prompt.token_ids),
            template=prompt.template,
            date=date,
            grammar_hmac=keyed_hash(self._services.hmac_key, prompt.grammar) if prompt.grammar else "",
            param=prompt_param(request),
            length_param=request.length_field,
            prompt_version=rendering.version_of(request),
            prefix_hmacs=prefix_hashes(services.hmac_key, self._cache_salt, prompt.token_ids)
            if services.hashes_prefixes
            else (),
        )
        self.context.ref.tell(ready, cause=cause, correlation=self._id)

    def _tell_unusable(self, error: GptossError, cause: int) -> None:
        unusable = cmd.PromptUnusable(
            now_ns=self._now(),
            code=error.code,
            status=error.status,
            message=error.message,
            param=(error.param or "") if isinstance(error, RequestError) else "",
        )
        self.context.ref.tell(unusable, cause=cause, correlation=self._id)

    def _keep_prompt(self, _: ev.PromptRendered) -> None:
        assert self._prompt is not None
        if self._services.keep_content:
            given = ev.PromptTokens(
                request_id=self._id,
                token_ids=self._prompt.token_ids,
                stop=self._request.sampling.stop,
                grammar=self._prompt.grammar,
            )
            self.record(given, correlation=self._id)

    def _tell_admitted(self, event: ev.RequestAdmitted) -> None:
        self._generation.prompt_tokens = self.state.prompt_tokens
        self._generation.put_admitted(event.max_tokens, event.note)

    def _submit(self, event: ev.SamplingBound) -> None:
        assert self._prompt is not None
        submit = Submit(
            request_id=self._id,
            attempt=event.attempt,
            prompt_token_ids=self._prompt.token_ids,
            output_token_ids=tuple(self._delivered),
            sampling=msgspec.structs.replace(event.sampling, stop=self._request.sampling.stop),
            priority=self._request.priority,
            deadline_ns=self._deadline_ns,
            cache_salt=self._cache_salt,
            grammar=self._prompt.grammar,
            session_id=self.state.session_id,
        )
        if self.directory.tell(executor_name(self.state.executor), submit, cause=self.event_pos):
            return
        lost = cmd.EngineFailure(
            now_ns=self._now(),
            attempt=event.attempt,
            code="engine_lost",
            message=f"the executor {self.state.executor} is gone",
            lost=True,
            tokens_out=len(self._delivered),
        )
        self.context.ref.tell(lost, cause=self.event_pos, correlation=self._id)

    def _deliver(self, tokens: TokensProduced) -> None:
        state = self.state
        if state.phase != "running" or tokens.attempt != state.attempt:
            return
        if not state.first_token and tokens.token_ids:
            seen = cmd.FirstTokenSeen(now_ns=self._now(), attempt=tokens.attempt)
            super().on_receive(seen)
        self._delivered.extend(tokens.token_ids)
        self._stopped_by = tokens.stopped_by or self._stopped_by
        if self._services.keep_text:
            self._text.append(tokens.text)
        delta = Delta(text=tokens.text, token_ids=tokens.token_ids, logprobs=tokens.logprobs, found=self._parts(tokens))
        self._generation.put(delta)

    def _parts(self, tokens: TokensProduced) -> tuple[Part, ...] | None:
        """What the parser finds in some more tokens; None without a parser."""
        if self._parser is None:
            return None
        parts: list[Part] = []
        pieces = tokens.pieces()
        for token_id, text in pieces:
            parts += self._parser.push(token_id, text)
        return tuple(parts if len(pieces) == 1 else joined(parts))

    def _read_to_end(self, done: cmd.EngineDone) -> cmd.EngineDone:
        """Hand over what the parser still holds back; returns ``done`` with what was counted in the output."""
        if self._parser is None or self.state.phase != "running" or done.attempt != self.state.attempt:
            return done
        self._generation.put(Delta(found=tuple(self._parser.finish())))
        return msgspec.structs.replace(
            done, reasoning_tokens=self._parser.reasoning_tokens, num_calls=self._parser.num_calls
        )

    def _cancel(self, _: ev.CancelRequested) -> None:
        if self.state.phase == "running":
            self._stop_in_engine()

    def _stop_in_engine(self) -> None:
        # On the same lane as the Submit, so that it cannot overtake it and be lost.
        cancel = CancelInEngine(request_id=self._id)
        self.directory.tell(executor_name(self.state.executor), cancel, cause=self.event_pos)

    # ---- terminal events

    def _completed(self, event: ev.RequestCompleted) -> None:
        usage = Usage(
            prompt_tokens=event.prompt_tokens,
            completion_tokens=event.completion_tokens,
            cached_tokens=event.cached_tokens,
            reasoning_tokens=event.reasoning_tokens,
        )
        reason = "tool_calls" if event.num_calls and event.finish_reason == "stop" else event.finish_reason
        stop_reason = self._stopped_by or event.stop_reason
        self._finish_with(Outcome(finish_reason=reason, usage=usage, stop_reason=stop_reason))

    def _failed(self, event: ev.RequestFailed) -> None:
        self._finish_with(
            Outcome(error=error_from(event.code, event.message), usage=self._usage(event.completion_tokens))
        )

    def _cancelled(self, event: ev.RequestCancelled) -> None:
        usage = self._usage(event.completion_tokens)
        if event.reason == "client":
            self._finish_with(Outcome(finish_reason="cancelled", usage=usage))
            return
        code, message = CANCEL_ERRORS[event.reason]
        self._finish_with(Outcome(error=error_from(code, message), usage=usage))

    def _rejected(self, event: ev.RequestRejected) -> None:
        error = error_from(event.code, event.message, param=event.param or None, retry_after_s=event.retry_after_s)
        self._generation.admission = event.note
        if isinstance(error, Overloaded):
            error.admission = event.note
        self._finish_with(Outcome(error=error))

    def _usage(self, completion_tokens: int) -> Usage:
        return Usage(prompt_tokens=self.state.prompt_tokens, completion_tokens=completion_tokens)

    def _finish_with(self, outcome: Outcome) -> None:
        if self._text:
            answer = ev.AnswerDelivered(request_id=self._id, text="".join(self._text))
            self.record(answer, correlation=self._id)
        self._generation.end(outcome)
        self.stop()

    def _now(self) -> int:
        return self.context.system.now_ns()

    # Of the class: an actor that held its own methods would be a cycle and wait for the garbage collector.
    _REACTIONS: ClassVar[dict[type[Event], Callable[["RequestActor", Any], None]]] = {
        ev.RequestValidated: _render,
        ev.PromptRendered: _keep_prompt,
        ev.RequestAdmitted: _tell_admitted,
        ev.SamplingBound: _submit,
        ev.CancelRequested: _cancel,
        ev.RequestCompleted: _completed,
        ev.RequestFailed: _failed,
        ev.RequestCancelled: _cancelled,
        ev.RequestRejected: _rejected,
    }


CANCEL_ERRORS: dict[str, tuple[str, str]] = {
    "disconnect": ("engine_error", "the client disconnected"),
    "slow_client": ("engine_error", "the client did not read its answer"),
    "deadline": ("deadline_exceeded", "the request ran out of time"),
    "shutdown": ("not_ready", "the server is shutting down"),
    "sibling_failed": ("engine_error", "another choice of the same call failed"),
}


def _without_text(request: GenerateRequest) -> SamplingParams:
    """Sampling settings as control events may hold them: without the stop strings, which are the user's text."""
    return msgspec.structs.replace(request.sampling, stop=())
