"""A system owns its actors, tasks, timers and threads, and nothing else."""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable

import pykka
import pytest

from gptoss.actors.actor import LoopActor, ThreadedActor
from gptoss.actors.journal import Journal
from gptoss.actors.supervisor import Supervision
from gptoss.actors.system import System
from gptoss.clock import SystemClock, SystemIds, SystemRng
from gptoss.errors import ActorDead, ActorError
from gptoss.messages.events import ActorFailed, ActorStopped

Until = Callable[[Callable[[], object]], Awaitable[None]]


class Echo(LoopActor):
    def on_receive(self, message: object) -> object:
        return message


def new_system(journal: Journal) -> System:
    return System(name="t", clock=SystemClock(), ids=SystemIds(), rng=SystemRng(), journal=journal)


async def test_stop_takes_actors_down_in_reverse_order(system: System, journal: Journal) -> None:
    for name in "abc":
        system.spawn(Echo, name=name)
    await system.stop()
    stopped = [record.meta.actor for record in journal.read() if isinstance(record.event, ActorStopped)]
    assert stopped == ["c", "b", "a"]


async def test_stop_touches_no_foreign_pykka_actor_and_no_other_system(system: System, journal: Journal) -> None:
    class Foreign(pykka.ThreadingActor):
        def on_receive(self, message: object) -> object:
            return message

    foreign = Foreign.start()
    try:
        async with new_system(journal) as other:
            neighbour = other.spawn(Echo, name="echo")
            system.spawn(Echo, name="echo")
            await system.stop()
            assert foreign.ask("x", timeout=5) == "x"
            assert await neighbour.ask("x", timeout_s=5) == "x"
    finally:
        foreign.stop()
    assert pykka.ActorRegistry.get_all() == []


async def test_stop_answers_everybody_within_its_time(journal: Journal) -> None:
    class Stuck(LoopActor):
        async def on_receive(self, message: object) -> None:
            await asyncio.Event().wait()

    class StuckThread(ThreadedActor):
        def on_receive(self, message: object) -> None:
            gate.wait(10)

    gate = threading.Event()
    system = new_system(journal)
    await system.start()
    refs = [system.spawn(Stuck, name="loop"), system.spawn(StuckThread, name="thread")]
    asks = [ref.ask(number, timeout_s=60) for ref in refs for number in range(3)]
    await asyncio.sleep(0.01)
    async with asyncio.timeout(5):
        await system.stop(timeout_s=0.05)
    outcomes = await asyncio.gather(*asks, return_exceptions=True)
    gate.set()
    assert {type(outcome) for outcome in outcomes} == {ActorDead}
    assert system.mailbox_depths() == {}


async def test_stop_is_idempotent_and_concurrent_calls_wait_for_the_same_end(system: System) -> None:
    ref = system.spawn(Echo, name="echo")
    await asyncio.gather(system.stop(), system.stop())
    await system.stop()
    assert not ref.is_alive


async def test_an_actor_may_stop_its_own_system(journal: Journal, until: Until) -> None:
    system = new_system(journal)
    await system.start()

    class Ends(LoopActor):
        async def on_receive(self, message: object) -> None:
            await self.context.system.stop(timeout_s=0.05)

    ref = system.spawn(Ends, name="ends")
    ref.tell("x")
    await until(lambda: not ref.is_alive)
    await system.stop()


async def test_nothing_new_starts_while_stopping(system: System) -> None:
    await system.stop()
    with pytest.raises(ActorError, match="stopping"):
        system.spawn(Echo, name="late")
    with pytest.raises(ActorError, match="stopping"):
        await system.run_in_thread(int)

    async def work() -> None: ...

    with pytest.raises(ActorError, match="stopping"):
        system.run_task(work(), name="late")


async def test_a_failure_while_stopping_is_not_restarted(system: System, journal: Journal) -> None:
    class Bad(LoopActor):
        def on_receive(self, message: object) -> None:
            raise ValueError("x")

    ref = system.spawn(Bad, name="bad", supervisor=system.supervisor("s", Supervision(backoff_s=0.0)))
    ref.tell("x")
    await system.stop()
    assert not ref.is_alive
    assert ref.incarnation == 0
    assert [record.event.reason for record in journal.read() if isinstance(record.event, ActorStopped)] == ["failed"]


async def test_a_system_is_used_between_start_and_stop_only(journal: Journal) -> None:
    system = new_system(journal)
    with pytest.raises(ActorError, match="not started"):
        system.spawn(Echo, name="early")
    with pytest.raises(ActorError, match="not started"):
        _ = system.root
    await system.start()
    with pytest.raises(ActorError, match="started before"):
        await system.start()
    await system.stop()
    await new_system(journal).stop()


