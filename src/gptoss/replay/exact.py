"""The part of a what-if that is exact: recorded commands to changed deciders, up to the first other choice.

Rules:
- A choice is what others are told, or what is counted: who is admitted with how many tokens, who waits, whose memory is
  granted, who runs where. The numbers beside it, and what is only observed, are no choice.
- Streams that begin in the middle count once their state is known, as in ``stream``.
"""

from functools import partial
from typing import Any

import msgspec

from gptoss.actors.decider import fold
from gptoss.actors.directory import EXECUTOR_PREFIX, REQUEST_PREFIX
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.codec import decode_command
from gptoss.messages.commands import Command, SettingValue
from gptoss.messages.envelope import Event, Record
from gptoss.replay.diff import diff, message_text, plan_divergence
from gptoss.replay.figures import Fares
from gptoss.replay.plans import ExecutorLog, ExecutorLogs
from gptoss.replay.policy import Policy
from gptoss.replay.result import Divergence
from gptoss.replay.simulate import Simulation

NO_CHOICE = (
    ev.MemoryObserved,
    ev.MemoryPoolSet,
    ev.MemoryPoolDropped,
    ev.MemoryEstimated,
    ev.CapacitySet,
    ev.ExecutorJoined,
    ev.ExecutorLeft,
    ev.ExecutorDrained,
    ev.ExecutorRated,
    ev.ConfigChanged,
    ev.RequestReceived,
    ev.RequestEstimated,
    ev.SessionKept,
)
CHOSEN: dict[type[Event], tuple[str, ...]] = {
    ev.AdmissionDecided: ("request_id", "action", "max_tokens", "code"),
    ev.Enqueued: ("request_id",),
    ev.Dequeued: ("request_id", "reason"),
    ev.MemoryRequested: ("request_id",),
    ev.ReservationGranted: ("request_id",),
    ev.ReservationRefused: ("request_id",),
    ev.ReservationReleased: ("request_id",),
    ev.SlotReleased: ("request_id",),
    ev.SessionEvicted: ("session_id",),
    ev.Parked: ("request_id",),
    ev.Unparked: ("request_id",),
    ev.ReservationBound: ("request_id", "executor"),
    ev.RouteDecided: ("request_id", "executor"),
    ev.RequestAdmitted: ("action", "max_tokens"),
}


class Divided(msgspec.Struct, frozen=True, kw_only=True):
    """Where two policies part, and all that is known there.

    Attributes:
        pos, at_ns: of the command that is decided differently; it has not been consumed.
        divergence: None where the parting is arbitrary.
        states: deciders' states before it, under the changed policy.
        recorded_states: likewise under the recorded one.
        engines: what each executor's engine has.
        fares: of all that came before.
        live: of each stream, the settings that it took while the server ran.
    """

    pos: int
    at_ns: int
    divergence: Divergence | None
    states: dict[str, Any]
    recorded_states: dict[str, Any]
    engines: dict[str, ExecutorLog]
    fares: Fares
    live: dict[str, dict[str, SettingValue]]

    def put_into(self, simulation: Simulation, policy: Policy) -> None:
        """Let a simulation stand here."""
        for stream, settings in self.live.items():
            policy.take(stream, settings)
        simulation.now_ns = self.at_ns
        states = self.states if policy.is_changed else self.recorded_states
        for stream, state in states.items():
            if not stream.startswith(REQUEST_PREFIX):
                simulation.states[stream] = policy.own(stream, state)
            elif state.phase != "ended":
                simulation.states[stream] = state
                deadline = cmd.CancelRequest(now_ns=0, reason="deadline")
                simulation.tell(state.deadline_ns, stream, deadline)
                simulation.made[state.request_id] = state.tokens_out
        waiting = states["admission"].waiting.values() if "admission" in states else ()
        for ask in sorted(waiting, key=lambda ask: (ask.deadline_ns, ask.enqueued_ns)):
            simulation.tell(ask.deadline_ns, "admission", cmd.CheckDeadlines(now_ns=0))
        running = {state.request_id: state for state in states.values() if getattr(state, "phase", "") == "running"}
        for stream, engine in self.engines.items():
            copy = simulation.engines[stream] = engine.only(running.keys())
            if copy.capabilities is not None:
                copy.capabilities = policy.capabilities(copy.capabilities)
            for each in (*copy.running.values(), *copy.line.values()):
                simulation.made[each.request_id] = each.num_tokens - each.num_prompt
        for request_id in sorted(name for name, state in running.items() if state.cancel is not None):
            simulation.at(self.at_ns, partial(simulation.cancel, request_id))


class _Open(msgspec.Struct):
    """A command that was decided, and what is recorded of it so far."""

    record: Record
    command: Command
    decided: list[Event]
    recorded: list[Event]


