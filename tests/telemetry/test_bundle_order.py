"""What people write about the bundle that they want."""

import pytest

from gptoss.errors import RequestError
from gptoss.telemetry.bundle_order import BundleOrder, parse_order
from gptoss.telemetry.bundle_slice import Selection

THREE_AM_NS = 1_772_334_000 * 10**9  # 2026-03-01T03:00:00Z


def test_without_a_choice_it_is_of_the_last_ten_minutes_without_content() -> None:
    assert parse_order({}) == BundleOrder(selection=Selection(window_s=600.0), content="none", limit_bytes=256 << 20)
    assert parse_order({"content": "hash"}).selection == Selection(window_s=600.0)
    assert parse_order({}, ("r1",)).selection == Selection(request_ids=("r1",))


@pytest.mark.parametrize(
    ("written", "selection"),
    [
        ({"request": "a,b"}, Selection(request_ids=("a", "b"))),
        ({"last": "5", "errors": ""}, Selection(last=5, errors=True)),
        ({"errors": "no", "last": "1"}, Selection(last=1)),
        ({"slow": ""}, Selection(slow_s=10.0)),
        ({"slow": "250ms"}, Selection(slow_s=0.25)),
        ({"window": "90"}, Selection(window_s=90.0)),
        ({"window": "1.5h"}, Selection(window_s=5400.0)),
        ({"window": "2d"}, Selection(window_s=172_800.0)),
        ({"window": "2026-03-01T03:00:00Z.."}, Selection(from_ns=THREE_AM_NS)),
        ({"window": "..2026-03-01 03:00"}, Selection(to_ns=THREE_AM_NS)),
        (
            {"window": "2026-03-01T04:00:00 01:00..2026-03-01T03:00:01"},
            Selection(from_ns=THREE_AM_NS, to_ns=THREE_AM_NS + 10**9),
        ),
    ],
)
def test_a_choice_is_read(written: dict[str, str], selection: Selection) -> None:
    assert parse_order(written).selection == selection


@pytest.mark.parametrize("param", ["last", "errors", "slow", "window", "content", "limit_mb", "novelty"])
@pytest.mark.parametrize("value", ["-1", "soon", "1e9", "x" * 5000, "..x", "\u0661", "0ms"])
def test_a_bad_value_is_refused_by_name_and_shown_short(param: str, value: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_order({param: value})
    assert caught.value.param == param
    assert len(caught.value.message) < 200
    assert caught.value.message.isascii()
