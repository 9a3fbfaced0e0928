"""The address of an actor.

Rules:
- A reference outlives restarts: it names the mailbox, not the instance behind it.
- ``tell`` never raises and never blocks. What cannot be delivered becomes a ``DeadLettered`` event.
- ``ask`` always resolves: the reply, the handler's error, ``ActorDead``, ``MailboxFull``, or ``AskTimeout`` at its
  absolute deadline.
- Cause and correlation travel in the letter; context variables do not cross it.
"""

import asyncio
from typing import Any, Generic, Protocol, TypeVar

from gptoss.actors.future import ReplyFuture
from gptoss.actors.inbox import CONTROL, DATA, Inbox, Letter
from gptoss.actors.kernel import Kernel
from gptoss.clock import NS_PER_S
from gptoss.errors import ActorDead, ActorError, MailboxFull
from gptoss.messages.envelope import NO_CAUSE

M_contra = TypeVar("M_contra", contravariant=True)


class Home(Protocol):
    """What a reference needs of the place where its actor lives."""

    @property
    def incarnation(self) -> int:
        """How often the actor was restarted."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether messages can still be delivered, perhaps after a restart."""
        ...

    async def stop(self, timeout_s: float) -> bool:
        """Stop the actor for good."""
        ...

    def watch(self, watcher: "Ref[Any]") -> None:
        """Tell ``watcher`` when the actor has stopped for good."""
        ...


class Ref(Generic[M_contra]):
    """A stable address that takes messages of type ``M_contra``; share it freely between threads."""

    __slots__ = ("__weakref__", "_home", "_kernel", "inbox", "name")

    def __init__(self, name: str, inbox: Inbox, home: Home, kernel: Kernel) -> None:
        self.name = name
        self.inbox = inbox
        self._home = home
        self._kernel = kernel

    def __repr__(self) -> str:
        return f"<Ref {self.name} #{self.incarnation}{'' if self.is_alive else ' stopped'}>"

    @property
    def incarnation(self) -> int:
        """How often the actor behind this address was restarted."""
        return self._home.incarnation

    @property
    def is_alive(self) -> bool:
        """False once the actor has stopped for good; true while it restarts."""
        return self._home.is_alive

    def tell(self, message: M_contra, *, cause: int = NO_CAUSE, correlation: str = "", control: bool = False) -> None:
        """Send a message and forget it.

        Args:
            message: what to send.
            cause: position of the record that led to this message.
            correlation: the request concerned.
            control: use the control lane, which is served before data.
        """
        letter = Letter(message, None, cause, correlation)
        try:
            shed = self.inbox.put(letter, CONTROL if control else DATA)
        except (ActorDead, MailboxFull) as error:
            self._bury(letter, error)
        else:
            if shed is not None:
                self._kernel.bury(shed, self.name, "shed")

    def ask(
        self,
        message: M_contra,
        *,
        timeout_s: float,
        cause: int = NO_CAUSE,
        correlation: str = "",
        control: bool = False,
    ) -> ReplyFuture[Any]:
        """Send a message and get the reply, by ``await`` or, on a thread without an event loop, by ``get()``.

        Args:
            message: what to send.
            timeout_s: seconds from now until the reply is given up and the message is not worth handling.
            cause: position of the record that led to this message.
            correlation: the request concerned.
            control: use the control lane, which is served before data.
        """
        reply: ReplyFuture[Any] = ReplyFuture()
        deadline_ns = self._kernel.clock.monotonic_ns() + int(timeout_s * NS_PER_S)
        letter = Letter(message, reply, cause, correlation, deadline_ns)
        try:
            shed = self.inbox.put(letter, CONTROL if control else DATA)
        except (ActorDead, MailboxFull) as error:
            self._bury(letter, error)
            return reply
        if shed is not None:
            self._kernel.bury(shed, self.name, "shed")
        self._kernel.expire(reply, timeout_s, self.name)
        return reply

    async def tell_wait(
        self, message: M_contra, *, timeout_s: float = 5.0, cause: int = NO_CAUSE, correlation: str = ""
    ) -> bool:
        """Send a message, waiting for room in the data lane.

        Returns:
            True when the mailbox took it; False when it became a dead letter, because the actor stopped or no room
            came within ``timeout_s``.
        """
        letter = Letter(message, None, cause, correlation)
        try:
            async with asyncio.timeout(timeout_s):
                while (waiter := self.inbox.offer(letter)) is not None:
                    try:
                        await waiter
                    except asyncio.CancelledError:
                        self.inbox.leave(waiter)
                        raise
        except (ActorDead, TimeoutError) as error:
            self.inbox.count_refused()
            self._kernel.bury(letter, self.name, "dead" if isinstance(error, ActorDead) else "full")
            return False
        return True

    async def stop(self, timeout_s: float = 5.0) -> bool:
        """Stop the actor for good: it takes nothing new, handles the letters it has, and ends.

        Call it on the system's loop. After ``timeout_s`` an awaiting handler is cancelled and the remaining letters
        become dead letters.

        Returns:
            Whether it stopped by itself in time.
        """
        return await self._home.stop(timeout_s)

    def watch(self, watcher: "Ref[Any]") -> None:
        """Send ``watcher`` a ``Terminated`` when this actor stops for good, at once if it has."""
        self._home.watch(watcher)

    def _bury(self, letter: Letter, error: ActorError) -> None:
        self._kernel.bury(letter, self.name, "dead" if isinstance(error, ActorDead) else "full")
