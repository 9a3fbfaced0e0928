"""Invariants of the line and of the sessions: whose turn it is, who is refused, what is kept and given up."""

from collections import defaultdict
from collections.abc import Iterator

import msgspec

from gptoss.clock import NS_PER_S
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.codec import decode_command
from gptoss.messages.envelope import Event, Record
from gptoss.simulation.decisions import states_at_the_end
from gptoss.simulation.observed import Observed, ViolationError

ADMITTED = frozenset({"accept", "shrink", "route_multi"})
SESSION_SLACK_S = 1.2
"""So much longer than it may be idle a session may be there: the guard looks once a second."""


class _Waiting(msgspec.Struct):
    """Someone in line. ``rank`` is its rank in its tenant, ``since`` the number of the record that put it there first."""

    tenant: str
    rank: tuple[float, int]
    since: int
    tried_at: int = -1
    parked: bool = False


def nobody_jumps_the_queue(observed: Observed) -> None:
    """Of a tenant's requests the most urgent goes first, then who has waited longest.

    A step of priority counts as so much waiting. Nobody is tried for memory while another of the tenant goes before him;
    who was asked for before the other began to wait may still get it: that is the window of one message.
    """
    waiting: dict[str, _Waiting] = {}
    ageing_ns = observed.settings.queue_ageing_s * NS_PER_S
    tried: dict[str, tuple[int, int]] = {}
    for number, record in enumerate(observed.streams.get("admission", [])):
        match record.event:
            case ev.Enqueued(request_id=request_id, ask=ask):
                rank = (ask.enqueued_ns + ask.priority * ageing_ns, number)
                waiting.setdefault(request_id, _Waiting(ask.tenant, rank, number)).tried_at = -1
            case ev.MemoryRequested(request_id=request_id, ask=ask):
                tried[request_id] = (number, ask.priority)
            case ev.Parked(request_id=request_id):
                waiting[request_id].parked = True
            case ev.Unparked(request_id=request_id):
                waiting[request_id].parked = False
            case ev.AdmissionDecided(request_id=request_id, action=action) if action in ADMITTED:
                own = waiting.pop(request_id, None)
                tenant = record.event.tenant
                tried_at, priority = tried[request_id]
                rank = own.rank if own else (record.event.at_ns + priority * ageing_ns, number)
                _check_turn(record, _Waiting(tenant, rank, number, tried_at), waiting)
            case _:
                for request_id in _left(record.event):
                    waiting.pop(request_id, None)


def _check_turn(record: Record, admitted: _Waiting, waiting: dict[str, _Waiting]) -> None:
    assert isinstance(record.event, ev.AdmissionDecided)
    for other, theirs in waiting.items():
        if theirs.tenant != admitted.tenant or theirs.parked:
            continue
        if theirs.rank < admitted.rank and theirs.since < admitted.tried_at:
            raise ViolationError(
                f"{record.event.request_id} was let in at {record.meta.pos}, although {other} waited and goes first"
            )


def _left(event: Event) -> Iterator[str]:
    """Those who are no longer in line for good."""
    if isinstance(event, ev.CommandConsumed):
        command = decode_command(event.command)
        if isinstance(command, cmd.WithdrawRequest):
            yield command.request_id
    elif isinstance(event, ev.AdmissionDecided) and event.action == "reject":
        yield event.request_id


def tenants_take_turns(observed: Observed) -> None:
    """While two tenants wait, neither is given more than the other by more than two of the largest requests.

    That is the bound of the fair order (see ``actors.fair_line``). It is looked at where nobody goes next for its patience.
    """
    if observed.scenario.shape.ageing_s < observed.scenario.shape.request_timeout_s:
        return
    turns = _Turns()
    for record in observed.streams.get("admission", []):
        event = record.event
        match event:
            case ev.Enqueued():
                turns.wait(event.ask.tenant, event.request_id, event.ask.kv_bytes)
            case ev.AdmissionDecided(action=action) if action in ADMITTED:
                behind = turns.give(event.tenant, event.request_id, event.kv_bytes)
                if behind:
                    raise ViolationError(
                        f"at {record.meta.pos} the tenant {event.tenant!r} is too far ahead of {behind!r}, which waits"
                    )
            case _:
                for request_id in _left(event):
                    turns.leave(request_id)


