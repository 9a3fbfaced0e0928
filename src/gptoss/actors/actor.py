"""Actors: on the event loop (``LoopActor``) or on a thread of their own (``ThreadedActor``).

Rules:
- One message at a time. While a loop actor's handler awaits, its mailbox waits.
- Nothing a handler raises leaves the actor: not ``CancelledError``, nor any other ``BaseException``, which stock Pykka
  answers by stopping every actor of the process. Only ``KeyboardInterrupt`` goes on to the loop, after the failure is
  recorded.
- An exception while handling an ask reaches the asker *and* supervision; a ``GptossError`` answers an ask as a normal
  refusal and is no failure. While handling a tell every exception is a failure.
- ``on_stop`` runs at the end of every incarnation that started, also after a failure (through ``on_failure``).
- Actors are started by ``System.spawn``, never by Pykka's ``start``. Pykka's own references (``actor_ref``, the
  registry) can tell, ask and stop; its proxies are refused.
"""

import abc
import asyncio
import contextlib
import contextvars
import functools
import inspect
import itertools
import queue
import threading
from collections.abc import Awaitable
from typing import Any, NoReturn

import pykka

from gptoss.actors.cell import Cell, Terminated
from gptoss.actors.future import ReplyFuture
from gptoss.actors.inbox import Inbox, Letter
from gptoss.actors.kernel import Kernel, describe
from gptoss.actors.pykka_door import PykkaDoor
from gptoss.actors.system import Context
from gptoss.clock import Clock
from gptoss.errors import ActorDead, ActorError, GptossError
from gptoss.messages.envelope import Event, Origin, Record

__all__ = ["Context", "LoopActor", "SystemActor", "Terminated", "ThreadedActor"]

NO_LETTER = Letter(None)
_urns = itertools.count()


