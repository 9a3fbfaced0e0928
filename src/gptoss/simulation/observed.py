"""What the invariants look at: everything that a run left behind, and the way to say that an invariant is broken."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, TypeAlias

from gptoss.actors.future import ReplyFuture
from gptoss.actors.inbox import Inbox
from gptoss.config import Settings
from gptoss.messages.envelope import Event, Record
from gptoss.simulation.clients import Seen
from gptoss.simulation.journal import SimulatedJournal
from gptoss.simulation.scenario import Scenario


class BrokenInvariant(Exception):
    """An invariant does not hold.

    Attributes:
        invariant: its name.
        message: what is wrong, with the request, actor or record concerned.
    """

    def __init__(self, invariant: str, message: str) -> None:
        super().__init__(f"{invariant}: {message}")
        self.invariant = invariant
        self.message = message


class ViolationError(Exception):
    """Raised by an invariant; the message says what is wrong."""


class Observed:
    """A run, for the invariants.

    Attributes:
        seen: what each client saw.
        asks: the reply of each ask of the probe, with what was asked.
        stuck: mailboxes where letters waited when nothing happened any more, with their number.
        inboxes: each mailbox that was ever opened, with its owner's name.
        live: what the live projections answered when all was at rest: name of the query -> answer.
        rebuilt: the same queries of projections that were folded from the journal's bytes.
        now_ns: the time.
        engine_sessions: what each living engine keeps of sessions, in bytes.
        logs: everything that was logged, as text.
        loop_failures: what reached the event loop's exception handler.
    """

    def __init__(self, scenario: Scenario, settings: Settings, journal: SimulatedJournal) -> None:
        self.scenario = scenario
        self.settings = settings
        self.journal = journal
        self.seen: list[Seen] = []
        self.asks: list[tuple[str, ReplyFuture[Any]]] = []
        self.stuck: list[tuple[str, int]] = []
        self.inboxes: list[tuple[str, Inbox]] = []
        self.live: dict[str, Any] = {}
        self.rebuilt: dict[str, Any] = {}
        self.now_ns = 0
        self.engine_sessions: dict[str, dict[str, int]] = {}
        self.logs = ""
        self.loop_failures: list[str] = []

    @cached_property
    def records(self) -> list[Record]:
        """The control records."""
        return list(self.journal.read())

    @cached_property
    def content(self) -> list[Record]:
        """The content records."""
        return list(self.journal.read(family="content"))

    @cached_property
    def streams(self) -> dict[str, list[Record]]:
        """The control records by stream."""
        streams: dict[str, list[Record]] = defaultdict(list)
        for record in self.records:
            streams[record.meta.stream].append(record)
        return dict(streams)

    def of_type(self, *kinds: type[Event]) -> Iterable[Record]:
        """The control records of these types."""
        return (record for record in self.records if isinstance(record.event, kinds))


Invariant: TypeAlias = Callable[[Observed], None]


def check(invariants: Iterable[Invariant], observed: Observed) -> None:
    """Look at each invariant in turn.

    Raises:
        BrokenInvariant: the first that does not hold.
    """
    for invariant in invariants:
        try:
            invariant(observed)
        except ViolationError as error:
            raise BrokenInvariant(invariant.__name__, str(error)) from None
