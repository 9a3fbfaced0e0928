"""Begins the requests of a load when they are due, and knows when the last of them has ended.

Rules:
- An open loop never waits for an answer. When the event loop is too busy to begin a request in time, it begins late, and
  whoever measures from its due time sees that.
- A closed loop waits for a free place. The place of a request that was told to come again later rests until then, as its
  client would: else a server that refuses at once is asked for nothing but refusals.
- Whatever happens it ends: after the last request, at the end of the load's time, or when it is told to stop. Requests
  that are open then have ``GRACE_S`` to end, or none when it was told to stop.
"""

import asyncio
import contextlib
from collections.abc import Callable

from gptoss.bench.figures import Ended
from gptoss.bench.load import Arrival, Load, arrivals
from gptoss.clock import NS_PER_S, Clock

GRACE_S = 30.0
REST_S_MAX = 10.0
TURN_REQUESTS = 32
"""Requests that begin in a row before others get their turn on the event loop."""
_LOOK_S = 0.1


class Feeder:
    """Feeds one load.

    Args:
        load: what to feed.
        clock: for due times.
        begin: begins a request, due at the given monotonic time. Plain; whoever it starts calls ``one_ended``.
        stop: ends the test when set.
    """

    def __init__(self, load: Load, clock: Clock, begin: Callable[[Arrival, int], None], stop: asyncio.Event) -> None:
        self._load = load
        self._clock = clock
        self._begin = begin
        self._stop = stop
        self._news = asyncio.Event()
        self.began = 0
        self.over = 0
        self.started_ns = 0
        self.ended_ns = 0
        self._resting = 0

    @property
    def open(self) -> int:
        """Requests that have begun and not ended."""
        return self.began - self.over

    def one_ended(self) -> None:
        """A request has ended. On the event loop."""
        self.over += 1
        self.ended_ns = self._clock.monotonic_ns()
        self._news.set()

    def rest(self, seconds: float) -> None:
        """Leave a place of a closed loop free for so long, but no longer than ``REST_S_MAX``."""
        self._resting += 1
        asyncio.get_running_loop().call_later(min(seconds, REST_S_MAX), self._rested)

    def _rested(self) -> None:
        self._resting -= 1
        self._news.set()

    async def run(self) -> Ended:
        """Feed the whole load and wait for its end; says what ended it."""
        self.started_ns = self.ended_ns = self._clock.monotonic_ns()
        last_ns = self.started_ns + int(self._load.duration_s * NS_PER_S)
        why: Ended = "all requests"
        for arrival in arrivals(self._load):
            due_ns = await self._turn_of(arrival, last_ns)
            if due_ns is None:
                why = "time"
                break
            self.began += 1
            self._begin(arrival, due_ns)
        await self._until(lambda: self.open == 0, self._clock.monotonic_ns() + int(GRACE_S * NS_PER_S))
        return "interrupted" if self._stop.is_set() else why

    async def _turn_of(self, arrival: Arrival, last_ns: int) -> int | None:
        """Wait until ``arrival`` is to begin; returns when it was due, or None when it is not to begin any more."""
        if self.began % TURN_REQUESTS == 0:
            await asyncio.sleep(0)
        if not self._load.rate:
            has_place = await self._until(lambda: self.open + self._resting < self._load.in_flight, last_ns)
            return self._clock.monotonic_ns() if has_place else None
        due_ns = self.started_ns + arrival.due_ns
        if due_ns > last_ns:
            return None
        while not self._stop.is_set():
            left_s = (due_ns - self._clock.monotonic_ns()) / NS_PER_S
            if left_s <= 0:
                return due_ns
            await asyncio.sleep(min(left_s, _LOOK_S))
        return None

    async def _until(self, is_so: Callable[[], bool], end_ns: int) -> bool:
        """Wait until something is so; False at ``end_ns``, or when told to stop."""
        while not self._stop.is_set():
            left_s = (end_ns - self._clock.monotonic_ns()) / NS_PER_S
            if left_s <= 0:
                return False
            if is_so():
                return True
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, _LOOK_S)):
                    await self._news.wait()
        return False
