"""What loop actors and threaded actors have in common: one message, a failure, the end. Their rules are in ``actor``."""

import abc
import functools
import inspect
import itertools
import threading
from typing import Any, NoReturn

import pykka

from gptoss.actors.cell import Cell
from gptoss.actors.future import ReplyFuture
from gptoss.actors.inbox import Inbox, Letter
from gptoss.actors.kernel import Kernel, describe
from gptoss.actors.pykka_door import PykkaDoor
from gptoss.actors.system import Context
from gptoss.clock import Clock
from gptoss.errors import ActorDead, ActorError, GptossError
from gptoss.messages.envelope import Event, Origin, Record
from gptoss.messages.trace_context import NO_TRACE

NO_LETTER = Letter(None)
_urns = itertools.count()


class SystemActor(pykka.Actor):
    """What loop and threaded actors have in common. Subclass one of those.

    Attributes:
        context: system, name, incarnation and own address; set before ``on_start``.
        clock: the system's clock.
        letter: the letter being handled, with its cause, correlation and deadline.
        trace: the trace that everything it records belongs to, for an actor of a single request.
    """

    context: Context
    clock: Clock
    trace = NO_TRACE

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
        return self.context.system.journal.append(event, self.origin(stream, correlation, cause))

    def origin(self, stream: str | None = None, correlation: str | None = None, cause: int | None = None) -> Origin:
        """Where an event of this actor comes from; the arguments are those of ``record``."""
        context, letter, trace = self.context, self.letter, self.trace
        return Origin(
            stream=context.name if stream is None else stream,
            cause=letter.cause if cause is None else cause,
            correlation=letter.correlation if correlation is None else correlation,
            trace_id=trace.trace_id,
            span_id=trace.span_id,
            actor=context.name,
            incarnation=context.incarnation,
        )

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
        if not self._cell.quiet:  # the registry is a list: with an actor for each request every end would search it
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
            let_keyboard_interrupt_pass(error)
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
        if not self._cell.quiet:
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


def let_keyboard_interrupt_pass(error: BaseException) -> None:
    """Raise ``error`` on if it is the user's Ctrl-C."""
    if isinstance(error, KeyboardInterrupt):
        raise error
