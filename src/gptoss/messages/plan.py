"""The plan of one engine step, as the scheduler makes it and the log keeps it.

With the plans of its steps an engine does the same again: the plan says who runs and which positions are computed in
which cuts, and everything else follows from the requests.
"""

from collections.abc import Collection, Iterable
from typing import Literal, Protocol, TypeAlias

import msgspec

PreemptionReason: TypeAlias = Literal["memory", "priority"]
RowFailure: TypeAlias = Literal["", "memory", "model", "not_finite"]
"""Why a row of a step came to nothing: no memory, the model raised, or its logits are NaN or infinite."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler keeps to; fixed while an engine lives.

    Attributes:
        max_batch_size: requests that may run at once.
        chunk_tokens: largest piece of a prompt in a step.
        align_tokens: pieces end at multiples of this where they can, since the prefix cache keeps whole blocks.
        is_row_invariant: of the runner: the bits of a row do not depend on how its request was cut.
        target_ms: time for prefill in a step while others decode; 0 allows one chunk.
        draft_streams_max: with more requests decoding, drafts do not pay and are dropped.
        is_batch_invariant: of the runner: with the same cuts they do not depend on who else is in the step either. If not,
            only a whole recorded run gives the same bits again.
    """

    max_batch_size: int
    chunk_tokens: int
    align_tokens: int = 1
    is_row_invariant: bool = False
    target_ms: float = 0.0
    draft_streams_max: int = 0
    is_batch_invariant: bool = True

    @property
    def has_free_cuts(self) -> bool:
        """Whether prompts may be cut anywhere: it changes no bits, or bits depend on the company whatever is done."""
        return self.is_row_invariant or not self.is_batch_invariant


class Start(msgspec.Struct, frozen=True, array_like=True):
    """A request gets its KV memory, with its first ``num_cached`` tokens from the prefix cache.

    Of one that runs already and is still at its prompt: it goes on after those tokens, which another has computed.
    """

    request_id: str
    attempt: int
    num_cached: int


class Preemption(msgspec.Struct, frozen=True, array_like=True):
    """A request loses its KV memory and goes back in line: for one of better priority, or because memory is short."""

    request_id: str
    attempt: int
    reason: PreemptionReason


class PlannedRow(msgspec.Struct, frozen=True, array_like=True):
    """Tokens ``start`` to ``start + num_tokens`` of a request; the last ``num_draft`` of them are guesses.

    Attributes:
        num_logits: last positions whose logits are wanted: none inside a prompt, else one and one for each guess.
    """

    request_id: str
    attempt: int
    start: int
    num_tokens: int
    num_logits: int
    num_draft: int = 0


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One step: first ``preemptions`` lose their KV memory, then ``starts`` get theirs, then ``rows`` run.

    Attributes:
        preemptions: worst first.
        starts: also those who run and take more from the prefix cache.
        prefill_tokens_max: tokens of prefill that the rows were to stay within.
        prefill_ms_per_token: the speed that this was derived from, as last measured; 0 while unknown.
        kv_budget_bytes: KV memory that running requests could hold together.
    """

    preemptions: tuple[Preemption, ...] = ()
    starts: tuple[Start, ...] = ()
    rows: tuple[PlannedRow, ...] = ()
    prefill_tokens_max: int = 0
    prefill_ms_per_token: float = 0.0
    kv_budget_bytes: int = 0


def without(plan: StepPlan, request_ids: Collection[str]) -> StepPlan:
    """The plan as if those requests had never been planned to start."""
    if not request_ids:
        return plan
    return msgspec.structs.replace(
        plan,
        starts=tuple(start for start in plan.starts if start.request_id not in request_ids),
        rows=tuple(row for row in plan.rows if row.request_id not in request_ids),
    )


class _Row(Protocol):
    @property
    def request_id(self) -> str: ...
    @property
    def attempt(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_logits(self) -> int: ...
    @property
    def num_draft(self) -> int: ...


class PlannedStep(Protocol):
    """A step that ran, as ``StepDone`` and ``StepCommitted`` hold it."""

    @property
    def preemptions(self) -> tuple[Preemption, ...]:
        """See ``StepPlan``, and so the others."""
        ...

    @property
    def starts(self) -> tuple[Start, ...]: ...  # noqa: D102
    @property
    def rows(self) -> Iterable[_Row]: ...  # noqa: D102
    @property
    def prefill_tokens_max(self) -> int: ...  # noqa: D102
    @property
    def prefill_ms_per_token(self) -> float: ...  # noqa: D102
    @property
    def kv_budget_bytes(self) -> int: ...  # noqa: D102


def plan_of(step: PlannedStep) -> StepPlan:
    """The plan that a step carried out."""
    return StepPlan(
        preemptions=step.preemptions,
        starts=step.starts,
        rows=tuple(
            PlannedRow(row.request_id, row.attempt, row.start, row.num_tokens, row.num_logits, row.num_draft)
            for row in step.rows
        ),
        prefill_tokens_max=step.prefill_tokens_max,
        prefill_ms_per_token=step.prefill_ms_per_token,
        kv_budget_bytes=step.kv_budget_bytes,
    )
