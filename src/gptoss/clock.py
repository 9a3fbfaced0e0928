"""The only home of time, ids and chance.

Everything else takes a ``Clock``, an ``IdSource`` and an ``Rng`` as arguments, so that a test or a replay can supply
its own. Lint bans ``time``, ``uuid4`` and ``random`` elsewhere.
"""

import random
import secrets
import time
from collections.abc import Sequence
from typing import Protocol, TypeVar

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000

T = TypeVar("T")


class Clock(Protocol):
    """Where time comes from."""

    def monotonic_ns(self) -> int:
        """Nanoseconds that never go back; the zero is arbitrary. Order, waits and durations use this."""
        ...

    def wall_ns(self) -> int:
        """Nanoseconds since the Unix epoch; may jump. Only for showing to people and for clients' ``created``."""
        ...

    def thread_ns(self) -> int:
        """Nanoseconds of work of the calling thread: what it waited for, the interpreter's lock included, is not in them."""
        ...


class IdSource(Protocol):
    """Where identifiers come from."""

    def new_id(self, prefix: str) -> str:
        """A fresh identifier such as ``req_5f0c...``: the prefix, an underscore and 96 random bits in hex."""
        ...


class Rng(Protocol):
    """Where chance comes from."""

    def uniform(self) -> float:
        """A float in [0, 1)."""
        ...

    def seed63(self) -> int:
        """An integer in [0, 2**63), fit to be a sampling seed."""
        ...


class SystemClock:
    """The machine's clocks; read for every record, so there is no function of ours around them."""

    monotonic_ns = staticmethod(time.monotonic_ns)
    wall_ns = staticmethod(time.time_ns)
    thread_ns = staticmethod(time.thread_time_ns)


class SystemIds:
    """Random identifiers from the operating system."""

    def new_id(self, prefix: str) -> str:
        """See ``IdSource``."""
        return f"{prefix}_{secrets.token_hex(12)}"


class SystemRng:
    """Chance from a generator seeded by the operating system."""

    def __init__(self) -> None:
        self._random = random.Random(secrets.randbits(256))  # noqa: S311 - drawn for each request; no secret is made of it

    def uniform(self) -> float:
        """See ``Rng``."""
        return self._random.random()

    def seed63(self) -> int:
        """See ``Rng``."""
        return self._random.getrandbits(63)


class SeededRng:
    """Chance that is the same for the same seed, on every machine and in every process.

    Args:
        seed: any text; streams of chance for different purposes take different texts.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)  # noqa: S311 - chance for tests and simulations; a text seed is hashed whole

    def uniform(self) -> float:
        """See ``Rng``."""
        return self._random.random()

    def seed63(self) -> int:
        """See ``Rng``."""
        return self._random.getrandbits(63)

    def below(self, bound: int) -> int:
        """An integer in [0, bound)."""
        return int(self._random.random() * bound)

    def between(self, low: float, high: float) -> float:
        """A float in [low, high)."""
        return low + (high - low) * self._random.random()

    def pick(self, items: Sequence[T]) -> T:
        """One of ``items``."""
        return items[self.below(len(items))]

    def happens(self, probability: float) -> bool:
        """True with this probability."""
        return self._random.random() < probability


class SeededIds:
    """Identifiers drawn from a ``SeededRng``."""

    def __init__(self, rng: SeededRng) -> None:
        self._rng = rng

    def new_id(self, prefix: str) -> str:
        """See ``IdSource``."""
        return f"{prefix}_{self._rng.seed63():016x}"
