"""The line in front of the executors: who of those who wait goes next. An immutable value; every step is O(log n).

Two orders:

- By priority (the default of ``LineOrder``): the lower priority number first, then who has waited longest.
- Fair (``ageing_ns`` above 0): tenants take turns by what they have been given, each tenant's own requests by priority
  and age.

Rules of the fair order:
- A tenant has a counter of KV bytes that were set aside for it while there was a line. The tenant with the smallest goes
  next, and its counter grows by what it is given: tenants that always have work get equal memory, whatever the number
  and size of their requests. (Virtual token counter; Source: Sheng et al., Fairness in Serving Large Language Models,
  OSDI 2024, with bytes for tokens.)
- Who comes back after a pause begins at the smallest counter of those who wait, so that nobody saves up turns.
- Within a tenant a step of priority is worth ``ageing_ns`` of waiting, so that nothing waits for ever behind a stream of
  more urgent requests. Between tenants priority counts for nothing: it is the client's own word.
- A tenant that waits and was given nothing for ``ageing_ns`` goes next, whatever the counters say: an endless stream of
  fresh tenants, who all begin at the smallest counter, cannot keep it out.
- Counters matter only while there is a line; without one they are forgotten.
"""

import msgspec
from immutables import Map

from gptoss.actors.ordered import Key, Ordered

LAST_NUMBER = 2**63
COUNTERS_MIN = 1024
"""So many counters are kept before those that mean nothing any more are dropped."""
COUNTERS_MAX = 65_536
"""With more that still mean something, only those who wait keep theirs."""


class LineOrder(msgspec.Struct, frozen=True, kw_only=True):
    """How a line is ordered; ``ageing_ns`` 0 is by priority alone, all tenants being one."""

    ageing_ns: int = 0

    @property
    def is_fair(self) -> bool:
        """Whether tenants take turns."""
        return self.ageing_ns > 0

    def tenant(self, tenant: str) -> str:
        """The tenant as the line knows it."""
        return tenant if self.is_fair else ""

    def rank(self, priority: int, since_ns: int) -> tuple[int, int]:
        """Where a request stands among its tenant's; the lowest goes first."""
        return (0, since_ns + priority * self.ageing_ns) if self.is_fair else (priority, since_ns)


class Place(msgspec.Struct, frozen=True):
    """Where a request waits. ``key`` is its rank and its number."""

    tenant: str
    key: Key


class Waiters(msgspec.Struct, frozen=True):
    """The requests of one tenant that wait.

    Attributes:
        since_ns: when it was last given something, or else began to wait.
        number: of its first arrival since it began to wait; tells equal tenants apart.
        queue: its requests by rank.
    """

    since_ns: int
    number: int
    queue: Ordered[str]


