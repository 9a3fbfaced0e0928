"""Commands: what one actor asks of another. Imperative names; refusals come back as replies, never as exceptions.

A command to a decider carries everything the decision may depend on: the time as ``now_ns`` (monotonic), drawn seeds,
observed memory. Each is journaled as it is consumed (``CommandConsumed``), which is what makes replay possible.
Text and token ids never travel in a decider's command; they go beside it, to the actor's shell.
"""

from typing import Literal, TypeAlias

import msgspec

from gptoss.messages.model import DeviceMemory, EngineCapabilities, FinishReason
from gptoss.messages.sampling import SamplingParams

CancelReason: TypeAlias = Literal["client", "disconnect", "slow_client", "deadline", "shutdown", "sibling_failed"]
SettingValue: TypeAlias = bool | int | float | str
PREFIX_TOKENS = 64
"""Of the shortest beginning of a prompt that is hashed, for the router."""
AdmissionAction: TypeAlias = Literal["accept", "shrink", "route_multi", "queue", "reject"]


class Command(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of every decider's command. ``now_ns`` is the monotonic time at which it was sent."""

    now_ns: int


class MemoryAdvice(msgspec.Struct, frozen=True, kw_only=True):
    """What the memory guard knows of a request beside its estimate, so that admission need not guess.

    Attributes:
        pressure: share of the KV memory that is spoken for, see ``actors.pressure``; above 1 when memory was lost.
        max_tokens_half: half of the output tokens, and ``kv_bytes_half`` the memory with so many.
        max_tokens_fit: the most output tokens with which it fits the largest executor at all, and ``kv_bytes_fit`` the
            memory with so many; 0 if not even one does.
    """

    pressure: float = 0.0
    max_tokens_half: int = 0
    kv_bytes_half: int = 0
    max_tokens_fit: int = 0
    kv_bytes_fit: int = 0


class AdmissionNote(msgspec.Struct, frozen=True, kw_only=True):
    """What a client is told of how it was let in or refused: the decision, its reason and its numbers.

    Attributes:
        pressure: of the KV memory, 0 to 1, as the decision saw it.
        running, slots, queued: requests that run, that may, and that wait.
        waited_ms: in the line.
    """

    action: AdmissionAction
    reason: str
    max_tokens: int = 0
    kv_bytes: int = 0
    pressure: float = 0.0
    running: int = 0
    slots: int = 0
    queued: int = 0
    waited_ms: float = 0.0


# ---------------------------------------------------------------- request lifecycle


class BeginRequest(Command, frozen=True, kw_only=True):
    """A request has arrived and is well formed.

    Attributes:
        is_chat: its prompt is a conversation, of ``num_messages`` messages.
        parent_id: the request that this is a further choice of.
        user_hmac: keyed hash of the caller's ``user``.
        queue_timeout_s: how long it may wait for admission; 0 is what the settings said at the start.
        log_fault: why what is recorded is not kept any more; empty while it is.
    """

    request_id: str
    endpoint: str
    model: str
    served_model: str
    stream: bool
    sampling: SamplingParams
    num_stop_strings: int
    drawn_seed: int
    max_model_len: int
    default_max_tokens: int
    priority: int
    deadline_ns: int
    session_id: str = ""
    traceparent: str = ""
    num_messages: int = 0
    is_chat: bool = True
    parent_id: str = ""
    user_hmac: str = ""
    num_metadata: int = 0
    queue_timeout_s: float = 0.0
    log_fault: str = ""


class PromptReady(Command, frozen=True, kw_only=True):
    """The prompt was rendered. The hashes of its ids and grammar are keyed.

    Attributes:
        param: the field that it came from.
        length_param: the field that bounds the length of the answer, as the client knows it.
        prefix_hmacs: of its first ``PREFIX_TOKENS`` tokens, twice as many, four times as many and so on, with its tenant and salt:
            equal ones mean that an executor that served the one has the beginning of the other.
    """

    prompt_tokens: int
    prompt_hmac: str
    template: str
    date: str
    param: str = "messages"
    grammar_hmac: str = ""
    length_param: str = "max_tokens"
    prompt_version: str = ""
    prefix_hmacs: tuple[str, ...] = ()


class PromptUnusable(Command, frozen=True, kw_only=True):
    """The prompt could not be rendered; ``status`` is the HTTP status of the error."""

    code: str
    status: int
    message: str
    param: str = ""


class EstimateReady(Command, frozen=True, kw_only=True):
    """The memory guard's estimate for this request; ``kv_bytes_prompt`` is the part that the prompt alone needs."""

    kv_bytes: int
    kv_bytes_prompt: int
    advice: MemoryAdvice | None = None


class AdmissionGranted(Command, frozen=True, kw_only=True):
    """Admission lets the request run with at most ``max_tokens`` output tokens."""

    action: AdmissionAction
    max_tokens: int
    kv_bytes: int
    note: AdmissionNote | None = None


class AdmissionRefused(Command, frozen=True, kw_only=True):
    """Admission refuses the request."""

    code: str
    message: str
    retry_after_s: float
    note: AdmissionNote | None = None


class RouteFound(Command, frozen=True, kw_only=True):
    """The router chose an executor."""

    executor: str


class FirstTokenSeen(Command, frozen=True, kw_only=True):
    """The first token of this request has come out of the engine."""

    attempt: int


class EngineDone(Command, frozen=True, kw_only=True):
    """The engine ended the request as it should.

    ``reasoning_tokens`` and ``num_calls`` are what the request's actor read in its output; ``session_tokens`` and
    ``session_bytes`` what the engine keeps of it for the next turn of its session.
    """

    attempt: int
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    stop_reason: str | int | None = None
    reasoning_tokens: int = 0
    num_calls: int = 0
    session_tokens: int = 0
    session_bytes: int = 0


class EngineFailure(Command, frozen=True, kw_only=True):
    """The engine, or the executor in front of it, failed this request.

    Attributes:
        lost: the engine is gone and did nothing wrong to this request: it may go on elsewhere.
        tokens_out: tokens already delivered; a resumed attempt goes on after them.
    """

    attempt: int
    code: str
    message: str
    lost: bool = False
    tokens_out: int = 0


class CancelRequest(Command, frozen=True, kw_only=True):
    """Stop the request."""

    reason: CancelReason


class FailRequest(Command, frozen=True, kw_only=True):
    """The request cannot go on, whatever its phase; ``code`` is one of ``gptoss.errors``. See ``EngineFailure``."""

    code: str
    message: str
    tokens_out: int = 0


class FirstByteWritten(Command, frozen=True, kw_only=True):
    """The first byte of the answer went to the client."""


RequestCommand: TypeAlias = (
    BeginRequest
    | PromptReady
    | PromptUnusable
    | EstimateReady
    | AdmissionGranted
    | AdmissionRefused
    | RouteFound
    | FirstTokenSeen
    | EngineDone
    | EngineFailure
    | CancelRequest
    | FailRequest
    | FirstByteWritten
)


# ---------------------------------------------------------------- memory guard


class SetMemoryPool(Command, frozen=True, kw_only=True):
    """An executor is ready: its KV budget may be reserved from now on. Replaces an older pool of the same executor."""

    executor: str
    capabilities: EngineCapabilities


class DropMemoryPool(Command, frozen=True, kw_only=True):
    """An executor is gone: nothing more may be reserved on it."""

    executor: str


class EstimateMemory(Command, frozen=True, kw_only=True):
    """Ask how much KV memory a request needs."""

    request_id: str
    prompt_tokens: int
    max_tokens: int


class ReserveMemory(Command, frozen=True, kw_only=True):
    """Ask for KV memory on any executor that has room. Answered by ``MemoryGranted`` or ``MemoryRefused``.

    A ``session_id`` is in use, and so not given up, until the reservation is released.
    """

    request_id: str
    kv_bytes: int
    session_id: str = ""


class BindMemory(Command, frozen=True, kw_only=True):
    """Tie a request's reservation to the executor that the router chose."""

    request_id: str
    executor: str


class ReleaseMemory(Command, frozen=True, kw_only=True):
    """Give a request's reservation back, from who asked for it; without one it does nothing."""

    request_id: str


class ObserveMemory(Command, frozen=True, kw_only=True):
    """A reading of one executor's memory.

    Attributes:
        free_bytes: what its device still has; -1 if that is not known.
        prefix_cache_bytes: held by cached prefixes, kept sessions included.
        devices: of each, where the executor has several.
    """

    executor: str
    used_bytes: int
    total_bytes: int
    kv_bytes_in_use: int
    free_bytes: int = -1
    prefix_cache_bytes: int = 0
    devices: tuple[DeviceMemory, ...] = ()


class KeepSession(Command, frozen=True, kw_only=True):
    """A turn is over, and the engine keeps ``kv_bytes`` of it for the next turn of the session."""

    session_id: str
    executor: str
    tokens: int
    kv_bytes: int


class CheckSessions(Command, frozen=True, kw_only=True):
    """Give up sessions that nobody used for too long."""


GuardCommand: TypeAlias = (
    SetMemoryPool
    | DropMemoryPool
    | EstimateMemory
    | ReserveMemory
    | BindMemory
    | ReleaseMemory
    | ObserveMemory
    | KeepSession
    | CheckSessions
)


# ---------------------------------------------------------------- admission


class SetCapacity(Command, frozen=True, kw_only=True):
    """How many requests one executor may run at once; 0 slots while it cannot serve.

    ``multi_device`` if its engine spans several devices.
    """

    executor: str
    slots: int
    kv_budget_bytes: int
    multi_device: bool = False


class AdmitRequest(Command, frozen=True, kw_only=True):
    """Ask to run.

    Attributes:
        kv_bytes: the memory guard's estimate with ``max_tokens`` output tokens.
        kv_bytes_prompt: the part of it that the prompt alone needs.
        advice: what the guard knows beside it.
        tenant: whose it is; tenants take turns.
        session_id: of the conversation within its tenant; empty is none.
        can_shrink: whether it may be given fewer output tokens than it asked for.
    """

    request_id: str
    prompt_tokens: int
    max_tokens: int
    kv_bytes: int
    kv_bytes_prompt: int
    priority: int
    deadline_ns: int
    advice: MemoryAdvice | None = None
    tenant: str = ""
    session_id: str = ""
    can_shrink: bool = True


class MemoryGranted(Command, frozen=True, kw_only=True):
    """The memory guard's yes to ``ReserveMemory``; ``pressure`` is that after the grant."""

    request_id: str
    pressure: float = 0.0


class MemoryRefused(Command, frozen=True, kw_only=True):
    """The memory guard's no to ``ReserveMemory``: no executor has this much free now."""

    request_id: str
    kv_bytes_free_max: int
    pressure: float


class WithdrawRequest(Command, frozen=True, kw_only=True):
    """The request is over or gave up waiting; frees its slot or its place in the queue."""

    request_id: str


class MemoryFreed(Command, frozen=True, kw_only=True):
    """Reservations were released: waiting requests may fit now."""


class CheckDeadlines(Command, frozen=True, kw_only=True):
    """Expire queued requests whose deadline has passed."""


class StartDraining(Command, frozen=True, kw_only=True):
    """Refuse everything new from now on."""


AdmissionCommand: TypeAlias = (
    SetCapacity
    | AdmitRequest
    | MemoryGranted
    | MemoryRefused
    | WithdrawRequest
    | MemoryFreed
    | CheckDeadlines
    | StartDraining
)


# ---------------------------------------------------------------- router


class SetExecutor(Command, frozen=True, kw_only=True):
    """An executor became able to serve, or changed; ``multi_device`` if its engine spans several devices."""

    executor: str
    slots: int
    kv_budget_bytes: int
    multi_device: bool = False


class DropExecutor(Command, frozen=True, kw_only=True):
    """An executor can no longer serve; with ``fault``, because it failed."""

    executor: str
    reason: str
    fault: bool = False


class DrainExecutor(Command, frozen=True, kw_only=True):
    """Choose this executor for nobody new; who runs there goes on."""

    executor: str


class RateExecutor(Command, frozen=True, kw_only=True):
    """An executor is suspect: it should have made progress by now. Or it is not any more."""

    executor: str
    suspect: bool
    silent_ms: float = 0.0


class RouteRequest(Command, frozen=True, kw_only=True):
    """Ask for an executor; without one that can take it the request waits until there is.

    Attributes:
        session_id: names the conversation, for affinity: the client's ``X-Session-ID`` within its tenant; empty is none.
        multi_device: admission decided ``route_multi``: it should run where an engine spans several devices.
        prefix_hmacs: see ``PromptReady``.
    """

    request_id: str
    kv_bytes: int
    prompt_tokens: int
    session_id: str = ""
    multi_device: bool = False
    prefix_hmacs: tuple[str, ...] = ()


class ForgetRoute(Command, frozen=True, kw_only=True):
    """The request left its executor."""

    request_id: str


RouterCommand: TypeAlias = SetExecutor | DropExecutor | DrainExecutor | RateExecutor | RouteRequest | ForgetRoute


# ---------------------------------------------------------------- executor


class DropSession(Command, frozen=True, kw_only=True):
    """To an executor: what its engine keeps of this session may go."""

    session_id: str


# ---------------------------------------------------------------- every decider


class ChangeSettings(Command, frozen=True, kw_only=True):
    """Decide by other settings from now on.

    Attributes:
        settings: every setting that can change while the server runs, with its new value.
        changed: those that differ from before.
        origin: who asked for it: a signal, or the HTTP surface.
    """

    settings: dict[str, SettingValue]
    changed: tuple[str, ...]
    origin: str


DeciderCommand: TypeAlias = (
    RequestCommand | GuardCommand | AdmissionCommand | RouterCommand | DropSession | ChangeSettings
)
