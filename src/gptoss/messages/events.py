"""The catalogue of events, version 1. Past tense; a refusal is an event too.

Order within a request's life, as ``actors.request`` decides it:
RequestReceived -> RequestValidated -> PromptRendered -> RequestEstimated -> RequestAdmitted -> RequestRouted ->
SamplingBound -> FirstTokenProduced -> exactly one of RequestCompleted, RequestFailed, RequestCancelled,
RequestRejected. ``docs/events.md`` is generated from this file.

Units: ``_ns`` nanoseconds, ``_ms`` milliseconds, ``_s`` seconds, ``_bytes`` bytes. Executors are named by device.
"""

from typing import ClassVar

import msgspec

from gptoss.messages.commands import AdmissionAction, AdmissionNote, CancelReason, MemoryAdvice, SettingValue
from gptoss.messages.envelope import Event, Family
from gptoss.messages.model import DeviceMemory, EngineCapabilities, FinishReason, ModelFingerprint
from gptoss.messages.plan import Preemption, PreemptionReason, RowFailure, Start
from gptoss.messages.sampling import SamplingParams

# ---------------------------------------------------------------- system


class NodeStarted(Event, frozen=True, kw_only=True):
    """A server process began. ``settings`` is JSON of the effective settings without secrets."""

    version: str
    settings: str
    python: str
    packages: dict[str, str]
    os: str
    cpu_count: int
    wall_ns: int


class NodeStopped(Event, frozen=True, kw_only=True):
    """The process stops in order."""

    reason: str


class ClockAnchored(Event, frozen=True, kw_only=True):
    """Wall time at this record's monotonic time; other records' wall times are derived from it."""

    wall_ns: int


class RunsAborted(Event, frozen=True, kw_only=True):
    """A boot that did not stop in order was found at start; these requests of it never ended."""

    boot: str
    request_ids: tuple[str, ...]


class ActorStarted(Event, frozen=True, kw_only=True):
    """An actor is ready for messages."""

    kind: str


class ActorFailed(Event, frozen=True, kw_only=True):
    """A handler or ``on_start`` raised; the supervisor decides what follows."""

    message_type: str
    code: str
    error: str


class ActorRestarted(Event, frozen=True, kw_only=True):
    """The supervisor replaced a failed actor after waiting ``backoff_ms``."""

    restarts: int
    backoff_ms: float


class ActorStopped(Event, frozen=True, kw_only=True):
    """An actor stopped; ``reason`` is normal, failed or escalated."""

    reason: str
    unhandled: int


class SupervisorEscalated(Event, frozen=True, kw_only=True):
    """Restarts exceeded their intensity: the child stays down and the system is not ready."""

    child: str
    restarts: int
    within_s: float


class DeadLettered(Event, frozen=True, kw_only=True):
    """A message could not be delivered. ``reason``: dead, full, expired or shed."""

    to: str
    message_type: str
    reason: str


class CommandConsumed(Event, frozen=True, kw_only=True):
    """A deciding actor took this command. Feeding these to ``decide`` in order reproduces every decision."""

    decider: str
    command: msgspec.Raw


class SnapshotTaken(Event, frozen=True, kw_only=True):
    """The whole state of a long-living decider, at this place in its stream; a replay may begin here.

    ``settings`` are those that it decides by, once they are others than ``NodeStarted`` has.
    """

    decider: str
    state: msgspec.Raw
    settings: dict[str, SettingValue] = msgspec.field(default_factory=dict[str, SettingValue])


class ConfigChanged(Event, frozen=True, kw_only=True):
    """Settings changed while the server runs: on ``system`` that they do, on a decider's stream where it takes them.

    ``settings`` are all that can change, ``changed`` those that did; ``refused`` were asked for too but need a restart.
    """

    settings: dict[str, SettingValue]
    changed: tuple[str, ...]
    origin: str
    refused: tuple[str, ...] = ()


class LogDegraded(Event, frozen=True, kw_only=True):
    """The journal's disk failed; events go on in memory only. Recorded last, where it still can be."""

    reason: str


class DrainStarted(Event, frozen=True, kw_only=True):
    """No new requests are taken; running ones may finish within ``timeout_s``."""

    timeout_s: float


