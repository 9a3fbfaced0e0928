"""A bounded mailbox with two lanes.

Rules:
- Any thread may put; one consumer gets. Control letters come first, each lane is in order.
- Both lanes are bounded. What a full data lane does is the ``Policy``; a full control lane always refuses.
- ``put`` and ``seal`` exclude each other by one lock: a letter is either inside, to be taken or returned by ``close``,
  or its ``put`` raised ``ActorDead``. None is stranded.
- Wake-ups are coalesced: the consumer is rung only when it has seen the inbox empty, once for a whole burst.
- Counting: ``sent == taken + dead + len(inbox)`` at any quiet moment.
"""

import enum
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from gptoss.actors.future import ReplyFuture
from gptoss.errors import ActorDead, MailboxFull
from gptoss.messages.envelope import NO_CAUSE

Policy = Literal["refuse", "wait", "shed"]
"""What a full data lane does with the next letter: refuse it; let ``tell_wait`` wait for room (``tell`` is refused);
or shed the oldest data letter in favour of the new one."""


class Lane(enum.Enum):
    """Which queue of the mailbox a letter joins."""

    CONTROL = "control"
    DATA = "data"


CONTROL = Lane.CONTROL
DATA = Lane.DATA


class MailboxSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of a mailbox, in letters."""

    capacity: int = 10_000
    policy: Policy = "refuse"
    control_capacity: int = 100_000


class Letter(msgspec.Struct, eq=False):
    """A message on its way.

    Attributes:
        reply_to: where the answer of an ask goes; None for a tell and once a handler deferred the reply.
        cause: position of the record that led to this message.
        correlation: the request concerned, or empty.
        deadline_ns: monotonic time after which an ask is not worth handling; None for a tell.
    """

    message: Any
    reply_to: ReplyFuture[Any] | None = None
    cause: int = NO_CAUSE
    correlation: str = ""
    deadline_ns: int | None = None


class Inbox:
    """The letters that wait for one actor; it outlives the actor's restarts."""

    __slots__ = (
        "_capacity",
        "_closed",
        "_control",
        "_control_capacity",
        "_data",
        "_idle",
        "_lock",
        "_owner",
        "_ring",
        "_sheds",
        "_waiters",
        "dead",
        "sent",
        "taken",
    )

    def __init__(self, owner: str, spec: MailboxSpec) -> None:
        self._owner = owner
        self._capacity = spec.capacity
        self._control_capacity = spec.control_capacity
        self._sheds = spec.policy == "shed"
        self._lock = threading.Lock()
        self._control: deque[Letter] = deque()
        self._data: deque[Letter] = deque()
        self._waiters: deque[ReplyFuture[None]] = deque()
        self._ring: Callable[[], None] | None = None
        self._idle = False
        self._closed = False
        self.sent = 0
        self.taken = 0
        self.dead = 0

    def __len__(self) -> int:
        return len(self._control) + len(self._data)

    def empty(self) -> bool:
        """Whether no letter waits."""
        return not (self._control or self._data)

    def is_at_rest(self) -> bool:
        """Whether no letter waits and the consumer, having handled all, sleeps; also once nobody can come any more."""
        return self.empty() and (self._idle or self._closed)

    # ---- the senders' side

    def put(self, letter: Letter, lane: Lane = DATA) -> Letter | None:
        """Add a letter and wake the consumer if it sleeps.

        Returns:
            The oldest data letter if it had to make room, to be dead-lettered by the caller.

        Raises:
            ActorDead: the inbox is closed.
            MailboxFull: the lane is full and its policy is not to shed.
        """
        shed = ring = None
        with self._lock:
            self.sent += 1
            if lane is DATA:
                if len(self._data) >= self._capacity:
                    shed = self._make_room(lane)
                self._data.append(letter)
            else:
                if len(self._control) >= self._control_capacity:
                    self._make_room(lane)
                self._control.append(letter)
            if self._idle:
                self._idle = False
                ring = self._ring
        if ring is not None:
            ring()
        return shed

    def _make_room(self, lane: Lane) -> Letter | None:
        """Shed a letter or raise. A closed inbox has capacity 0, so that ``put`` needs no check of its own."""
        self.dead += 1
        if self._closed:
            raise ActorDead(f"{self._owner} has stopped")
        if lane is DATA and self._sheds:
            try:
                return self._data.popleft()
            except IndexError:  # the consumer was quicker: there is room now
                self.dead -= 1
                return None
        capacity = self._capacity if lane is DATA else self._control_capacity
        raise MailboxFull(f"the {lane.value} mailbox of {self._owner} is full: {capacity} letters wait")

    def offer(self, letter: Letter) -> ReplyFuture[None] | None:
        """Add a data letter if there is room; else a future that is set when it is this sender's turn to try again.

        Raises:
            ActorDead: the inbox is closed.
        """
        ring = waiter = None
        with self._lock:
            if self._closed:
                raise ActorDead(f"{self._owner} has stopped")
            if len(self._data) >= self._capacity:
                waiter = ReplyFuture[None]()
                self._waiters.append(waiter)
            else:
                self.sent += 1
                self._data.append(letter)
                if self._idle:
                    self._idle = False
                    ring = self._ring
        if ring is not None:
            ring()
        if waiter is not None and len(self._data) < self._capacity:
            self._call_waiter()  # the consumer, which takes no lock, made room before it could see the waiter
        return waiter

    def leave(self, waiter: ReplyFuture[None]) -> None:
        """A waiter gives up: its turn, if it had come, goes to the next one."""
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                return
        self._call_waiter()

    def count_refused(self) -> None:
        """A letter that was only offered is dead-lettered."""
        with self._lock:
            self.sent += 1
            self.dead += 1

    # ---- the consumer's side

    def attach(self, ring: Callable[[], None]) -> None:
        """Name the way to wake the consumer, which must first ``get`` until it sees None."""
        with self._lock:
            self._ring = ring
            self._idle = False

    def detach(self) -> None:
        """The consumer is gone; letters wait for the next one."""
        with self._lock:
            self._ring = None
            self._idle = False

    def get(self) -> Letter | None:
        """The next letter, or None: then the consumer sleeps until it is rung."""
        while True:
            try:
                letter = self._control.popleft() if self._control else self._data.popleft()
            except IndexError:
                with self._lock:
                    if self._control or self._data:
                        continue
                    self._idle = True
                return None
            self.taken += 1
            if self._waiters:
                self._call_waiter()
            return letter

    def count_taken_as_dead(self) -> None:
        """A letter that was taken is dead-lettered instead of handled."""
        with self._lock:
            self.taken -= 1
            self.dead += 1

    def seal(self) -> None:
        """Refuse every later ``put``; what is inside can still be taken. Idempotent."""
        with self._lock:
            self._closed = True
            self._capacity = self._control_capacity = 0
            waiters = list(self._waiters)
            self._waiters.clear()
        for waiter in waiters:
            waiter.resolve()

    def close(self) -> list[Letter]:
        """Seal, and return the letters that nobody will handle; idempotent."""
        self.seal()
        with self._lock:
            self._ring = None
            left = [*self._control, *self._data]
            self._control.clear()
            self._data.clear()
            self.dead += len(left)
        return left

    def _call_waiter(self) -> None:
        with self._lock:
            waiter = self._waiters.popleft() if self._waiters else None
        if waiter is not None:
            waiter.resolve()
