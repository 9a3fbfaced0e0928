"""Actors: on the event loop (``LoopActor``) or on a thread of their own (``ThreadedActor``).

Rules:
- One message at a time. While a loop actor's handler awaits, its mailbox waits.
- Nothing a handler raises leaves the actor: not ``CancelledError``, nor any other ``BaseException``, which stock Pykka
  answers by stopping every actor of the process. Only ``KeyboardInterrupt`` goes on to the loop, after the failure is
  recorded.
- An exception while handling an ask reaches the asker *and* supervision; a ``GptossError`` answers an ask as a normal
  refusal and is no failure. While handling a tell every exception is a failure.
- ``on_stop`` runs at the end of every incarnation that started, also after a failure (through ``on_failure``).
- Actors are started by ``System.spawn``, never by Pykka's ``start``. Pykka's own references (``actor_ref``, and for all but
  ``quiet`` actors the registry) can tell, ask and stop; its proxies are refused.
"""

import asyncio
import contextvars
import inspect
import queue
import threading
from collections.abc import Awaitable
from typing import Any

import pykka

from gptoss.actors.actor_base import NO_LETTER, SystemActor, let_keyboard_interrupt_pass
from gptoss.actors.cell import Terminated
from gptoss.actors.inbox import Letter
from gptoss.actors.system import Context
from gptoss.errors import ActorError

__all__ = ["Context", "LoopActor", "SystemActor", "Terminated", "ThreadedActor"]


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
            self._kernel.call_turn_from_thread(self._drain, self._variables)

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
                let_keyboard_interrupt_pass(error)
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
