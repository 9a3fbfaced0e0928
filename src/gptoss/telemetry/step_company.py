"""Who was in which steps of an engine, so that the span of a request can name those that it shared them with.

A request is taken to be in every step from its first row on an executor to its last; what loses its memory leaves and
comes again. Memory is bounded: those that left are kept up to ``PAST_MAX`` an executor, oldest forgotten first.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from gptoss.messages.events import StepCommitted

PAST_MAX = 2048


@dataclass(slots=True)
class Presence:
    """A request in the steps of one executor, from one step to another.

    Attributes:
        span: trace id and span id of the request, for those who want to link to it.
        began_ns: when the first step began; ``seen_ns``: when the last was recorded.
        first_token_step: the step that produced the first token in here, None before that.
    """

    request_id: str
    span: tuple[str, str]
    executor: str
    attempt: int
    began_ns: int
    first_step: int
    last_step: int = 0
    seen_ns: int = 0
    first_token_step: int | None = None
    first_token_ns: int = 0
    last_token_ns: int = 0
    steps: int = 0
    tokens: int = 0
    prefilled: int = 0


def _past() -> defaultdict[str, deque[Presence]]:
    return defaultdict(lambda: deque[Presence](maxlen=PAST_MAX))


@dataclass(slots=True)
class Company:
    """Everyone who is in the steps of some executor now, and who was."""

    present: dict[str, Presence] = field(default_factory=dict[str, Presence])
    past: defaultdict[str, deque[Presence]] = field(default_factory=_past)

    def step(self, mono_ns: int, event: StepCommitted, spans: dict[str, tuple[str, str]]) -> Iterator[Presence]:
        """Take a step in; yields those who are new in it.

        Args:
            mono_ns: when it was recorded.
            event: the step.
            spans: of the requests that are known; rows of others are passed over.
        """
        number = event.step
        for row in event.rows:
            presence = self.present.get(row.request_id)
            if presence is None or presence.attempt != row.attempt or presence.executor != event.executor:
                span = spans.get(row.request_id)
                if span is None:
                    continue
                self.leave(row.request_id)
                presence = Presence(row.request_id, span, event.executor, row.attempt, event.started_ns, number)
                self.present[row.request_id] = presence
                yield presence
            presence.last_step, presence.seen_ns = number, mono_ns
            presence.steps += 1
            presence.prefilled += row.prefilled
            if row.tokens:
                presence.tokens += row.tokens
                presence.last_token_ns = mono_ns
                if presence.first_token_step is None:
                    presence.first_token_step, presence.first_token_ns = number, mono_ns

    def leave(self, request_id: str) -> None:
        """A request is in no step any more, or not for now."""
        presence = self.present.pop(request_id, None)
        if presence is not None:
            self.past[presence.executor].append(presence)

    def in_steps(self, executor: str, first: int, last: int) -> list[Presence]:
        """Everyone who was in one of these steps, by when they came."""
        found = [one for one in self.present.values() if one.executor == executor and one.first_step <= last]
        for one in reversed(self.past[executor]):
            if one.last_step < first:
                break  # they stand in the order in which they left
            if one.first_step <= last:
                found.append(one)
        return _by_arrival(found)

    def between(self, start_ns: int, end_ns: int) -> list[Presence]:
        """Everyone who was in a step between these times, on whatever executor, by when they came."""
        everyone = chain(self.present.values(), *self.past.values())
        return _by_arrival([one for one in everyone if one.began_ns <= end_ns and one.seen_ns >= start_ns])


def _by_arrival(found: list[Presence]) -> list[Presence]:
    return sorted(found, key=lambda one: (one.began_ns, one.request_id))
