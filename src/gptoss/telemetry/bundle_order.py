"""What bundle is wanted, as people write it: the query of ``/admin/debug/bundle``, the options of ``gptoss bundle``.

    request=ID,ID  last=5  errors=true  slow=2s  window=10m  window=2026-03-01T02:50..2026-03-01T03:10  content=tokens  limit_mb=64

Durations are a number with ms, s, m, h or d behind it, seconds without. Times are ISO 8601, UTC unless they say otherwise.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from gptoss.clock import NS_PER_S
from gptoss.errors import RequestError
from gptoss.telemetry.bundle_format import BUNDLE_BYTES_MAX, CONTENT_LEVELS, ContentLevel
from gptoss.telemetry.bundle_slice import Selection

WINDOW_S = 600.0
"""What a bundle is of when nothing is chosen, in seconds before the newest record."""
SLOW_S = 10.0
LIMIT_MB = 256
LIMIT_MB_MAX = BUNDLE_BYTES_MAX >> 20
LAST_MAX = 100_000
PARAMETERS = ("request", "last", "errors", "slow", "window", "content", "limit_mb")

_UNITS_S = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(ms|s|m|h|d|)", re.ASCII)
_COUNT = re.compile(r"[0-9]{1,6}", re.ASCII)
_TRUE, _FALSE = frozenset({"true", "1", "yes", ""}), frozenset({"false", "0", "no"})


class BundleOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What bundle is wanted.

    Attributes:
        selection: what it is about.
        content: the most that it may hold of prompts and answers.
        limit_bytes: the most that its records may take, unpacked.
    """

    selection: Selection = Selection(window_s=WINDOW_S)
    content: ContentLevel = "none"
    limit_bytes: int = LIMIT_MB << 20


def parse_order(query: Mapping[str, str], request_ids: tuple[str, ...] = ()) -> BundleOrder:
    """The order that a query writes; without any choice it is of the last ``WINDOW_S``.

    Raises:
        RequestError: naming the parameter that is unknown or has a bad value.
    """
    unknown = sorted(query.keys() - set(PARAMETERS))
    if unknown:
        raise RequestError(
            f"{unknown[0][:32]!a} is no parameter; there are {', '.join(PARAMETERS)}", param=unknown[0][:32]
        )
    named = tuple(name for name in query.get("request", "").split(",") if name)
    fields: dict[str, Any] = {"request_ids": (*request_ids, *named)}
    if "last" in query:
        fields["last"] = _count(query["last"], "last", LAST_MAX)
    if "errors" in query:
        fields["errors"] = _flag(query["errors"], "errors")
    if "slow" in query:
        fields["slow_s"] = _duration_s(query["slow"] or f"{SLOW_S:g}", "slow")
    fields |= _window(query["window"]) if "window" in query else {}
    selection = Selection(**fields)
    if selection == Selection():
        selection = BundleOrder().selection
    return BundleOrder(
        selection=selection,
        content=content_level(query.get("content", "none")),
        limit_bytes=_count(query.get("limit_mb", f"{LIMIT_MB}"), "limit_mb", LIMIT_MB_MAX) << 20,
    )


def content_level(written: str) -> ContentLevel:
    """The level of this name.

    Raises:
        RequestError: there is none.
    """
    for level in CONTENT_LEVELS:
        if level == written:
            return level
    raise RequestError(f"content is {written[:32]!a}; it must be one of {', '.join(CONTENT_LEVELS)}", param="content")


def _count(written: str, name: str, highest: int) -> int:
    if not _COUNT.fullmatch(written) or not 1 <= int(written) <= highest:
        raise RequestError(f"{name} is {written[:32]!a}; it must be between 1 and {highest}", param=name)
    return int(written)


def _flag(written: str, name: str) -> bool:
    if written not in _TRUE | _FALSE:
        raise RequestError(f"{name} is {written[:32]!a}; it must be true or false", param=name)
    return written in _TRUE


def _duration_s(written: str, name: str) -> float:
    match = _DURATION.fullmatch(written)
    if match is None or (seconds := float(match[1]) * _UNITS_S[match[2]]) <= 0:
        raise RequestError(f"{name} is {written[:32]!a}; it must be a duration such as 90s, 10m or 2h", param=name)
    return seconds


def _window(written: str) -> dict[str, Any]:
    begin, between, end = written.partition("..")
    if not between:
        return {"window_s": _duration_s(written, "window")}
    return {name: _time_ns(text) for name, text in (("from_ns", begin), ("to_ns", end)) if text}


def _time_ns(written: str) -> int:
    try:
        # A query turns the + of an offset into a space.
        when = datetime.fromisoformat(written.replace(" ", "+") if "T" in written else written)
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return int(when.timestamp() * NS_PER_S)
    except (ValueError, OverflowError):
        raise RequestError(
            f"window holds the time {written[:40]!a}; write one such as 2026-03-01T02:50:00Z", param="window"
        ) from None
