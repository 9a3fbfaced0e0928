"""The real clock, ids and chance keep what their ports promise."""

import re

from gptoss.clock import NS_PER_MS, NS_PER_S, SystemClock, SystemIds, SystemRng


def test_monotonic_time_never_goes_back() -> None:
    clock = SystemClock()
    times = [clock.monotonic_ns() for _ in range(1000)]
    assert times == sorted(times)


def test_wall_time_counts_nanoseconds_since_1970() -> None:
    years = SystemClock().wall_ns() / NS_PER_S / 86_400 / 365.25
    assert 50 < years < 200
    assert NS_PER_S == 1000 * NS_PER_MS


def test_ids_carry_their_prefix_and_do_not_repeat() -> None:
    ids = {SystemIds().new_id("req") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch(r"req_[0-9a-f]{24}", name) for name in ids)


def test_chance_stays_in_its_range_and_varies() -> None:
    rng = SystemRng()
    seeds = [rng.seed63() for _ in range(100)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(seeds)) == 100
    assert all(0 <= rng.uniform() < 1 for _ in range(100))
