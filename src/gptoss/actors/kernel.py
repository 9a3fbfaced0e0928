"""What the parts of one actor system share: its loop, its clock, chance, journal, dead letters and owned tasks.

Rules:
- An undeliverable message becomes a ``DeadLettered`` event, and the ask behind it is answered; nothing is raised.
- A failure in the journal is a code and a message written here. Of a foreign exception it holds the type and the
  place, never the text: that may quote a prompt.
- No task is orphaned: what ``own`` starts is cancelled with the system, and its failure becomes an event.
"""

import asyncio
import contextlib
import contextvars
import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import PurePath
from typing import Any, Literal, Protocol

from gptoss.actors.dispatcher import Dispatcher
from gptoss.actors.future import ReplyFuture
from gptoss.actors.inbox import Letter
from gptoss.actors.journal import Journal
from gptoss.clock import Clock, Rng
from gptoss.errors import ActorDead, ActorError, AskTimeout, EngineLost, GptossError, MailboxFull
from gptoss.messages.envelope import NO_CAUSE, Event, Origin, Record
from gptoss.messages.events import ActorFailed, DeadLettered

DeadReason = Literal["dead", "full", "expired", "shed"]
logger = logging.getLogger(__name__)


class Cancellable(Protocol):
    """Something that will happen unless it is cancelled."""

    def cancel(self) -> None:
        """Let it not happen."""
        ...


