"""Admission: who may run now, who waits, who is refused.

Rules:
- At most ``slots`` requests run or are about to; the queue is bounded; lower priority number goes first, then arrival.
- Memory decides last: admission asks the guard for the request at the head of the line, one at a time, and on a no it
  waits at the front until memory is freed. Nobody behind it is asked for before, so a large request is never starved by
  small ones.
- What admission had set aside it also has released, over the same way: so a release can never overtake its reservation.
- A request that no executor could ever hold is shrunk to what fits, or refused when not even that is useful.
- Every request that was asked for gets exactly one ``AdmissionDecided`` that is not ``queue``, unless it withdraws.
- ``retry_after_s`` comes from how long the last requests held their slots.
"""

import hashlib
from typing import TypeVar

import msgspec

from gptoss.actors.decider import DeciderActor, Told
from gptoss.actors.directory import request_name
from gptoss.clock import NS_PER_S
from gptoss.messages import commands as cmd
from gptoss.messages.commands import AdmissionAction, Command
from gptoss.messages.envelope import Event
from gptoss.messages.events import (
    AdmissionClosed,
    AdmissionDecided,
    Ask,
    CapacitySet,
    DeadlineExpired,
    Dequeued,
    Enqueued,
    MemoryRequested,
    SlotReleased,
)

# A shrunk answer shorter than this is of no use to anyone.
MIN_USEFUL_TOKENS = 16
RAN_SMOOTHING = 0.2
DEADLINE_PERIOD_S = 0.25
"""How often admission looks for passed deadlines."""

T = TypeVar("T")


class AdmissionPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that admission decides by."""

    max_queue: int

    @property
    def fingerprint(self) -> str:
        """Short hash, so that a decision names the policy it was made under."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:12]


class Capacity(msgspec.Struct, frozen=True):
    """What one executor offers."""

    slots: int
    kv_budget_bytes: int


class AdmissionState(msgspec.Struct, frozen=True, kw_only=True):
    """Capacities, and each request in exactly one of ``waiting``, ``pending`` (memory asked for) and ``running``."""

    capacities: dict[str, Capacity] = {}
    waiting: dict[str, Ask] = {}
    pending: dict[str, Ask] = {}
    running: dict[str, int] = {}
    ran_ns_mean: float = 0.0
    closed: bool = False

    @property
    def slots(self) -> int:
        """Requests that may run at once."""
        return sum(capacity.slots for capacity in self.capacities.values())

    @property
    def kv_bytes_max(self) -> int:
        """The largest request that could ever run."""
        return max((capacity.kv_budget_bytes for capacity in self.capacities.values()), default=0)

    @property
    def free_slots(self) -> int:
        """Requests that may start now."""
        return max(0, self.slots - len(self.running) - len(self.pending))

    def line(self) -> list[str]:
        """Waiting requests, next first."""
        return sorted(self.waiting, key=lambda key: (self.waiting[key].priority, self.waiting[key].enqueued_ns))

    def has_line(self, priority: int) -> bool:
        """Whether anyone goes before a newcomer of this priority, memory already asked for or not."""
        queued = (*self.waiting.values(), *self.tried)
        return any(ask.priority <= priority for ask in queued)

    @property
    def tried(self) -> tuple[Ask, ...]:
        """Those out of the line for whom memory has been asked and not answered; a no puts them back in front."""
        return tuple(ask for ask in self.pending.values() if ask.enqueued_ns >= 0)

    def retry_after_s(self) -> float:
        """When a slot should be free for one more, in seconds, at least 1."""
        ahead = len(self.waiting) + 1
        return round(max(1.0, self.ran_ns_mean / NS_PER_S * ahead / max(1, self.slots)), 1)


