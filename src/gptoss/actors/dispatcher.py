"""Who gets the next turn.

Rules:
- An actor on the loop that may have letters asks for a turn, by ``call_turn``. A turn handles at most
  ``letters_a_turn`` letters; an actor with more of them asks again.
- The live dispatcher gives turns in the order in which they were asked for, and up to ``TURNS_A_CALL`` of them in one
  callback of the loop: a request goes from actor to actor a dozen times, and each round of the loop asks the kernel for
  news of sockets.
- Without threads (``has_threads`` false) threaded actors take turns on the loop like the others, one letter each.
- A dispatcher chooses between actors, never between letters: each mailbox keeps its own order.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable
from typing import Protocol

from gptoss.actors.inbox import Inbox, MailboxSpec

TURNS_A_CALL = 64


class CallTurn(Protocol):
    """Asks for a turn; on the loop's thread only."""

    def __call__(self, turn: Callable[[], object], /, *, context: contextvars.Context | None = None) -> object:
        """Call ``turn`` in ``context``, soon."""
        ...


class Dispatcher(Protocol):
    """What a system needs of whoever chooses between its actors."""

    @property
    def letters_a_turn(self) -> int:
        """Letters that a loop actor handles before others get their turn."""
        ...

    @property
    def has_threads(self) -> bool:
        """Whether threaded actors have a thread each."""
        ...

    def bind(self, loop: asyncio.AbstractEventLoop) -> CallTurn:
        """The way to ask for turns on this loop."""
        ...

    def open_inbox(self, owner: str, spec: MailboxSpec) -> Inbox:
        """The mailbox of a new actor."""
        ...


class LiveDispatcher:
    """First come, first served; each threaded actor has its thread."""

    letters_a_turn = 64
    has_threads = True

    def bind(self, loop: asyncio.AbstractEventLoop) -> CallTurn:
        """See ``Dispatcher``."""
        return _Turns(loop)

    def open_inbox(self, owner: str, spec: MailboxSpec) -> Inbox:
        """See ``Dispatcher``."""
        return Inbox(owner, spec)


class _Turns:
    """Turns that were asked for."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asked: deque[tuple[Callable[[], object], contextvars.Context]] = deque()
        self._is_due = False

    def __call__(self, turn: Callable[[], object], /, *, context: contextvars.Context | None = None) -> None:
        self._asked.append((turn, contextvars.copy_context() if context is None else context))
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._give)

    def _give(self) -> None:
        asked = self._asked
        try:
            for _ in range(TURNS_A_CALL):
                if not asked:
                    break
                turn, context = asked.popleft()
                context.run(turn)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - as the loop does for its callbacks
            self._loop.call_exception_handler({"message": "an actor's turn raised", "exception": error})
        finally:
            self._is_due = bool(asked)
            if asked:
                self._loop.call_soon(self._give)