class Kernel:
    """Shared by the cells, supervisors and references of one ``System``. Bound to the running event loop and its thread."""

    def __init__(self, *, name: str, clock: Clock, rng: Rng, journal: Journal, dispatcher: Dispatcher) -> None:
        self.name = name
        self.clock = clock
        self.rng = rng
        self.journal = journal
        self.loop = asyncio.get_running_loop()
        self.loop_thread = threading.get_ident()
        self.context = contextvars.copy_context()
        self.dispatcher = dispatcher
        self.call_turn = dispatcher.bind(self.loop)
        self.letters_a_turn = dispatcher.letters_a_turn
        self.stopping = False
        self._rung: deque[tuple[Callable[[], object], contextvars.Context]] = deque()
        self._is_woken = False
        # Dictionaries for their order: what is cancelled first must not depend on where objects lie in memory.
        self.timers: dict[Cancellable, None] = {}
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.on_escalated: list[Callable[[str], object]] = []

    # ---- events

    def record(
        self, event: Event, name: str, *, incarnation: int = 0, cause: int = NO_CAUSE, correlation: str = ""
    ) -> Record:
        """Journal an event of the actor called ``name`` on the stream ``actor/<name>``."""
        origin = Origin(
            stream=f"actor/{name}", cause=cause, correlation=correlation, actor=name, incarnation=incarnation
        )
        return self.journal.append(event, origin)

    def bury(self, letter: Letter, to: str, reason: DeadReason) -> None:
        """Make an event of a letter that nobody will handle, and answer the ask behind it."""
        kind = type(letter.message).__name__
        event = DeadLettered(to=to, message_type=kind, reason=reason)
        self.record(event, to, cause=letter.cause, correlation=letter.correlation)
        if letter.reply_to is not None:
            letter.reply_to.fail(_refusal(to, kind, reason))

    def fail(
        self, name: str, what: str, error: BaseException, *, incarnation: int = 0, letter: Letter | None = None
    ) -> None:
        """Make an event of an exception; ``what`` is the message type or the hook that raised it."""
        code, text = describe(error)
        event = ActorFailed(message_type=what, code=code, error=text)
        cause, correlation = (letter.cause, letter.correlation) if letter else (NO_CAUSE, "")
        self.record(event, name, incarnation=incarnation, cause=cause, correlation=correlation)
        if isinstance(error, EngineLost):  # not this program's fault, and where it was raised says nothing
            logger.warning("actor %s ends with its engine: %s", name, text)
            return
        frames = "".join(traceback.format_tb(error.__traceback__))
        logger.error("actor %s failed in %s: %s\n%s", name, what, text, frames)

    # ---- the loop

    def post(self, callback: Callable[..., object], *args: Any) -> None:
        """Call on the loop soon, from any thread.

        Raises:
            RuntimeError: the loop is closed.
        """
        if threading.get_ident() == self.loop_thread:
            self.loop.call_soon(callback, *args, context=self.context)
        else:
            self.loop.call_soon_threadsafe(callback, *args, context=self.context)

    def call_turn_from_thread(self, turn: Callable[[], object], context: contextvars.Context) -> None:
        """Ask for a turn on the loop from another thread; not at all when the loop is closed.

        The loop is woken once for a whole burst: waking is a system call, which costs more than the turn, and lets the
        other thread's work in between every two of them.
        """
        self._rung.append((turn, context))
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._pass_turns_on, context=self.context)

    def _pass_turns_on(self) -> None:
        # Cleared before the deque is read: a turn that is asked for from here on is seen below or wakes the loop again.
        self._is_woken = False
        while self._rung:
            turn, context = self._rung.popleft()
            self.call_turn(turn, context=context)

    def run_on_loop(self, callback: Callable[..., object], *args: Any) -> None:
        """Call at once on the loop's own thread, soon from others; not at all when the loop is closed."""
        if threading.get_ident() == self.loop_thread:
            callback(*args)
            return
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(callback, *args, context=self.context)

    def expire(self, reply: ReplyFuture[Any], timeout_s: float, to: str) -> None:
        """Fail ``reply`` with ``AskTimeout`` when nothing else answers it within ``timeout_s``; from any thread."""
        try:
            if threading.get_ident() == self.loop_thread:
                self._arm(reply, timeout_s, to)
            else:
                self.loop.call_soon_threadsafe(self._arm, reply, timeout_s, to)
        except RuntimeError:
            reply.fail(ActorDead(f"{to} cannot answer: the event loop of system {self.name!r} is closed"))

    def _arm(self, reply: ReplyFuture[Any], timeout_s: float, to: str) -> None:
        timer = self.loop.call_later(timeout_s, _give_up, reply, timeout_s, to)
        reply.add_done_callback(lambda _: self.run_on_loop(timer.cancel))

    def own(self, coro: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run ``coro`` as a task of this system; an exception becomes an ``ActorFailed`` event and the result None."""
        task = self.loop.create_task(self._contain(coro, name), name=f"{self.name}/{name}", context=self.context.copy())
        task.add_done_callback(lambda _: coro.close())  # one that is cancelled before it began was never awaited
        self.keep(task)
        return task

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Cancel ``task`` with the system, unless it is done by then."""
        self.tasks[task] = None
        task.add_done_callback(self._let_go)

    def _let_go(self, task: asyncio.Task[Any]) -> None:
        self.tasks.pop(task, None)

    async def _contain(self, coro: Coroutine[Any, Any, Any], name: str) -> Any:
        try:
            return await coro
        except Exception as error:  # noqa: BLE001 - the edge of a task: its failure is an event, not a warning at exit
            self.fail(f"task/{name}", "task", error)
            return None


def describe(error: BaseException) -> tuple[str, str]:
    """Code and text of an error, fit for the journal."""
    if isinstance(error, GptossError):
        return error.code, error.message
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ActorError.code, type(error).__name__
    last = frames[-1]
    return ActorError.code, f"{type(error).__name__} at {PurePath(last.filename).name}:{last.lineno} in {last.name}"


def _give_up(reply: ReplyFuture[Any], timeout_s: float, to: str) -> None:
    reply.fail(AskTimeout(f"{to} did not answer within {timeout_s:g} s"))


def _refusal(to: str, kind: str, reason: DeadReason) -> ActorError:
    if reason == "expired":
        return AskTimeout(f"{to} did not get to {kind} before its deadline")
    if reason == "dead":
        return ActorDead(f"{to} stopped before it handled {kind}")
    return MailboxFull(f"the mailbox of {to} is full; {kind} was {'shed' if reason == 'shed' else 'refused'}")
