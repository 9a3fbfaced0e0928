"""The mailbox: two bounded lanes, a policy, closing, and its accounts."""

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gptoss.actors.inbox import CONTROL, DATA, Inbox, Lane, Letter, MailboxSpec
from gptoss.errors import ActorDead, MailboxFull


def taken(inbox: Inbox) -> list[object]:
    messages: list[object] = []
    while (letter := inbox.get()) is not None:
        messages.append(letter.message)
    return messages


def test_control_goes_first_and_each_lane_is_in_order() -> None:
    inbox = Inbox("x", MailboxSpec())
    for message, lane in (("d1", DATA), ("c1", CONTROL), ("d2", DATA), ("c2", CONTROL)):
        inbox.put(Letter(message), lane)
    assert taken(inbox) == ["c1", "c2", "d1", "d2"]


def test_a_full_data_lane_refuses_and_leaves_control_open() -> None:
    inbox = Inbox("x", MailboxSpec(capacity=1))
    inbox.put(Letter("d1"))
    with pytest.raises(MailboxFull, match="data mailbox of x is full: 1 letters"):
        inbox.put(Letter("d2"))
    inbox.put(Letter("c1"), CONTROL)
    assert taken(inbox) == ["c1", "d1"]


def test_the_control_lane_is_bounded_too() -> None:
    inbox = Inbox("x", MailboxSpec(control_capacity=1, policy="shed"))
    inbox.put(Letter("c1"), CONTROL)
    with pytest.raises(MailboxFull, match="control"):
        inbox.put(Letter("c2"), CONTROL)


def test_shedding_gives_back_the_oldest_data_letter() -> None:
    inbox = Inbox("x", MailboxSpec(capacity=2, policy="shed"))
    shed = [inbox.put(Letter(number)) for number in range(3)]
    assert [letter and letter.message for letter in shed] == [None, None, 0]
    assert taken(inbox) == [1, 2]


def test_a_closed_inbox_refuses_and_gives_back_what_was_left() -> None:
    inbox = Inbox("x", MailboxSpec())
    inbox.put(Letter("d"))
    inbox.put(Letter("c"), CONTROL)
    assert [letter.message for letter in inbox.close()] == ["c", "d"]
    assert inbox.close() == []
    for lane in Lane:
        with pytest.raises(ActorDead):
            inbox.put(Letter("late"), lane)
    with pytest.raises(ActorDead):
        inbox.offer(Letter("late"))


def test_a_sealed_inbox_can_still_be_emptied() -> None:
    inbox = Inbox("x", MailboxSpec())
    inbox.put(Letter("d"))
    inbox.seal()
    with pytest.raises(ActorDead):
        inbox.put(Letter("late"))
    assert taken(inbox) == ["d"]


def test_a_sleeping_consumer_is_rung_once_for_a_burst() -> None:
    inbox = Inbox("x", MailboxSpec())
    rings: list[int] = []
    inbox.attach(lambda: rings.append(1))
    assert inbox.get() is None  # now it sleeps
    for number in range(10):
        inbox.put(Letter(number))
    assert len(rings) == 1
    assert len(taken(inbox)) == 10
    inbox.put(Letter("next burst"))
    assert len(rings) == 2


def test_a_detached_consumer_is_not_rung() -> None:
    inbox = Inbox("x", MailboxSpec())
    rings: list[int] = []
    inbox.attach(lambda: rings.append(1))
    assert inbox.get() is None
    inbox.detach()
    inbox.put(Letter("waits for the next incarnation"))
    assert rings == []


def test_waiters_get_their_turn_one_for_each_letter_taken() -> None:
    inbox = Inbox("x", MailboxSpec(capacity=1, policy="wait"))
    assert inbox.offer(Letter(1)) is None
    first, second = inbox.offer(Letter(2)), inbox.offer(Letter(3))
    assert first is not None
    assert second is not None
    inbox.get()
    assert (first.done(), second.done()) == (True, False)


def test_a_waiter_that_leaves_passes_its_turn_on() -> None:
    inbox = Inbox("x", MailboxSpec(capacity=1, policy="wait"))
    inbox.offer(Letter(1))
    first, second = inbox.offer(Letter(2)), inbox.offer(Letter(3))
    assert first is not None
    assert second is not None
    inbox.get()
    inbox.leave(first)
    assert second.done()


def test_closing_wakes_every_waiter() -> None:
    inbox = Inbox("x", MailboxSpec(capacity=1, policy="wait"))
    inbox.offer(Letter(1))
    waiters = [inbox.offer(Letter(number)) for number in range(3)]
    inbox.close()
    assert all(waiter is not None and waiter.done() for waiter in waiters)


class InboxMachine(RuleBasedStateMachine):
    """An inbox against two plain queues."""

    def __init__(self) -> None:
        super().__init__()
        self.inbox = Inbox("x", MailboxSpec(capacity=3, control_capacity=2, policy="shed"))
        self.lanes: dict[Lane, deque[int]] = {CONTROL: deque(), DATA: deque()}
        self.is_closed = False
        self.is_asleep = False
        self.rings = 0
        self.next = 0
        self.inbox.attach(self._ring)

    def _ring(self) -> None:
        self.rings += 1

    @rule(lane=st.sampled_from(Lane))
    def put(self, lane: Lane) -> None:
        self.next += 1
        letter, queue, rings = Letter(self.next), self.lanes[lane], self.rings
        if self.is_closed:
            with pytest.raises(ActorDead):
                self.inbox.put(letter, lane)
            return
        if lane is CONTROL and len(queue) == 2:
            with pytest.raises(MailboxFull):
                self.inbox.put(letter, lane)
            return
        shed = self.inbox.put(letter, lane)
        assert (shed.message if shed else None) == (queue.popleft() if lane is DATA and len(queue) == 3 else None)
        queue.append(self.next)
        assert self.rings - rings == self.is_asleep
        self.is_asleep = False

    @rule()
    def get(self) -> None:
        letter = self.inbox.get()
        queue = self.lanes[CONTROL] or self.lanes[DATA]
        assert (letter.message if letter else None) == (queue.popleft() if queue else None)
        self.is_asleep = letter is None

    @precondition(lambda self: not self.is_closed)
    @rule()
    def close(self) -> None:
        self.is_closed = True
        left = [letter.message for letter in self.inbox.close()]
        assert left == [*self.lanes[CONTROL], *self.lanes[DATA]]
        for queue in self.lanes.values():
            queue.clear()

    @invariant()
    def accounts_balance(self) -> None:
        assert len(self.inbox) == sum(map(len, self.lanes.values()))
        assert self.inbox.empty() == (len(self.inbox) == 0)
        assert self.inbox.sent == self.inbox.taken + self.inbox.dead + len(self.inbox)


InboxMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestInboxMachine = InboxMachine.TestCase
