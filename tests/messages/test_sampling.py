"""Sampling settings outside their bounds are refused by name and value."""

from typing import Any

import msgspec
import pytest

from gptoss.errors import RequestError
from gptoss.messages.sampling import BOUNDS, SamplingParams, check_sampling


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_both_bounds_are_allowed(name: str) -> None:
    low, high = BOUNDS[name]
    assert low < high
    if name == "top_p":
        low = 0.001
    for value in (low, high):
        limits = {"max_tokens": 2**31 - 1} if name == "min_tokens" else {}
        check_sampling(msgspec.convert({**limits, name: value}, SamplingParams))


@pytest.mark.parametrize("name", sorted(BOUNDS))
@pytest.mark.parametrize("end", [0, 1])
def test_a_value_beyond_a_bound_is_named(name: str, end: int) -> None:
    value: Any = BOUNDS[name][end] + (1 if end else -1)
    with pytest.raises(RequestError, match=f"^{name} is .*; it must be between") as refused:
        check_sampling(msgspec.convert({name: value}, SamplingParams))
    assert refused.value.param == name


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (SamplingParams(top_p=0.0), "top_p"),
        (SamplingParams(temperature=float("nan")), "temperature"),
        (SamplingParams(min_tokens=5, max_tokens=4), "min_tokens"),
        (SamplingParams(stop=("x",) * 17), "stop"),
        (SamplingParams(stop=("",)), "stop"),
        (SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0)), "logit_bias"),
        (SamplingParams(logit_bias={-1: 1.0}), "logit_bias"),
        (SamplingParams(logit_bias={1: 100.5}), "logit_bias"),
        (SamplingParams(logit_bias={1: float("nan")}), "logit_bias"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(params: SamplingParams, param: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_sampling(params)
    assert refused.value.param == param
    assert refused.value.status == 400


def test_the_defaults_are_within_bounds() -> None:
    check_sampling(SamplingParams())
    assert SamplingParams().temperature == 1.0