class CountersSaved(Event, frozen=True, kw_only=True):
    """What metrics had counted when the control record ``pos`` of this boot was folded, and what they go on from."""

    pos: int
    state: msgspec.Raw


class CountersCarried(Event, frozen=True, kw_only=True):
    """What earlier boots counted: the counters of this boot go on from there."""

    state: msgspec.Raw


class ProcessReading(msgspec.Struct, frozen=True, array_like=True):
    """A child process: its processor time since it began, in seconds, and its resident memory."""

    pid: int
    cpu_s: float
    rss_bytes: int


class GpuReading(msgspec.Struct, frozen=True, array_like=True):
    """One GPU. ``busy_percent`` is the share of the last moment in which a kernel ran; the rest is 0 where unknown."""

    index: int
    name: str
    busy_percent: float
    memory_used_bytes: int
    memory_total_bytes: int
    power_w: float = 0.0
    temperature_c: float = 0.0


class HostObserved(Event, frozen=True, kw_only=True):
    """A reading of this process, its children, the machine and its GPUs.

    ``loop_late_ms`` is how much later than asked the event loop woke up for it.
    """

    cpu_s: float
    rss_bytes: int
    open_fds: int
    num_threads: int
    loop_late_ms: float
    children: tuple[ProcessReading, ...]
    host_cpu_percent: float
    load_1m: float
    memory_available_bytes: int
    memory_total_bytes: int
    disk_free_bytes: int
    gpus: tuple[GpuReading, ...] = ()


class SpansExported(Event, frozen=True, kw_only=True):
    """What became of the spans of kept traces since the last such record.

    ``exported`` reached the collector, ``refused`` did not (it was down, slow or said no), ``overflowed`` found the queue full.
    """

    exported: int
    refused: int
    overflowed: int


# ---------------------------------------------------------------- engine process


class EngineStarted(Event, frozen=True, kw_only=True):
    """An executor began to start its engine."""

    executor: str
    device: str
    model: str
    folder: str


PREPARATION = "prepare"


class EngineLoadProgressed(Event, frozen=True, kw_only=True):
    """Loading goes on; ``total`` 0 means unknown. Before there is any executor it is the model that is prepared, by ``PREPARATION``."""

    executor: str
    stage: str
    done: int
    total: int
    unit: str = "bytes"


class EngineLoaded(Event, frozen=True, kw_only=True):
    """The engine can serve."""

    executor: str
    capabilities: EngineCapabilities
    fingerprint: ModelFingerprint
    load_ms: float
    pid: int
    notes: tuple[str, ...] = ()


class EngineLoadFailed(Event, frozen=True, kw_only=True):
    """The engine cannot serve this model."""

    executor: str
    code: str
    message: str


class EngineExited(Event, frozen=True, kw_only=True):
    """The engine process is gone. ``exit_code`` is negative for a signal; ``planned`` if its executor ended it to restart."""

    executor: str
    exit_code: int
    reason: str
    in_flight: int
    planned: bool = False


class EngineStalled(Event, frozen=True, kw_only=True):
    """No step or answer for ``silent_ms`` while requests were running; the engine is killed."""

    executor: str
    silent_ms: float


class EngineSickened(Event, frozen=True, kw_only=True):
    """The engine failed ``failures`` requests and served none in between: it is killed and replaced."""

    executor: str
    failures: int


class RestartRequested(Event, frozen=True, kw_only=True):
    """Someone wants this engine replaced: nothing new goes there, those in flight may finish within ``timeout_s``."""

    executor: str
    origin: str
    in_flight: int
    timeout_s: float


# ---------------------------------------------------------------- request


class RequestReceived(Event, frozen=True, kw_only=True):
    """A request arrived. Nothing of its content is here.

    ``parent_id`` is the request that this is a further choice of; ``user_hmac`` a keyed hash of the caller's ``user``.
    """

    request_id: str
    endpoint: str
    model: str
    stream: bool
    num_messages: int
    priority: int
    deadline_ns: int
    session_id: str = ""
    traceparent: str = ""
    max_model_len: int = 0
    default_max_tokens: int = 0
    parent_id: str = ""
    user_hmac: str = ""
    num_metadata: int = 0
    queue_timeout_s: float = 0.0


class RequestValidated(Event, frozen=True, kw_only=True):
    """Its settings are within bounds; ``sampling`` holds them with the seed in force and without the stop strings."""

    sampling: SamplingParams
    num_stop_strings: int = 0


