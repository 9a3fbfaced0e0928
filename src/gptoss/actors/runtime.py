"""What an actor may ask of the system it lives in."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from gptoss.actors.inbox import Letter
from gptoss.actors.journal import Journal
from gptoss.actors.ref import Ref
from gptoss.clock import Clock, IdSource, Rng

T = TypeVar("T")


class Timer:
    """A message to come. ``cancel`` is thread-safe and idempotent."""

    def __init__(self) -> None:
        self.cancelled = False
        self.handle: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        """Nothing more is sent after this returns on the event loop; from a thread, soon after."""
        self.cancelled = True
        if self.handle is not None:
            self.handle.cancel()


class Runtime(Protocol):
    """The actor system as its actors see it. Thread-safe except ``run_task`` and ``run_in_thread``."""

    loop: asyncio.AbstractEventLoop
    loop_thread_id: int
    clock: Clock
    ids: IdSource
    rng: Rng
    journal: Journal

    def now_ns(self) -> int:
        """Monotonic time."""
        ...

    def bury(self, to: str, letter: Letter, reason: str) -> None:
        """Record an undeliverable letter; its ask, if any, gets an error."""
        ...

    def run_task(self, work: Coroutine[Any, Any, Any], *, name: str) -> "asyncio.Task[Any]":
        """Run a coroutine that the system owns: cancelled at stop, its failure an event."""
        ...

    async def run_in_thread(self, work: Callable[[], T]) -> T:
        """Run a blocking function on the system's bounded thread pool."""
        ...

    def send_after(self, delay_s: float, ref: Ref[Any], message: Callable[[], Any]) -> Timer:
        """Tell ``ref`` a message, made then, in ``delay_s`` seconds."""
        ...

    def send_every(self, period_s: float, ref: Ref[Any], message: Callable[[], Any]) -> Timer:
        """Tell ``ref`` a message every ``period_s`` seconds."""
        ...
