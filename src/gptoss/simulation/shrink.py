"""From a failing scenario to the smallest one that still breaks the same invariant.

Delta debugging: take away parts of the faults, then of the arrivals, in ever smaller pieces, and keep what still fails;
then make what is left plainer. Another interleaving may hide the fault although nothing of it was taken away, so each
candidate gets a few seeds.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from gptoss.actors.directory import EXECUTOR_PREFIX
from gptoss.simulation.run import Verdict, simulate
from gptoss.simulation.scenario import Arrival, Scenario

T = TypeVar("T")
RUNS_MAX = 300
SEEDS_TRIED = 3
PLAIN_ARRIVALS: tuple[dict[str, Any], ...] = (
    {"priority": 0},
    {"timeout_s": None},
    {"request_id": ""},
    {"session_id": ""},
    {"user": ""},
    {"flaw": ""},
    {"prompt_tokens": 1},
    {"max_tokens": 1},
    {"max_tokens": 5},
)
PLAIN_SHAPES: tuple[dict[str, Any], ...] = (
    {"executors": 1},
    {"joined": False},
    {"lag": 0.0},
    {"slots": 1},
    {"prefix_cache_bytes": 0},
)


class Shrinker:
    """Shrinks one failing scenario.

    Args:
        verdict: of the scenario as it was found.
        runs_max: simulations that may be spent on it.
        seeds_tried: for each candidate.
        progress: called with the smallest scenario so far whenever there is a smaller one.
    """

    def __init__(
        self,
        verdict: Verdict,
        *,
        runs_max: int = RUNS_MAX,
        seeds_tried: int = SEEDS_TRIED,
        progress: Callable[[Scenario], object] | None = None,
    ) -> None:
        self.smallest = verdict
        self.runs = 0
        self._runs_max = runs_max
        self._seeds_tried = seeds_tried
        self._progress = progress

    def shrink(self) -> Verdict:
        """The verdict of the smallest scenario that breaks the same invariant."""
        while self.runs < self._runs_max:
            before = self.smallest.scenario
            self._drop_faults()
            self._drop_arrivals()
            self._make_plainer()
            if self.smallest.scenario == before:
                break
        return self.smallest

    def _drop_faults(self) -> None:
        self._drop(
            lambda: self.smallest.scenario.faults,
            lambda faults: msgspec.structs.replace(self.smallest.scenario, faults=tuple(faults)),
        )

    def _drop_arrivals(self) -> None:
        self._drop(
            lambda: self.smallest.scenario.arrivals,
            lambda arrivals: _with_arrivals(self.smallest.scenario, arrivals),
        )

    def _drop(self, parts: Callable[[], Sequence[T]], rebuild: Callable[[Sequence[T]], Scenario]) -> None:
        size = len(parts())
        while size >= 1:
            start = 0
            while start < len(parts()):
                left = [*parts()[:start], *parts()[start + size :]]
                if not self._fails(rebuild(left)):
                    start += size
            size //= 2

    def _make_plainer(self) -> None:
        for change in PLAIN_SHAPES:
            scenario = self.smallest.scenario
            plainer = msgspec.structs.replace(scenario.shape, **change)
            known = set(plainer.devices)
            if plainer != scenario.shape and all(
                fault.target.removeprefix(EXECUTOR_PREFIX) in known or "cuda" not in fault.target
                for fault in scenario.faults
            ):
                self._fails(msgspec.structs.replace(scenario, shape=plainer))
        for candidate in self._plainer_arrivals():
            self._fails(candidate)

    def _plainer_arrivals(self) -> Iterator[Scenario]:
        for index in range(len(self.smallest.scenario.arrivals)):
            for change in PLAIN_ARRIVALS:
                arrivals = list(self.smallest.scenario.arrivals)
                plainer = msgspec.structs.replace(arrivals[index], **change)
                if _is_plainer(plainer, arrivals[index]):
                    arrivals[index] = plainer
                    yield _with_arrivals(self.smallest.scenario, arrivals)

    def _fails(self, scenario: Scenario) -> bool:
        """Whether the candidate breaks the same invariant; then it is the smallest so far."""
        for seed in range(scenario.seed, scenario.seed + self._seeds_tried):
            if self.runs >= self._runs_max:
                return False
            self.runs += 1
            verdict, _ = simulate(msgspec.structs.replace(scenario, seed=seed))
            if verdict.broken == self.smallest.broken:
                self.smallest = verdict
                if self._progress is not None:
                    self._progress(verdict.scenario)
                return True
        return False


def _with_arrivals(scenario: Scenario, arrivals: Sequence[Arrival]) -> Scenario:
    """The scenario with these arrivals, and without the faults of those that are not among them."""
    gone = {arrival.name for arrival in scenario.arrivals} - {arrival.name for arrival in arrivals}
    faults = tuple(fault for fault in scenario.faults if fault.target not in gone)
    return msgspec.structs.replace(scenario, arrivals=tuple(arrivals), faults=faults)


def _is_plainer(one: Arrival, other: Arrival) -> bool:
    if one == other:
        return False
    return other.max_tokens is None or one.max_tokens is None or one.max_tokens <= other.max_tokens
