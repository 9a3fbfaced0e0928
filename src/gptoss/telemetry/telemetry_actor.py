"""The actor that keeps the live projections: it watches the journal and folds each record soon after.

Rules:
- The journal's watcher only appends to a deque and sets a timer once for a whole burst.
- Folding happens on the loop ``FOLD_DELAY_S`` later, so that it does not stand in the way of the request that it is about, and at
  most ``BATCH`` records an iteration, so that it never holds up a token for long. Whoever asks to ``CatchUp`` need not wait.
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
from gptoss.telemetry.live_views import LiveViews

BATCH = 256
FOLD_DELAY_S = 0.005
SAVE_RECORDS_MIN = 20_000
"""A later start has to fold so many records again, at most; a fraction of a second."""
SAVED_BYTES_PER_RECORD = 8
"""The larger what is saved, the rarer."""
COUNTERS_STREAM = "counters"
PENDING_MAX = 50_000
PENDING_HARD_MAX = 200_000

_FREQUENT = (ev.StepCommitted, ev.CommandConsumed, ev.MemoryObserved, ev.DeadLettered, ev.EngineLoadProgressed)


class CatchUp(msgspec.Struct, frozen=True, kw_only=True):
    """An ask, answered once everything that was in the journal when it arrived is folded."""


class TelemetryActor(LoopActor):
    """Folds the journal into the live views, and records now and then what the metrics have counted.

    Args:
        journal: what to watch.
        views: read by their owner on the event loop.
        saves_counters: whether the journal outlives the process, so that a later start can go on from ``CountersSaved``.
    """

    def __init__(self, *, journal: Journal, views: LiveViews, saves_counters: bool = False) -> None:
        super().__init__()
        self._journal = journal
        self._views = views
        self._saves_counters = saves_counters
        self._home: asyncio.AbstractEventLoop
        self._home_thread = 0
        self._pending: deque[Record] = deque()
        self._is_woken = False
        self._due: asyncio.Handle | None = None
        self._read_pos = -1
        self._folded = 0
        self._save_at = SAVE_RECORDS_MIN
        self._missed = 0
        self._missed_told = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._unsubscribe: Callable[[], None] | None = None

    def on_start(self) -> None:
        """Begin to watch, then fold what this boot recorded earlier. Runs on the event loop, where all folding is."""
        self._home = asyncio.get_running_loop()
        self._home_thread = threading.get_ident()
        self._unsubscribe = self._journal.subscribe(self._watch)
        for record in self._journal.read(boot=self._journal.boot, after=self._views.newest_pos):
            self._views.fold(record)
        self._views.flush()
        self._read_pos = self._views.newest_pos

    def on_stop(self) -> None:
        """Stop watching, fold what is left, and save the counters."""
        if self._unsubscribe is not None:
            self._unsubscribe()
        while self._pending:
            self._fold_some()
        self._views.flush()
        self._tell_waiters()
        if self._saves_counters:
            self._save_counters()

    def on_receive(self, message: CatchUp) -> Awaitable[None] | None:
        """Answer a ``CatchUp``, now or when its time has come."""
        del message
        if not self._pending:
            return None
        waiter: asyncio.Future[None] = self._home.create_future()
        self._waiters.append((self._folded + len(self._pending), waiter))
        self._fold_at_once()
        return waiter

    # ------------------------------------------------------------ on the appending thread, the journal locked

    def _watch(self, record: Record) -> None:
        pending = self._pending
        waiting = len(pending)
        if waiting >= PENDING_MAX and (waiting >= PENDING_HARD_MAX or isinstance(record.event, _FREQUENT)):
            self._missed += 1
            return
        pending.append(record)
        if not self._is_woken:
            self._is_woken = True
            self._wake_loop()

    def _wake_loop(self) -> None:
        if threading.get_ident() == self._home_thread:
            self._fold_soon()
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody will look at the projections again
                self._home.call_soon_threadsafe(self._fold_soon)

    # ------------------------------------------------------------ on the event loop

    def _fold_soon(self) -> None:
        if self._due is None:
            self._due = self._home.call_later(FOLD_DELAY_S, self._fold_batch)

    def _fold_at_once(self) -> None:
        if self._due is not None:
            self._due.cancel()
        self._due = self._home.call_soon(self._fold_batch)

    def _fold_batch(self) -> None:
        self._due = None
        # Cleared before the deque is read: what is appended from here on either is seen below or wakes the loop again.
        self._is_woken = False
        try:
            self._fold_some()
            if self._saves_counters and self._folded >= self._save_at:
                self._save_counters()
        finally:
            self._views.flush()
            self._tell_missed()
            self._tell_waiters()
            if self._pending and not self._is_woken:
                self._is_woken = True
                self._fold_at_once()

    def _fold_some(self) -> None:
        pending, fold, read_pos = self._pending, self._views.fold, self._read_pos
        for _ in range(min(BATCH, len(pending))):
            record = pending.popleft()
            self._folded += 1
            if record.meta.pos > read_pos:  # else on_start has read it already
                fold(record)

    def _save_counters(self) -> None:
        state = msgspec.msgpack.encode(self._views.metrics.saved())
        saved = ev.CountersSaved(pos=self._views.newest_pos, state=msgspec.Raw(state))
        self.record(saved, stream=COUNTERS_STREAM, correlation="")
        self._save_at = self._folded + max(SAVE_RECORDS_MIN, len(state) // SAVED_BYTES_PER_RECORD)

    def _tell_missed(self) -> None:
        missed = self._missed - self._missed_told
        if missed:
            self._missed_told += missed
            self._views.count_missed(missed)

    def _tell_waiters(self) -> None:
        while self._waiters and self._waiters[0][0] <= self._folded:
            _, waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
