"""What a message costs: this runtime beside stock Pykka, in one process and one run.

    python benchmarks/bench_actors.py [--rounds 5] [--messages 100000] [--json]

Each round measures ours, stock, ours, stock (A B A B), so that a machine that slows down hurts both; the table shows
medians, with the fastest and slowest sample. Times are wall time for each message, sending and handling included.
"Stock" is Pykka's ThreadingActor: each message crosses threads, which is what Pykka offers. ``floor`` is bare asyncio
doing the same hand-over without an actor.
"""

import argparse
import asyncio
import json
import platform
import statistics
import threading
import time
from collections.abc import Awaitable, Callable

import pykka

from gptoss.actors.actor import LoopActor, ThreadedActor
from gptoss.actors.inbox import MailboxSpec
from gptoss.actors.ref import Ref
from gptoss.actors.system import System
from gptoss.clock import SystemClock, SystemIds, SystemRng
from gptoss.telemetry.memory_journal import MemoryJournal

MAILBOX = MailboxSpec(capacity=10_000_000)
CHAIN = 5
SENDERS = 4
Sample = Callable[[int], Awaitable[float]]


class Count(LoopActor):
    """Counts; answers an ask with the count."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def on_receive(self, message: object) -> int:
        self.count += 1
        return self.count


class ThreadedCount(ThreadedActor):
    """The same on a thread."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def on_receive(self, message: object) -> int:
        self.count += 1
        return self.count


class StockCount(pykka.ThreadingActor):
    """The same on stock Pykka."""

    use_daemon_thread = True

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def on_receive(self, message: object) -> int:
        self.count += 1
        return self.count


class Link(LoopActor):
    """Passes a message on to the next link."""

    def __init__(self, following: Ref[object]) -> None:
        super().__init__()
        self.following = following

    def on_receive(self, message: object) -> None:
        self.following.tell(message)


class StockLink(pykka.ThreadingActor):
    """The same on stock Pykka."""

    use_daemon_thread = True

    def __init__(self, following: "pykka.ActorRef[StockCount]") -> None:
        super().__init__()
        self.following = following

    def on_receive(self, message: object) -> None:
        self.following.tell(message)


