"""The scheduler's state out of an executor's log, so that ``schedule`` can be asked again what it planned.

Rules:
- The log says how many tokens there are, not which: that is all a plan depends on. What was measured or looked up (the
  budget, the speed of prefill, prefix hits, guesses) is taken from the step itself.
- The engine takes submits in the order of ``ExecutorAccepted``, and each step says how many it has taken. One that was
  cancelled, refused or already over when the engine took it counts and leaves nothing.
- A log that begins in the middle of an engine's life, as a bundle's does, holds requests that nobody knows. Until every
  request in the batch and in line is known, plans are passed over; the step's own counts say when that is.
- An engine that says nothing of its limits plans nothing (``capabilities.limits``), and there is nothing to check; what
  its requests have made is noted all the same.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import msgspec

from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.scheduler import NO_DEADLINE, Candidate, SchedulerState, schedule
from gptoss.messages import events as ev
from gptoss.messages.envelope import Meta
from gptoss.messages.model import EngineCapabilities
from gptoss.messages.plan import Limits, PlannedRow, StepPlan, plan_of, without

NO_ROOM = 2**62
"""Bytes that a hit would need where the step shows that there was no room for it."""

replace = msgspec.structs.replace


class ExecutorLog:
    """One executor's requests as its events tell of them.

    Args:
        lost_ends: requests whose last token came in a step whose end the executor never heard of, because the engine
            died; shared by all executors of a boot. Resumed, they are over at once.
        is_whole: the log begins with the executor's life.

    Attributes:
        capabilities: of the engine that lives; None before it has loaded.
        line: requests without KV memory; ``running`` those with it.
        sent: accepted, and not known to be taken by the engine; None stands for one that has ended.
        is_known: every request of the engine is known.
    """

    def __init__(self, lost_ends: set[str], *, is_whole: bool) -> None:
        self.capabilities: EngineCapabilities | None = None
        self.sent: list[ev.ExecutorAccepted | None] = []
        self.line: dict[str, Candidate] = {}
        self.running: dict[str, Candidate] = {}
        self.is_known = is_whole
        self._lost_ends = lost_ends
        self._closing: set[str] = set()
        self._arrivals = 0

    @property
    def limits(self) -> Limits | None:
        """What the scheduler keeps to; None if the engine does not say, or has not loaded."""
        return self.capabilities.limits if self.capabilities else None

    @property
    def kv_bytes_in_use(self) -> int:
        """Held by those who run."""
        return sum(candidate.kv_bytes for candidate in self.running.values())

    def requests(self) -> Iterator[str]:
        """All that have not ended."""
        yield from self.running
        yield from self.line
        yield from (event.request_id for event in self.sent if event)

    # ---- events

    def observe(self, event: Any) -> None:
        """Note any event of the executor's stream but ``StepCommitted``."""
        match event:
            case ev.EngineLoaded():
                self.capabilities = event.capabilities
            case ev.EngineStarted():
                self._forget_engine()
                self._closing.clear()
            case ev.EngineExited():
                self._forget_engine()  # who is lost with it is told next
            case ev.ExecutorAccepted():
                self._closing.discard(event.request_id)
                if not event.resumed_tokens:
                    self._lost_ends.discard(event.request_id)  # of an earlier request with this id
                self.sent.append(event)
            case ev.CancelApplied():
                self._end(event.request_id)
            case ev.ExecutorFaulted():
                if event.lost and event.request_id in self._closing:
                    self._lost_ends.add(event.request_id)
                self._end(event.request_id)
            case _:
                pass

    def lose_track(self) -> None:
        """Records are missing: nothing is known any more but the engine's limits."""
        self.sent.clear()
        self.line.clear()
        self.running.clear()
        self._closing.clear()
        self.is_known = False

    def copy(self) -> "ExecutorLog":
        """One that has seen the same and goes its own way."""
        other = ExecutorLog(set(self._lost_ends), is_whole=self.is_known)
        other.capabilities, other._arrivals = self.capabilities, self._arrivals
        other.sent, other.line, other.running = self.sent.copy(), self.line.copy(), self.running.copy()
        return other

    def only(self, request_ids: Collection[str]) -> "ExecutorLog":
        """A copy that has none but these requests."""
        other = self.copy()
        for request_id in set(self.requests()).difference(request_ids):
            other._end(request_id)  # noqa: SLF001 - of its own class
        return other

    def check(
        self, step: ev.StepCommitted, revise: Callable[[SchedulerState], SchedulerState] = lambda state: state
    ) -> dict[str, tuple[Any, Any]] | None:
        """Plan a step again, and then take it as it was.

        Args:
            step: as recorded.
            revise: changes what the scheduler sees.

        Returns:
            (recorded, replayed) of each part that differs; None if the plan cannot be checked.
        """
        if self.limits is None:
            self._follow(step)
            return None
        found: dict[str, tuple[Any, Any]] | None = None
        taken = min(step.submits_taken, len(self.sent))
        if self.is_known:
            if taken != step.submits_taken:
                found = {"submits_taken": (step.submits_taken, taken)}
            self.take(taken)
            again = self.plan(step, revise)
            if again is not None:
                found = (found or {}) | _differences(plan_of(step), without(again, step.refused))
                if found and step.refused and self.capabilities and self.capabilities.prefix_cache_bytes:
                    found = None  # what the cache had for those refused is not recorded, and their share depends on it
        else:
            self._take_named(step)
        self.apply(step)
        if not self.is_known:
            counts = (len(self.line), len(self.running))
            self.is_known = not any(self.sent) and counts == (step.waiting, step.running)
        elif found is not None:
            counts = {"waiting": len(self.line), "running": len(self.running), "kv_bytes_in_use": self.kv_bytes_in_use}
            found |= {
                name: (getattr(step, name), value) for name, value in counts.items() if value != getattr(step, name)
            }
        return found

    # ---- steps

    def take(self, count: int) -> None:
        """The engine takes the next submits."""
        for event in self.sent[:count]:
            if event is not None:
                self._add(event)
        del self.sent[:count]

    def plan(self, step: ev.StepCommitted, revise: Callable[[SchedulerState], SchedulerState]) -> StepPlan | None:
        """The plan of a step, from the state before it and what the step says was measured or looked up."""
        if self.limits is None:
            return None
        hits = {start.request_id: start.num_cached for start in step.starts}
        drafts = {row.request_id: row.num_draft for row in step.rows if row.num_draft}
        state = self.state(self.limits, step.kv_budget_bytes, step.prefill_ms_per_token, hits, drafts)
        return schedule(revise(state))

    def state(
        self,
        limits: Limits,
        kv_budget_bytes: int,
        prefill_ms_per_token: float,
        hits: Mapping[str, int],
        drafts: Mapping[str, int],
    ) -> SchedulerState:
        """What the scheduler sees.

        Args:
            limits: of the engine.
            kv_budget_bytes: as the scheduler knew it.
            prefill_ms_per_token: likewise.
            hits: tokens that the prefix cache has of each request.
            drafts: guesses that each request would like to have verified.
        """
        running = tuple(
            _with_finds(each, hits, drafts) if key in hits or key in drafts else each
            for key, each in self.running.items()
        )
        waiting = sorted(self.line.values(), key=_order)
        if hits:
            waiting = [replace(each, num_cached=hits.get(each.request_id, 0)) for each in waiting]
        return SchedulerState(
            limits=limits,
            running=running,
            waiting=tuple(waiting),
            kv_budget_bytes=kv_budget_bytes,
            prefill_ms_per_token=prefill_ms_per_token,
        )

    def apply(self, step: ev.StepCommitted) -> None:
        """Take a step as it was; rows of requests that are not known are passed over."""
        self._closing.clear()
        for preemption in step.preemptions:
            lost = self.running.pop(preemption.request_id, None)
            if lost is not None:
                self.line[lost.request_id] = replace(lost, num_computed=0)
        for start in step.starts:
            each = self.line.pop(start.request_id, None) or self.running.get(start.request_id)
            if each is not None:
                self.running[start.request_id] = replace(each, num_computed=start.num_cached)
        if step.refused and not self.running:
            self.line.pop(step.refused[0], None)  # waiting will not help it: it fails
        for row in step.rows:
            self._advance(row)

    def _advance(self, row: ev.CommittedRow) -> None:
        each = self.running.get(row.request_id)
        if each is None:
            return
        if row.ended:
            del self.running[row.request_id]
            self._closing.add(row.request_id)
        elif not row.failure:
            rejected = row.num_draft - (row.tokens - 1) if row.num_draft else 0
            self.running[row.request_id] = replace(
                each, num_tokens=each.num_tokens + row.tokens, num_computed=row.start + row.num_tokens - rejected
            )

    # ---- parts

    def _add(self, event: ev.ExecutorAccepted) -> None:
        """Put a request in line, unless it is over already."""
        prompt, output = event.prompt_tokens, event.resumed_tokens
        capabilities = self.capabilities
        room = capabilities.max_model_len - prompt if capabilities else event.max_tokens
        max_tokens = min(event.max_tokens, room) if event.max_tokens else room
        if output and (output >= max_tokens or event.request_id in self._lost_ends):
            self._lost_ends.discard(event.request_id)
            return
        self.running.pop(event.request_id, None)
        self.line[event.request_id] = Candidate(
            event.request_id,
            event.attempt,
            event.priority,
            event.deadline_ns or NO_DEADLINE,
            self._arrivals,
            prompt,
            prompt + output,
            0,
            kv_bytes(capabilities.kv_layout, prompt + max_tokens) if capabilities else 0,
        )
        self._arrivals += 1

    def _follow(self, step: ev.StepCommitted) -> None:
        """Take a step of an engine that does not plan: each row is the next token of its request."""
        self._take_named(step)
        for row in step.rows:
            each = self.line.pop(row.request_id, None) or self.running.pop(row.request_id, None)
            if each is not None and not row.ended:
                num_tokens = each.num_tokens + row.tokens
                self.running[row.request_id] = replace(each, num_tokens=num_tokens, num_computed=num_tokens - 1)

    def _take_named(self, step: ev.StepCommitted) -> None:
        """Whoever is named in a step has been taken; for the others nobody can tell."""
        named = {start.request_id for start in step.starts} | {row.request_id for row in step.rows}
        for event in self.sent:
            if event is not None and event.request_id in named:
                self._add(event)
        self.sent = [event for event in self.sent if event is not None and event.request_id not in named]

    def _end(self, request_id: str) -> None:
        self.line.pop(request_id, None)
        self.running.pop(request_id, None)
        self.sent = [None if event and event.request_id == request_id else event for event in self.sent]

    def _forget_engine(self) -> None:
        self.sent.clear()
        self.line.clear()
        self.running.clear()
        self.capabilities = None
        self.is_known = True


