"""Bugs to plant: each breaks the real code while its context lasts, as a careless change of that code might."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import msgspec

from gptoss.actors import kernel
from gptoss.actors.admission import Admission
from gptoss.actors.admission_state import AdmissionState
from gptoss.actors.directory import Directory
from gptoss.actors.executor import ExecutorActor
from gptoss.actors.fair_line import FairLine
from gptoss.actors.inbox import DATA, Inbox, Lane, Letter
from gptoss.actors.kernel import Kernel
from gptoss.actors.lifecycle import Lifecycle, RequestState
from gptoss.actors.memory_guard import MemoryGuard
from gptoss.actors.memory_state import GuardState
from gptoss.actors.request import RequestActor
from gptoss.actors.router import Router
from gptoss.actors.router_state import Route, RouterState
from gptoss.actors.sessions import SessionBook
from gptoss.actors.standing import Standing
from gptoss.actors.system import Timer
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.commands import Command
from gptoss.messages.envelope import Event, Record
from gptoss.telemetry import segment_recovery
from gptoss.telemetry.telemetry_actor import TelemetryActor

Plant = Callable[[], Any]


def returns(answer: Any) -> Callable[[Any], Any]:
    """A function in whose place another stands, that returns ``answer`` whatever it is given."""

    def make(_: Any) -> Any:
        def wrong(*_: Any) -> Any:
            return answer

        return wrong

    return make


def patched(target: object, name: str, make: Callable[[Any], Any]) -> Any:
    """``target.name`` replaced by what ``make`` makes of it."""
    return mock.patch.object(target, name, make(getattr(target, name)))


def skipped_release() -> Any:
    """Memory is not given back by who leaves while it is asked for."""

    def make(tells: Any) -> Any:
        def wrong(self: Admission, state: AdmissionState, event: Event, now_ns: int) -> Any:
            if isinstance(event, ev.SlotReleased) and event.ran_ns == 0:
                return []
            return tells(self, state, event, now_ns)

        return wrong

    return patched(Admission, "tells", make)


def reordered_delivery() -> Any:
    """A mailbox with three letters gives the second one first."""

    def make(get: Any) -> Any:
        def wrong(self: Inbox) -> Letter | None:
            if len(self._data) >= 2 and not self._control:
                self._data[0], self._data[1] = self._data[1], self._data[0]
            return get(self)

        return wrong

    return patched(Inbox, "get", make)


def double_terminal_event() -> Any:
    """A request that was cancelled while it ran ends as cancelled and as completed."""

    def make(decide: Any) -> Any:
        def wrong(self: Lifecycle, state: RequestState, command: Command) -> list[Event]:
            events = decide(self, state, command)
            if state.cancel is not None and isinstance(command, cmd.EngineDone):
                events.append(events[-1])
            return events

        return wrong

    return patched(Lifecycle, "decide", make)


def leaked_reservation() -> Any:
    """While others wait in line, who leaves keeps the grant."""

    def make(tells: Any) -> Any:
        def wrong(self: Admission, state: AdmissionState, event: Event, now_ns: int) -> Any:
            told = tells(self, state, event, now_ns)
            return [each for each in told if not isinstance(each[1], cmd.ReleaseMemory)] if state.waiting else told

        return wrong

    return patched(Admission, "tells", make)


def memory_granted_twice() -> Any:
    """The guard forgets that unbound grants count."""

    def wrong(self: GuardState) -> int:
        free = [self.free_bytes(name) + self.reserved_bytes("") for name in self.pools]
        return max(0, max(free, default=0))

    return mock.patch.object(GuardState, "free_bytes_max", wrong)


def lost_wake_up() -> Any:
    """A letter that arrives while the consumer falls asleep does not wake it, now and then."""
    counter = iter(range(10**9))

    def make(put: Any) -> Any:
        def wrong(self: Inbox, letter: Letter, lane: Lane = DATA) -> Letter | None:
            if self._idle and next(counter) % 50 == 49:
                self._idle = False
            return put(self, letter, lane)

        return wrong

    return patched(Inbox, "put", make)


def token_twice_after_a_retry() -> Any:
    """A resumed attempt goes on one token too early."""

    def make(react: Any) -> Any:
        def wrong(self: RequestActor, event: Event) -> None:
            delivered = self._delivered
            if isinstance(event, ev.SamplingBound):
                self._delivered = delivered[:-1]
            try:
                react(self, event)
            finally:
                self._delivered = delivered

        return wrong

    return patched(RequestActor, "react", make)


def deadline_that_never_fires() -> Any:
    """Timers that fire once do not."""

    def make(fire: Any) -> Any:
        def wrong(self: Timer, when_s: float) -> None:
            if self._period_s is not None:
                fire(self, when_s)

        return wrong

    return patched(Timer, "_fire", make)


def queue_deadline_that_never_fires() -> Any:
    """Nobody looks for passed deadlines in the line."""
    return patched(Admission, "_expire", returns([]))


def queue_slot_leak() -> Any:
    """Who leaves while memory is asked for keeps the slot."""

    def make(withdraw: Any) -> Any:
        def wrong(self: Admission, state: AdmissionState, command: cmd.WithdrawRequest) -> list[Event]:
            return [] if command.request_id in state.pending else withdraw(self, state, command)

        return wrong

    return patched(Admission, "_withdraw", make)


def dropped_dead_letter() -> Any:
    """A letter for a dead actor vanishes."""

    def make(bury: Any) -> Any:
        def wrong(self: Kernel, letter: Letter, to: str, reason: Any) -> None:
            if reason != "dead" or letter.reply_to is not None:
                bury(self, letter, to, reason)

        return wrong

    return patched(Kernel, "bury", make)


def forgotten_ask() -> Any:
    """An ask has no time-out."""
    return patched(Kernel, "expire", returns(None))


def jumped_queue() -> Any:
    """Whoever fits goes first, as long as there is a slot."""
    return patched(AdmissionState, "has_line", returns(False))


def unheard_cancel() -> Any:
    """A cancellation that comes before the prompt is rendered is lost."""

    def make(decide: Any) -> Any:
        def wrong(self: Lifecycle, state: RequestState, command: Command) -> list[Event]:
            is_lost = isinstance(command, cmd.CancelRequest) and state.phase == "rendering"
            return [] if is_lost else decide(self, state, command)

        return wrong

    return patched(Lifecycle, "decide", make)


def late_cancel() -> Any:
    """The executor does not pass on that a request is cancelled."""
    return patched(ExecutorActor, "_cancel", returns(None))


def impure_decision() -> Any:
    """A decision depends on something that is not recorded."""
    counter = iter(range(10**9))

    def make(decide: Any) -> Any:
        def wrong(self: Router, state: RouterState, command: Command) -> list[Event]:
            events = decide(self, state, command)
            return [*events[:-1]] if events and next(counter) % 20 == 19 else events

        return wrong

    return patched(Router, "decide", make)


def missed_record() -> Any:
    """The live projections miss a record now and then, and do not say so."""
    counter = iter(range(10**9))

    def make(watch: Any) -> Any:
        def wrong(self: TelemetryActor, record: Record) -> None:
            if next(counter) % 100 != 99:
                watch(self, record)

        return wrong

    return patched(TelemetryActor, "_watch", make)


def forgotten_unfinished_request() -> Any:
    """Recovery does not see which requests a crash cut off."""
    return patched(segment_recovery, "_unfinished", returns(()))


def request_without_a_record() -> Any:
    """A request is taken although the journal has stopped."""

    def make(decide: Any) -> Any:
        def wrong(self: Lifecycle, state: RequestState, command: Command) -> list[Event]:
            if isinstance(command, cmd.BeginRequest):
                command = msgspec.structs.replace(command, log_fault="")
            return decide(self, state, command)

        return wrong

    return patched(Lifecycle, "decide", make)


def text_in_a_failure() -> Any:
    """The text of a foreign exception, which may quote a prompt, goes into the journal."""

    def wrong(error: BaseException) -> tuple[str, str]:
        return "actor_error", str(error)

    return mock.patch.object(kernel, "describe", wrong)


def tenant_that_is_not_charged() -> Any:
    """What a tenant is given does not count: one that floods the line gets all of it."""

    def make(_: Any) -> Any:
        def wrong(self: FairLine, *_: Any) -> FairLine:
            return self

        return wrong

    return patched(FairLine, "charge", make)


def session_given_up_in_use() -> Any:
    """A session counts as idle although a request of it runs."""

    def make(_: Any) -> Any:
        def wrong(self: SessionBook, name: str) -> SessionBook:
            return self

        return wrong

    return patched(SessionBook, "enter", make)


def session_that_its_engine_keeps() -> Any:
    """The engine is not told that a session was given up."""

    def make(tells: Any) -> Any:
        def wrong(self: MemoryGuard, state: GuardState, event: Event, now_ns: int) -> Any:
            return [] if isinstance(event, ev.SessionEvicted) else tells(self, state, event, now_ns)

        return wrong

    return patched(MemoryGuard, "tells", make)


def session_that_nobody_counts() -> Any:
    """The guard is not told what an engine keeps of a turn."""
    return patched(Standing, "keep", returns(None))


def session_that_never_ends() -> Any:
    """Nobody looks for sessions that are idle for too long."""
    return patched(MemoryGuard, "has_overdue", returns(False))


def refused_for_pressure() -> Any:
    """Who would have to wait under pressure is refused instead."""

    def make(hopeless: Any) -> Any:
        def wrong(self: Admission, state: AdmissionState, command: cmd.AdmitRequest) -> Any:
            if command.advice is not None and command.advice.pressure >= 0.9:
                return self._refuse(state, command, "deadline_exceeded", "memory is short")
            return hopeless(self, state, command)

        return wrong

    return patched(Admission, "_hopeless", make)


def refusing_restart() -> Any:
    """A wanted restart takes the capacity away, as a lost engine does."""

    def make(leave: Any) -> Any:
        def wrong(self: Standing, reason: str, cause: int = -1, *, fault: bool = False, returns: bool = False) -> None:
            del returns
            leave(self, reason, cause, fault=fault)

        return wrong

    return patched(Standing, "leave", make)


def drained_executor_chosen() -> Any:
    """The router forgets that an executor is draining."""

    def make(evolve: Any) -> Any:
        def wrong(self: Router, state: RouterState, event: Event) -> RouterState:
            return state if isinstance(event, ev.ExecutorDrained) else evolve(self, state, event)

        return wrong

    return patched(Router, "evolve", make)


def size_ignored() -> Any:
    """Long prompts run wherever there is room."""

    def make(wish: Any) -> Any:
        def wrong(self: Router, candidates: Any, route: Route) -> str:
            return wish(self, candidates, msgspec.structs.replace(route, prompt_tokens=0, multi_device=False))

        return wrong

    return patched(Router, "_wish", make)


def unheard_settings() -> Any:
    """The router is not told of changed settings."""

    def make(tell: Any) -> Any:
        def wrong(self: Directory, name: str, message: object, **options: Any) -> bool:
            is_lost = name == "router" and isinstance(message, cmd.ChangeSettings)
            return True if is_lost else tell(self, name, message, **options)

        return wrong

    return patched(Directory, "tell", make)


PLANTED: dict[str, tuple[Plant, str]] = {
    "a skipped release": (skipped_release, "nothing_is_held_at_rest"),
    "a reordered delivery": (reordered_delivery, "text_is_delivered_whole"),
    "a double terminal event": (double_terminal_event, "one_terminal_event"),
    "a leaked reservation": (leaked_reservation, "nothing_is_held_at_rest"),
    "memory granted twice": (memory_granted_twice, "reservations_within_budget"),
    "a lost wake-up": (lost_wake_up, "mailboxes_are_empty"),
    "a token twice after a retry": (token_twice_after_a_retry, "tokens_are_contiguous"),
    "a deadline that never fires": (deadline_that_never_fires, "deadlines_fire"),
    "a deadline in the line that never fires": (queue_deadline_that_never_fires, "deadlines_fire"),
    "a queue slot leak": (queue_slot_leak, "nothing_is_held_at_rest"),
    "a dropped dead letter": (dropped_dead_letter, "letters_balance"),
    "a forgotten ask": (forgotten_ask, "asks_resolve"),
    "a jumped queue": (jumped_queue, "nobody_jumps_the_queue"),
    "an unheard cancel": (unheard_cancel, "cancels_are_heeded"),
    "a late cancel": (late_cancel, "cancel_frees_memory"),
    "an impure decision": (impure_decision, "decisions_replay"),
    "a record that the live view misses": (missed_record, "projections_rebuild"),
    "an unfinished request that recovery forgets": (forgotten_unfinished_request, "log_recovers"),
    "a request without a record": (request_without_a_record, "nobody_is_let_in_unrecorded"),
    "a tenant that is not charged": (tenant_that_is_not_charged, "tenants_take_turns"),
    "a session given up in use": (session_given_up_in_use, "sessions_in_use_are_kept"),
    "a session that its engine keeps": (session_that_its_engine_keeps, "sessions_end"),
    "a session that nobody counts": (session_that_nobody_counts, "sessions_end"),
    "a session that never ends": (session_that_never_ends, "sessions_end"),
    "a refusal for pressure": (refused_for_pressure, "refusals_are_for_a_reason"),
    "a restart that refuses": (refusing_restart, "restarts_refuse_nobody"),
    "a draining executor that is chosen": (drained_executor_chosen, "draining_executors_take_nobody"),
    "a size that is ignored": (size_ignored, "large_requests_go_to_several_devices"),
    "settings that are not heard": (unheard_settings, "settings_reach_deciders"),
    "a prompt in a failure": (text_in_a_failure, "nothing_leaks_text"),
}
"""What is planted -> how, and the invariant that must find it."""