class Exact:
    """Takes a boot's records until the policies part."""

    def __init__(self, policy: Policy, *, from_start: bool) -> None:
        self.num_decisions = 0
        self._policy = policy
        self._from_start = from_start
        self._states: dict[str, Any] = {}
        self._recorded: dict[str, Any] = {}
        self._engines = ExecutorLogs()
        self._open: _Open | None = None
        self._held: list[Record] = []
        self._fares = Fares()

    def observe(self, record: Record) -> Divided | None:
        """Take the next record; says where the policies part once that is seen."""
        meta, event = record.meta, record.event
        if meta.stream.startswith(EXECUTOR_PREFIX):
            if self._open is None:
                return self._engine(record)
            self._held.append(record)  # if the open command is where the policies part, this has not happened yet
            return None
        decider = self._policy.decider(meta.stream)
        if decider is None:
            return None
        if isinstance(event, ev.CommandConsumed):
            return self._close() or self._consume(record, event)
        if isinstance(event, ev.SnapshotTaken):
            found = self._close()
            if event.settings:
                self._policy.take(meta.stream, event.settings)
                decider = self._policy.decider(meta.stream)
                assert decider is not None
            if meta.stream not in self._recorded:
                self._recorded[meta.stream] = fold(decider, decider.initial(), event)
                self._states[meta.stream] = self._policy.state(self._recorded[meta.stream])
            return found
        if self._open is not None and meta.cause == self._open.record.meta.pos and meta.actor == meta.stream:
            self._open.recorded.append(event)
        return None

    def end(self) -> Divided | None:
        """No more records come; the last command may be cut off and says nothing."""
        self._open = None
        return self._release()

    # ---- parts

    def _consume(self, record: Record, event: ev.CommandConsumed) -> Divided | None:
        stream = record.meta.stream
        decider = self._policy.decider(stream)
        command = decode_command(event.command)
        assert decider is not None
        if isinstance(command, cmd.ChangeSettings):
            self._policy.take(stream, command.settings)
            return None
        if isinstance(command, cmd.BeginRequest) or (stream not in self._states and record.meta.seq <= 1):
            # A long-living actor's first record is its start.
            self._states[stream] = self._recorded[stream] = decider.initial()
        if stream not in self._states:
            return None
        if self._from_start and isinstance(command, cmd.BeginRequest):
            self._states.pop(stream)
            return self._part(record, None)
        changed = self._policy.command(command, self._life_end(command))
        decided = decider.decide(self._states[stream], changed)
        self._open = _Open(record, changed, decided, [])
        return None

    def _close(self) -> Divided | None:
        """Compare what the last command led to; unless it differs, take it."""
        if self._open is None:
            return None
        record, decided, recorded = self._open.record, self._open.decided, self._open.recorded
        command, self._open = self._open.command, None
        ours, theirs = [c for c in map(choice, decided) if c], [c for c in map(choice, recorded) if c]
        stream = record.meta.stream
        if ours != theirs:
            return self._part(record, _divergence(record, command, recorded, decided))
        self.num_decisions += 1
        decider = self._policy.decider(stream)
        assert decider is not None
        for event in decided:
            self._states[stream] = decider.evolve(self._states[stream], event)
        for event in recorded:
            self._recorded[stream] = decider.evolve(self._recorded[stream], event)
            request_id = getattr(event, "request_id", stream.removeprefix(REQUEST_PREFIX))
            self._fares.observe(record.meta.mono_ns, request_id, event)
            if isinstance(event, ev.TERMINAL_EVENTS):
                self._states.pop(stream)
                self._recorded.pop(stream)
                break
        return self._release()

    def _release(self) -> Divided | None:
        """Take what executors recorded while a command was open."""
        held, self._held = self._held, []
        return next((found for found in map(self._engine, held) if found), None)

    def _part(self, record: Record, divergence: Divergence | None) -> Divided:
        return Divided(
            pos=record.meta.pos,
            at_ns=record.meta.mono_ns,
            divergence=divergence,
            states=self._states,
            recorded_states=self._recorded,
            engines=self._engines.by_stream,
            fares=self._fares,
            live=dict(self._policy.live),
        )

    def _life_end(self, command: Command) -> int | None:
        if not isinstance(command, cmd.AdmitRequest):
            return None
        state = self._states.get(f"{REQUEST_PREFIX}{command.request_id}")
        return state.deadline_ns if state else None

    def _engine(self, record: Record) -> Divided | None:
        meta, event = record.meta, record.event
        log, _ = self._engines.of(meta)
        if not isinstance(event, ev.StepCommitted):
            log.observe(event)
            return None
        capabilities = log.capabilities
        if not self._policy.changes_engines or not log.is_known or capabilities is None:
            log.check(event)
            return None
        before = log.copy()
        found = log.check(event, lambda state: self._policy.scheduler_state(state, capabilities))
        self.num_decisions += found is not None
        parts = {name: both for name, both in (found or {}).items() if name in {"preemptions", "starts", "rows"}}
        if not parts:
            return None
        self._engines.by_stream[meta.stream] = before
        return self._part(record, plan_divergence(record, event, parts))


def choice(event: Event) -> tuple[Any, ...] | None:
    """What an event chooses; None if it chooses nothing."""
    if isinstance(event, NO_CHOICE):
        return None
    names = CHOSEN.get(type(event), ())
    return (type(event).__name__, *(getattr(event, name) for name in names))


def _divergence(record: Record, command: Command, recorded: list[Event], decided: list[Event]) -> Divergence:
    """The first pair of events that choose differently."""
    old = [event for event in recorded if choice(event)]
    new = [event for event in decided if choice(event)]
    index = next(
        (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if choice(a) != choice(b)), min(len(old), len(new))
    )
    before, after = (events[index] if index < len(events) else None for events in (old, new))
    shown = before or after
    meta = record.meta
    return Divergence(
        kind="differs" if before and after else "missing" if after else "unexpected",
        boot=meta.boot,
        pos=meta.pos,
        stream=meta.stream,
        decider="request" if meta.stream.startswith(REQUEST_PREFIX) else meta.stream,
        type=type(shown).__name__,
        command=message_text(command),
        command_pos=meta.pos,
        fields=diff(before, after),
    )
