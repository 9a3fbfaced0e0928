"""Bugs planted in the real code: the simulator finds each by the invariant that is meant for it, and shrinks it."""

import pytest
from planted import PLANTED

from gptoss.simulation.campaign import verdict_of
from gptoss.simulation.shrink import Shrinker

SEEDS = 120
RUNS_MAX = 40
FAULTS_MAX = 5


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found_by_its_invariant_and_shrunk(bug: str) -> None:
    plant, invariant = PLANTED[bug]
    with plant():
        found = next((v for v in map(verdict_of, range(SEEDS)) if v.broken == invariant), None)
        assert found is not None, f"{bug} was not found within {SEEDS} seeds"
        smallest = Shrinker(found, runs_max=RUNS_MAX, seeds_tried=1).shrink()
    assert smallest.broken == invariant
    assert len(smallest.scenario.faults) <= FAULTS_MAX
    assert len(smallest.scenario.arrivals) <= len(found.scenario.arrivals)


def test_the_same_seeds_hold_without_a_planted_bug() -> None:
    assert [(v.scenario.seed, v.broken) for v in map(verdict_of, range(10)) if v.broken] == []