async def test_names_are_unique_among_the_living(system: System) -> None:
    first = system.spawn(Echo, name="echo")
    with pytest.raises(ActorError, match="'echo' is running"):
        system.spawn(Echo, name="echo")
    await first.stop()
    second = system.spawn(Echo, name="echo")
    assert await second.ask("x", timeout_s=5) == "x"
    with pytest.raises(ActorDead):
        await first.ask("x", timeout_s=5)


async def test_mailbox_depths_name_every_living_actor(system: System) -> None:
    ref = system.spawn(Echo, name="echo")
    for number in range(3):
        ref.tell(number)
    assert system.mailbox_depths() == {"echo": 3}
    await ref.ask("x", timeout_s=5)
    assert system.mailbox_depths() == {"echo": 0}


# ---------------------------------------------------------------- tasks and threads


async def test_a_failing_task_is_an_event_and_its_result_none(system: System, journal: Journal) -> None:
    async def fail() -> int:
        raise ValueError("x")

    assert await system.run_task(fail(), name="work") is None
    (record,) = journal.read()
    assert isinstance(record.event, ActorFailed)
    assert record.meta.stream == "actor/task/work"


async def test_owned_tasks_are_cancelled_with_the_system(system: System, journal: Journal) -> None:
    task = system.run_task(asyncio.sleep(60), name="sleeper")
    await asyncio.sleep(0)
    await system.stop()
    assert task.cancelled()
    assert list(journal.read()) == []


async def test_blocking_work_runs_off_the_loop(system: System) -> None:
    def where(prefix: str) -> str:
        return prefix + threading.current_thread().name

    name = await system.run_in_thread(where, "on ")
    assert name.startswith("on test_")

    def fail() -> None:
        raise ValueError("to the caller")

    with pytest.raises(ValueError, match="to the caller"):
        await system.run_in_thread(fail)


# ---------------------------------------------------------------- timers


class Collect(LoopActor):
    def __init__(self, seen: list[object]) -> None:
        super().__init__()
        self.seen = seen

    def on_receive(self, message: object) -> None:
        self.seen.append(message)


async def test_a_timer_makes_its_message_when_it_fires(system: System, until: Until) -> None:
    seen: list[object] = []
    ref = system.spawn(lambda: Collect(seen), name="collect")
    value = "before"
    system.send_after(0.005, ref, lambda: value)
    value = "at fire time"
    await until(lambda: seen)
    assert seen == ["at fire time"]


async def test_a_periodic_timer_goes_on_until_cancelled(system: System, until: Until) -> None:
    seen: list[object] = []
    ref = system.spawn(lambda: Collect(seen), name="collect")
    timer = system.send_every(0.001, ref, lambda: "tick")
    await until(lambda: len(seen) >= 3)
    timer.cancel()
    timer.cancel()
    await ref.ask("end", timeout_s=5)
    count = len(seen)
    await asyncio.sleep(0.01)
    assert len(seen) == count


async def test_a_cancelled_timer_never_fires(system: System) -> None:
    seen: list[object] = []
    ref = system.spawn(lambda: Collect(seen), name="collect")
    system.send_after(0.002, ref, lambda: "never").cancel()
    await asyncio.sleep(0.01)
    assert seen == []


async def test_a_threaded_actor_can_set_and_cancel_timers(system: System, until: Until) -> None:
    seen: list[object] = []
    ref = system.spawn(lambda: Collect(seen), name="collect")

    def arm() -> None:
        system.send_after(0.001, ref, lambda: "never").cancel()
        system.send_after(0.005, ref, lambda: "from a thread")

    await asyncio.to_thread(arm)
    await until(lambda: seen)
    assert seen == ["from a thread"]


async def test_a_failing_message_factory_is_an_event(system: System, journal: Journal, until: Until) -> None:
    def fail() -> object:
        raise ValueError("x")

    ref = system.spawn(Echo, name="echo")
    system.send_every(0.001, ref, fail)
    await until(lambda: any(isinstance(record.event, ActorFailed) for record in journal.read()))
    await asyncio.sleep(0.005)
    failed = [record.event for record in journal.read() if isinstance(record.event, ActorFailed)]
    assert [event.message_type for event in failed] == ["timer"]
    assert ref.is_alive


async def test_a_task_that_is_cancelled_before_it_begins_is_closed(system: System) -> None:
    coroutine = asyncio.sleep(60)
    system.run_task(coroutine, name="late").cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED
