"""The shell around a decider: what it records, in which order, and what a failure leaves behind."""

from typing import Any

import pytest

from gptoss.actors.decider import DeciderActor
from gptoss.actors.directory import Directory
from gptoss.actors.system import System
from gptoss.clock import SystemClock, SystemIds, SystemRng
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.codec import decode_command
from gptoss.messages.commands import Command
from gptoss.messages.envelope import Event, Origin, Record
from gptoss.telemetry.memory_journal import MemoryJournal

RELEASE = cmd.ForgetRoute(now_ns=1, request_id="r1")
BOUND = ev.ReservationBound(request_id="r2", executor="cpu:0")
GONE = ev.RouteForgotten(request_id="r1", executor="cpu:0")


class Counting:
    """Two events a command; its state is how many it has folded, and it can fail in either of its functions."""

    name = "counting"

    def __init__(self, *, fails_in: str = "") -> None:
        self.fails_in = fails_in

    def initial(self) -> int:
        return 0

    def decide(self, state: int, command: Command) -> list[Event]:
        del state, command
        if self.fails_in == "decide":
            raise ValueError("planted")
        return [BOUND, GONE]

    def evolve(self, state: int, event: Event) -> int:
        if self.fails_in == "evolve" and event is GONE:
            raise ValueError("planted")
        return state + 1

    def tells(self, state: int, event: Event, now_ns: int) -> list[Any]:
        del state, event, now_ns
        return []


async def recorded(decider: Counting) -> tuple[list[Record], list[tuple[int, int]]]:
    """The records of one command in the decider's stream; each reaction's position and the state that it saw."""
    seen: list[tuple[int, int]] = []

    class Watched(DeciderActor[int]):
        def react(self, event: Event) -> None:
            if isinstance(event, ev.ReservationBound | ev.RouteForgotten):
                seen.append((self.event_pos, self.state))

    clock = SystemClock()
    journal = MemoryJournal(node="n", boot="b", clock=clock)
    async with System(name="test", clock=clock, ids=SystemIds(), rng=SystemRng(), journal=journal) as system:
        ref = system.spawn(lambda: Watched(decider, Directory()), name="counting")
        cause = journal.append(ev.ClockAnchored(wall_ns=1), Origin(stream="system")).meta.pos
        ref.tell(RELEASE, cause=cause)
    about = [record for record in journal.read(stream="counting") if not isinstance(record.event, ev.ActorStarted)]
    return [record for record in about if not isinstance(record.event, ev.ActorStopped | ev.ActorFailed)], seen


async def test_a_command_and_its_events_are_recorded_before_any_is_acted_on() -> None:
    records, seen = await recorded(Counting())
    consumed, bound, gone = records
    assert isinstance(consumed.event, ev.CommandConsumed)
    assert decode_command(consumed.event.command) == RELEASE
    assert [record.event for record in (bound, gone)] == [BOUND, GONE]
    assert [record.meta.correlation for record in records] == ["r1", "r2", "r1"]
    assert bound.meta.cause == gone.meta.cause == consumed.meta.pos
    assert consumed.meta.cause < consumed.meta.pos
    assert seen == [(bound.meta.pos, 2), (gone.meta.pos, 2)]


@pytest.mark.parametrize(("fails_in", "events"), [("decide", []), ("evolve", [BOUND])])
async def test_a_command_that_could_not_be_decided_is_recorded_with_what_came_of_it(
    fails_in: str, events: list[Event]
) -> None:
    records, seen = await recorded(Counting(fails_in=fails_in))
    assert isinstance(records[0].event, ev.CommandConsumed)
    assert [record.event for record in records[1:]] == events
    assert not seen
