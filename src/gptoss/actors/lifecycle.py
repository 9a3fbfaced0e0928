"""A request's life as a decider: which phase follows from which command.

    received -> rendering -> estimating -> admitting -> routing -> running -> ended
                    any phase -> ended, by refusal, failure or cancellation

``STEPS`` is the whole table: for each phase, the commands it takes and the function that decides. A command that the
phase does not list is late or stale (a token of an attempt that was given up, say) and leads to nothing. Cancelling
works in every phase, and so does giving up when the request's own actor failed; while the engine runs the request, the end waits for the engine's word, so that the tokens are
counted and the memory is free when it comes.
"""

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from gptoss.actors.decider import Told
from gptoss.clock import NS_PER_S
from gptoss.errors import ContextLengthExceeded, GptossError, ModelNotFound, NotReady, RequestError
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.commands import CancelReason, Command
from gptoss.messages.envelope import Event
from gptoss.messages.sampling import SamplingParams, check_sampling

Phase = Literal["new", "rendering", "estimating", "admitting", "routing", "running", "ended"]
MAX_ATTEMPTS = 3
TENANT_HEX = 16
"""So much of a tenant's keyed hash tells it from the others."""


class RequestState(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request stands."""

    phase: Phase = "new"
    request_id: str = ""
    sampling: SamplingParams = SamplingParams()
    priority: int = 0
    deadline_ns: int = 0
    max_model_len: int = 0
    default_max_tokens: int = 0
    prompt_tokens: int = 0
    max_tokens: int = 0
    kv_bytes: int = 0
    attempt: int = 0
    tokens_out: int = 0
    executor: str = ""
    tenant: str = ""
    session_id: str = ""
    is_bound: bool = False
    multi_device: bool = False
    prefix_hmacs: tuple[str, ...] = ()
    queue_timeout_s: float = 0.0
    first_token: bool = False
    first_byte: bool = False
    cancel: CancelReason | None = None


class Lifecycle:
    """The decisions of one request.

    Args:
        queue_timeout_s: how long it may wait for admission, in seconds.
    """

    name = "request"

    def __init__(self, queue_timeout_s: float = 60.0) -> None:
        self._queue_timeout_ns = int(queue_timeout_s * NS_PER_S)

    def initial(self) -> RequestState:
        """Nothing has happened."""
        return RequestState()

    def decide(self, state: RequestState, command: Command) -> list[Event]:
        """See the module's table."""
        if isinstance(command, cmd.CancelRequest):
            return _cancel(state, command)
        if isinstance(command, cmd.FailRequest):
            return _give_up(state, command)
        step = STEPS[state.phase].get(type(command))
        return step(state, command) if step else []

    def evolve(self, state: RequestState, event: Event) -> RequestState:
        """Move through the phases."""
        change = CHANGES.get(type(event))
        return msgspec.structs.replace(state, **change(event)) if change else state

    def tells(self, state: RequestState, event: Event, now_ns: int) -> list[Told]:
        """Ask the others in turn, and give everything back at the end."""
        request_id = state.request_id
        match event:
            case ev.PromptRendered():
                estimate = cmd.EstimateMemory(
                    now_ns=now_ns,
                    request_id=request_id,
                    prompt_tokens=event.prompt_tokens,
                    max_tokens=event.max_tokens,
                )
                return [("memory", estimate)]
            case ev.RequestEstimated():
                return [("admission", self._admit(state, event, now_ns))]
            case ev.RequestAdmitted() | ev.AttemptRetried():
                # A lost executor's route is forgotten by the router itself when the executor leaves.
                route = cmd.RouteRequest(
                    now_ns=now_ns,
                    request_id=request_id,
                    kv_bytes=state.kv_bytes,
                    prompt_tokens=state.prompt_tokens,
                    session_id=state.session_id,
                    multi_device=state.multi_device,
                    prefix_hmacs=state.prefix_hmacs,
                )
                return [("router", route)]
            case ev.RequestCompleted() | ev.RequestFailed() | ev.RequestCancelled() | ev.RequestRejected():
                return [
                    ("router", cmd.ForgetRoute(now_ns=now_ns, request_id=request_id)),
                    ("admission", cmd.WithdrawRequest(now_ns=now_ns, request_id=request_id)),
                ]
            case _:
                return []

    def _queue_timeout_of(self, state: RequestState) -> int:
        return int(state.queue_timeout_s * NS_PER_S) or self._queue_timeout_ns

    def _admit(self, state: RequestState, event: ev.RequestEstimated, now_ns: int) -> cmd.AdmitRequest:
        return cmd.AdmitRequest(
            now_ns=now_ns,
            request_id=state.request_id,
            prompt_tokens=state.prompt_tokens,
            max_tokens=state.max_tokens,
            kv_bytes=event.kv_bytes,
            kv_bytes_prompt=event.kv_bytes_prompt,
            priority=state.priority,
            deadline_ns=min(state.deadline_ns, now_ns + self._queue_timeout_of(state)),
            advice=event.advice,
            tenant=state.tenant,
            session_id=state.session_id,
            can_shrink=not state.is_bound,
        )


# ---------------------------------------------------------------- decisions


def _begin(_: RequestState, command: cmd.BeginRequest) -> list[Event]:
    received = ev.RequestReceived(
        request_id=command.request_id,
        endpoint=command.endpoint,
        model=command.model,
        stream=command.stream,
        num_messages=command.num_messages,
        priority=command.priority,
        deadline_ns=command.deadline_ns,
        session_id=command.session_id,
        traceparent=command.traceparent,
        max_model_len=command.max_model_len,
        default_max_tokens=command.default_max_tokens,
        parent_id=command.parent_id,
        user_hmac=command.user_hmac,
        num_metadata=command.num_metadata,
        queue_timeout_s=command.queue_timeout_s,
    )
    try:
        if command.model and command.model != command.served_model:
            raise ModelNotFound(
                f"the model {command.model!r} is not served here; this server has {command.served_model!r}",
                param="model",
            )
        if command.is_chat and command.num_messages == 0:
            raise RequestError("messages is empty; it needs at least one message", param="messages")
        check_sampling(command.sampling)
        if command.max_model_len == 0:
            raise NotReady("the model is still loading", retry_after_s=2.0)
        if command.log_fault:
            raise NotReady(f"the journal has stopped: {command.log_fault}", retry_after_s=30.0)
    except GptossError as error:
        return [received, rejection(error)]
    seed = command.drawn_seed if command.sampling.seed is None else command.sampling.seed
    sampling = msgspec.structs.replace(command.sampling, seed=seed)
    return [received, ev.RequestValidated(sampling=sampling, num_stop_strings=command.num_stop_strings)]


def _rendered(state: RequestState, command: cmd.PromptReady) -> list[Event]:
    room = state.max_model_len - command.prompt_tokens
    wanted = state.sampling.max_tokens
    if room < 1 or (wanted is not None and wanted > room):
        asked = f" and {command.length_param} asks for {wanted} more" if wanted is not None else ""
        error = ContextLengthExceeded(
            f"the prompt has {command.prompt_tokens} tokens{asked}; the context holds {state.max_model_len}",
            param=command.param if room < 1 else command.length_param,
        )
        return [rejection(error)]
    return [
        ev.PromptRendered(
            prompt_tokens=command.prompt_tokens,
            prompt_hmac=command.prompt_hmac,
            template=command.template,
            date=command.date,
            grammar_hmac=command.grammar_hmac,
            prompt_version=command.prompt_version,
            prefix_hmacs=command.prefix_hmacs,
            max_tokens=wanted if wanted is not None else min(room, state.default_max_tokens),
        )
    ]


def _unusable(_: RequestState, command: cmd.PromptUnusable) -> list[Event]:
    if command.status >= 500:  # noqa: PLR2004 - the HTTP class of server faults
        return [ev.RequestFailed(code=command.code, message=command.message)]
    return [ev.RequestRejected(code=command.code, status=command.status, message=command.message, param=command.param)]


def _estimated(_: RequestState, command: cmd.EstimateReady) -> list[Event]:
    return [
        ev.RequestEstimated(kv_bytes=command.kv_bytes, kv_bytes_prompt=command.kv_bytes_prompt, advice=command.advice)
    ]


def _granted(_: RequestState, command: cmd.AdmissionGranted) -> list[Event]:
    return [
        ev.RequestAdmitted(
            action=command.action, max_tokens=command.max_tokens, kv_bytes=command.kv_bytes, note=command.note
        )
    ]


def _refused(_: RequestState, command: cmd.AdmissionRefused) -> list[Event]:
    status = 429 if command.code == "queue_full" else 503
    return [
        ev.RequestRejected(
            code=command.code,
            status=status,
            message=command.message,
            retry_after_s=command.retry_after_s,
            note=command.note,
        )
    ]


def _routed(state: RequestState, command: cmd.RouteFound) -> list[Event]:
    attempt = state.attempt + 1
    sampling = msgspec.structs.replace(state.sampling, max_tokens=state.max_tokens)
    return [
        ev.RequestRouted(executor=command.executor, attempt=attempt),
        ev.SamplingBound(attempt=attempt, sampling=sampling, resumed_tokens=state.tokens_out),
    ]


def _first_token(state: RequestState, command: cmd.FirstTokenSeen) -> list[Event]:
    return [] if state.first_token else [ev.FirstTokenProduced(attempt=command.attempt)]


def _first_byte(state: RequestState, _: cmd.FirstByteWritten) -> list[Event]:
    return [] if state.first_byte else [ev.FirstByteSent()]


def _done(state: RequestState, command: cmd.EngineDone) -> list[Event]:
    if command.attempt != state.attempt:
        return []
    if command.reason == "cancelled":
        return [_cancelled(state, command.completion_tokens)]
    return [
        ev.RequestCompleted(
            finish_reason=command.reason,
            prompt_tokens=command.prompt_tokens,
            completion_tokens=command.completion_tokens,
            cached_tokens=command.cached_tokens,
            stop_reason=command.stop_reason if isinstance(command.stop_reason, int) else None,
            reasoning_tokens=command.reasoning_tokens,
            num_calls=command.num_calls,
            session_tokens=command.session_tokens,
            session_bytes=command.session_bytes,
        )
    ]


def _failed(state: RequestState, command: cmd.EngineFailure) -> list[Event]:
    if command.attempt != state.attempt:
        return []
    if state.cancel is not None:
        return [_cancelled(state, command.tokens_out)]
    if command.lost and state.attempt < MAX_ATTEMPTS:
        return [ev.AttemptRetried(attempt=state.attempt, code=command.code, tokens_out=command.tokens_out)]
    return [ev.RequestFailed(code=command.code, message=command.message, completion_tokens=command.tokens_out)]


def _cancel(state: RequestState, command: cmd.CancelRequest) -> list[Event]:
    if state.phase in {"new", "ended"} or state.cancel is not None:
        return []
    requested = ev.CancelRequested(reason=command.reason)
    if state.phase == "running":
        return [requested]
    return [requested, ev.RequestCancelled(reason=command.reason, completion_tokens=state.tokens_out)]


def _give_up(state: RequestState, command: cmd.FailRequest) -> list[Event]:
    if state.phase in {"new", "ended"}:
        return []
    return [ev.RequestFailed(code=command.code, message=command.message, completion_tokens=command.tokens_out)]


def _cancelled(state: RequestState, completion_tokens: int) -> ev.RequestCancelled:
    return ev.RequestCancelled(reason=state.cancel or "client", completion_tokens=completion_tokens)


def session_key(session_id: str, tenant: str) -> str:
    """The name of a conversation within its tenant, so that nobody gets at another's by its id; empty without one."""
    return f"{session_id}@{tenant[:TENANT_HEX]}" if session_id else ""


def rejection(error: GptossError) -> ev.RequestRejected:
    """The terminal event of a refusal."""
    return ev.RequestRejected(
        code=error.code,
        status=error.status,
        message=error.message,
        param=getattr(error, "param", None) or "",
        retry_after_s=getattr(error, "retry_after_s", 0.0),
    )


STEPS: dict[Phase, dict[type[Command], Callable[[RequestState, Any], list[Event]]]] = {
    "new": {cmd.BeginRequest: _begin},
    "rendering": {cmd.PromptReady: _rendered, cmd.PromptUnusable: _unusable},
    "estimating": {cmd.EstimateReady: _estimated},
    "admitting": {cmd.AdmissionGranted: _granted, cmd.AdmissionRefused: _refused},
    "routing": {cmd.RouteFound: _routed, cmd.FirstByteWritten: _first_byte},
    "running": {
        cmd.FirstTokenSeen: _first_token,
        cmd.FirstByteWritten: _first_byte,
        cmd.EngineDone: _done,
        cmd.EngineFailure: _failed,
    },
    "ended": {},
}

# ---------------------------------------------------------------- changes of state


def _ended(_: Event) -> dict[str, Any]:
    return {"phase": "ended"}


CHANGES: dict[type[Event], Callable[[Any], dict[str, Any]]] = {
    ev.RequestReceived: lambda e: {
        "phase": "rendering",
        "request_id": e.request_id,
        "priority": e.priority,
        "deadline_ns": e.deadline_ns,
        "max_model_len": e.max_model_len,
        "default_max_tokens": e.default_max_tokens,
        "tenant": e.user_hmac[:TENANT_HEX],
        "session_id": session_key(e.session_id, e.user_hmac),
        "queue_timeout_s": e.queue_timeout_s,
    },
    ev.RequestValidated: lambda e: {"sampling": e.sampling},
    ev.PromptRendered: lambda e: {
        "phase": "estimating",
        "prompt_tokens": e.prompt_tokens,
        "max_tokens": e.max_tokens,
        "is_bound": bool(e.grammar_hmac),
        "prefix_hmacs": e.prefix_hmacs,
    },
    ev.RequestEstimated: lambda _: {"phase": "admitting"},
    ev.RequestAdmitted: lambda e: {
        "phase": "routing",
        "max_tokens": e.max_tokens,
        "kv_bytes": e.kv_bytes,
        "multi_device": e.action == "route_multi",
    },
    ev.RequestRouted: lambda e: {"phase": "running", "executor": e.executor, "attempt": e.attempt},
    ev.FirstTokenProduced: lambda _: {"first_token": True},
    ev.FirstByteSent: lambda _: {"first_byte": True},
    ev.CancelRequested: lambda e: {"cancel": e.reason},
    ev.AttemptRetried: lambda e: {"phase": "routing", "executor": "", "tokens_out": e.tokens_out},
    **dict.fromkeys(ev.TERMINAL_EVENTS, _ended),
}
