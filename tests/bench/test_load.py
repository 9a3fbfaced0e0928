"""Loads: a function of their seed, at the rate and in the mix that was asked for."""

import asyncio
from collections import Counter

import pytest

from gptoss.bench.feeder import Feeder
from gptoss.bench.figures import GROWTH, Quantiles, Spread
from gptoss.bench.load import Arrival, Load, Span, arrivals, read_priorities, read_span
from gptoss.clock import NS_PER_S, SeededRng, SystemClock


def test_the_same_seed_gives_the_same_requests_at_the_same_times() -> None:
    load = Load(requests=50, rate=10, prompt=Span(1, 9), output=Span(1, 9), priorities=((0, 1), (7, 1)), seed=3)
    assert list(arrivals(load)) == list(arrivals(load))
    other = Load(requests=50, rate=10, prompt=Span(1, 9), output=Span(1, 9), priorities=((0, 1), (7, 1)), seed=4)
    assert list(arrivals(load)) != list(arrivals(other))


@pytest.mark.parametrize("burst", [1, 20])
def test_the_rate_holds_on_average_whatever_the_bursts(burst: int) -> None:
    found = list(arrivals(Load(requests=20_000, rate=100, burst=burst)))
    assert found[-1].due_ns / NS_PER_S == pytest.approx(200, rel=0.1)
    assert max(Counter(arrival.due_ns for arrival in found).values()) == burst
    assert [arrival.due_ns for arrival in found] == sorted(arrival.due_ns for arrival in found)


def test_lengths_and_priorities_have_their_shares() -> None:
    load = Load(requests=10_000, prompt=Span(3, 5), output=Span(1, 2), priorities=((0, 9.0), (10, 1.0)))
    found = list(arrivals(load))
    assert {arrival.due_ns for arrival in found} == {0}
    assert {arrival.prompt_tokens for arrival in found} == {3, 4, 5}
    assert {arrival.output_tokens for arrival in found} == {1, 2}
    assert sum(arrival.priority == 10 for arrival in found) == pytest.approx(1000, rel=0.15)


def test_spans_and_priorities_are_read() -> None:
    assert read_span("8-64", "x", 100) == Span(8, 64)
    assert read_span(" 7", "x", 100) == Span(7, 7)
    assert read_priorities("0:9, -3:0.5,4") == ((0, 9.0), (-3, 0.5), (4, 1.0))


def test_a_spread_is_right_within_one_percent() -> None:
    rng = SeededRng("spread")
    values = [rng.between(0.01, 900.0) for _ in range(5000)]
    spread = Spread()
    for value in values:
        spread.add(value)
    found, ordered = spread.quantiles(), sorted(values)
    for percent, told in ((50, found.p50), (90, found.p90), (99, found.p99)):
        exact = ordered[5000 * percent // 100 - 1]
        assert exact - 0.001 <= told <= exact * GROWTH + 0.001
    assert (found.count, found.max) == (5000, pytest.approx(ordered[-1], abs=1e-3))
    assert found.mean == pytest.approx(sum(values) / 5000, abs=1e-3)
    assert Spread().quantiles() == Quantiles()


async def test_a_closed_loop_has_so_many_open_and_no_more() -> None:
    open_now: list[int] = []

    def begin(_: Arrival, __: int) -> None:
        open_now.append(feeder.open)
        asyncio.get_running_loop().call_later(0.001, feeder.one_ended)

    feeder = Feeder(Load(requests=40, in_flight=3), SystemClock(), begin, asyncio.Event())
    assert await feeder.run() == "all requests"
    assert (feeder.began, feeder.over, max(open_now)) == (40, 40, 3)


async def test_the_place_of_who_was_told_to_come_later_rests_until_then() -> None:
    clock, at_ns = SystemClock(), list[int]()

    def begin(_: Arrival, __: int) -> None:
        at_ns.append(clock.monotonic_ns())
        feeder.rest(0.05)
        feeder.one_ended()

    feeder = Feeder(Load(requests=6, in_flight=2), clock, begin, asyncio.Event())
    assert await feeder.run() == "all requests"
    assert at_ns[4] - at_ns[0] >= 2 * 0.05 * NS_PER_S
    assert feeder.ended_ns - at_ns[-1] < 0.05 * NS_PER_S  # resting is no part of what was measured


async def test_an_open_loop_begins_what_is_due_though_nothing_is_answered() -> None:
    begun: list[int] = []
    stop = asyncio.Event()

    def begin(arrival: Arrival, due_ns: int) -> None:
        assert due_ns <= SystemClock().monotonic_ns()
        begun.append(arrival.number)
        if len(begun) == 30:
            stop.set()

    feeder = Feeder(Load(requests=1000, rate=2000), SystemClock(), begin, stop)
    assert await feeder.run() == "interrupted"
    assert begun == list(range(30))
    assert feeder.open == 30


async def test_a_load_ends_with_its_time() -> None:
    def begin(_: Arrival, __: int) -> None:
        feeder.one_ended()

    feeder = Feeder(Load(requests=1000, rate=100, duration_s=0.1), SystemClock(), begin, asyncio.Event())
    assert await feeder.run() == "time"
    assert 0 < feeder.began < 100
