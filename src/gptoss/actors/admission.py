"""Admission: who may run now, who waits, who is refused.

Rules:
- At most ``slots`` requests run or are about to; the queue is bounded. Who goes next stands in ``fair_line``.
- Memory decides last: admission asks the guard for the request at the head of the line, one at a time, and on a no it
  waits at the front until memory is freed. Nobody behind it is asked for before, so a large request is never starved by
  small ones.
- What admission had set aside it also has released, over the same way: so a release can never overtake its reservation.
- A request that no executor could ever hold is shrunk to what fits, or refused when not even that is useful. One that
  waits while the executor that could hold it is down is parked, so that it holds up nobody.
- Under pressure newcomers are shrunk, then queued (``pressure``). Nobody who fits is refused for it.
- Who cannot be served by its deadline, as far as the pace of the line tells, is refused at once and not at its deadline.
- When the queue is full, the newest request of the tenant with most of them makes room for one of a smaller tenant.
- Every request that was asked for gets exactly one ``AdmissionDecided`` that is not ``queue``, unless it withdraws.
- ``retry_after_s`` comes from the pace of the line, or else from how long the last requests held their slots.
"""

import msgspec

from gptoss.actors import admission_state as states
from gptoss.actors.admission_fit import AdmissionPolicy, fit, note_of, with_route
from gptoss.actors.admission_state import RELEASES_MIN, AdmissionRecord, AdmissionState, Capacity
from gptoss.actors.decider import Told
from gptoss.actors.directory import request_name
from gptoss.actors.fair_line import FairLine, LineOrder
from gptoss.actors.pressure import is_reached
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
    Parked,
    SlotReleased,
    Unparked,
)

DOUBT = 1.5
"""Below the level ``refuse`` a forecast must miss the deadline by this factor before it counts."""