class FairLine(msgspec.Struct, frozen=True, kw_only=True):
    """The line.

    Attributes:
        order: how it is ordered.
        places: by request.
        tenants: those that wait.
        turns: tenants by counter; ``patience``: by ``since_ns``; ``sizes``: by number of requests.
        counters: of tenants that were given something while there was a line; ``floor``: where newcomers begin.
        counters_max: with more, those that mean nothing any more are dropped.
    """

    order: LineOrder = LineOrder()
    places: Map[str, Place] = Map()
    tenants: Map[str, Waiters] = Map()
    turns: Ordered[str] = Ordered()
    patience: Ordered[str] = Ordered()
    sizes: Ordered[str] = Ordered()
    counters: Map[str, int] = Map()
    floor: int = 0
    counters_max: int = COUNTERS_MIN

    def __len__(self) -> int:
        return len(self.places)

    # ---- changes

    def join(
        self, name: str, number: int, *, tenant: str, priority: int, since_ns: int, began: tuple[int, int] | None = None
    ) -> "FairLine":
        """With one request more.

        Args:
            name: of the request.
            number: of its arrival; each has its own, and of equals the lowest goes first.
            tenant: whose it is.
            priority: the lowest goes first.
            since_ns: since when it waits; one that is put back keeps its age.
            began: ``since_ns`` and ``number`` of its tenant, if those are known and the tenant does not wait yet.
        """
        tenant = self.order.tenant(tenant)
        place = Place(tenant, (*self.order.rank(priority, since_ns), number))
        own = self.tenants.get(tenant)
        before = own or Waiters(*(began or (since_ns, number)), Ordered())
        after = Waiters(before.since_ns, before.number, before.queue.put(place.key, name))
        line = msgspec.structs.replace(self, places=self.places.set(name, place))
        return _with_waiters(line, tenant, own, after)

    def leave(self, name: str) -> "FairLine":
        """Without a request. Raises ``KeyError`` if it does not wait."""
        place = self.places[name]
        own = self.tenants[place.tenant]
        queue = own.queue.take(place.key)
        line = msgspec.structs.replace(self, places=self.places.delete(name))
        line = _with_waiters(line, place.tenant, own, Waiters(own.since_ns, own.number, queue) if queue else None)
        if line.places:
            return line
        return msgspec.structs.replace(line, counters=Map(), floor=0, counters_max=COUNTERS_MIN)

    def charge(self, tenant: str, kv_bytes: int, now_ns: int) -> "FairLine":
        """After a tenant was given memory; without a line it costs nothing."""
        if not (self.order.is_fair and self.places):
            return self
        counter = self.counter(tenant)
        floor = max(self.floor, min(counter, self.turns.first()[0][0]))
        own = self.tenants.get(tenant)
        line = self if own is None else _with_waiters(self, tenant, own, None)
        line = msgspec.structs.replace(line, counters=line.counters.set(tenant, counter + kv_bytes), floor=floor)
        if own is None:
            return _without_stale_counters(line)
        return _with_waiters(line, tenant, None, Waiters(now_ns, own.number, own.queue))

    # ---- questions

    def counter(self, tenant: str) -> int:
        """What a tenant has been given, as far as it counts."""
        return max(self.counters.get(tenant, 0), self.floor)

    def head(self, now_ns: int) -> str | None:
        """Who goes next; None if nobody waits."""
        if not self.places:
            return None
        tenant = self.turns.first()[1]
        if self.order.is_fair:
            (since_ns, _), patient = self.patience.first()
            if now_ns - since_ns >= self.order.ageing_ns:
                tenant = patient
        return self.tenants[tenant].queue.first()[1]

    def ahead_of(self, tenant: str, priority: int, since_ns: int) -> int:
        """About how many of those who wait go before such a request; exact by priority.

        Fair: for each of its own requests before it, one of every other tenant that waits, at most all.
        """
        tenant = self.order.tenant(tenant)
        own = self.tenants.get(tenant)
        before = own.queue.count_below((*self.order.rank(priority, since_ns), LAST_NUMBER)) if own else 0
        others = len(self.tenants) - (own is not None)
        own_size = len(own.queue) if own else 0
        return before + min(len(self.places) - own_size, (before + 1) * others)

    def to_displace(self, tenant: str) -> str | None:
        """Who has to leave a full line for a newcomer: the last of the tenant with most requests, if that is fairer."""
        tenant = self.order.tenant(tenant)
        if not (self.order.is_fair and self.places):
            return None
        (most, _), largest = self.sizes.last()
        own = self.tenants.get(tenant)
        if most <= (len(own.queue) if own else 0) + 1:
            return None
        return self.tenants[largest].queue.last()[1]

    def names(self) -> list[str]:
        """Those who wait, tenant by tenant, next first."""
        return [name for tenant in self.turns for name in self.tenants[tenant].queue]


def _with_waiters(line: FairLine, tenant: str, before: Waiters | None, after: Waiters | None) -> FairLine:
    """With other waiters of a tenant in every index; only who begins to wait or ends may change ``since_ns``."""
    tenants, turns, patience, sizes = line.tenants, line.turns, line.patience, line.sizes
    counters = line.counters
    if before is None:
        counters = counters.set(tenant, line.counter(tenant))
    else:
        sizes = sizes.take((len(before.queue), before.number))
    if before is not None and after is None:
        turns = turns.take((counters[tenant], before.since_ns, before.number))
        patience = patience.take((before.since_ns, before.number))
        tenants = tenants.delete(tenant)
    elif after is not None:
        tenants = tenants.set(tenant, after)
        sizes = sizes.put((len(after.queue), after.number), tenant)
    if before is None and after is not None:
        turns = turns.put((counters[tenant], after.since_ns, after.number), tenant)
        patience = patience.put((after.since_ns, after.number), tenant)
    return msgspec.structs.replace(
        line, tenants=tenants, turns=turns, patience=patience, sizes=sizes, counters=counters
    )


def _without_stale_counters(line: FairLine) -> FairLine:
    if len(line.counters) <= line.counters_max:
        return line
    kept = {t: c for t, c in line.counters.items() if c > line.floor or t in line.tenants}
    if len(kept) > COUNTERS_MAX:
        kept = {t: c for t, c in kept.items() if t in line.tenants}
    return msgspec.structs.replace(line, counters=Map(kept), counters_max=COUNTERS_MIN + 2 * len(kept))
