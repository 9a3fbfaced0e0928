"""The result of a replay in a few lines, from its JSON; it may have been written by another version, so nothing is sure."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import msgspec

FIELDS_MAX = 40
CHAIN_MAX = 30
LINES_MAX = 12

Tone: TypeAlias = Literal["good", "bad", ""]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay came to.

    Attributes:
        fields: rows of a table: a name and two values, headed by ``sides``.
        chain: what led to the first difference: position, stream, type and summary of each record.
    """

    tone: Tone
    headline: str
    lines: tuple[str, ...] = ()
    sides: tuple[str, str] = ("recorded", "replayed")
    fields: tuple[tuple[str, str, str], ...] = ()
    chain: tuple[dict[str, Any], ...] = ()


def verdict_of(result: Mapping[str, Any]) -> Verdict:
    """The verdict of one result, as ``replay.result.to_json`` gives it."""
    match result.get("mode"):
        case "verify":
            return _verify(result)
        case "tokens":
            return _tokens(result)
        case "what-if":
            return _what_if(result)
        case mode:
            return Verdict(tone="", headline=f"A replay of an unknown kind: {mode}")


def _verify(result: Mapping[str, Any]) -> Verdict:
    checked = _maps(result.get("checked"))
    decisions = sum(_int(one.get("decisions")) for one in checked)
    events = sum(_int(one.get("events")) for one in checked)
    names = ", ".join(f"{one.get('decider')} {_int(one.get('decisions'))}" for one in checked if one.get("decisions"))
    lines = [f"decided again: {names}"] if names else []
    lines += [str(problem) for problem in _list(result.get("problems"))]
    lines += [str(note) for note in _list(result.get("notes"))]
    first = _map(result.get("first"))
    if first:
        return _diverged(first, _int(result.get("num_diverged")), lines)
    if result.get("problems"):
        return Verdict(tone="bad", headline="Lives are not whole.", lines=tuple(lines[:LINES_MAX]))
    headline = f"Every decision is made again as recorded: {decisions} decisions, {events} events."
    return Verdict(tone="good", headline=headline, lines=tuple(lines[:LINES_MAX]))


def _diverged(first: Mapping[str, Any], num_diverged: int, lines: Sequence[str]) -> Verdict:
    what = f"{first.get('kind')} at #{first.get('pos')} of {first.get('stream')}: {first.get('type')}"
    command = first.get("command")
    return Verdict(
        tone="bad",
        headline=f"The replay diverges: {what}",
        lines=(
            f"{num_diverged} differ; this is the first",
            *((f"command #{first.get('command_pos')}: {command}",) if command else ()),
            *lines[:LINES_MAX],
        ),
        fields=tuple(
            (str(row.get("field")), str(row.get("recorded")), str(row.get("replayed")))
            for row in _maps(first.get("fields"))[:FIELDS_MAX]
        ),
        chain=tuple(
            {name: str(link.get(name, "")) for name in ("pos", "stream", "type", "summary")}
            for link in _maps(first.get("chain"))[:CHAIN_MAX]
        ),
    )


def _tokens(result: Mapping[str, Any]) -> Verdict:
    diverged = _maps(result.get("diverged"))
    lines = [f"model {result.get('model')}", *(str(note) for note in _list(result.get("notes")))]
    ran = f"{_int(result.get('tokens'))} tokens of {_int(result.get('requests'))} requests"
    if not diverged:
        return Verdict(
            tone="good", headline=f"The engine gives the same tokens: {ran}.", lines=tuple(lines[:LINES_MAX])
        )
    rows = tuple(
        (
            f"{one.get('request_id')}, token {one.get('position')}",
            f"{one.get('recorded')} (logprob {one.get('logprob_recorded')})",
            f"{one.get('replayed')} (logprob {one.get('logprob_replayed')})",
        )
        for one in diverged[:FIELDS_MAX]
    )
    headline = f"The engine gives other tokens for {len(diverged)} requests, of {ran}."
    return Verdict(tone="bad", headline=headline, lines=tuple(lines[:LINES_MAX]), fields=rows)


def _what_if(result: Mapping[str, Any]) -> Verdict:
    changes = _map(result.get("changes"))
    tried = ", ".join(f"{name} {_pair(pair)}" for name, pair in changes.items())
    recorded, estimated = _map(result.get("recorded")), _map(result.get("estimated"))
    rows = tuple((str(name), str(value), str(estimated.get(name))) for name, value in recorded.items() if estimated)
    lines = [f"the first {_int(result.get('exact_decisions'))} decisions are the same"]
    lines += [f"estimated: {one}" for one in _list(result.get("assumptions"))]
    same = "" if result.get("first") else ": it changes nothing"
    return Verdict(
        tone="",
        headline=f"What if: {tried or 'nothing changed'}{same}",
        lines=tuple(lines[:LINES_MAX]),
        sides=("as it was", "estimated"),
        fields=rows[:FIELDS_MAX],
    )


def _pair(pair: Any) -> str:
    values = _list(pair)
    return f"{values[0]} -> {values[1]}" if len(values) == 2 else str(pair)  # noqa: PLR2004 - before and after


def _map(value: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return cast("Sequence[Any]", value) if isinstance(value, list | tuple) else ()


def _maps(value: Any) -> list[Mapping[str, Any]]:
    return [_map(one) for one in _list(value)]


def _int(value: Any) -> int:
    return value if isinstance(value, int) else 0