class SystemActor(pykka.Actor):
    """What loop and threaded actors have in common. Subclass one of those.

    Attributes:
        context: system, name, incarnation and own address; set before ``on_start``.
        clock: the system's clock.
        letter: the letter being handled, with its cause, correlation and deadline.
    """

    context: Context
    clock: Clock

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if inspect.iscoroutinefunction(cls.on_start) or inspect.iscoroutinefunction(cls.on_stop):
            raise ActorError(f"{cls.__name__}: on_start and on_stop may not be async")

    def __init__(self) -> None:
        # Not super().__init__(): Pykka draws a uuid for each actor, and there is an actor for each request.
        self.actor_urn = f"urn:gptoss:actor:{next(_urns)}"
        self._door = self._create_actor_inbox()
        self.actor_inbox = self._door
        self.actor_stopped = threading.Event()
        self._actor_ref = pykka.ActorRef(self)
        self.letter = NO_LETTER
        self._cell: Cell
        self._kernel: Kernel
        self._inbox: Inbox
        self._deferred: set[ReplyFuture[Any]] = set()
        self._is_halting = False
        self._ends_when_empty = False
        self._has_ended = False

    @classmethod
    def start(cls, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refused: an actor of a system needs its mailbox and supervisor."""
        raise ActorError(f"start {cls.__name__} with System.spawn, not with Pykka's start")

    @staticmethod
    def _create_actor_inbox() -> PykkaDoor:
        return PykkaDoor()

    @staticmethod
    def _create_future() -> ReplyFuture[Any]:
        return ReplyFuture()

    # ---- for subclasses

    def record(
        self, event: Event, *, stream: str | None = None, correlation: str | None = None, cause: int | None = None
    ) -> Record:
        """Journal an event of this actor.

        Args:
            event: the fact.
            stream: what it is about; None is this actor's name.
            correlation: the request concerned; None takes the current letter's.
            cause: position of the record that led to it; None takes the current letter's.
        """
        context, letter = self.context, self.letter
        origin = Origin(
            stream=context.name if stream is None else stream,
            cause=letter.cause if cause is None else cause,
            correlation=letter.correlation if correlation is None else correlation,
            actor=context.name,
            incarnation=context.incarnation,
        )
        return context.system.journal.append(event, origin)

    def defer(self) -> ReplyFuture[Any] | None:
        """Take over the reply of the current letter; what the handler returns is not sent.

        Returns:
            The reply to set later, from any thread; None when the letter is a tell. If it is still open when this
            incarnation ends, it fails with ``ActorDead``.
        """
        reply = self.letter.reply_to
        if reply is not None:
            self._deferred.add(reply)
            reply.add_done_callback(self._deferred.discard)
        return reply

    def stop(self) -> None:
        """Stop for good after the current message; letters that wait become dead letters."""
        if not self._has_ended:
            self._is_halting = True
            self._kernel.run_on_loop(self._cell.begin_stop)

    def on_failure(self, *_failure: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Clean up after a handler raised; by default the same as ``on_stop``. Takes type, value and traceback."""
        self.on_stop()

    # ---- for the cell

    def incarnate(self, cell: Cell, context: Context) -> None:
        """See ``cell.Incarnation``."""
        self._cell = cell
        self._kernel = cell.kernel
        self._inbox = cell.inbox
        self.context = context
        self.clock = cell.kernel.clock
        self._door.connect(cell)

    def begin_loop(self) -> None:
        """See ``cell.Incarnation``."""
        pykka.ActorRegistry.register(self.actor_ref)
        self._start_actor_loop()

    def halt_loop(self, *, drain: bool) -> None:
        """See ``cell.Incarnation``."""
        if drain:
            self._ends_when_empty = True
        else:
            self._is_halting = True
        self._ring()

    @abc.abstractmethod
    def _ring(self) -> None:
        """Wake the loop that takes letters, from any thread."""

    def cancel_handler(self) -> None:
        """See ``cell.Incarnation``."""

    def retire(self) -> None:
        """See ``cell.Incarnation``."""
        self._leave()
        self._answer_open_asks()
        if self.letter.reply_to is not None:
            self.letter.reply_to.fail(self._dead())

    # ---- one message

    def _run_on_start(self) -> bool:
        try:
            self.on_start()
        except BaseException as error:  # noqa: BLE001 - the edge of an actor: every failure goes to supervision
            self._fail("on_start", error)
            self._leave()
            self._report(failed=True)
            _let_keyboard_interrupt_pass(error)
            return False
        self._cell.started()
        return True

    def _is_expired(self, letter: Letter) -> bool:
        if letter.deadline_ns is None or self.clock.monotonic_ns() < letter.deadline_ns:
            return False
        self._inbox.count_taken_as_dead()
        self._kernel.bury(letter, self.context.name, "expired")
        return True

    def _reply(self, letter: Letter, result: Any) -> None:
        reply = letter.reply_to
        if reply is not None and reply not in self._deferred:
            reply.resolve(result)

    def _survives(self, letter: Letter, error: BaseException) -> bool:
        """Answer the ask behind a handler's exception; False when the exception ended this incarnation."""
        if self._has_ended:
            return False
        reply = letter.reply_to
        if reply is not None and isinstance(error, GptossError):
            reply.fail(error)
            return True
        kind = type(letter.message).__name__
        self._fail(kind, error)
        if reply is not None:
            reply.fail(ActorError(f"{self.context.name} failed on {kind}: {describe(error)[1]}"))
        self._end(error)
        return False

    # ---- the end

    def _end(self, error: BaseException | None = None) -> None:
        self._leave()
        try:
            if error is None:
                self.on_stop()
            else:
                self.on_failure(type(error), error, error.__traceback__)
        except BaseException as late:  # noqa: BLE001 - the edge of an actor: it ends anyway
            self._fail("on_stop", late)
        self._answer_open_asks()
        self._report(failed=error is not None)

    def _leave(self) -> None:
        self._has_ended = True
        self._door.connect(None)
        self.actor_stopped.set()
        pykka.ActorRegistry.unregister(self.actor_ref)

    def _answer_open_asks(self) -> None:
        for reply in tuple(self._deferred):
            reply.fail(self._dead())

    def _report(self, *, failed: bool) -> None:
        self._kernel.run_on_loop(functools.partial(self._cell.ended, self, failed=failed))

    def _fail(self, what: str, error: BaseException) -> None:
        self._kernel.fail(self.context.name, what, error, incarnation=self.context.incarnation, letter=self.letter)

    def _dead(self) -> ActorDead:
        return ActorDead(f"{self.context.name} ended before it answered")


class LoopActor(SystemActor):
    """An actor on the system's event loop.

    ``on_receive`` is a plain function, or returns an awaitable, such as a coroutine or another actor's reply; then the
    next message waits until that is done. Only awaiting handlers cost a task.
    """

    def __init__(self) -> None:
        super().__init__()
        self._handler: asyncio.Task[None] | None = None
        self._variables: contextvars.Context

    def cancel_handler(self) -> None:
        """See ``cell.Incarnation``."""
        if self._handler is not None:
            self._handler.cancel()

    def _start_actor_loop(self) -> None:
        self._variables = self._kernel.context.copy()
        self._inbox.attach(self._ring)
        self._kernel.call_turn(self._open, context=self._variables)

    def _ring(self) -> None:
        if threading.get_ident() == self._kernel.loop_thread:
            self._kernel.call_turn(self._drain, context=self._variables)
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody will handle anything any more
                self._kernel.loop.call_soon_threadsafe(self._drain, context=self._variables)

    def _open(self) -> None:
        if self._run_on_start():
            self._drain()

    def _drain(self) -> None:
        if self._handler is not None or self._has_ended:
            return
        get, receive = self._inbox.get, self.on_receive
        for _ in range(self._kernel.letters_a_turn):
            if self._is_halting:
                self._end()
                return
            letter = get()
            if letter is None:
                self._rest()
                return
            self.letter = letter
            if letter.deadline_ns is not None and self._is_expired(letter):
                continue
            try:
                result = receive(letter.message)
            except BaseException as error:  # noqa: BLE001 - the edge of an actor
                survives = self._survives(letter, error)
                _let_keyboard_interrupt_pass(error)
                if not survives:
                    return
                continue
            if result is not None and result is not letter.reply_to and hasattr(result, "__await__"):
                self._wait_for(letter, result)
                return
            if letter.reply_to is not None:
                self._reply(letter, result)
        self._ring()

    def _rest(self) -> None:
        self.letter = NO_LETTER
        if self._ends_when_empty:
            self._end()

    def _is_being_stopped(self) -> bool:
        return (self._is_halting or self._ends_when_empty) and not self._has_ended

    def _wait_for(self, letter: Letter, awaitable: Awaitable[Any]) -> None:
        name = f"{self.context.name}.on_receive"
        self._handler = self._kernel.loop.create_task(
            self._finish(letter, awaitable), name=name, context=self._variables.copy()
        )
        self._kernel.keep(self._handler)

    async def _finish(self, letter: Letter, awaitable: Awaitable[Any]) -> None:
        try:
            result = await awaitable
        except BaseException as error:
            self._handler = None
            if isinstance(error, asyncio.CancelledError) and self._is_being_stopped():
                if letter.reply_to is not None:
                    letter.reply_to.fail(self._dead())
                self._end()
            elif self._survives(letter, error):
                self._ring()
            if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt)):
                raise
            return
        self._handler = None
        self._reply(letter, result)
        self._ring()