class PromptRendered(Event, frozen=True, kw_only=True):
    """The prompt became token ids. ``prompt_hmac`` is their keyed hash, ``date`` what the template saw.

    ``grammar_hmac`` is the keyed hash of the grammar that binds the answer, empty without one; ``prompt_version`` says how
    a conversation was made into a prompt; ``prefix_hmacs`` are those of ever longer beginnings, for the router.
    """

    prompt_tokens: int
    prompt_hmac: str
    template: str
    date: str
    max_tokens: int
    grammar_hmac: str = ""
    prompt_version: str = ""
    prefix_hmacs: tuple[str, ...] = ()


class RequestEstimated(Event, frozen=True, kw_only=True):
    """The KV memory that prompt and output may need; ``kv_bytes_prompt`` is the prompt's part."""

    kv_bytes: int
    kv_bytes_prompt: int
    advice: MemoryAdvice | None = None


class RequestAdmitted(Event, frozen=True, kw_only=True):
    """Admission said yes; ``max_tokens`` may have shrunk."""

    action: AdmissionAction
    max_tokens: int
    kv_bytes: int
    note: AdmissionNote | None = None


class RequestRouted(Event, frozen=True, kw_only=True):
    """The request goes to ``executor`` as attempt ``attempt``."""

    executor: str
    attempt: int


class SamplingBound(Event, frozen=True, kw_only=True):
    """What the engine was given to sample with."""

    attempt: int
    sampling: SamplingParams
    resumed_tokens: int


class FirstTokenProduced(Event, frozen=True, kw_only=True):
    """The first token came out of the engine."""

    attempt: int


class FirstByteSent(Event, frozen=True, kw_only=True):
    """The first byte of the answer went to the client."""


class CancelRequested(Event, frozen=True, kw_only=True):
    """Someone asked to stop the request."""

    reason: CancelReason


class AttemptRetried(Event, frozen=True, kw_only=True):
    """The executor was lost; the request goes on elsewhere after ``tokens_out`` delivered tokens."""

    attempt: int
    code: str
    tokens_out: int


class RequestCompleted(Event, frozen=True, kw_only=True):
    """Terminal: served to the end. ``num_calls`` are the tool calls in the answer.

    ``session_tokens`` and ``session_bytes`` are what the engine keeps for the next turn of its session.
    """

    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    stop_reason: str | int | None = None
    reasoning_tokens: int = 0
    num_calls: int = 0
    session_tokens: int = 0
    session_bytes: int = 0


class RequestFailed(Event, frozen=True, kw_only=True):
    """Terminal: the server's fault."""

    code: str
    message: str
    completion_tokens: int = 0


class RequestCancelled(Event, frozen=True, kw_only=True):
    """Terminal: stopped on request."""

    reason: CancelReason
    completion_tokens: int = 0


class RequestRejected(Event, frozen=True, kw_only=True):
    """Terminal: refused before it ran. ``status`` is the HTTP status of the answer."""

    code: str
    status: int
    message: str
    param: str = ""
    retry_after_s: float = 0.0
    note: AdmissionNote | None = None


# ---------------------------------------------------------------- memory guard


class MemoryPoolSet(Event, frozen=True, kw_only=True):
    """An executor's KV memory may be reserved."""

    executor: str
    capabilities: EngineCapabilities


class MemoryPoolDropped(Event, frozen=True, kw_only=True):
    """An executor's KV memory is gone, with the reservations that were bound to it."""

    executor: str
    reservations_lost: int


class MemoryEstimated(Event, frozen=True, kw_only=True):
    """KV bytes of a request, from the model's own config; ``kv_bytes_prompt`` is the prompt's part."""

    request_id: str
    prompt_tokens: int
    max_tokens: int
    kv_bytes: int
    kv_bytes_prompt: int
    advice: MemoryAdvice | None = None


class ReservationGranted(Event, frozen=True, kw_only=True):
    """Memory is set aside. ``unbound_bytes`` counts grants that no executor is tied to yet.

    ``session_id`` is in use until it is released; ``pressure`` is that after the grant.
    """

    request_id: str
    kv_bytes: int
    kv_bytes_free_max: int
    unbound_bytes: int
    session_id: str = ""
    pressure: float = 0.0