def send_from_threads(tell: Callable[[int], object], messages: int) -> None:
    def send() -> None:
        for number in range(messages // SENDERS):
            tell(number)

    threads = [threading.Thread(target=send) for _ in range(SENDERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Ours:
    """The runtime of this package."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.number = 0

    def spawn(self, factory: Callable[[], LoopActor | ThreadedActor]) -> Ref[object]:
        self.number += 1
        return self.system.spawn(factory, name=f"a{self.number}", mailbox=MAILBOX, quiet=True)

    async def tell(self, messages: int) -> float:
        return await self._tell(self.spawn(Count), messages)

    async def tell_threaded(self, messages: int) -> float:
        return await self._tell(self.spawn(ThreadedCount), messages)

    async def _tell(self, ref: Ref[object], messages: int) -> float:
        await ref.ask("warm", timeout_s=60)
        began = time.perf_counter()
        for number in range(messages):
            ref.tell(number)
        count = await ref.ask("end", timeout_s=60)
        took = time.perf_counter() - began
        await ref.stop()
        assert count == messages + 2
        return took / messages

    async def ask(self, messages: int) -> float:
        messages //= 10
        ref = self.spawn(Count)
        await ref.ask("warm", timeout_s=60)
        began = time.perf_counter()
        for number in range(messages):
            await ref.ask(number, timeout_s=60)
        took = time.perf_counter() - began
        await ref.stop()
        return took / messages

    async def cross_thread(self, messages: int) -> float:
        ref = self.spawn(Count)
        await ref.ask("warm", timeout_s=60)
        began = time.perf_counter()
        await asyncio.to_thread(send_from_threads, ref.tell, messages)
        await ref.ask("end", timeout_s=60)
        took = time.perf_counter() - began
        await ref.stop()
        return took / messages

    async def chain(self, messages: int) -> float:
        refs = [self.spawn(Count)]
        for _ in range(CHAIN - 1):
            following = refs[-1]
            refs.append(self.spawn(lambda following=following: Link(following)))
        await asyncio.sleep(0)
        began = time.perf_counter()
        for number in range(messages // CHAIN):
            refs[-1].tell(number)
        while refs[0].inbox.taken < messages // CHAIN:
            await asyncio.sleep(0)
        took = time.perf_counter() - began
        for ref in refs:
            await ref.stop()
        return took / (messages // CHAIN)

    async def spawn_stop(self, messages: int) -> float:
        messages //= 50
        began = time.perf_counter()
        for _ in range(messages):
            await self.spawn(Count).stop()
        return (time.perf_counter() - began) / messages

    async def spawn_stop_among_500(self, messages: int) -> float:
        others = [self.spawn(Count) for _ in range(500)]
        await asyncio.sleep(0)
        took = await self.spawn_stop(messages)
        for other in others:
            await other.stop()
        return took


class Stock:
    """Pykka as it comes. Its calls block, so they run on this thread."""

    async def tell(self, messages: int) -> float:
        ref = StockCount.start()
        began = time.perf_counter()
        for number in range(messages):
            ref.tell(number)
        ref.ask("end")
        took = time.perf_counter() - began
        ref.stop()
        return took / messages

    tell_threaded = tell

    async def ask(self, messages: int) -> float:
        messages //= 10
        ref = StockCount.start()
        began = time.perf_counter()
        for number in range(messages):
            ref.ask(number)
        took = time.perf_counter() - began
        ref.stop()
        return took / messages

    async def cross_thread(self, messages: int) -> float:
        ref = StockCount.start()
        began = time.perf_counter()
        send_from_threads(ref.tell, messages)
        ref.ask("end")
        took = time.perf_counter() - began
        ref.stop()
        return took / messages

    async def chain(self, messages: int) -> float:
        counter = StockCount.start()
        refs: list[pykka.ActorRef[StockCount] | pykka.ActorRef[StockLink]] = [counter]
        for _ in range(CHAIN - 1):
            refs.append(StockLink.start(refs[-1]))
        began = time.perf_counter()
        for number in range(messages // CHAIN):
            refs[-1].tell(number)
        for ref in reversed(refs):
            ref.ask("end", block=ref is counter)
        counted = 0
        while counted < messages // CHAIN:
            counted = counter.ask("count")
        took = time.perf_counter() - began
        for ref in reversed(refs):
            ref.stop()
        return took / (messages // CHAIN)

    async def spawn_stop(self, messages: int) -> float:
        messages //= 50
        began = time.perf_counter()
        for _ in range(messages):
            StockCount.start().stop()
        return (time.perf_counter() - began) / messages

    async def spawn_stop_among_500(self, messages: int) -> float:
        others = [StockCount.start() for _ in range(500)]
        took = await self.spawn_stop(messages)
        for other in others:
            other.stop()
        return took


async def floor(messages: int) -> float:
    """A future resolved by the next loop turn, awaited, with a time-out timer: an ask without an actor."""
    loop = asyncio.get_running_loop()
    messages //= 10
    began = time.perf_counter()
    for _ in range(messages):
        future = loop.create_future()
        timer = loop.call_later(60, future.cancel)
        loop.call_soon(future.set_result, 1)
        await future
        timer.cancel()
    return (time.perf_counter() - began) / messages


CASES = {
    "tell": "tell, loop actor",
    "tell_threaded": "tell, threaded actor",
    "ask": "awaited ask",
    "cross_thread": f"tell from {SENDERS} threads",
    "chain": f"chain of {CHAIN} actors",
    "spawn_stop": "spawn and stop",
    "spawn_stop_among_500": "the same among 500 actors",
}


async def measure(rounds: int, messages: int) -> dict[str, dict[str, list[float]]]:
    """Samples in microseconds by case and contender."""
    journal = MemoryJournal(node="bench", boot="bench", clock=SystemClock())
    samples: dict[str, dict[str, list[float]]] = {case: {"ours": [], "stock": []} for case in CASES}
    samples["floor"] = {"asyncio": []}
    async with System(name="bench", clock=SystemClock(), ids=SystemIds(), rng=SystemRng(), journal=journal) as system:
        contenders: dict[str, Ours | Stock] = {"ours": Ours(system), "stock": Stock()}
        for case in CASES:
            for _ in range(2 * rounds):
                for name, contender in contenders.items():
                    sample: Sample = getattr(contender, case)
                    samples[case][name].append(await sample(messages) * 1e6)
        for _ in range(2 * rounds):
            samples["floor"]["asyncio"].append(await floor(messages) * 1e6)
    return samples


def print_table(samples: dict[str, dict[str, list[float]]]) -> None:
    print(f"microseconds a message: median (fastest .. slowest); Python {platform.python_version()}")
    print(f"{'':28}{'ours':>26}{'stock pykka':>30}{'stock/ours':>12}")
    for case, title in CASES.items():
        ours, stock = samples[case]["ours"], samples[case]["stock"]
        ratio = statistics.median(stock) / statistics.median(ours)
        print(f"{title:28}{_cell(ours):>26}{_cell(stock):>30}{ratio:>12.1f}")
    print(f"{'floor: asyncio hand-over':28}{_cell(samples['floor']['asyncio']):>26}")
    print(f"tells a second, loop actor: {1e6 / statistics.median(samples['tell']['ours']):,.0f}")


def _cell(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--json", action="store_true", help="print the samples instead of the table")
    options = parser.parse_args()
    samples = asyncio.run(measure(options.rounds, options.messages))
    print(json.dumps({"unit": "us", "samples": samples})) if options.json else print_table(samples)


if __name__ == "__main__":
    main()
