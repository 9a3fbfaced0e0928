"""Actors: one message at a time, deferred replies, stopping themselves, and Pykka's own view of them."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pykka
import pytest
from pykka.messages import ProxyCall

from gptoss.actors.actor import LoopActor, SystemActor, Terminated, ThreadedActor
from gptoss.actors.future import ReplyFuture
from gptoss.actors.journal import Journal
from gptoss.actors.system import System
from gptoss.errors import ActorDead, ActorError
from gptoss.messages.events import ActorFailed, ActorStarted, ActorStopped, DeadLettered

Until = Callable[[Callable[[], object]], Awaitable[None]]
Base = type[SystemActor]
BOTH = pytest.mark.parametrize("base", [LoopActor, ThreadedActor])


class Echo(LoopActor):
    def on_receive(self, message: object) -> object:
        return message


class ThreadedEcho(ThreadedActor):
    def on_receive(self, message: object) -> object:
        return message


# ---------------------------------------------------------------- handling


@BOTH
async def test_messages_are_handled_in_order_after_on_start(system: System, base: Base) -> None:
    class Collect(base):
        def on_start(self) -> None:
            self.seen: list[object] = ["started"]

        def on_receive(self, message: object) -> object:
            self.seen.append(message)
            return self.seen

    ref = system.spawn(Collect, name="collect")
    for number in range(200):
        ref.tell(number)
    assert await ref.ask("end", timeout_s=5) == ["started", *range(200), "end"]


async def test_the_mailbox_waits_while_a_handler_awaits(system: System) -> None:
    class Careful(LoopActor):
        def __init__(self) -> None:
            super().__init__()
            self.log: list[str] = []

        def on_receive(self, message: str) -> object:
            return self.slowly(message) if message.startswith("slow") else self.at_once(message)

        async def slowly(self, message: str) -> str:
            self.log.append(f"begin {message}")
            await asyncio.sleep(0.005)
            self.log.append(f"end {message}")
            return message

        def at_once(self, message: str) -> list[str]:
            self.log.append(message)
            return self.log

    ref = system.spawn(Careful, name="careful")
    slow = ref.ask("slow 1", timeout_s=5)
    ref.tell("slow 2")
    assert await ref.ask("quick", timeout_s=5) == ["begin slow 1", "end slow 1", "begin slow 2", "end slow 2", "quick"]
    assert await slow == "slow 1"


async def test_a_handler_may_return_another_actors_reply(system: System) -> None:
    echo = system.spawn(ThreadedEcho, name="echo")

    class Forward(LoopActor):
        def on_receive(self, message: object) -> object:
            return echo.ask(message, timeout_s=5)

    assert await system.spawn(Forward, name="forward").ask("x", timeout_s=5) == "x"


async def test_control_overtakes_waiting_data(system: System) -> None:
    class Collect(LoopActor):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[object] = []

        def on_receive(self, message: object) -> object:
            self.seen.append(message)
            return tuple(self.seen)

    ref = system.spawn(Collect, name="collect")
    ref.tell("data")
    assert await ref.ask("control", timeout_s=5, control=True) == ("control",)


async def test_a_busy_actor_lets_others_have_their_turn(system: System) -> None:
    order: list[str] = []

    class Busy(LoopActor):
        def on_receive(self, message: object) -> None:
            order.append("busy")

    class Other(LoopActor):
        def on_receive(self, message: object) -> None:
            order.append("other")

    busy, other = system.spawn(Busy, name="busy"), system.spawn(Other, name="other")
    for number in range(1_000):
        busy.tell(number)
    other.tell("x")
    await busy.ask("end", timeout_s=5)
    assert order.index("other") < 200


def test_async_hooks_are_refused_when_the_class_is_made() -> None:
    with pytest.raises(ActorError, match="on_start"):
        type("Wrong", (LoopActor,), {"on_start": _coroutine})
    with pytest.raises(ActorError, match="on_receive"):
        type("Wrong", (ThreadedActor,), {"on_receive": _coroutine})


async def _coroutine(*_: object) -> None: ...


# ---------------------------------------------------------------- deferred replies


@BOTH
async def test_a_deferred_reply_is_set_later_and_the_return_value_is_not_sent(system: System, base: Base) -> None:
    kept: list[ReplyFuture[Any]] = []

    class Later(base):
        def on_receive(self, message: object) -> object:
            if message == "defer":
                reply = self.defer()
                assert reply is not None
                kept.append(reply)
                return "not this"
            assert self.defer() is None or message != "tell"
            kept[0].set("this")
            return None

    ref = system.spawn(Later, name="later")
    deferred = ref.ask("defer", timeout_s=5)
    ref.tell("tell")
    assert await deferred == "this"


@BOTH
async def test_an_open_deferred_reply_fails_when_its_incarnation_ends(system: System, until: Until, base: Base) -> None:
    class Forgetful(base):
        def on_receive(self, message: object) -> object:
            if message == "boom":
                raise ValueError("boom")
            return self.defer()

    ref = system.spawn(Forgetful, name="forgetful", supervisor=system.root)
    before = ref.ask("x", timeout_s=5)
    ref.tell("boom")
    with pytest.raises(ActorDead):
        await before
    after = ref.ask("x", timeout_s=5)
    await until(lambda: ref.incarnation == 1 and ref.inbox.empty())
    await ref.stop()
    with pytest.raises(ActorDead):
        await after


# ---------------------------------------------------------------- stopping


@BOTH
async def test_an_actor_that_stops_itself_leaves_dead_letters(
    system: System, journal: Journal, until: Until, base: Base
) -> None:
    class Quits(base):
        def on_receive(self, message: object) -> object:
            if message == "wait":
                gate.wait(5)
            if message == "quit":
                self.stop()
            return message

    gate = threading.Event()
    ref = system.spawn(Quits, name="quits", quiet=True)
    if base is ThreadedActor:
        ref.tell("wait")
    quitting, waiting = ref.ask("quit", timeout_s=5), ref.ask("never", timeout_s=5)
    ref.tell("never")
    gate.set()
    assert await quitting == "quit"
    with pytest.raises(ActorDead):
        await waiting
    await until(lambda: not ref.is_alive)
    assert [type(record.event) for record in journal.read()] == [DeadLettered] * 2


@BOTH
async def test_stop_handles_what_was_sent_before(system: System, base: Base) -> None:
    seen: list[object] = []

    class Collect(base):
        def on_receive(self, message: object) -> None:
            seen.append(message)

        def on_stop(self) -> None:
            seen.append("on_stop")

    ref = system.spawn(Collect, name="collect")
    for number in range(100):
        ref.tell(number)
    assert await ref.stop()
    assert seen == [*range(100), "on_stop"]
    assert await ref.stop()


async def test_a_handler_that_awaits_for_ever_is_cancelled_at_the_time_out(system: System) -> None:
    log: list[str] = []

    class Stuck(LoopActor):
        async def on_receive(self, message: object) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                log.append("cleaned up")

        def on_stop(self) -> None:
            log.append("on_stop")

    ref = system.spawn(Stuck, name="stuck")
    running, waiting = ref.ask("x", timeout_s=5), ref.ask("y", timeout_s=5)
    await asyncio.sleep(0.005)
    assert not await ref.stop(timeout_s=0.01)
    assert log == ["cleaned up", "on_stop"]
    for reply in (running, waiting):
        with pytest.raises(ActorDead):
            await reply


async def test_a_thread_that_never_returns_is_given_up_and_fenced(system: System, journal: Journal) -> None:
    gate = threading.Event()
    handled: list[object] = []

    class Stuck(ThreadedActor):
        def on_receive(self, message: object) -> object:
            gate.wait(10)
            handled.append(message)
            return message

    ref = system.spawn(Stuck, name="stuck")
    running, waiting = ref.ask("first", timeout_s=5), ref.ask("second", timeout_s=5)
    await asyncio.sleep(0.005)
    assert not await ref.stop(timeout_s=0.01)
    for reply in (running, waiting):
        with pytest.raises(ActorDead):
            await reply
    gate.set()
    thread = next(thread for thread in threading.enumerate() if thread.name.startswith("Stuck"))
    await asyncio.to_thread(thread.join, 5)
    assert handled == ["first"]
    assert sum(isinstance(record.event, ActorStopped) for record in journal.read()) == 1


@BOTH
async def test_a_failing_on_stop_is_an_event_and_the_actor_ends(system: System, journal: Journal, base: Base) -> None:
    class Untidy(base):
        def on_stop(self) -> None:
            raise ValueError("untidy")

    ref = system.spawn(Untidy, name="untidy")
    assert await ref.stop()
    failed = [record.event for record in journal.read() if isinstance(record.event, ActorFailed)]
    assert [event.message_type for event in failed] == ["on_stop"]


async def test_on_stop_runs_after_a_failure_too(system: System, until: Until) -> None:
    ends: list[int] = []

    class Resource(LoopActor):
        def on_receive(self, message: object) -> object:
            raise ValueError("x")

        def on_stop(self) -> None:
            ends.append(self.context.incarnation)

    ref = system.spawn(Resource, name="resource", supervisor=system.root)
    ref.tell("x")
    await until(lambda: ref.incarnation == 1)
    await ref.stop()
    assert ends == [0, 1]


# ---------------------------------------------------------------- watching


@BOTH
async def test_a_watcher_hears_of_the_final_stop_once(system: System, until: Until, base: Base) -> None:
    heard: list[Terminated] = []

    class Watcher(LoopActor):
        def on_receive(self, message: Terminated) -> None:
            heard.append(message)

    class Fails(base):
        def on_receive(self, message: object) -> object:
            raise ValueError("x")

    watcher = system.spawn(Watcher, name="watcher")
    normal, failing = system.spawn(Echo, name="normal"), system.spawn(Fails, name="failing")
    for ref in (normal, failing):
        system.watch(ref, watcher)
    await normal.stop()
    failing.tell("x")
    await until(lambda: len(heard) == 2)
    assert heard == [Terminated("normal", "normal"), Terminated("failing", "failed")]
    system.watch(normal, watcher)
    await until(lambda: len(heard) == 3)
    assert heard[2] == Terminated("normal", "normal")


# ---------------------------------------------------------------- events and Pykka


async def test_lifecycle_events_carry_the_name_and_a_quiet_actor_has_none(system: System, journal: Journal) -> None:
    await system.spawn(Echo, name="loud").stop()
    quiet = system.spawn(Echo, name="quiet", quiet=True)
    await quiet.ask("x", timeout_s=5)
    assert pykka.ActorRegistry.get_by_class(Echo) == []
    await quiet.stop()
    records = list(journal.read())
    assert [record.event for record in records] == [
        ActorStarted(kind="Echo"),
        ActorStopped(reason="normal", unhandled=0),
    ]
    assert {(record.meta.stream, record.meta.actor) for record in records} == {("actor/loud", "loud")}


@pytest.mark.parametrize("kind", [Echo, ThreadedEcho])
async def test_pykkas_reference_can_tell_ask_and_stop(
    system: System, until: Until, kind: type[Echo] | type[ThreadedEcho]
) -> None:
    ref = system.spawn(kind, name="echo")
    (theirs,) = pykka.ActorRegistry.get_by_class(kind)
    theirs.tell("x")
    assert await theirs.ask("y", block=False) == "y"
    assert await asyncio.to_thread(theirs.ask, "z", timeout=5) == "z"
    with pytest.raises(ActorError, match="proxy"):
        await theirs.ask(ProxyCall(("stop",), (), {}), block=False)
    assert await asyncio.to_thread(theirs.stop, timeout=5)
    await until(lambda: not ref.is_alive)
    assert pykka.ActorRegistry.get_by_class(kind) == []
    with pytest.raises(pykka.ActorDeadError):
        theirs.tell("late")


async def test_pykkas_reference_belongs_to_one_incarnation(system: System, until: Until) -> None:
    class Fragile(Echo):
        def on_receive(self, message: object) -> object:
            raise ValueError("x")

    ref = system.spawn(Fragile, name="fragile", supervisor=system.root)
    (old,) = pykka.ActorRegistry.get_by_class(Fragile)
    ref.tell("x")
    await until(lambda: ref.incarnation == 1)
    assert not old.is_alive()
    with pytest.raises(pykka.ActorDeadError):
        old.tell("to the first incarnation")


def test_an_actor_is_not_started_past_its_system() -> None:
    with pytest.raises(ActorError, match=r"System\.spawn"):
        Echo.start()
