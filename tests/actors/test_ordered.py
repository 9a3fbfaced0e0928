"""The persistent sorted map, held against a plain dictionary."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss.actors.ordered import Ordered

keys = st.tuples(st.integers(0, 30), st.integers(0, 3))
steps = st.lists(st.tuples(st.booleans(), keys), max_size=80)


@given(steps)
def test_it_holds_what_was_put_and_not_taken_in_the_order_of_the_keys(steps: list[tuple[bool, Any]]) -> None:
    ordered: Ordered[str] = Ordered()
    plain: dict[Any, str] = {}
    versions: list[tuple[Ordered[str], list[tuple[Any, str]]]] = []
    for is_put, key in steps:
        if is_put and key not in plain:
            ordered, plain[key] = ordered.put(key, f"v{key}"), f"v{key}"
        elif not is_put and key in plain:
            ordered = ordered.take(key)
            del plain[key]
        versions.append((ordered, sorted(plain.items())))
    for version, items in versions:
        assert list(version.items()) == items, "an older version does not change"
        assert len(version) == len(items)
        for probe in [(n, 0) for n in range(0, 31, 5)]:
            assert version.count_below(probe) == sum(key < probe for key, _ in items)
    if plain:
        assert ordered.first() == min(plain.items())
        assert ordered.last() == max(plain.items())


def test_equal_values_in_the_same_order_are_equal() -> None:
    one = Ordered[str]().put((1,), "a").put((2,), "b")
    other = Ordered[str]().put((8,), "b").put((5,), "a")
    assert one == other
    assert one != other.put((9,), "c")
    assert one != Ordered[str]().put((1,), "b").put((2,), "a")


def test_what_is_not_there_cannot_be_taken() -> None:
    with pytest.raises(KeyError):
        Ordered[str]().put((1,), "a").take((2,))
    with pytest.raises(KeyError):
        Ordered[str]().first()
    with pytest.raises(KeyError):
        Ordered[str]().last()
