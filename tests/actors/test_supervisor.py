"""Supervision: restarts, backoff, intensity, order."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from gptoss.actors.actor import LoopActor, SystemActor, Terminated, ThreadedActor
from gptoss.actors.journal import Journal
from gptoss.actors.supervisor import Supervision
from gptoss.actors.system import System
from gptoss.clock import SystemClock, SystemIds
from gptoss.errors import ActorDead, ActorError
from gptoss.messages.events import ActorFailed, ActorRestarted, ActorStopped, SupervisorEscalated

Until = Callable[[Callable[[], object]], Awaitable[None]]
QUICK = Supervision(backoff_s=0.001, backoff_max_s=0.001)


class Fragile(LoopActor):
    def on_receive(self, message: object) -> object:
        if message == "boom":
            raise ValueError("boom")
        return self.context.incarnation


class FragileThread(ThreadedActor):
    def on_receive(self, message: object) -> object:
        if message == "boom":
            raise ValueError("boom")
        return self.context.incarnation


@pytest.mark.parametrize("kind", [Fragile, FragileThread])
async def test_the_mailbox_survives_a_restart_and_the_failing_letter_is_consumed(
    system: System, journal: Journal, kind: type[Fragile] | type[FragileThread]
) -> None:
    ref = system.spawn(kind, name="fragile", supervisor=system.supervisor("s", QUICK))
    failing, waiting = ref.ask("boom", timeout_s=5), ref.ask("x", timeout_s=5)
    with pytest.raises(ActorError):
        await failing
    assert await waiting == 1 == ref.incarnation
    records = [record for record in journal.read() if isinstance(record.event, ActorFailed | ActorRestarted)]
    assert [(type(record.event), record.meta.incarnation) for record in records] == [
        (ActorFailed, 0),
        (ActorRestarted, 1),
    ]


async def test_an_unsupervised_actor_stops_when_it_fails(system: System, journal: Journal) -> None:
    ref = system.spawn(Fragile, name="fragile", quiet=True)
    failing, waiting = ref.ask("boom", timeout_s=5), ref.ask("x", timeout_s=5)
    with pytest.raises(ActorError):
        await failing
    with pytest.raises(ActorDead):
        await waiting
    stopped = [record.event for record in journal.read() if isinstance(record.event, ActorStopped)]
    assert stopped == [ActorStopped(reason="failed", unhandled=1)]


async def test_a_failing_constructor_counts_as_a_failure(system: System, until: Until) -> None:
    made: list[int] = []

    def factory() -> Fragile:
        made.append(1)
        if len(made) == 2:
            raise ValueError("cannot build")
        return Fragile()

    ref = system.spawn(factory, name="fragile", supervisor=system.supervisor("s", QUICK))
    ref.tell("boom")
    await until(lambda: ref.incarnation == 2)
    assert await ref.ask("x", timeout_s=5) == 2


async def test_too_many_failures_escalate(system: System, journal: Journal, until: Until) -> None:
    escalated: list[str] = []
    heard: list[Terminated] = []

    class Watcher(LoopActor):
        def on_receive(self, message: Terminated) -> None:
            heard.append(message)

    system.on_escalated(escalated.append)
    supervisor = system.supervisor("guard", Supervision(max_restarts=2, backoff_s=0.001))
    ref = system.spawn(Fragile, name="fragile", supervisor=supervisor)
    sibling = system.spawn(Fragile, name="sibling", supervisor=supervisor)
    system.watch(ref, system.spawn(Watcher, name="watcher"))
    for _ in range(3):
        ref.tell("boom")
    waiting = ref.ask("x", timeout_s=5)
    with pytest.raises(ActorDead):
        await waiting
    await until(lambda: escalated and heard)
    assert escalated == ["fragile"]
    assert heard == [Terminated("fragile", "escalated")]
    assert not ref.is_alive
    assert await sibling.ask("x", timeout_s=5) == 0
    assert supervisor.children == ("sibling",)
    (record,) = [record for record in journal.read() if isinstance(record.event, SupervisorEscalated)]
    assert record.event == SupervisorEscalated(child="fragile", restarts=2, within_s=60.0)


async def test_failures_outside_the_window_are_forgotten(journal: Journal, until: Until) -> None:
    class StepClock(SystemClock):
        now = 0

        def monotonic_ns(self) -> int:
            return self.now

    class NoRng:
        def uniform(self) -> float:
            return 0.0

        def seed63(self) -> int:
            return 0

    clock = StepClock()
    async with System(name="t", clock=clock, ids=SystemIds(), rng=NoRng(), journal=journal) as system:
        supervisor = system.supervisor("s", Supervision(max_restarts=1, within_s=10.0))
        ref = system.spawn(Fragile, name="fragile", supervisor=supervisor)
        for incarnation in range(1, 6):
            ref.tell("boom")
            await until(lambda incarnation=incarnation: ref.incarnation == incarnation)
            clock.now += 11_000_000_000
        assert ref.is_alive


async def test_backoff_doubles_up_to_its_bound_with_jitter(journal: Journal, until: Until) -> None:
    class Draws:
        draw = 0.5

        def uniform(self) -> float:
            return self.draw

        def seed63(self) -> int:
            return 0

    async with System(name="t", clock=SystemClock(), ids=SystemIds(), rng=Draws(), journal=journal) as system:
        supervision = Supervision(max_restarts=5, backoff_s=0.002, backoff_max_s=0.008)
        ref = system.spawn(Fragile, name="fragile", supervisor=system.supervisor("s", supervision))
        for incarnation in range(1, 6):
            ref.tell("boom")
            await until(lambda incarnation=incarnation: ref.incarnation == incarnation)
        await ref.ask("x", timeout_s=5)
    waits = [record.event.backoff_ms for record in journal.read() if isinstance(record.event, ActorRestarted)]
    assert waits == pytest.approx([1.0, 2.0, 4.0, 4.0, 4.0])


async def test_rest_for_one_restarts_the_later_siblings_in_order(system: System, until: Until) -> None:
    log: list[str] = []

    def kind(base: type[SystemActor]) -> type[SystemActor]:
        class Logging(base):
            def on_start(self) -> None:
                log.append(f"start {self.context.name}{self.context.incarnation}")

            def on_stop(self) -> None:
                log.append(f"stop {self.context.name}{self.context.incarnation}")

            def on_receive(self, message: object) -> object:
                if message == "boom":
                    raise ValueError("boom")
                return self.context.incarnation

        return Logging

    supervisor = system.supervisor("chain", Supervision(strategy="rest_for_one", backoff_s=0.001))
    bases = (LoopActor, LoopActor, ThreadedActor, LoopActor)
    refs = [
        system.spawn(kind(base), name=name, supervisor=supervisor) for name, base in zip("abcd", bases, strict=True)
    ]
    assert [await ref.ask("x", timeout_s=5) for ref in refs] == [0] * 4
    log.clear()
    kept = refs[3].ask("sent while d goes down", timeout_s=5)
    refs[1].tell("boom", control=True)
    assert await kept in {0, 1}
    await until(lambda: [ref.incarnation for ref in refs] == [0, 1, 1, 1])
    assert [await ref.ask("x", timeout_s=5) for ref in refs] == [0, 1, 1, 1]
    assert log[:3] == ["stop b0", "stop d0", "stop c0"]
    starts = [line for line in log if line.startswith("start")]
    assert sorted(starts) == ["start b1", "start c1", "start d1"]
    assert starts.index("start b1") < starts.index("start d1")  # c has a thread of its own and starts when it likes


async def test_a_sibling_that_fails_at_the_same_time_is_restarted_once(system: System, until: Until) -> None:
    supervisor = system.supervisor("chain", Supervision(strategy="rest_for_one", backoff_s=0.01))
    refs = [system.spawn(Fragile, name=name, supervisor=supervisor) for name in "abc"]
    for ref in reversed(refs):
        ref.tell("boom")
    await until(lambda: all(ref.incarnation >= 1 for ref in refs))
    assert [await ref.ask("x", timeout_s=5) for ref in refs] == [1, 1, 1]


async def test_a_sibling_that_does_not_go_down_is_replaced_and_fenced(system: System, until: Until) -> None:
    gate = threading.Event()
    handled: list[tuple[int, object]] = []

    class Stuck(ThreadedActor):
        def on_receive(self, message: object) -> object:
            if message == "stuck":
                gate.wait(10)
            handled.append((self.context.incarnation, message))
            return self.context.incarnation

    supervisor = system.supervisor("chain", Supervision(strategy="rest_for_one", backoff_s=0.001))
    first = system.spawn(Fragile, name="first", supervisor=supervisor)
    second = system.spawn(Stuck, name="second", supervisor=supervisor)
    stuck = second.ask("stuck", timeout_s=10)
    await until(second.inbox.empty)
    first.tell("boom")
    with pytest.raises(ActorDead):
        await stuck
    assert await second.ask("x", timeout_s=5) == 1
    gate.set()
    await until(lambda: len(handled) == 2)
    second.tell("y")
    await until(lambda: len(handled) == 3)
    assert handled == [(1, "x"), (0, "stuck"), (1, "y")]


async def test_stopping_an_actor_that_waits_for_its_restart_ends_it(system: System, until: Until) -> None:
    supervisor = system.supervisor("s", Supervision(backoff_s=60.0, backoff_max_s=60.0))
    ref = system.spawn(Fragile, name="fragile", supervisor=supervisor)
    with pytest.raises(ActorError):
        await ref.ask("boom", timeout_s=5)
    waiting = ref.ask("x", timeout_s=5)
    assert await ref.stop()
    with pytest.raises(ActorDead):
        await waiting
    successor = system.spawn(Fragile, name="fragile", supervisor=supervisor)
    await asyncio.sleep(0.01)
    assert await successor.ask("x", timeout_s=5) == 0
