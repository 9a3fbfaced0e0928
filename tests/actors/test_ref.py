"""Addresses: what becomes of a message that cannot be delivered, and of an ask that is not answered."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import pytest

from gptoss.actors.actor import LoopActor, SystemActor, ThreadedActor
from gptoss.actors.inbox import MailboxSpec
from gptoss.actors.journal import Journal
from gptoss.actors.system import System
from gptoss.errors import ActorDead, ActorError, AskTimeout, MailboxFull, QueueFull
from gptoss.messages.events import ActorFailed, DeadLettered

Until = Callable[[Callable[[], object]], Awaitable[None]]


class Gate(LoopActor):
    """Handles one message at a time, each when the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = asyncio.Event()
        self.seen: list[object] = []

    async def on_receive(self, message: object) -> object:
        await self.opened.wait()
        self.seen.append(message)
        return message


class Numbered(NamedTuple):
    sender: int
    number: int


def dead_letters(journal: Journal) -> list[tuple[str, str, str]]:
    return [
        (record.event.to, record.event.message_type, record.event.reason)
        for record in journal.read()
        if isinstance(record.event, DeadLettered)
    ]


async def test_a_tell_to_a_dead_actor_is_a_dead_letter_with_its_cause(system: System, journal: Journal) -> None:
    ref = system.spawn(Gate, name="gate", quiet=True)
    await ref.stop()
    ref.tell("late", cause=4, correlation="req_1")
    assert dead_letters(journal) == [("gate", "str", "dead")]
    (record,) = journal.read()
    assert (record.meta.stream, record.meta.cause, record.meta.correlation) == ("actor/gate", 4, "req_1")
    assert not ref.is_alive


async def test_a_full_mailbox_refuses_asks_and_buries_tells(system: System, journal: Journal, until: Until) -> None:
    ref = system.spawn(Gate, name="gate", mailbox=MailboxSpec(capacity=1))
    ref.tell("handled")
    await until(ref.inbox.empty)
    ref.tell("waits")
    ref.tell("refused")
    with pytest.raises(MailboxFull):
        await ref.ask("refused too", timeout_s=5)
    assert dead_letters(journal) == [("gate", "str", "full")] * 2
    await ref.stop(timeout_s=0)


async def test_a_shed_ask_is_answered(system: System, journal: Journal, until: Until) -> None:
    ref = system.spawn(Gate, name="gate", mailbox=MailboxSpec(capacity=1, policy="shed"))
    ref.tell("handled")
    await until(ref.inbox.empty)
    oldest = ref.ask("oldest", timeout_s=5)
    ref.tell("newest")
    with pytest.raises(MailboxFull, match="shed"):
        await oldest
    assert dead_letters(journal) == [("gate", "str", "shed")]
    await ref.stop(timeout_s=0)


async def test_tell_wait_waits_for_room_and_loses_nothing(system: System, until: Until) -> None:
    class Slow(LoopActor):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        async def on_receive(self, message: object) -> object:
            if isinstance(message, int):
                await asyncio.sleep(0)
                self.seen.append(message)
            return tuple(self.seen)

    ref = system.spawn(Slow, name="slow", mailbox=MailboxSpec(capacity=2, policy="wait"))
    accepted = await asyncio.gather(*(ref.tell_wait(number) for number in range(50)))
    assert all(accepted)
    await until(ref.inbox.empty)
    assert sorted(await ref.ask("seen", timeout_s=5)) == list(range(50))


async def test_tell_wait_gives_up_with_a_dead_letter(system: System, journal: Journal, until: Until) -> None:
    ref = system.spawn(Gate, name="gate", mailbox=MailboxSpec(capacity=1, policy="wait"))
    ref.tell("handled")
    await until(ref.inbox.empty)
    ref.tell("waits")
    assert not await ref.tell_wait("never", timeout_s=0.01)
    assert dead_letters(journal) == [("gate", "str", "full")]
    waiting = asyncio.ensure_future(ref.tell_wait("the actor dies first"))
    await asyncio.sleep(0)
    await ref.stop(timeout_s=0)
    assert not await waiting
    assert dead_letters(journal)[1:].count(("gate", "str", "dead")) == 2  # "waits" and "the actor dies first"


async def test_an_ask_times_out_at_its_deadline_and_is_not_handled_later(
    system: System, journal: Journal, until: Until
) -> None:
    gates: list[Gate] = []

    def factory() -> Gate:
        gates.append(Gate())
        return gates[-1]

    ref = system.spawn(factory, name="gate")
    ref.tell("first")
    with pytest.raises(AskTimeout, match=r"gate did not answer within 0\.01 s"):
        await ref.ask("expired", timeout_s=0.01)
    ref.tell("third")
    gates[0].opened.set()
    await until(lambda: len(gates[0].seen) == 2)
    assert gates[0].seen == ["first", "third"]
    assert dead_letters(journal) == [("gate", "str", "expired")]


