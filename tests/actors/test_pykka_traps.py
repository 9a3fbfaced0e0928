"""Each trap of stock Pykka, shown on stock Pykka, beside the same situation here."""

import asyncio
import contextvars
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable

import pykka
import pytest
from pykka._envelope import Envelope

from gptoss.actors.actor import LoopActor, SystemActor, ThreadedActor
from gptoss.actors.future import ReplyFuture
from gptoss.actors.inbox import Inbox, Letter, MailboxSpec
from gptoss.actors.journal import Journal
from gptoss.actors.system import System
from gptoss.errors import ActorDead, ActorError
from gptoss.messages.events import ActorFailed, ActorRestarted, DeadLettered

Until = Callable[[Callable[[], object]], Awaitable[None]]
tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")


class StockEcho(pykka.ThreadingActor):
    use_daemon_thread = True

    def on_receive(self, message: object) -> object:
        if isinstance(message, BaseException):
            raise message
        return tenant.get() if message == "tenant" else message


class Echo(LoopActor):
    def on_receive(self, message: object) -> object:
        if isinstance(message, BaseException):
            raise message
        return tenant.get() if message == "tenant" else message


# ---------------------------------------------------------------- awaiting a reply


async def loop_was_alive_during(future: "pykka.Future[bool]") -> bool:
    """Set the future from a thread to whether the loop ran a callback in the meantime."""
    beat = threading.Event()
    asyncio.get_running_loop().call_later(0.01, beat.set)
    setter = threading.Thread(target=lambda: future.set(beat.wait(0.2)))
    setter.start()
    alive = await future
    await asyncio.to_thread(setter.join)
    return alive


async def test_awaiting_a_stock_future_blocks_the_loop() -> None:
    assert not await loop_was_alive_during(pykka.ThreadingFuture())


async def test_awaiting_our_future_leaves_the_loop_running() -> None:
    assert await loop_was_alive_during(ReplyFuture())


# ---------------------------------------------------------------- put against teardown


def test_a_put_that_loses_against_a_stock_stop_is_never_answered(lone_registry: None) -> None:
    ref = StockEcho.start()
    assert ref.is_alive()  # the sender checked ...
    ref.stop()  # ... the actor stopped ...
    late: pykka.ThreadingFuture[object] = pykka.ThreadingFuture()
    ref.actor_inbox.put(Envelope("late", reply_to=late))  # ... and the sender goes on with its put
    with pytest.raises(pykka.Timeout):
        late.get(timeout=0.1)


async def test_a_put_that_loses_against_our_stop_is_refused(system: System) -> None:
    ref = system.spawn(Echo, name="echo")
    await ref.stop()
    with pytest.raises(ActorDead):
        ref.inbox.put(Letter("late"))
    with pytest.raises(ActorDead):
        await ref.ask("late", timeout_s=5)


def test_no_letter_is_stranded_when_threads_put_while_the_inbox_closes() -> None:
    inbox = Inbox("x", MailboxSpec(capacity=1_000_000))
    accepted: list[int] = []
    go = threading.Barrier(5)

    def send() -> None:
        go.wait()
        count = 0
        try:
            while True:
                inbox.put(Letter(count))
                count += 1
        except ActorDead:
            accepted.append(count)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    go.wait()
    while len(inbox) < 1000:
        pass
    left = inbox.close()
    for thread in threads:
        thread.join()
    assert len(left) == sum(accepted)
    assert inbox.sent == sum(accepted) + 4 == inbox.dead


# ---------------------------------------------------------------- BaseException


def test_a_base_exception_in_a_stock_actor_stops_every_actor(lone_registry: None) -> None:
    bystander, culprit = StockEcho.start(), StockEcho.start()
    culprit.tell(asyncio.CancelledError())
    assert bystander.actor_stopped.wait(2)


@pytest.mark.parametrize("kind", [asyncio.CancelledError, GeneratorExit, SystemExit, BaseException])
async def test_a_base_exception_here_fails_one_actor_only(
    system: System, journal: Journal, until: Until, kind: type[BaseException]
) -> None:
    class Threaded(ThreadedActor):
        def on_receive(self, message: object) -> object:
            if isinstance(message, BaseException):
                raise message
            return message

    foreign = StockEcho.start()
    bystander = system.spawn(Echo, name="bystander")
    culprits = [
        system.spawn(Echo, name="loop", supervisor=system.root),
        system.spawn(Threaded, name="thread", supervisor=system.root),
    ]
    try:
        for culprit in culprits:
            culprit.tell(kind())
        await until(lambda: all(culprit.incarnation == 1 for culprit in culprits))
        assert await bystander.ask("still here", timeout_s=5) == "still here"
        assert [await culprit.ask("again", timeout_s=5) for culprit in culprits] == ["again", "again"]
        assert foreign.is_alive()
        assert foreign.ask("stock") == "stock"
    finally:
        foreign.stop()
    assert sum(isinstance(record.event, ActorFailed) for record in journal.read()) == 2


