"""Requests under test, strangers beside them, and what each of them got."""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from core_run import submit

from gptoss.engine.port import EngineEvent, Failed, Finished, StepDone, Submit, TokenLogprob

TOKENS = 24
"""Of the answer to each of the targets."""
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "temperature": {"temperature": 1.0},
    "top_p": {"temperature": 0.9, "top_p": 0.9},
    "top_k": {"temperature": 1.2, "top_k": 20},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "penalties": {"temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    "all": {"temperature": 1.1, "top_k": 100, "top_p": 0.95, "min_p": 0.01, "logit_bias": {70: 2.0}, "min_tokens": 9},
}
LENGTHS = [3, 33, 17, 270, 9, 60, 256, 300]
"""Tokens of prompt; some of more than one chunk of prefill."""


class Stream(msgspec.Struct, frozen=True):
    """Everything that a request got."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]


NOTHING = Stream((), "", ())


def targets(priority: int = 0) -> list[Submit]:
    """One request for each of the settings."""
    return [
        submit(name, length=length, priority=priority, max_tokens=TOKENS, seed=seed, logprobs=2, **settings)
        for seed, (length, (name, settings)) in enumerate(zip(LENGTHS, SETTINGS.items(), strict=True))
    ]


def strangers(count: int, priority: int = 0) -> list[Submit]:
    """Requests of all lengths, sampled and greedy."""
    return [
        submit(f"s{i}", length=2 + 7 * i % 90, max_tokens=9 + 5 * i % 40, seed=i, temperature=i % 3, priority=priority)
        for i in range(count)
    ]


def streams(events: Iterable[EngineEvent]) -> dict[str, Stream]:
    """What each request got, by its id; a request that failed is left out."""
    found: dict[str, Stream] = {}

    def add(request_id: str, *more: Any) -> None:
        old = found.get(request_id, NOTHING)
        found[request_id] = Stream(*(a + b for a, b in zip(msgspec.structs.astuple(old), more, strict=True)))

    for event in events:
        if isinstance(event, StepDone):
            for row in event.rows:
                add(row.request_id, row.token_ids, row.text, row.logprobs)
        elif isinstance(event, Finished):
            add(event.request_id, (), event.text, ())
        elif isinstance(event, Failed):
            del found[event.request_id]
    return found


def has_each(events: Iterable[EngineEvent], names: Iterable[str], count: int) -> bool:
    """Whether each of the requests has ``count`` tokens or more."""
    found = streams(events)
    return all(name in found and len(found[name].token_ids) >= count for name in names)


def rest_of(requests: Iterable[Submit], events: Sequence[EngineEvent]) -> list[Submit]:
    """What is sent to another engine after the one that said ``events`` was lost."""
    delivered = streams(events)
    ended = {event.request_id for event in events if isinstance(event, Finished)}
    return [
        msgspec.structs.replace(
            request, attempt=2, output_token_ids=delivered.get(request.request_id, NOTHING).token_ids
        )
        for request in requests
        if request.request_id not in ended
    ]


def joined(before: Iterable[EngineEvent], after: Iterable[EngineEvent], name: str) -> Stream:
    """The stream of a request of which one engine delivered the first part and another the rest."""
    first, second = (streams(events).get(name, NOTHING) for events in (before, after))
    return Stream(first.token_ids + second.token_ids, first.text + second.text, first.logprobs + second.logprobs)