async def test_a_slow_handlers_late_reply_is_dropped(system: System, until: Until) -> None:
    gates: list[Gate] = []

    def factory() -> Gate:
        gates.append(Gate())
        return gates[-1]

    ref = system.spawn(factory, name="gate")
    with pytest.raises(AskTimeout):
        await ref.ask("slow", timeout_s=0.01)
    gates[0].opened.set()
    await until(lambda: gates[0].seen == ["slow"])
    assert await ref.ask("next", timeout_s=5) == "next"


@pytest.mark.parametrize("base", [LoopActor, ThreadedActor])
async def test_a_refusal_answers_an_ask_and_is_no_failure(
    system: System, journal: Journal, base: type[SystemActor]
) -> None:
    class Refusing(base):
        def on_receive(self, message: object) -> object:
            raise QueueFull("no place left", retry_after_s=3)

    ref = system.spawn(Refusing, name="refusing", supervisor=system.root)
    for _ in range(2):
        with pytest.raises(QueueFull) as refusal:
            await ref.ask("x", timeout_s=5)
        assert refusal.value.retry_after_s == 3
    assert ref.incarnation == 0
    assert not any(isinstance(record.event, ActorFailed) for record in journal.read())


async def test_a_refusal_of_a_tell_is_a_failure(system: System, until: Until) -> None:
    class Refusing(LoopActor):
        def on_receive(self, message: object) -> object:
            raise QueueFull("nobody hears this")

    ref = system.spawn(Refusing, name="refusing", supervisor=system.root)
    ref.tell("x")
    await until(lambda: ref.incarnation == 1)


async def test_a_failure_in_the_journal_never_quotes_the_exception(system: System, journal: Journal) -> None:
    class Leaky(LoopActor):
        def on_receive(self, message: object) -> object:
            raise ValueError(f"prompt was {message}")

    with pytest.raises(ActorError) as failure:
        await system.spawn(Leaky, name="leaky").ask("canary", timeout_s=5)
    (failed,) = [record.event for record in journal.read() if isinstance(record.event, ActorFailed)]
    assert failed.code == "actor_error"
    assert failed.error.startswith("ValueError at test_ref.py:")
    assert "canary" not in failed.error + failure.value.message


async def test_threads_tell_the_loop_in_order_for_each_sender(system: System) -> None:
    class Collect(LoopActor):
        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[int, list[int]] = {sender: [] for sender in range(4)}

        def on_receive(self, message: object) -> object:
            if isinstance(message, Numbered):
                self.seen[message.sender].append(message.number)
            return self.seen

    ref = system.spawn(Collect, name="collect", mailbox=MailboxSpec(capacity=100_000))

    def send(sender: int) -> None:
        for number in range(2_000):
            ref.tell(Numbered(sender, number))

    threads = [threading.Thread(target=send, args=(sender,)) for sender in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert await ref.ask("seen", timeout_s=5) == {sender: list(range(2_000)) for sender in range(4)}


async def test_a_thread_can_ask_and_get(system: System) -> None:
    class Echo(LoopActor):
        def on_receive(self, message: object) -> object:
            return message

    ref = system.spawn(Echo, name="echo")
    assert await asyncio.to_thread(lambda: ref.ask("x", timeout_s=5).get(timeout=5)) == "x"


async def test_every_ask_resolves_when_actors_stop_and_restart_under_load(system: System) -> None:
    class Moody(LoopActor):
        def on_receive(self, message: object) -> object:
            if message == 13:
                raise ValueError("moody")
            return message

    ref = system.spawn(Moody, name="moody", supervisor=system.root)
    asks = [ref.ask(number % 50, timeout_s=5) for number in range(200)]
    await asyncio.sleep(0)
    stopping = asyncio.ensure_future(ref.stop())
    asks += [ref.ask("late", timeout_s=5) for _ in range(10)]
    outcomes = await asyncio.gather(*asks, return_exceptions=True)
    await stopping
    assert {type(outcome) for outcome in outcomes} <= {int, ActorError, ActorDead}
    assert ref.inbox.sent == 210 == ref.inbox.taken + ref.inbox.dead


async def test_asks_after_the_loop_is_gone_fail_at_once(journal: Journal, system: System) -> None:
    class Echo(LoopActor):
        def on_receive(self, message: object) -> object:
            return message

    ref = system.spawn(Echo, name="echo")
    await system.stop()
    with pytest.raises(ActorDead):
        await ref.ask("x", timeout_s=5)
    assert dead_letters(journal) == [("echo", "str", "dead")]
