"""An event loop whose time is virtual, and the dispatcher that gives actors their turns in an order drawn from a seed.

Rules:
- Nothing sleeps and there is no thread. When nothing is ready, time jumps to the next timer; when there is no timer
  either, the run can never end and ``DeadlockError`` says so.
- Work for other threads (``run_in_executor``) is done on the loop. It begins at once and its result arrives after as
  long as it took: some latency, and what the work itself says it waited (``block``).
- Of the actors that may have letters, one drawn at random goes next, for one letter. A turn takes a few microseconds.
  Now and then an actor's turn is put off by up to ``LAG_MAX_S``, so that timers and other actors overtake it; not again
  within ``LAG_EVERY_S``, for it must be able to keep up with its letters.
- Order within a mailbox is the mailbox's own; no draw changes it.
"""

import asyncio
import contextvars
from collections.abc import Callable
from typing import Any, TypeVar

from gptoss.actors.inbox import Inbox, MailboxSpec
from gptoss.clock import NS_PER_S, SeededRng
from gptoss.testing import ManualClock

T = TypeVar("T")

LAG_MAX_S = 0.006
LAG_EVERY_S = 0.02
TURN_NS_MAX = 20_000
THREAD_LATENCY_S = 0.002
CLOSING_ROUNDS = 10


class DeadlockError(Exception):
    """Nothing is ready and no timer is set: whoever waits will wait for ever."""


class _NoSelector:
    """Takes the place of the selector that a real loop sleeps in: it lets virtual time pass instead."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise DeadlockError("nothing is ready and no timer is set")
        if timeout > 0:
            self._clock.advance_ns(max(1, round(timeout * NS_PER_S)))
        return []

    def close(self) -> None: ...


class SimulatedLoop(asyncio.BaseEventLoop):
    """See the module's rules.

    Args:
        clock: advanced by this loop.
        rng: draws the latencies of work on other threads.
    """

    def __init__(self, clock: ManualClock, rng: SeededRng) -> None:
        super().__init__()
        self._selector = _NoSelector(clock)
        self._clock = clock
        self._rng = rng
        self._blocked_s = 0.0
        self.failures: list[str] = []
        self.set_exception_handler(self._note_failure)

    def time(self) -> float:
        """Virtual seconds."""
        return self._clock.monotonic_ns() / NS_PER_S

    def block(self, duration_s: float) -> None:
        """Called by work on another thread: it has waited so long."""
        self._blocked_s += duration_s

    def run_in_executor(self, executor: object, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Do the work here, and let its result arrive later."""
        del executor
        future: asyncio.Future[T] = self.create_future()
        self._blocked_s = 0.0
        try:
            result = func(*args)
        except Exception as error:  # noqa: BLE001 - as a thread pool does: whoever awaits gets it
            deliver, outcome = future.set_exception, error
        else:
            deliver, outcome = future.set_result, result

        def arrive() -> None:
            if not future.done():
                deliver(outcome)  # pyright: ignore[reportArgumentType]

        self.call_later(self._blocked_s + self._rng.uniform() * THREAD_LATENCY_S, arrive)
        return future

    def _note_failure(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.failures.append(f"{context.get('message')}: {type(error).__name__ if error else ''} {error or ''}")

    def run_ready(self) -> None:
        """Run what is ready, and what that makes ready, for a while; no time passes."""
        for _ in range(CLOSING_ROUNDS):
            self.call_soon(self.stop)
            self.run_forever()

    # ---- what a loop without I/O still has to have

    def _process_events(self, event_list: list[Any]) -> None: ...

    def _write_to_self(self) -> None: ...


class SeededDispatcher:
    """See the module's rules, and ``gptoss.actors.dispatcher``.

    Args:
        clock: advanced a little by each turn.
        rng: draws who is next.
        lag: probability that a turn is put off.

    Attributes:
        inboxes: every mailbox that was ever opened, by its owner's name; owners of the same name in order.
    """

    letters_a_turn = 1
    has_threads = False

    def __init__(self, clock: ManualClock, rng: SeededRng, lag: float) -> None:
        self.inboxes: list[tuple[str, Inbox]] = []
        self._clock = clock
        self._rng = rng
        self._lag = lag
        self._runnable: list[tuple[Callable[[], object], contextvars.Context | None]] = []
        self._is_picking = False
        self._lagged_s: dict[object, float] = {}
        self._loop: asyncio.AbstractEventLoop

    def bind(self, loop: asyncio.AbstractEventLoop) -> Callable[..., None]:
        """See ``Dispatcher``."""
        self._loop = loop
        return self._call_turn

    def open_inbox(self, owner: str, spec: MailboxSpec) -> Inbox:
        """See ``Dispatcher``."""
        inbox = Inbox(owner, spec)
        self.inboxes.append((owner, inbox))
        return inbox

    def _call_turn(self, turn: Callable[[], object], /, *, context: contextvars.Context | None = None) -> None:
        if self._lag and self._lags(turn):
            self._loop.call_later(self._rng.uniform() * LAG_MAX_S, self._enlist, turn, context)
        else:
            self._enlist(turn, context)

    def _lags(self, turn: Callable[[], object]) -> bool:
        actor, now_s = getattr(turn, "__self__", turn), self._loop.time()
        if now_s < self._lagged_s.get(actor, 0.0) or not self._rng.happens(self._lag):
            return False
        self._lagged_s[actor] = now_s + LAG_EVERY_S
        return True

    def _enlist(self, turn: Callable[[], object], context: contextvars.Context | None) -> None:
        self._runnable.append((turn, context))
        if not self._is_picking:
            self._is_picking = True
            self._loop.call_soon(self._pick)

    def _pick(self) -> None:
        runnable = self._runnable
        index = self._rng.below(len(runnable))
        runnable[index], runnable[-1] = runnable[-1], runnable[index]
        turn, context = runnable.pop()
        self._clock.advance_ns(1 + self._rng.below(TURN_NS_MAX))
        try:
            if context is None:
                turn()
            else:
                context.run(turn)
        finally:
            if runnable:
                self._loop.call_soon(self._pick)
            else:
                self._is_picking = False