class Admission:
    """Admission's decisions."""

    name = "admission"

    def __init__(self, policy: AdmissionPolicy) -> None:
        self.policy = policy

    def initial(self) -> AdmissionState:
        """Nobody runs and there is no capacity."""
        return AdmissionState()

    def decide(self, state: AdmissionState, command: Command) -> list[Event]:
        """See the module's rules."""
        match command:
            case cmd.SetCapacity():
                capacity = CapacitySet(
                    executor=command.executor, slots=command.slots, kv_budget_bytes=command.kv_budget_bytes
                )
                return self._then_pump(state, [capacity], command.now_ns)
            case cmd.AdmitRequest():
                return self._admit(state, command)
            case cmd.MemoryGranted():
                return self._granted(state, command)
            case cmd.MemoryRefused():
                return self._memory_refused(state, command)
            case cmd.WithdrawRequest():
                return self._withdraw(state, command)
            case cmd.MemoryFreed():
                # It may be enough for the request at the head, so it is asked for again.
                return self._then_pump(state, [], command.now_ns)
            case cmd.CheckDeadlines():
                return self._expire(state, command)
            case cmd.StartDraining() if not state.closed:
                return [AdmissionClosed()]
            case _:
                return []

    def evolve(self, state: AdmissionState, event: Event) -> AdmissionState:
        """Keep who is where."""
        replace = msgspec.structs.replace
        match event:
            case CapacitySet():
                capacity = Capacity(event.slots, event.kv_budget_bytes)
                return replace(state, capacities={**state.capacities, event.executor: capacity})
            case Enqueued():
                pending = _without(state.pending, event.request_id)
                waiting = {**state.waiting, event.request_id: event.ask}
                return replace(state, waiting=waiting, pending=pending)
            case Dequeued():
                return replace(state, waiting=_without(state.waiting, event.request_id))
            case MemoryRequested():
                return replace(state, pending={**state.pending, event.request_id: event.ask})
            case AdmissionDecided(action="accept" | "shrink"):
                pending = _without(state.pending, event.request_id)
                return replace(state, pending=pending, running={**state.running, event.request_id: event.at_ns})
            case SlotReleased():
                mean = state.ran_ns_mean or float(event.ran_ns)
                mean += RAN_SMOOTHING * (event.ran_ns - mean)
                running = _without(state.running, event.request_id)
                pending = _without(state.pending, event.request_id)
                return replace(state, running=running, pending=pending, ran_ns_mean=mean)
            case AdmissionClosed():
                return replace(state, closed=True)
            case _:
                return state

    def tells(self, state: AdmissionState, event: Event, now_ns: int) -> list[Told]:
        """Ask the memory guard, and tell requests whether they may run."""
        match event:
            case MemoryRequested():
                reserve = cmd.ReserveMemory(now_ns=now_ns, request_id=event.request_id, kv_bytes=event.ask.kv_bytes)
                return [("memory", reserve)]
            case SlotReleased():
                return [("memory", cmd.ReleaseMemory(now_ns=now_ns, request_id=event.request_id))]
            case AdmissionDecided(action="accept" | "shrink"):
                granted = cmd.AdmissionGranted(
                    now_ns=now_ns, action=event.action, max_tokens=event.max_tokens, kv_bytes=event.kv_bytes
                )
                return [(request_name(event.request_id), granted)]
            case AdmissionDecided(action="reject"):
                refused = cmd.AdmissionRefused(
                    now_ns=now_ns, code=event.code, message=event.reason, retry_after_s=event.retry_after_s
                )
                return [(request_name(event.request_id), refused)]
            case _:
                return []

    # ---- one decision each

    def _admit(self, state: AdmissionState, command: cmd.AdmitRequest) -> list[Event]:
        if state.closed:
            return [self._refuse(state, command, "not_ready", "the server is shutting down")]
        if state.kv_bytes_max == 0:
            return [self._refuse(state, command, "not_ready", "no executor has loaded the model yet")]
        fitted = _fit(command, state.kv_bytes_max)
        if fitted is None:
            reason = f"needs {command.kv_bytes} bytes of KV memory; the largest executor has {state.kv_bytes_max}"
            return [self._refuse(state, command, "memory_exhausted", reason)]
        if state.free_slots and not state.has_line(command.priority):
            return [_request_memory(command.request_id, fitted)]
        if len(state.waiting) >= self.policy.max_queue:
            return [self._refuse(state, command, "queue_full", f"{len(state.waiting)} requests are waiting already")]
        reason = "order" if state.free_slots else "slots"
        return self._enqueue(state, command.request_id, fitted, reason, command.now_ns)

    def _granted(self, state: AdmissionState, command: cmd.MemoryGranted) -> list[Event]:
        ask = state.pending.get(command.request_id)
        if ask is None:
            return []
        action: AdmissionAction = "shrink" if ask.shrunk else "accept"
        reason = "fits after shrinking max_tokens" if ask.shrunk else "fits"
        decided = self._decided(state, command.request_id, ask, command.now_ns)
        accepted = msgspec.structs.replace(decided, action=action, reason=reason)
        return self._then_pump(state, [accepted], command.now_ns)

    def _memory_refused(self, state: AdmissionState, command: cmd.MemoryRefused) -> list[Event]:
        ask = state.pending.get(command.request_id)
        if ask is None:
            return []
        if ask.enqueued_ns < 0:
            return self._enqueue(state, command.request_id, ask, "memory", command.now_ns)
        return [
            Enqueued(request_id=command.request_id, position=0, queued=len(state.waiting) + 1, reason="memory", ask=ask)
        ]

    def _withdraw(self, state: AdmissionState, command: cmd.WithdrawRequest) -> list[Event]:
        request_id = command.request_id
        if request_id in state.waiting:
            waited_ns = command.now_ns - state.waiting[request_id].enqueued_ns
            return self._then_pump(state, [_dequeue(state, request_id, waited_ns, "withdrawn")], command.now_ns)
        if request_id not in state.running and request_id not in state.pending:
            return []
        ran_ns = command.now_ns - state.running.get(request_id, command.now_ns)
        running = len(_without(state.running, request_id))
        released = SlotReleased(request_id=request_id, running=running, ran_ns=ran_ns)
        return self._then_pump(state, [released], command.now_ns)

    def _expire(self, state: AdmissionState, command: cmd.CheckDeadlines) -> list[Event]:
        events: list[Event] = []
        for request_id, ask in state.waiting.items():
            if ask.deadline_ns <= command.now_ns:
                waited_ns = command.now_ns - ask.enqueued_ns
                events.append(DeadlineExpired(request_id=request_id, waited_ns=waited_ns))
                events.append(_dequeue(state, request_id, waited_ns, "expired"))
                decided = self._decided(state, request_id, ask, command.now_ns)
                reason = f"waited {waited_ns / NS_PER_S:.1f} s, until its deadline"
                events.append(
                    msgspec.structs.replace(decided, action="reject", code="deadline_exceeded", reason=reason)
                )
        return self._then_pump(state, events, command.now_ns) if events else []

    # ---- parts of decisions

    def _then_pump(self, state: AdmissionState, events: list[Event], now_ns: int) -> list[Event]:
        """``events``, then a memory request for the head of the line if there is a slot for it and none is tried yet."""
        for event in events:
            state = self.evolve(state, event)
        if not (state.waiting and state.free_slots) or state.tried:
            return events
        request_id = state.line()[0]
        ask = state.waiting[request_id]
        dequeued = _dequeue(state, request_id, now_ns - ask.enqueued_ns, "tried")
        return [*events, dequeued, _request_memory(request_id, ask)]

    def _enqueue(self, state: AdmissionState, request_id: str, ask: Ask, reason: str, now_ns: int) -> list[Event]:
        waiting = msgspec.structs.replace(ask, enqueued_ns=now_ns)
        queued = len(state.waiting) + 1
        decided = self._decided(state, request_id, ask, now_ns)
        position = sum(other.priority <= ask.priority for other in state.waiting.values())
        return [
            msgspec.structs.replace(decided, action="queue", reason=reason),
            Enqueued(request_id=request_id, position=position, queued=queued, reason=reason, ask=waiting),
        ]

    def _refuse(self, state: AdmissionState, command: cmd.AdmitRequest, code: str, reason: str) -> Event:
        ask = Ask(max_tokens=command.max_tokens, kv_bytes=command.kv_bytes, priority=0, deadline_ns=0, shrunk=False)
        decided = self._decided(state, command.request_id, ask, command.now_ns)
        return msgspec.structs.replace(
            decided, action="reject", code=code, reason=reason, retry_after_s=state.retry_after_s()
        )

    def _decided(self, state: AdmissionState, request_id: str, ask: Ask, now_ns: int) -> AdmissionDecided:
        return AdmissionDecided(
            request_id=request_id,
            action="accept",
            reason="",
            max_tokens=ask.max_tokens,
            kv_bytes=ask.kv_bytes,
            running=len(state.running),
            queued=len(state.waiting),
            slots=state.slots,
            policy=self.policy.fingerprint,
            at_ns=now_ns,
        )