class ReservationRefused(Event, frozen=True, kw_only=True):
    """No executor has this much free now."""

    request_id: str
    kv_bytes: int
    kv_bytes_free_max: int
    pressure: float


class ReservationBound(Event, frozen=True, kw_only=True):
    """The reservation is on this executor."""

    request_id: str
    executor: str


class ReservationReleased(Event, frozen=True, kw_only=True):
    """Memory is given back; exactly once for each grant. ``at_ns`` is when, where a session of it became idle."""

    request_id: str
    kv_bytes: int
    executor: str
    at_ns: int = 0


class MemoryObserved(Event, frozen=True, kw_only=True):
    """A reading of one executor's memory. ``used_bytes`` of ``total_bytes`` is the device, beside ``pressure``.

    Attributes:
        pressure: share of the KV memory that is spoken for, see ``actors.pressure``.
        free_bytes: what the device still has; -1 if that is not known.
        lacking_bytes: of the KV budget, what the device turned out not to have.
        session_bytes: kept for sessions on this executor.
        devices: of each, where the executor has several.
    """

    executor: str
    used_bytes: int
    total_bytes: int
    kv_bytes_in_use: int
    kv_bytes_reserved: int
    pressure: float
    free_bytes: int = -1
    lacking_bytes: int = 0
    session_bytes: int = 0
    devices: tuple[DeviceMemory, ...] = ()


class SessionKept(Event, frozen=True, kw_only=True):
    """The engine of ``executor`` keeps the KV of a session's last turn for its next one."""

    session_id: str
    executor: str
    tokens: int
    kv_bytes: int
    at_ns: int
    pressure: float


class SessionEvicted(Event, frozen=True, kw_only=True):
    """A session's KV may go. ``used_ns`` is when its last turn ended.

    ``reason``: idle (for too long), sessions_full (all together have too much), too_large, pressure, memory (a request
    needs it), moved (the session went on elsewhere), executor_lost.
    """

    session_id: str
    executor: str
    reason: str
    kv_bytes: int
    used_ns: int
    pressure: float


# ---------------------------------------------------------------- admission


