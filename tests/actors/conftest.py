"""A journal in memory, a running system, and a bounded wait, for the tests of the actor runtime."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence

import msgspec
import pykka
import pytest

from gptoss.actors.journal import Journal, JournalHealth
from gptoss.actors.system import System
from gptoss.clock import SystemClock, SystemIds, SystemRng
from gptoss.messages.envelope import Event, Family, Meta, Origin, Record


class ListJournal:
    """As much of a journal as the runtime needs: a list, and positions."""

    node = "test"
    boot = "boot"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: list[Record] = []

    @property
    def health(self) -> JournalHealth:
        last = len(self._records) - 1
        return JournalHealth(ok=True, reason="", last_pos=last, committed_pos=last, stored_bytes=0)

    def append(self, event: Event, origin: Origin) -> Record:
        with self._lock:
            meta = Meta(
                node=self.node,
                boot=self.boot,
                pos=len(self._records),
                stream=origin.stream,
                seq=sum(record.meta.stream == origin.stream for record in self._records[-100:]),
                type=type(event).__name__,
                version=event.VERSION,
                cause=origin.cause,
                correlation=origin.correlation,
                trace_id="",
                span_id="",
                actor=origin.actor,
                incarnation=origin.incarnation,
                mono_ns=0,
            )
            record = Record(meta, event)
            self._records.append(record)
            return record

    def append_decision(self, command: Event, origin: Origin, led_to: Sequence[tuple[Event, str]]) -> list[Record]:
        records = [self.append(command, origin)]
        for event, correlation in led_to:
            about = msgspec.structs.replace(origin, cause=records[0].meta.pos, correlation=correlation)
            records.append(self.append(event, about))
        return records

    def flush(self, timeout_s: float = 5.0) -> bool:
        return timeout_s >= 0

    def read(
        self,
        *,
        family: Family = "control",
        boot: str | None = None,
        stream: str | None = None,
        correlation: str | None = None,
        after: int = -1,
        limit: int | None = None,
    ) -> Iterator[Record]:
        found = [
            record
            for record in tuple(self._records)
            if stream in {None, record.meta.stream} and correlation in {None, record.meta.correlation}
            if record.meta.pos > after and family == record.event.FAMILY and boot in {None, self.boot}
        ]
        return iter(found[:limit])

    def subscribe(
        self, watcher: Callable[[Record], None], types: Collection[type[Event]] | None = None
    ) -> Callable[[], None]:
        del types
        raise NotImplementedError(f"{watcher} would never be called here")

    def close(self) -> None: ...


@pytest.fixture
def journal() -> Journal:
    return ListJournal()


@pytest.fixture
async def system(journal: Journal) -> AsyncIterator[System]:
    async with System(name="test", clock=SystemClock(), ids=SystemIds(), rng=SystemRng(), journal=journal) as running:
        yield running


@pytest.fixture
def until() -> Callable[[Callable[[], object]], Awaitable[None]]:
    """Wait until something holds; five seconds at most."""

    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.001)

    return wait


@pytest.fixture
def lone_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Pykka registry of its own, so that stock Pykka's ``stop_all`` reaches nobody else."""
    monkeypatch.setattr(pykka.ActorRegistry, "_actor_refs", [])
    yield
    pykka.ActorRegistry.stop_all(timeout=2)