def _with_finds(each: Candidate, hits: Mapping[str, int], drafts: Mapping[str, int]) -> Candidate:
    """A running request with what the step says was found for it."""
    num_cached, cached_bytes = hits.get(each.request_id, 0), 0
    if each.request_id in hits and num_cached <= each.num_computed:
        num_cached, cached_bytes = each.num_computed + 1, NO_ROOM
    return replace(each, num_cached=num_cached, cached_bytes=cached_bytes, num_draft=drafts.get(each.request_id, 0))


def _order(candidate: Candidate) -> tuple[int, int, int]:
    return candidate.order


def _differences(recorded: StepPlan, replayed: StepPlan) -> dict[str, tuple[Any, Any]]:
    """(recorded, replayed) of each part of a plan that differs; of the rows only those."""
    if recorded == replayed:
        return {}
    found: dict[str, tuple[Any, Any]] = {}
    for name in StepPlan.__struct_fields__:
        old, new = getattr(recorded, name), getattr(replayed, name)
        if old != new:
            found[name] = (_but(old, new), _but(new, old)) if name == "rows" else (old, new)
    return found


def _but(rows: tuple[PlannedRow, ...], others: tuple[PlannedRow, ...]) -> tuple[PlannedRow, ...]:
    """The rows that the others lack; all of them if only the order differs."""
    return tuple(row for row in rows if row not in others) or (rows if len(rows) == len(others) else ())


class ExecutorLogs:
    """The logs of one boot's executors.

    Attributes:
        by_stream: those that there are.
    """

    def __init__(self) -> None:
        self.by_stream: dict[str, ExecutorLog] = {}
        self._next_seq: dict[str, int] = {}
        self._lost_ends: set[str] = set()

    def of(self, meta: Meta) -> tuple[ExecutorLog, bool]:
        """The log that a record goes on with, and whether records before it are missing: then it has lost track."""
        log = self.by_stream.get(meta.stream)
        if log is None:
            log = self.by_stream[meta.stream] = ExecutorLog(self._lost_ends, is_whole=meta.seq == 0)
            has_gap = False
        else:
            has_gap = meta.seq != self._next_seq[meta.stream]
            if has_gap:
                log.lose_track()
        self._next_seq[meta.stream] = meta.seq + 1
        return log, has_gap