class CapacitySet(Event, frozen=True, kw_only=True):
    """How many requests one executor may run at once; ``multi_device`` if its engine spans several devices."""

    executor: str
    slots: int
    kv_budget_bytes: int
    multi_device: bool = False


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A request that wants to run, as admission keeps it.

    Attributes:
        kv_bytes: memory for the prompt and ``max_tokens`` of output.
        shrunk: ``max_tokens`` is below what was asked for.
        enqueued_ns: when it began to wait; -1 when it never did.
        tenant: whose it is.
        session_id: of its conversation within its tenant.
        multi_device: it should run where an engine spans several devices.
    """

    max_tokens: int
    kv_bytes: int
    priority: int
    deadline_ns: int
    shrunk: bool
    enqueued_ns: int = -1
    tenant: str = ""
    session_id: str = ""
    multi_device: bool = False


class AdmissionDecided(Event, frozen=True, kw_only=True):
    """The decision with the numbers it saw. ``policy`` is the hash of the policy settings.

    Attributes:
        pressure: share of the KV memory that is spoken for, see ``actors.pressure``, as the guard gave it on arrival.
        kv_bytes_max: the largest request that an executor that is up could hold.
        wait_s: how long it waited, if it was let in or its time is up; else the forecast, where there is one.
        until_deadline_s: how long it may wait.
        tenant: whose it is.
    """

    request_id: str
    action: AdmissionAction
    reason: str
    max_tokens: int
    kv_bytes: int
    running: int
    queued: int
    slots: int
    policy: str
    retry_after_s: float = 0.0
    code: str = ""
    at_ns: int = 0
    pressure: float = 0.0
    kv_bytes_max: int = 0
    wait_s: float = 0.0
    until_deadline_s: float = 0.0
    tenant: str = ""


class MemoryRequested(Event, frozen=True, kw_only=True):
    """Admission asks the memory guard to set memory aside for this request."""

    request_id: str
    ask: Ask


class Enqueued(Event, frozen=True, kw_only=True):
    """The request waits at ``position`` (0 is next)."""

    request_id: str
    position: int
    queued: int
    reason: str
    ask: Ask


class Dequeued(Event, frozen=True, kw_only=True):
    """The request leaves the queue. ``reason``: tried (memory is asked for), withdrawn, expired or displaced."""

    request_id: str
    waited_ns: int
    queued: int
    reason: str


class Parked(Event, frozen=True, kw_only=True):
    """No executor that is up could hold this waiting request; it lets the others pass until one can."""

    request_id: str
    kv_bytes: int
    kv_bytes_max: int


class Unparked(Event, frozen=True, kw_only=True):
    """An executor could hold this request now; it is back in its place in the line."""

    request_id: str


class DeadlineExpired(Event, frozen=True, kw_only=True):
    """A waiting request ran out of time."""

    request_id: str
    waited_ns: int


class SlotReleased(Event, frozen=True, kw_only=True):
    """A running request ended. ``ran_ns`` is how long it held its slot; queue forecasts use it, and ``at_ns``."""

    request_id: str
    running: int
    ran_ns: int
    at_ns: int = 0


class AdmissionClosed(Event, frozen=True, kw_only=True):
    """Draining: everything new is refused."""


# ---------------------------------------------------------------- router


class ExecutorJoined(Event, frozen=True, kw_only=True):
    """The router may choose this executor; ``multi_device`` if its engine spans several devices."""

    executor: str
    slots: int
    kv_budget_bytes: int
    multi_device: bool = False


class ExecutorLeft(Event, frozen=True, kw_only=True):
    """The router may not choose this executor any more. ``fault_ns`` is when it failed, if that is why."""

    executor: str
    reason: str
    fault_ns: int = 0


class ExecutorDrained(Event, frozen=True, kw_only=True):
    """The router chooses this executor for nobody new; ``running`` requests go on there."""

    executor: str
    running: int


class ExecutorRated(Event, frozen=True, kw_only=True):
    """The router avoids this executor while it is suspect: it has work and has made no progress for ``silent_ms``."""

    executor: str
    suspect: bool
    silent_ms: float


class RouteCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """One executor as the router saw it; the lowest score wins among those of the right kind.

    Attributes:
        cached_tokens: of the prompt, those that a request routed there lately began with.
        session: the conversation was there last.
        faults: failures of it within the last minute.
        health: empty, ``suspect`` or ``draining``.
    """

    executor: str
    running: int
    slots: int
    kv_bytes_bound: int
    kv_bytes_free: int
    score: float
    multi_device: bool = False
    cached_tokens: int = 0
    session: bool = False
    faults: int = 0
    health: str = ""


class RouteDecided(Event, frozen=True, kw_only=True):
    """The choice, with everything it was made from. ``executor`` is empty when none could take the request.

    ``reason``: least_loaded, only_one, prefix or session (it has the beginning of the prompt); large_prompt, large_kv,
    pressure or admission (sent to several devices for that); singles_full; no_room or no_executor.
    """

    request_id: str
    executor: str
    reason: str
    candidates: tuple[RouteCandidate, ...]
    kv_bytes: int = 0
    prompt_tokens: int = 0
    session_id: str = ""
    multi_device: bool = False
    prefix_hmacs: tuple[str, ...] = ()


class RouteForgotten(Event, frozen=True, kw_only=True):
    """The request left its executor."""

    request_id: str
    executor: str


# ---------------------------------------------------------------- executor


class ExecutorAccepted(Event, frozen=True, kw_only=True):
    """The executor handed the request to its engine, with all that the engine's scheduler goes by.

    ``max_tokens`` 0 is as many as the context allows; ``resumed_tokens`` of output were there already.
    """

    request_id: str
    executor: str
    attempt: int
    prompt_tokens: int
    resumed_tokens: int = 0
    max_tokens: int = 0
    priority: int = 0
    deadline_ns: int = 0


class CommittedRow(msgspec.Struct, frozen=True, array_like=True):
    """One request's part of a step: tokens produced, prompt tokens computed, and the row as it was planned.

    The row is ``num_tokens`` positions from ``start``, with logits of the last ``num_logits``; the last ``num_draft`` of
    them were guesses. With a ``failure`` it came to nothing; ``ended`` says that it was the request's last.
    """

    request_id: str
    attempt: int
    tokens: int
    prefilled: int
    start: int = 0
    num_tokens: int = 0
    num_logits: int = 0
    num_draft: int = 0
    failure: RowFailure = ""
    ended: bool = False


class StepCommitted(Event, frozen=True, kw_only=True):
    """One step of an engine, for all requests in it. ``started_ns`` is on the same monotonic clock as the records.

    It holds the whole plan, and with the events before it all that the plan was made from: ``submits_taken`` says how
    many of the accepted requests the engine had seen by then. Those preempted lost their memory before the rows ran;
    those refused were planned to start, but the device had no memory. ``messages/plan.py`` describes the parts.
    """

    executor: str
    step: int
    started_ns: int
    duration_ns: int
    rows: tuple[CommittedRow, ...]
    waiting: int
    running: int
    kv_bytes_in_use: int
    prefix_cache_bytes: int = 0
    submits_taken: int = 0
    preemptions: tuple[Preemption, ...] = ()
    starts: tuple[Start, ...] = ()
    refused: tuple[str, ...] = ()
    prefill_tokens_max: int = 0
    prefill_ms_per_token: float = 0.0
    kv_budget_bytes: int = 0


class Preempted(Event, frozen=True, kw_only=True):
    """The request gave its KV memory up and waits again, for one of better priority or because memory is short."""

    request_id: str
    executor: str
    attempt: int
    step: int
    reason: PreemptionReason


class CancelApplied(Event, frozen=True, kw_only=True):
    """The engine has let go of a cancelled request."""

    request_id: str
    executor: str
    completion_tokens: int


class ExecutorFaulted(Event, frozen=True, kw_only=True):
    """A request was in flight when its executor was lost, or the engine failed it alone."""

    request_id: str
    executor: str
    attempt: int
    code: str
    message: str
    lost: bool


# ---------------------------------------------------------------- delivery


class ClientSlow(Event, frozen=True, kw_only=True):
    """The client has not read for ``stalled_ms``."""

    stalled_ms: float


class ClientDisconnected(Event, frozen=True, kw_only=True):
    """The client went away before the answer was complete."""


# ---------------------------------------------------------------- content family


class MessagesReceived(Event, frozen=True, kw_only=True):
    """Content: what the client wrote, as JSON; recorded only where the setting ``content`` is ``full``."""

    FAMILY: ClassVar[Family] = "content"

    request_id: str
    messages: str
    tools: str = "[]"


class PromptTokens(Event, frozen=True, kw_only=True):
    """Content: what the engine was given besides ``SamplingBound``: prompt, stop strings, the grammar of the answer."""

    FAMILY: ClassVar[Family] = "content"

    request_id: str
    token_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()
    grammar: str = ""


class ProducedRow(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of one request in one step; ``position`` is the index of the first in the output."""

    request_id: str
    attempt: int
    position: int
    token_ids: tuple[int, ...]


