"""Who gets the next turn.

Rules:
- An actor on the loop that may have letters asks for a turn, by ``call_turn``. A turn handles at most
  ``letters_a_turn`` letters; an actor with more of them asks again.
- The live dispatcher gives turns in the order in which they were asked for. Its ``call_turn`` *is* the loop's
  ``call_soon``, so nothing is paid for the choice.
- Without threads (``has_threads`` false) threaded actors take turns on the loop like the others, one letter each.
- A dispatcher chooses between actors, never between letters: each mailbox keeps its own order.
"""

import asyncio
import contextvars
from collections.abc import Callable
from typing import Protocol

from gptoss.actors.inbox import Inbox, MailboxSpec


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
        return loop.call_soon

    def open_inbox(self, owner: str, spec: MailboxSpec) -> Inbox:
        """See ``Dispatcher``."""
        return Inbox(owner, spec)
