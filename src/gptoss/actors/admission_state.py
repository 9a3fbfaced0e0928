"""What admission knows: capacities, who waits, who runs, and how fast the line moves. A value; every step is O(log n)."""

from collections.abc import Mapping
from typing import TypeVar

import msgspec
from immutables import Map

from gptoss.actors.fair_line import COUNTERS_MIN, FairLine, LineOrder
from gptoss.actors.ordered import Ordered
from gptoss.clock import NS_PER_S
from gptoss.messages.events import Ask

RAN_SMOOTHING = 0.2
RELEASES_MIN = 8
"""So many departures from a server with a line have to be seen before anybody is refused on a forecast."""

T = TypeVar("T")


class Capacity(msgspec.Struct, frozen=True):
    """What one executor offers; ``multi_device`` if its engine spans several devices."""

    slots: int
    kv_budget_bytes: int
    multi_device: bool = False


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How fast requests leave while others wait: the rate at which the line moves, whatever it is that holds it up.

    Attributes:
        interval_ns: between two departures, as a moving mean; 0 before the second.
        samples: intervals that were seen.
        last_ns: the last departure; 0 if nobody waited then.
    """

    interval_ns: float = 0.0
    samples: int = 0
    last_ns: int = 0

    def after(self, at_ns: int, *, has_line: bool) -> "Pace":
        """After a departure."""
        if not has_line:
            return msgspec.structs.replace(self, last_ns=0)
        if not self.last_ns:
            return msgspec.structs.replace(self, last_ns=at_ns)
        interval_ns = float(at_ns - self.last_ns)
        mean = self.interval_ns + RAN_SMOOTHING * (interval_ns - self.interval_ns) if self.samples else interval_ns
        return Pace(interval_ns=mean, samples=self.samples + 1, last_ns=at_ns)


class AdmissionState(msgspec.Struct, frozen=True, kw_only=True):
    """Capacities, and each request in exactly one of ``waiting``, ``pending`` (memory asked for) and ``running``.

    Attributes:
        line: the order of those in ``waiting`` who are not parked.
        parked: those whom no executor that is up could hold, by size; still in ``waiting``.
        numbers: of the arrivals of those who wait; the next one gets ``arrivals``.
        deadlines: all who wait by deadline.
        num_tried: of ``pending``, those who came out of the line; a no puts them back in front.
        ran_ns_mean: how long requests hold their slots.
    """

    capacities: dict[str, Capacity] = {}
    waiting: Map[str, Ask] = Map()
    pending: Map[str, Ask] = Map()
    running: Map[str, int] = Map()
    line: FairLine = FairLine()
    parked: Ordered[str] = Ordered()
    numbers: Map[str, int] = Map()
    arrivals: int = 0
    deadlines: Ordered[str] = Ordered()
    num_tried: int = 0
    ran_ns_mean: float = 0.0
    pace: Pace = Pace()
    closed: bool = False

    @property
    def slots(self) -> int:
        """Requests that may run at once."""
        return sum(capacity.slots for capacity in self.capacities.values())

    @property
    def kv_bytes_max(self) -> int:
        """The largest request that could ever run."""
        return max((capacity.kv_budget_bytes for capacity in self.capacities.values()), default=0)

    @property
    def kv_bytes_max_up(self) -> int:
        """The largest request that an executor which is up could hold."""
        return max((each.kv_budget_bytes for each in self.capacities.values() if each.slots), default=0)

    @property
    def has_multi_device(self) -> bool:
        """Whether an executor that is up spans several devices."""
        return any(each.multi_device and each.slots for each in self.capacities.values())

    @property
    def free_slots(self) -> int:
        """Requests that may start now."""
        return max(0, self.slots - len(self.running) - len(self.pending))

    @property
    def tried(self) -> tuple[Ask, ...]:
        """Those out of the line for whom memory has been asked and not answered; a no puts them back in front."""
        return tuple(ask for ask in self.pending.values() if ask.enqueued_ns >= 0) if self.num_tried else ()

    def has_line(self, ask: Ask, now_ns: int) -> bool:
        """Whether anyone goes before a newcomer, memory already asked for or not."""
        if not (len(self.line) or self.num_tried):
            return False
        order = self.line.order
        rank = order.rank(ask.priority, now_ns)
        for other in self.tried:
            if order.tenant(other.tenant) != order.tenant(ask.tenant):
                return True
            if order.rank(other.priority, other.enqueued_ns) <= rank:
                return True
        if not len(self.line):
            return False
        with_it = self.line.join("", self.arrivals, tenant=ask.tenant, priority=ask.priority, since_ns=now_ns)
        return with_it.head(now_ns) != ""

    # ---- changes

    def with_waiting(self, request_id: str, ask: Ask, began: tuple[int, int] | None = None) -> "AdmissionState":
        """With a request in line; ``began`` as for ``FairLine.join``."""
        number = self.arrivals
        return msgspec.structs.replace(
            self,
            waiting=self.waiting.set(request_id, ask),
            numbers=self.numbers.set(request_id, number),
            arrivals=number + 1,
            deadlines=self.deadlines.put((ask.deadline_ns, number), request_id),
            line=_joined(self.line, request_id, number, ask, began),
        )

    def without_waiting(self, request_id: str) -> "AdmissionState":
        """Without a request that waits, parked or not."""
        ask, number = self.waiting[request_id], self.numbers[request_id]
        is_parked = request_id not in self.line.places
        return msgspec.structs.replace(
            self,
            waiting=self.waiting.delete(request_id),
            numbers=self.numbers.delete(request_id),
            deadlines=self.deadlines.take((ask.deadline_ns, number)),
            line=self.line if is_parked else self.line.leave(request_id),
            parked=self.parked.take((ask.kv_bytes, number)) if is_parked else self.parked,
        )

    def with_parked(self, request_id: str) -> "AdmissionState":
        """With a waiting request out of the line."""
        key = (self.waiting[request_id].kv_bytes, self.numbers[request_id])
        return msgspec.structs.replace(self, line=self.line.leave(request_id), parked=self.parked.put(key, request_id))

    def with_unparked(self, request_id: str) -> "AdmissionState":
        """With a parked request back in its place."""
        ask, number = self.waiting[request_id], self.numbers[request_id]
        return msgspec.structs.replace(
            self,
            line=_joined(self.line, request_id, number, ask),
            parked=self.parked.take((ask.kv_bytes, number)),
        )

    def expired(self, now_ns: int) -> list[str]:
        """Those who wait and whose deadline has passed, in the order of their arrival."""
        found: list[tuple[int, str]] = []
        for (deadline_ns, number), name in self.deadlines.items():
            if deadline_ns > now_ns:
                break
            found.append((number, name))
        return [name for _, name in sorted(found)]

    def unparkable(self) -> list[str]:
        """Those parked whom an executor that is up could hold by now."""
        found: list[str] = []
        for (kv_bytes, _), name in self.parked.items():
            if kv_bytes > self.kv_bytes_max_up:
                break
            found.append(name)
        return found

    def with_pending(self, request_id: str, ask: Ask) -> "AdmissionState":
        """With a request for whom memory is asked."""
        num_tried = self.num_tried + (ask.enqueued_ns >= 0)
        return msgspec.structs.replace(self, pending=self.pending.set(request_id, ask), num_tried=num_tried)

    def without_pending(self, request_id: str) -> "AdmissionState":
        """Without it, if it was there."""
        ask = self.pending.get(request_id)
        if ask is None:
            return self
        num_tried = self.num_tried - (ask.enqueued_ns >= 0)
        return msgspec.structs.replace(self, pending=self.pending.delete(request_id), num_tried=num_tried)

    def with_released(self, request_id: str, ran_ns: int, at_ns: int) -> "AdmissionState":
        """Without a request that ran, or for which memory was asked; ``at_ns`` 0 tells nothing of the line's pace."""
        mean = self.ran_ns_mean or float(ran_ns)
        mean += RAN_SMOOTHING * (ran_ns - mean)
        running = self.running.delete(request_id) if request_id in self.running else self.running
        pace = self.pace.after(at_ns, has_line=bool(self.waiting)) if at_ns else self.pace
        return msgspec.structs.replace(self.without_pending(request_id), running=running, ran_ns_mean=mean, pace=pace)

    # ---- forecasts

    def forecast_s(self, ahead: int) -> float:
        """How long one with ``ahead`` requests before it will wait, in seconds; 0 while nothing is known."""
        if self.pace.samples:
            return self.pace.interval_ns / NS_PER_S * (ahead + 1)
        return self.ran_ns_mean / NS_PER_S * (ahead + 1) / max(1, self.slots)

    def retry_after_s(self) -> float:
        """When a slot should be free for one more, in seconds, at least 1."""
        ahead = len(self.waiting) + 1
        return round(max(1.0, self.ran_ns_mean / NS_PER_S * ahead / max(1, self.slots)), 1)


class LineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What cannot be told of a fair line from those who wait in it.

    Attributes:
        numbers: of the arrivals of those who wait, in their order; the next one gets ``arrivals``.
        tenants: (since_ns, number) of each that waits, see ``fair_line.Waiters``.
    """

    numbers: tuple[int, ...] = ()
    arrivals: int = 0
    tenants: dict[str, tuple[int, int]] = {}
    counters: dict[str, int] = {}
    floor: int = 0
    counters_max: int = 0


class AdmissionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``AdmissionState`` as a snapshot holds it. Those who wait stand in the order of their arrival."""

    capacities: dict[str, Capacity] = {}
    waiting: dict[str, Ask] = {}
    pending: dict[str, Ask] = {}
    running: dict[str, int] = {}
    ran_ns_mean: float = 0.0
    closed: bool = False
    pace: Pace = Pace()
    parked: tuple[str, ...] = ()
    line: LineRecord | None = None


def recorded(state: AdmissionState) -> AdmissionRecord:
    """What a snapshot holds of a state: the same state always gives the same bytes."""
    line = state.line
    arrived = sorted(state.waiting, key=lambda name: state.numbers[name])
    return AdmissionRecord(
        capacities=state.capacities,
        waiting={name: state.waiting[name] for name in arrived},
        pending=_sorted(state.pending),
        running=_sorted(state.running),
        ran_ns_mean=state.ran_ns_mean,
        closed=state.closed,
        pace=state.pace,
        parked=tuple(state.parked),
        line=LineRecord(
            numbers=tuple(state.numbers[name] for name in arrived),
            arrivals=state.arrivals,
            tenants=_sorted({name: (each.since_ns, each.number) for name, each in line.tenants.items()}),
            counters=_sorted(line.counters),
            floor=line.floor,
            counters_max=line.counters_max,
        )
        if line.order.is_fair
        else None,
    )


