"""What a load test asks for: how many requests, how long they are, and when each is due.

Rules:
- A load is a function of its seed: the same seed gives the same requests at the same times, on every machine.
- With a ``rate`` the loop is open: a request is due at its time whether or not the ones before it have been answered, as
  with real users. Without one the loop is closed: ``in_flight`` requests at once, the next as soon as one ends.
- Every load is bounded, in number and in time.
"""

import math
import re
from collections.abc import Iterator

import msgspec

from gptoss.clock import NS_PER_S, SeededRng
from gptoss.errors import ConfigError

_SPAN = re.compile(r"(\d+)(?:-(\d+))?")
_PRIORITY = re.compile(r"(-?\d+)(?::(\d+(?:\.\d+)?))?")


class Span(msgspec.Struct, frozen=True):
    """Lengths from ``low`` to ``high``, both included, each as likely as the others."""

    low: int
    high: int

    def draw(self, rng: SeededRng) -> int:
        """One of them."""
        return self.low + rng.below(self.high - self.low + 1)


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One load.

    Attributes:
        requests: at most so many; ``duration_s``: none begins after so many seconds.
        rate: requests a second, on average, as a Poisson process; 0 closes the loop.
        in_flight: requests at once, where the loop is closed.
        burst: requests that come together; the rate stays what it is.
        prompt, output: lengths in tokens. A fake tokenizer makes a token of each word.
        priorities: each with its share of the requests; lower runs first.
    """

    requests: int = 10_000
    duration_s: float = 30.0
    rate: float = 0.0
    in_flight: int = 64
    burst: int = 1
    prompt: Span = Span(32, 32)
    output: Span = Span(16, 16)
    priorities: tuple[tuple[int, float], ...] = ((0, 1.0),)
    seed: int = 1


class Arrival(msgspec.Struct, frozen=True):
    """One request of a load; ``due_ns`` counts from its beginning and is 0 where the loop is closed."""

    number: int
    due_ns: int
    prompt_tokens: int
    output_tokens: int
    priority: int


def arrivals(load: Load) -> Iterator[Arrival]:
    """The requests of ``load``, in the order in which they are due."""
    rng = SeededRng(f"{load.seed}/load")
    due_s = 0.0
    for number in range(load.requests):
        if load.rate and number and number % load.burst == 0:
            due_s += -math.log(1.0 - rng.uniform()) * load.burst / load.rate
        yield Arrival(
            number, int(due_s * NS_PER_S), load.prompt.draw(rng), load.output.draw(rng), _priority(load, rng.uniform())
        )


def _priority(load: Load, at: float) -> int:
    total = sum(share for _, share in load.priorities)
    for priority, share in load.priorities:
        at -= share / total
        if at < 0:
            return priority
    return load.priorities[-1][0]


def read_span(text: str, what: str, bound: int) -> Span:
    """``16`` or ``8-64``.

    Raises:
        ConfigError: it is neither, or has a length outside 1 to ``bound``.
    """
    match = _SPAN.fullmatch(text.strip())
    span = Span(int(match[1]), int(match[2] or match[1])) if match else Span(0, 0)
    if not 1 <= span.low <= span.high <= bound:
        raise ConfigError(f"{what} is {text!r}; give a length such as 16 or a range such as 8-64, of 1 to {bound}")
    return span


def read_priorities(text: str) -> tuple[tuple[int, float], ...]:
    """``0`` or ``0:9,10:1``: priorities, each with its share.

    Raises:
        ConfigError: it is neither.
    """
    found: list[tuple[int, float]] = []
    for item in text.split(","):
        match = _PRIORITY.fullmatch(item.strip())
        if match is None:
            raise ConfigError(f"the priorities are {text!r}; give one such as 0, or shares such as 0:9,10:1")
        found.append((int(match[1]), float(match[2] or 1)))
    if not sum(share for _, share in found):
        raise ConfigError(f"the priorities {text!r} have no share at all")
    return tuple(found)