class ThreadedActor(SystemActor, pykka.ThreadingActor):  # pyright: ignore[reportIncompatibleMethodOverride]
    """An actor on a thread of its own, for handlers that block. ``on_receive`` must be a plain function."""

    use_daemon_thread = True  # a handler that never returns must not keep the process alive

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if inspect.iscoroutinefunction(cls.on_receive):
            raise ActorError(f"{cls.__name__}: a threaded actor's on_receive may not be async")

    def __init__(self) -> None:
        super().__init__()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._has_thread = True

    def _start_actor_loop(self) -> None:
        self._has_thread = self._kernel.dispatcher.has_threads
        self._inbox.attach(self._ring)
        if self._has_thread:
            super()._start_actor_loop()
        else:
            self._kernel.call_turn(self._open)

    def _ring(self) -> None:
        if self._has_thread:
            self._bell.put(None)
        else:
            self._kernel.call_turn(self._turn)

    def _actor_loop(self) -> None:
        if not self._run_on_start():
            return
        while not self._has_ended:
            if not self._take_letter():
                self._bell.get()

    def _take_letter(self) -> bool:
        """Handle a letter, or end; False when there is nothing to do until the bell rings."""
        if self._is_halting:
            self._end()
            return True
        letter = self._inbox.get()
        if letter is not None:
            self._handle(letter)
            return True
        self.letter = NO_LETTER
        if self._ends_when_empty:
            self._end()
        return self._has_ended

    def _handle(self, letter: Letter) -> None:
        self.letter = letter
        if self._is_expired(letter):
            return
        try:
            result = self.on_receive(letter.message)
        except BaseException as error:  # noqa: BLE001 - the edge of an actor
            self._survives(letter, error)
            return
        self._reply(letter, result)

    # ---- without a thread of its own

    def _open(self) -> None:
        if self._run_on_start():
            self._ring()

    def _turn(self) -> None:
        if not self._has_ended and self._take_letter():
            self._ring()


def _let_keyboard_interrupt_pass(error: BaseException) -> None:
    if isinstance(error, KeyboardInterrupt):
        raise error