def _fit(command: cmd.AdmitRequest, kv_bytes_max: int) -> Ask | None:
    """The request as it can be served: whole, with fewer output tokens, or not at all."""
    whole = Ask(
        max_tokens=command.max_tokens,
        kv_bytes=command.kv_bytes,
        priority=command.priority,
        deadline_ns=command.deadline_ns,
        shrunk=False,
    )
    if command.kv_bytes <= kv_bytes_max:
        return whole
    room = kv_bytes_max - command.kv_bytes_prompt
    per_token = (command.kv_bytes - command.kv_bytes_prompt) / max(1, command.max_tokens)
    max_tokens = int(room / per_token) if per_token > 0 else 0
    if max_tokens < MIN_USEFUL_TOKENS:
        return None
    return msgspec.structs.replace(whole, max_tokens=max_tokens, kv_bytes=kv_bytes_max, shrunk=True)


def _request_memory(request_id: str, ask: Ask) -> MemoryRequested:
    return MemoryRequested(request_id=request_id, ask=ask)


def _dequeue(state: AdmissionState, request_id: str, waited_ns: int, reason: str) -> Dequeued:
    return Dequeued(request_id=request_id, waited_ns=waited_ns, queued=len(state.waiting) - 1, reason=reason)


def _without(items: dict[str, T], key: str) -> dict[str, T]:
    return {k: v for k, v in items.items() if k != key} if key in items else items


class AdmissionActor(DeciderActor[AdmissionState]):
    """Admission with a clock for the deadlines of those who wait."""

    def on_start(self) -> None:
        """Look for passed deadlines a few times a second."""
        super().on_start()
        system = self.context.system
        self._deadlines = system.send_every(
            DEADLINE_PERIOD_S, self.context.ref, lambda: cmd.CheckDeadlines(now_ns=system.now_ns())
        )

    def on_receive(self, message: Command) -> None:
        """Consume a command; a deadline check with nobody waiting is no decision and leaves no trace."""
        if isinstance(message, cmd.CheckDeadlines) and not self.state.waiting:
            return
        super().on_receive(message)

    def on_stop(self) -> None:
        """Stop the clock."""
        self._deadlines.cancel()
