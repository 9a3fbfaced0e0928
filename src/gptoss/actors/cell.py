"""The place where an actor lives under one name: its mailbox, its address, and one incarnation after the other.

    up -> ended by itself ------------------------------> stopped (normal)
    up -> failed -> supervised: down -> up again (incarnation + 1), mailbox kept
                 -> unsupervised, escalated ------------> stopped (failed | escalated)
    any -> stop() -> down ------------------------------> stopped (normal)

Rules:
- Everything here runs on the system's loop; an actor on another thread posts its end to it.
- An incarnation reports its end once. What a replaced or abandoned incarnation reports later is ignored.
- ``stop`` refuses new letters and lets the actor handle those it has, as Pykka does, but only for so long. What is left
  then, or when the actor stopped itself or failed, becomes dead letters, and its asks get ``ActorDead``.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Literal, Protocol

import msgspec

from gptoss.actors.inbox import MailboxSpec
from gptoss.actors.kernel import Kernel
from gptoss.actors.ref import Ref
from gptoss.messages.events import ActorRestarted, ActorStarted, ActorStopped

StopReason = Literal["normal", "failed", "escalated"]
ABANDON_GRACE_S = 0.5
"""How long a cancelled handler may take to clean up before its actor is given up."""


class Terminated(msgspec.Struct, frozen=True):
    """What a watcher gets, in its control lane, when the watched actor has stopped for good."""

    name: str
    reason: StopReason


class Incarnation(Protocol):
    """What a cell needs of an actor instance."""

    def incarnate(self, cell: "Cell", context: Any) -> None:
        """Take the mailbox and the context; called once, before ``begin_loop``."""
        ...

    def begin_loop(self) -> None:
        """Register with Pykka and start consuming: ``on_start`` first, then letters."""
        ...

    def halt_loop(self, *, drain: bool) -> None:
        """End, then report to ``Cell.ended``: when the mailbox is empty if ``drain``, else after the current message."""
        ...

    def cancel_handler(self) -> None:
        """Cancel the handler that is being awaited, if the kind of actor can."""
        ...

    def retire(self) -> None:
        """Answer what is open and report nothing from now on: this instance does not end in time."""
        ...


class Parent(Protocol):
    """What a cell needs of its supervisor."""

    def child_failed(self, cell: "Cell") -> None:
        """The cell is down after a failure: restart it or let it end."""
        ...

    def child_stopped(self, cell: "Cell") -> None:
        """The cell is gone for good."""
        ...


class Cell:
    """One name in a system."""

    def __init__(
        self,
        kernel: Kernel,
        name: str,
        factory: Callable[[], Incarnation],
        *,
        mailbox: MailboxSpec,
        parent: Parent | None,
        quiet: bool,
    ) -> None:
        self.kernel = kernel
        self.name = name
        self.parent = parent
        self.quiet = quiet
        self.inbox = kernel.dispatcher.open_inbox(name, mailbox)
        self.ref: Ref[Any] = Ref(name, self.inbox, self, kernel)
        self.incarnation = 0
        self.is_alive = True
        self.context_of: Callable[[Cell], Any] = lambda _: None
        self.on_stopped: Callable[[Cell], object] = lambda _: None
        self._factory: Callable[[], Incarnation] | None = factory
        self._actor: Incarnation | None = None
        self._backoff_ms = 0.0
        self._is_stopping = False
        self._is_suspending = False
        self._reason: StopReason = "normal"
        self._stop_callbacks: list[Callable[[], object]] = []
        self._down_waiters: list[asyncio.Future[None]] = []

    # ---- life

    def start(self) -> None:
        """Make an incarnation. A factory that raises counts as a failed actor."""
        if self._factory is None:
            return
        try:
            actor = self._factory()
            actor.incarnate(self, self.context_of(self))
        except Exception as error:  # noqa: BLE001 - the edge: a constructor's failure goes to supervision
            self.kernel.fail(self.name, "constructor", error, incarnation=self.incarnation)
            self.kernel.post(self._after_failure)
            return
        self._actor = actor
        actor.begin_loop()

    def restart(self, backoff_ms: float) -> None:
        """The next incarnation, with the same mailbox."""
        if not self.is_alive or self._actor is not None:
            return
        self.incarnation += 1
        self._backoff_ms = backoff_ms
        self._is_suspending = False
        self.start()

    def started(self) -> None:
        """The incarnation's ``on_start`` went well. From any thread."""
        if self.incarnation:
            event = ActorRestarted(restarts=self.incarnation, backoff_ms=self._backoff_ms)
        elif self.quiet:
            return
        else:
            event = ActorStarted(kind=type(self._actor).__name__)
        self.kernel.record(event, self.name, incarnation=self.incarnation)

    def ended(self, actor: Incarnation, *, failed: bool) -> None:
        """An incarnation handles no more letters."""
        if actor is not self._actor:
            return
        self._actor = None
        self.inbox.detach()
        for waiter in self._down_waiters:
            _release(waiter)
        if failed:
            self._after_failure()
        elif self._is_stopping or not self._is_suspending:
            self.finish("normal")

    def _after_failure(self) -> None:
        if not self.is_alive or self._is_suspending:
            return
        if self._is_stopping or self.parent is None or self.kernel.stopping:
            self.finish("failed")
        else:
            self.parent.child_failed(self)

    def finish(self, reason: StopReason) -> None:
        """Stop for good: close the mailbox, answer its letters, tell the watchers."""
        if not self.is_alive:
            return
        self.is_alive = False
        self._reason = reason
        self._factory = None
        # Who wants to reach this place has it; a cell that had it too would be a cycle and wait for the garbage collector.
        del self.ref
        left = self.inbox.close()
        for letter in left:
            self.kernel.bury(letter, self.name, "dead")
        if not self.quiet or reason != "normal":
            stopped = ActorStopped(reason=reason, unhandled=len(left))
            self.kernel.record(stopped, self.name, incarnation=self.incarnation)
        self.on_stopped(self)
        if self.parent is not None:
            self.parent.child_stopped(self)
        callbacks, self._stop_callbacks = self._stop_callbacks, []
        for callback in callbacks:
            callback()

    # ---- orders

    def watch(self, watcher: Ref[Any]) -> None:
        """Tell ``watcher`` when this actor stops for good, at once if it has."""
        self.when_stopped(lambda: self._notify(watcher))

    def when_stopped(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` when this actor stops for good, at once if it has."""
        if self.is_alive:
            self._stop_callbacks.append(callback)
        else:
            callback()

    def begin_stop(self) -> None:
        """Refuse new letters and order the actor to end once it has handled those it has."""
        if not self.is_alive:
            return
        self._is_stopping = True
        self.inbox.seal()
        if self._actor is None:
            self.finish("normal")
        else:
            self._actor.halt_loop(drain=True)

    async def stop(self, timeout_s: float) -> bool:
        """Stop for good; False when the actor had to be interrupted or given up."""
        self.begin_stop()
        in_time = await self._come_down(timeout_s)
        self.finish("normal")
        return in_time

    async def suspend(self, timeout_s: float) -> bool:
        """End the incarnation but keep the mailbox, for ``restart``."""
        if not self.is_alive or self._actor is None:
            return True
        self._is_suspending = True
        self._actor.halt_loop(drain=False)
        return await self._come_down(timeout_s)

    async def _come_down(self, timeout_s: float) -> bool:
        if await self._is_down_within(timeout_s):
            return True
        actor = self._actor
        if actor is not None:
            actor.cancel_handler()
        if actor is not None and not await self._is_down_within(ABANDON_GRACE_S):
            actor.retire()
            self.ended(actor, failed=False)
        return False

    async def _is_down_within(self, timeout_s: float) -> bool:
        if self._is_down():
            return True
        waiter: asyncio.Future[None] = self.kernel.loop.create_future()
        timer = self.kernel.loop.call_later(timeout_s, _release, waiter)
        self._down_waiters.append(waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._down_waiters.remove(waiter)
        return self._is_down()

    def _is_down(self) -> bool:
        return self._actor is None

    def _notify(self, watcher: Ref[Any]) -> None:
        if watcher.is_alive:
            watcher.tell(Terminated(self.name, self._reason), control=True)


def _release(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
