"""Whose turn it is: priority and age within a tenant, turns between tenants."""

from collections import Counter

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.actors.fair_line import FairLine, LineOrder
from gptoss.clock import NS_PER_S

AGEING_NS = 10 * NS_PER_S
FAIR = FairLine(order=LineOrder(ageing_ns=AGEING_NS))


def joined(line: FairLine, *requests: tuple[str, str, int, int]) -> FairLine:
    """With requests of (name, tenant, priority, since in s)."""
    for number, (name, tenant, priority, since_s) in enumerate(requests, start=len(line.places)):
        line = line.join(name, number, tenant=tenant, priority=priority, since_ns=since_s * NS_PER_S)
    return line


def served(line: FairLine, times: int, *, now_s: float = 0.0, size: int = 10) -> list[str]:
    """Who is let in, one after the other, each with so many bytes."""
    names: list[str] = []
    now_ns = int(now_s * NS_PER_S)
    for _ in range(times):
        name = line.head(now_ns)
        if name is None:
            break
        tenant = line.places[name].tenant
        line = line.leave(name).charge(tenant, size, now_ns)
        names.append(name)
    return names


def test_without_tenants_the_lowest_number_and_then_the_oldest_goes_first() -> None:
    line = joined(FairLine(), ("old", "a", 0, 1), ("new", "b", 0, 2), ("urgent", "c", -1, 3), ("batch", "a", 5, 0))
    assert served(line, 9) == ["urgent", "old", "new", "batch"]
    assert line.ahead_of("z", 0, 9 * NS_PER_S) == 3


def test_a_tenant_with_many_requests_gets_every_second_turn_beside_one_with_few() -> None:
    flood = [(f"a{n}", "a", 0, 0) for n in range(20)]
    line = joined(FAIR, *flood, *((f"b{n}", "b", 0, 1) for n in range(3)))
    assert [name[0] for name in served(line, 6, now_s=1)] == ["a", "b", "a", "b", "a", "b"]


def test_turns_are_counted_in_memory_and_not_in_requests() -> None:
    line = joined(FAIR, *((f"a{n}", "a", 0, 0) for n in range(9)), *((f"b{n}", "b", 0, 0) for n in range(9)))
    given: Counter[str] = Counter()
    for _ in range(9):
        name = line.head(0)
        assert name is not None
        tenant = line.places[name].tenant
        size = 30 if tenant == "a" else 10
        given[tenant] += size
        line = line.leave(name).charge(tenant, size, 0)
    assert abs(given["a"] - given["b"]) <= 30


def test_priority_orders_a_tenants_own_requests_and_no_others() -> None:
    line = joined(FAIR, ("a0", "a", 0, 0), ("b-urgent", "b", -5, 0), ("b-batch", "b", 5, 0), ("a1", "a", 0, 0))
    assert served(line, 4) == ["a0", "b-urgent", "a1", "b-batch"]


def test_a_step_of_priority_is_worth_so_much_waiting() -> None:
    young = joined(FAIR, ("batch", "a", 1, 0), ("now", "a", 0, 9))
    assert served(young, 1, now_s=9) == ["now"]
    old = joined(FAIR, ("batch", "a", 1, 0), ("now", "a", 0, 11))
    assert served(old, 1, now_s=11) == ["batch"]


def test_a_tenant_that_comes_back_has_saved_nothing_up() -> None:
    line = joined(FAIR, *((f"a{n}", "a", 0, 0) for n in range(30)))
    for _ in range(10):
        name = line.head(0)
        assert name is not None
        line = line.leave(name).charge("a", 10, 0)
    line = joined(line, *((f"b{n}", "b", 0, 0) for n in range(5)))
    assert [name[0] for name in served(line, 6)].count("b") == 3


def test_an_endless_stream_of_fresh_tenants_keeps_nobody_out() -> None:
    line = joined(FAIR, ("first", "a", 0, 0), ("second", "a", 0, 0))
    names: list[str] = []
    for second in range(30):
        line = line.join(f"n{second}", 100 + second, tenant=f"t{second}", priority=0, since_ns=second * NS_PER_S)
        name = line.head(second * NS_PER_S)
        assert name is not None
        tenant = line.places[name].tenant
        line = line.leave(name).charge(tenant, 10, second * NS_PER_S)
        names.append(name)
    assert names.index("second") <= 12, "it was its turn after the ageing time at the latest"


def test_counters_of_those_who_are_gone_are_forgotten() -> None:
    line = joined(FAIR, *((f"a{n}", "a", 0, 0) for n in range(4000)))
    for number in range(3000):
        name = line.head(0)
        assert name is not None
        line = line.leave(name).charge("a", 10, 0)
        line = line.charge(f"t{number}", 1, 0)
    assert len(line.counters) < 3000


def test_a_full_line_gives_up_the_last_of_the_largest_tenant_for_a_smaller_one() -> None:
    line = joined(FAIR, *((f"a{n}", "a", 0, 0) for n in range(5)), ("b0", "b", 0, 0))
    assert line.to_displace("b") == "a4"
    assert line.to_displace("c") == "a4"
    assert line.to_displace("a") is None
    assert joined(FAIR, ("a0", "a", 0, 0), ("b0", "b", 0, 0)).to_displace("b") is None


moves = st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 1), st.booleans()), max_size=60)


@settings(max_examples=50)
@given(moves)
def test_everyone_who_joins_leaves_once_and_nothing_stays(moves: list[tuple[str, int, bool]]) -> None:
    line, names = FAIR, set[str]()
    for number, (tenant, priority, is_served) in enumerate(moves):
        line = line.join(f"r{number}", number, tenant=tenant, priority=priority, since_ns=number)
        names.add(f"r{number}")
        if is_served:
            name = line.head(number)
            assert name in names
            names.remove(name)
            whose = line.places[name].tenant
            line = line.leave(name).charge(whose, 5, number)
        assert set(line.names()) == names
        assert len(line.turns) == len(line.patience) == len(line.sizes) == len(line.tenants)
    for name in names:
        line = line.leave(name)
    assert line == msgspec.structs.replace(FAIR)