def restored(record: AdmissionRecord, order: LineOrder) -> AdmissionState:
    """The state that a snapshot holds."""
    fair = record.line or LineRecord(counters_max=COUNTERS_MIN)
    state = AdmissionState(
        capacities=record.capacities,
        pending=Map(record.pending),
        running=Map(record.running),
        line=FairLine(order=order, counters=Map(fair.counters), floor=fair.floor, counters_max=fair.counters_max),
        num_tried=sum(ask.enqueued_ns >= 0 for ask in record.pending.values()),
        ran_ns_mean=record.ran_ns_mean,
        pace=record.pace,
        closed=record.closed,
    )
    numbers = fair.numbers or range(len(record.waiting))
    for number, (name, ask) in zip(numbers, record.waiting.items(), strict=True):
        state = msgspec.structs.replace(state, arrivals=number)
        state = state.with_waiting(name, ask, fair.tenants.get(order.tenant(ask.tenant)))
    for name in record.parked:
        state = state.with_parked(name)
    return msgspec.structs.replace(state, arrivals=fair.arrivals) if record.line else state


def _joined(line: FairLine, name: str, number: int, ask: Ask, began: tuple[int, int] | None = None) -> FairLine:
    return line.join(name, number, tenant=ask.tenant, priority=ask.priority, since_ns=ask.enqueued_ns, began=began)


def _sorted(items: Mapping[str, T]) -> dict[str, T]:
    return {name: items[name] for name in sorted(items)}