# ---------------------------------------------------------------- silent failures


def test_a_stock_on_start_failure_is_silent(lone_registry: None) -> None:
    told: list[object] = []

    class Stock(StockEcho):
        def on_start(self) -> None:
            raise ValueError("cannot start")

        def on_failure(self, *failure: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            told.append(failure)

    ref = Stock.start()  # no exception here
    assert ref.actor_stopped.wait(2)
    assert told == []  # and no hook there


@pytest.mark.parametrize("base", [LoopActor, ThreadedActor])
async def test_our_on_start_failure_is_an_event_and_reaches_supervision(
    system: System, journal: Journal, base: type[SystemActor]
) -> None:
    starts: list[int] = []

    class Starts(base):
        def on_start(self) -> None:
            starts.append(self.context.incarnation)
            if self.context.incarnation == 0:
                raise ValueError("cannot start")

        def on_receive(self, message: object) -> object:
            return message

    ref = system.spawn(Starts, name="starts", supervisor=system.root)
    assert await ref.ask("waited through the restart", timeout_s=5) == "waited through the restart"
    assert starts == [0, 1]
    kinds = [type(record.event) for record in journal.read(stream="actor/starts")]
    assert kinds == [ActorFailed, ActorRestarted]


def test_an_exception_during_a_stock_ask_never_reaches_on_failure(lone_registry: None) -> None:
    told: list[object] = []

    class Stock(StockEcho):
        def on_failure(self, *failure: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            told.append(failure)

    ref = Stock.start()
    with pytest.raises(ValueError, match="broken"):
        ref.ask(ValueError("broken"))
    assert ref.ask("the same broken instance") == "the same broken instance"
    assert told == []


async def test_an_exception_during_our_ask_reaches_the_asker_and_supervision(system: System, until: Until) -> None:
    ref = system.spawn(Echo, name="echo", supervisor=system.root)
    with pytest.raises(ActorError, match="ValueError"):
        await ref.ask(ValueError("broken"), timeout_s=5)
    await until(lambda: ref.incarnation == 1)


# ---------------------------------------------------------------- context


def test_context_variables_do_not_cross_a_stock_tell(lone_registry: None) -> None:
    ref = StockEcho.start()
    token = tenant.set("alice")
    try:
        assert ref.ask("tenant") == "nobody"
    finally:
        tenant.reset(token)


async def test_here_they_do_not_leak_either_and_the_letter_carries_what_matters(
    system: System, journal: Journal
) -> None:
    class Recorder(LoopActor):
        def on_receive(self, message: object) -> object:
            self.record(DeadLettered(to="x", message_type="y", reason="dead"))
            return tenant.get()

    ref = system.spawn(Recorder, name="recorder")
    tenant.set("alice")
    assert await ref.ask("hello", timeout_s=5, cause=7, correlation="req_1") == "nobody"
    (record,) = journal.read(stream="recorder")
    assert (record.meta.cause, record.meta.correlation, record.meta.actor) == (7, "req_1", "recorder")


# ---------------------------------------------------------------- pinned frames


class Tensor:
    """Stands for device memory."""


def test_a_stock_reply_pins_the_frames_of_its_exception(lone_registry: None) -> None:
    seen: list[weakref.ref[Tensor]] = []

    class Stock(pykka.ThreadingActor):
        use_daemon_thread = True

        def on_receive(self, message: object) -> object:
            tensor = Tensor()
            seen.append(weakref.ref(tensor))
            raise ValueError(str(message))

    ref = Stock.start()
    reply = ref.ask("x", block=False)
    with pytest.raises(ValueError, match="x"):
        reply.get(timeout=2)
    ref.stop()
    gc.collect()
    assert seen[0]() is not None


@pytest.mark.parametrize("error", [ValueError("x"), ActorError("a refusal")])
async def test_our_reply_lets_the_frames_go(system: System, until: Until, error: Exception) -> None:
    seen: list[weakref.ref[Tensor]] = []

    class Failing(LoopActor):
        def on_receive(self, message: object) -> object:
            tensor = Tensor()
            seen.append(weakref.ref(tensor))
            try:
                raise KeyError("first")
            except KeyError:
                raise type(error)("x") from None

    reply = system.spawn(Failing, name="failing").ask("x", timeout_s=5)
    await until(reply.done)
    gc.collect()
    assert isinstance(reply.error(), ActorError)
    assert seen[0]() is None