class _Turns:
    """What tenants were given while they waited."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[str]] = defaultdict(set)
        self._given: dict[tuple[str, str], int] = {}  # to the first, since both wait
        self._largest = 0

    def wait(self, tenant: str, request_id: str, kv_bytes: int) -> None:
        self._largest = max(self._largest, kv_bytes)
        if not self._waiting[tenant]:
            self._forget(tenant)
        self._waiting[tenant].add(request_id)

    def leave(self, request_id: str) -> None:
        for requests in self._waiting.values():
            requests.discard(request_id)

    def give(self, tenant: str, request_id: str, kv_bytes: int) -> str | None:
        """A tenant is given memory; returns another that waits and got too little."""
        behind: str | None = None
        for other in (name for name, requests in self._waiting.items() if requests and name != tenant):
            pair = (tenant, other)
            self._given[pair] = self._given.get(pair, 0) + kv_bytes
            ahead = self._given[pair] - self._given.get((other, tenant), 0)
            if request_id in self._waiting[tenant] and ahead > 2 * self._largest:
                behind = other or "nobody"
        self._waiting[tenant].discard(request_id)
        if not self._waiting[tenant]:
            self._forget(tenant)
        return behind

    def _forget(self, tenant: str) -> None:
        self._given = {pair: amount for pair, amount in self._given.items() if tenant not in pair}


def refusals_are_for_a_reason(observed: Observed) -> None:
    """Nobody is refused who could have been served: the numbers of each refusal say why it had to be.

    Too large for every executor; or no place in a full line; or a forecast beyond its deadline, behind others; or its time
    was up. Pressure alone is no reason.
    """
    max_queue = observed.settings.max_queue
    for record in observed.streams.get("admission", []):
        event = record.event
        if isinstance(event, ev.ConfigChanged):
            max_queue = int(event.settings["max_queue"])
        if not isinstance(event, ev.AdmissionDecided) or event.action != "reject" or event.code == "not_ready":
            continue
        is_right = {
            "memory_exhausted": event.kv_bytes > event.kv_bytes_max,
            "queue_full": event.queued >= max_queue,
            "deadline_exceeded": not event.until_deadline_s or (event.queued and event.wait_s > event.until_deadline_s),
        }
        if not is_right[event.code]:
            raise ViolationError(f"{event.request_id} was refused at {record.meta.pos} ({event.code}) without reason")
        if event.code in {"queue_full", "deadline_exceeded"} and event.retry_after_s < 1.0:
            raise ViolationError(f"{event.request_id} was refused at {record.meta.pos} and not told when to come again")


def sessions_in_use_are_kept(observed: Observed) -> None:
    """No session is given up while a request of it holds memory, unless its engine is gone or it went on elsewhere."""
    turns: dict[str, str] = {}
    for record in observed.streams.get("memory", []):
        match record.event:
            case ev.ReservationGranted(request_id=request_id, session_id=session_id):
                turns.setdefault(request_id, session_id)
            case ev.ReservationReleased(request_id=request_id):
                turns.pop(request_id, None)
            case ev.SessionEvicted(
                session_id=session_id, reason="idle" | "pressure" | "memory" | "sessions_full" as why
            ):
                if session_id in turns.values():
                    raise ViolationError(f"a session in use was given up at {record.meta.pos} ({why})")
            case _:
                pass


def sessions_end(observed: Observed) -> None:
    """At rest no session is there that was idle for too long, and what the guard counts is what the engines keep."""
    book = states_at_the_end(observed)["memory"].book
    has_failed = any(isinstance(r.event, ev.ActorRestarted) for r in observed.streams.get("memory", []))
    for name, session in book.sessions.items():
        idle_s = (observed.now_ns - session.used_ns) / NS_PER_S
        if not has_failed and idle_s > observed.settings.session_idle_s + SESSION_SLACK_S:
            raise ViolationError(f"the session {name} is still kept after {idle_s:.1f} s")
    counted = {name: session.kv_bytes for name, session in book.sessions.items()}
    for device, kept in observed.engine_sessions.items():
        for name, kv_bytes in kept.items():
            if book.sessions[name].executor != device if name in book.sessions else True:
                raise ViolationError(f"{device} keeps the session {name}, of which the guard knows nothing")
            if counted[name] != kv_bytes:
                raise ViolationError(f"{device} keeps {kv_bytes} bytes for {name}; the guard counts {counted[name]}")