class StepTokens(Event, frozen=True, kw_only=True):
    """Content: the token ids that one step produced."""

    FAMILY: ClassVar[Family] = "content"

    executor: str
    step: int
    rows: tuple[ProducedRow, ...]


class AnswerDelivered(Event, frozen=True, kw_only=True):
    """Content: the text that the client got, up to the request's end; only where ``content`` is ``full``."""

    FAMILY: ClassVar[Family] = "content"

    request_id: str
    text: str


class PromptHashed(Event, frozen=True, kw_only=True):
    """Content of a redacted bundle: a keyed hash in place of a prompt's tokens, stop strings and grammar."""

    FAMILY: ClassVar[Family] = "content"

    request_id: str
    num_tokens: int
    hmac: str


class HashedRow(msgspec.Struct, frozen=True, array_like=True):
    """``ProducedRow`` without its tokens. ``hmac`` is of the prompt and the whole output up to this row's end.

    So equal hashes mean equal tokens from the very beginning, and a token that comes again shows nowhere.
    """

    request_id: str
    attempt: int
    position: int
    num_tokens: int
    hmac: str


class StepHashed(Event, frozen=True, kw_only=True):
    """Content of a redacted bundle: keyed hashes in place of the tokens that one step produced."""

    FAMILY: ClassVar[Family] = "content"

    executor: str
    step: int
    rows: tuple[HashedRow, ...]


TERMINAL_EVENTS: tuple[type[Event], ...] = (RequestCompleted, RequestFailed, RequestCancelled, RequestRejected)
"""Every request ends with exactly one of these."""