class Admission:
    """Admission's decisions."""

    name = "admission"
    record_type = AdmissionRecord

    def __init__(self, policy: AdmissionPolicy) -> None:
        self.policy = policy
        self._fingerprint = policy.fingerprint
        self._order = LineOrder(ageing_ns=int(policy.ageing_s * NS_PER_S))
        self._is_current = policy.version > 1

    def initial(self) -> AdmissionState:
        """Nobody runs and there is no capacity."""
        return AdmissionState(line=FairLine(order=self._order))

    def recorded(self, state: AdmissionState) -> AdmissionRecord:
        """See ``decider.KeepsRecord``."""
        return states.recorded(state)

    def restored(self, record: AdmissionRecord) -> AdmissionState:
        """See ``decider.KeepsRecord``."""
        return states.restored(record, self._order)

    def decide(self, state: AdmissionState, command: Command) -> list[Event]:
        """See the module's rules."""
        match command:
            case cmd.SetCapacity():
                capacity = CapacitySet(
                    executor=command.executor,
                    slots=command.slots,
                    kv_budget_bytes=command.kv_budget_bytes,
                    multi_device=command.multi_device,
                )
                unparked = self.evolve(state, capacity).unparkable()
                events: list[Event] = [capacity, *(Unparked(request_id=name) for name in unparked)]
                return self._then_pump(state, events, command.now_ns)
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
                capacity = Capacity(event.slots, event.kv_budget_bytes, event.multi_device)
                return replace(state, capacities={**state.capacities, event.executor: capacity})
            case Enqueued():
                return state.without_pending(event.request_id).with_waiting(event.request_id, event.ask)
            case Dequeued():
                return state.without_waiting(event.request_id)
            case Parked():
                return state.with_parked(event.request_id)
            case Unparked():
                return state.with_unparked(event.request_id)
            case MemoryRequested():
                return state.with_pending(event.request_id, event.ask)
            case AdmissionDecided(action="accept" | "shrink" | "route_multi"):
                line = state.line.charge(event.tenant, event.kv_bytes, event.at_ns)
                running = state.running.set(event.request_id, event.at_ns)
                return replace(state.without_pending(event.request_id), running=running, line=line)
            case SlotReleased():
                return state.with_released(event.request_id, event.ran_ns, event.at_ns)
            case AdmissionClosed():
                return replace(state, closed=True)
            case _:
                return state

    def tells(self, state: AdmissionState, event: Event, now_ns: int) -> list[Told]:
        """Ask the memory guard, and tell requests whether they may run."""
        match event:
            case MemoryRequested():
                reserve = cmd.ReserveMemory(
                    now_ns=now_ns,
                    request_id=event.request_id,
                    kv_bytes=event.ask.kv_bytes,
                    session_id=event.ask.session_id,
                )
                return [("memory", reserve)]
            case SlotReleased():
                return [("memory", cmd.ReleaseMemory(now_ns=now_ns, request_id=event.request_id))]
            case AdmissionDecided(action="accept" | "shrink" | "route_multi"):
                granted = cmd.AdmissionGranted(
                    now_ns=now_ns,
                    action=event.action,
                    max_tokens=event.max_tokens,
                    kv_bytes=event.kv_bytes,
                    note=note_of(event),
                )
                return [(request_name(event.request_id), granted)]
            case AdmissionDecided(action="reject"):
                refused = cmd.AdmissionRefused(
                    now_ns=now_ns,
                    code=event.code,
                    message=event.reason,
                    retry_after_s=event.retry_after_s,
                    note=note_of(event),
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
        fitted = fit(self.policy, state, command)
        if fitted is None:
            reason = f"needs {command.kv_bytes} bytes of KV memory; the largest executor has {state.kv_bytes_max}"
            return [self._refuse(state, command, "memory_exhausted", reason)]
        pressure = command.advice.pressure if command.advice else 0.0
        is_tight = is_reached(self.policy.levels.queue, pressure)
        fitted = with_route(self.policy, state, command, fitted, is_tight=is_tight)
        now_ns = command.now_ns
        if state.free_slots and not is_tight and not state.has_line(fitted, now_ns):
            return [_request_memory(command.request_id, fitted)]
        room = self._make_room(state, command)
        if room is None:
            return [self._refuse(state, command, "queue_full", f"{len(state.waiting)} requests are waiting already")]
        hopeless = self._hopeless(state, command)
        if hopeless is not None:
            return [hopeless]
        reason = "slots" if not state.free_slots else "pressure" if is_tight else "order"
        for event in room:
            state = self.evolve(state, event)
        queued = self._enqueue(state, command.request_id, fitted, reason, now_ns, pressure)
        return [*room, *(self._then_pump(state, queued, now_ns) if is_tight else queued)]

    def _granted(self, state: AdmissionState, command: cmd.MemoryGranted) -> list[Event]:
        ask = state.pending.get(command.request_id)
        if ask is None:
            return []
        action: AdmissionAction = "route_multi" if ask.multi_device else "shrink" if ask.shrunk else "accept"
        reason = "fits after shrinking max_tokens" if ask.shrunk else "fits"
        if ask.multi_device:
            reason += "; for several devices"
        decided = self._decided(state, command.request_id, ask, command.now_ns, command.pressure)
        accepted = msgspec.structs.replace(decided, action=action, reason=reason)
        return self._then_pump(state, [accepted], command.now_ns)

    def _memory_refused(self, state: AdmissionState, command: cmd.MemoryRefused) -> list[Event]:
        ask = state.pending.get(command.request_id)
        if ask is None:
            return []
        if ask.enqueued_ns < 0:
            return self._enqueue(state, command.request_id, ask, "memory", command.now_ns, command.pressure)
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
        running = len(state.running) - (request_id in state.running)
        released = SlotReleased(
            request_id=request_id,
            running=running,
            ran_ns=ran_ns,
            at_ns=command.now_ns if self._is_current else 0,
        )
        return self._then_pump(state, [released], command.now_ns)

    def _expire(self, state: AdmissionState, command: cmd.CheckDeadlines) -> list[Event]:
        events: list[Event] = []
        for request_id in state.expired(command.now_ns):
            ask = state.waiting[request_id]
            waited_ns = command.now_ns - ask.enqueued_ns
            events.append(DeadlineExpired(request_id=request_id, waited_ns=waited_ns))
            events.append(_dequeue(state, request_id, waited_ns, "expired"))
            decided = self._decided(state, request_id, ask, command.now_ns)
            reason = f"waited {waited_ns / NS_PER_S:.1f} s, until its deadline"
            retry_after_s = self._retry_after_s(state, 0.0) if self._is_current else 0.0
            events.append(
                msgspec.structs.replace(
                    decided, action="reject", code="deadline_exceeded", reason=reason, retry_after_s=retry_after_s
                )
            )
        return self._then_pump(state, events, command.now_ns) if events else []

    # ---- parts of decisions

    def _then_pump(self, state: AdmissionState, events: list[Event], now_ns: int) -> list[Event]:
        """``events``, then a memory request for the head of the line if there is a slot for it and none is tried yet."""
        for event in events:
            state = self.evolve(state, event)
        found = list(events)
        while state.free_slots and not state.num_tried and (request_id := state.line.head(now_ns)) is not None:
            ask = state.waiting[request_id]
            if not self._is_current or ask.kv_bytes <= state.kv_bytes_max_up:
                found.append(_dequeue(state, request_id, now_ns - ask.enqueued_ns, "tried"))
                found.append(_request_memory(request_id, ask))
                break
            parked = Parked(request_id=request_id, kv_bytes=ask.kv_bytes, kv_bytes_max=state.kv_bytes_max_up)
            state = self.evolve(state, parked)
            found.append(parked)
        return found

    def _make_room(self, state: AdmissionState, command: cmd.AdmitRequest) -> list[Event] | None:
        """What makes room in the queue for a newcomer; None if nothing may."""
        if len(state.waiting) < self.policy.max_queue:
            return []
        displaced = state.line.to_displace(command.tenant)
        if displaced is None:
            return None
        ask = state.waiting[displaced]
        waited_ns = command.now_ns - ask.enqueued_ns
        decided = msgspec.structs.replace(
            self._decided(state, displaced, ask, command.now_ns),
            action="reject",
            code="queue_full",
            reason=f"{len(state.waiting)} requests are waiting, of your tenant more than of the others",
            retry_after_s=self._retry_after_s(state, 0.0),
        )
        return [_dequeue(state, displaced, waited_ns, "displaced"), decided]

    def _hopeless(self, state: AdmissionState, command: cmd.AdmitRequest) -> Event | None:
        """The refusal of a newcomer that would miss its deadline in the line.

        Only behind others: who would be next may wait, or nobody would ever show that the line has become faster.
        """
        if not self._is_current or state.pace.samples < RELEASES_MIN:
            return None
        ahead = state.line.ahead_of(command.tenant, command.priority, command.now_ns)
        pressure = command.advice.pressure if command.advice else 0.0
        wait_s = state.forecast_s(ahead)
        left_s = (command.deadline_ns - command.now_ns) / NS_PER_S
        doubt = 1.0 if is_reached(self.policy.levels.refuse, pressure) else DOUBT
        if not ahead or wait_s <= left_s * doubt:
            return None
        reason = f"would wait about {wait_s:.1f} s for its turn, and may wait {max(0.0, left_s):.1f} s"
        refused = self._refuse(state, command, "deadline_exceeded", reason)
        return msgspec.structs.replace(
            refused, wait_s=round(wait_s, 3), retry_after_s=self._retry_after_s(state, wait_s - left_s)
        )

    def _retry_after_s(self, state: AdmissionState, excess_s: float) -> float:
        """When it is worth to come again: once the line is shorter by ``excess_s``, or by half; in seconds, at least 1."""
        if not self._is_current:
            return state.retry_after_s()
        return round(max(1.0, excess_s or state.forecast_s(len(state.waiting) // 2)), 1)

    def _enqueue(
        self, state: AdmissionState, request_id: str, ask: Ask, reason: str, now_ns: int, pressure: float
    ) -> list[Event]:
        waiting = msgspec.structs.replace(ask, enqueued_ns=now_ns)
        queued = len(state.waiting) + 1
        position = state.line.ahead_of(ask.tenant, ask.priority, now_ns)
        decided = msgspec.structs.replace(
            self._decided(state, request_id, ask, now_ns, pressure), action="queue", reason=reason
        )
        if self._is_current:
            decided = msgspec.structs.replace(decided, wait_s=round(state.forecast_s(position), 3))
        return [
            decided,
            Enqueued(request_id=request_id, position=position, queued=queued, reason=reason, ask=waiting),
        ]

    def _refuse(self, state: AdmissionState, command: cmd.AdmitRequest, code: str, reason: str) -> AdmissionDecided:
        ask = Ask(
            max_tokens=command.max_tokens,
            kv_bytes=command.kv_bytes,
            priority=0,
            deadline_ns=command.deadline_ns,
            shrunk=False,
            tenant=command.tenant,
        )
        pressure = command.advice.pressure if command.advice else 0.0
        return msgspec.structs.replace(
            self._decided(state, command.request_id, ask, command.now_ns, pressure),
            action="reject",
            code=code,
            reason=reason,
            retry_after_s=self._retry_after_s(state, 0.0),
        )

    def _decided(
        self, state: AdmissionState, request_id: str, ask: Ask, now_ns: int, pressure: float = 0.0
    ) -> AdmissionDecided:
        decided = AdmissionDecided(
            request_id=request_id,
            action="accept",
            reason="",
            max_tokens=ask.max_tokens,
            kv_bytes=ask.kv_bytes,
            running=len(state.running),
            queued=len(state.waiting),
            slots=state.slots,
            policy=self._fingerprint,
            at_ns=now_ns,
        )
        if not self._is_current:
            return decided
        waited_ns = now_ns - ask.enqueued_ns if ask.enqueued_ns >= 0 else 0
        return msgspec.structs.replace(
            decided,
            pressure=pressure,
            kv_bytes_max=state.kv_bytes_max_up,
            wait_s=round(waited_ns / NS_PER_S, 3),
            until_deadline_s=round(max(0, ask.deadline_ns - now_ns) / NS_PER_S, 3),
            tenant=ask.tenant,
        )


def _request_memory(request_id: str, ask: Ask) -> MemoryRequested:
    return MemoryRequested(request_id=request_id, ask=ask)


def _dequeue(state: AdmissionState, request_id: str, waited_ns: int, reason: str) -> Dequeued:
    return Dequeued(request_id=request_id, waited_ns=waited_ns, queued=len(state.waiting) - 1, reason=reason)
