"""The actor that keeps the live projections: it watches the journal and folds each record soon after.

Rules:
- The journal's watcher only appends to a deque and wakes the event loop once for a whole burst.
- Folding happens on the loop, at most ``BATCH`` records an iteration, so that it never holds up a token for long.
- Under overload the live view gives up detail before truth: above ``PENDING_MAX`` waiting records it misses steps and
  other frequent facts, and only above ``PENDING_HARD_MAX`` anything else. What it misses is counted and shown in
  ``/metrics`` and ``/stats``; the journal itself misses nothing.
- A record that cannot be folded costs that record only; the loop's exception handler reports it.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Awaitable, Callable

import msgspec

from gptoss.actors.actor import LoopActor
from gptoss.actors.journal import Journal
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.telemetry.logs import LogWriter
from gptoss.telemetry.metrics import Metrics
from gptoss.telemetry.projection import Projection

BATCH = 256
PENDING_MAX = 50_000
PENDING_HARD_MAX = 200_000

_FREQUENT = (ev.StepCommitted, ev.CommandConsumed, ev.MemoryObserved, ev.DeadLettered, ev.EngineLoadProgressed)


class CatchUp(msgspec.Struct, frozen=True, kw_only=True):
    """An ask, answered once everything that was in the journal when it arrived is folded."""


class TelemetryActor(LoopActor):
    """Folds the journal into the projection, the metrics and the log.

    Args:
        journal: what to watch.
        projection: read by its owner on the event loop, as are the metrics.
        metrics: see ``projection``.
        log_writer: writes the log lines; None for none.
    """

    def __init__(
        self, *, journal: Journal, projection: Projection, metrics: Metrics, log_writer: LogWriter | None = None
    ) -> None:
        super().__init__()
        self._journal = journal
        self._projection = projection
        self._metrics = metrics
        self._log_writer = log_writer
        self._home: asyncio.AbstractEventLoop
        self._home_thread = 0
        self._pending: deque[Record] = deque()
        self._is_woken = False
        self._queued = 0
        self._folded = 0
        self._missed = 0
        self._missed_told = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._unsubscribe: Callable[[], None] | None = None

    def on_start(self) -> None:
        """Begin to watch, then fold what this boot recorded earlier. Runs on the event loop, where all folding is."""
        self._home = asyncio.get_running_loop()
        self._home_thread = threading.get_ident()
        self._unsubscribe = self._journal.subscribe(self._watch)
        for record in self._journal.read(boot=self._journal.boot, after=self._projection.newest_pos):
            self._fold(record)

    def on_stop(self) -> None:
        """Stop watching and fold what is left."""
        if self._unsubscribe is not None:
            self._unsubscribe()
        while self._pending:
            self._fold_next()
        self._tell_waiters()

    def on_receive(self, message: CatchUp) -> Awaitable[None] | None:
        """Answer a ``CatchUp``, now or when its time has come."""
        del message
        if self._folded >= self._queued:
            return None
        waiter: asyncio.Future[None] = self._home.create_future()
        self._waiters.append((self._queued, waiter))
        return waiter

    # ------------------------------------------------------------ on the appending thread, the journal locked

    def _watch(self, record: Record) -> None:
        waiting = len(self._pending)
        if waiting >= PENDING_MAX and (waiting >= PENDING_HARD_MAX or isinstance(record.event, _FREQUENT)):
            self._missed += 1
            return
        self._pending.append(record)
        self._queued += 1
        if not self._is_woken:
            self._is_woken = True
            self._wake_loop()

    def _wake_loop(self) -> None:
        if threading.get_ident() == self._home_thread:
            self._home.call_soon(self._fold_batch)
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody will look at the projections again
                self._home.call_soon_threadsafe(self._fold_batch)

    # ------------------------------------------------------------ on the event loop

    def _fold_batch(self) -> None:
        # Cleared before the deque is read: what is appended from here on either is seen below or wakes the loop again.
        self._is_woken = False
        try:
            for _ in range(BATCH):
                if not self._pending:
                    break
                self._fold_next()
        finally:
            self._tell_missed()
            self._tell_waiters()
            if self._pending and not self._is_woken:
                self._is_woken = True
                self._home.call_soon(self._fold_batch)

    def _fold_next(self) -> None:
        record = self._pending.popleft()
        self._folded += 1
        if record.meta.pos > self._projection.newest_pos:  # else on_start has read it already
            self._fold(record)

    def _fold(self, record: Record) -> None:
        self._projection.fold(record)
        self._metrics.fold(record)
        if self._log_writer is not None:
            self._log_writer.fold(record)

    def _tell_missed(self) -> None:
        missed = self._missed - self._missed_told
        if missed:
            self._missed_told += missed
            self._projection.count_missed(missed)
            self._metrics.count_missed(missed)

    def _tell_waiters(self) -> None:
        while self._waiters and self._waiters[0][0] <= self._folded:
            _, waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
