"""What a replay found, as plain data: the report for people, ``--json`` and the HTML report all show this.

``to_json`` gives JSON types only. Positions are those of the control family; with its boot one names a record.
"""

from typing import Any, Literal, TypeAlias

import msgspec

from gptoss.messages.envelope import NO_CAUSE

FORMAT_VERSION = 1

Kind: TypeAlias = Literal["differs", "missing", "unexpected", "snapshot", "plan", "gap", "error"]
"""How a replay can differ.

    differs     the decider says something else than was recorded
    missing     it says something that was not recorded; the position is that of the command
    unexpected  the recording holds an event that no decision leads to
    snapshot    the recorded state is not what the events before it lead to
    plan        the scheduler plans something else for this step
    gap         records of this stream are missing
    error       the decider raises, or what is recorded cannot be read
"""


class FieldDiff(msgspec.Struct, frozen=True, kw_only=True):
    """One field that differs; None where one side has no such event."""

    field: str
    recorded: Any
    replayed: Any


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A record in the chain of causes: ``summary`` is the command or event in one line."""

    pos: int
    stream: str
    type: str
    mono_ns: int
    summary: str


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """Where the replay is not as recorded.

    Attributes:
        decider: who decides there: admission, memory, router, request or scheduler.
        type: of the recorded event, or of the replayed one where none was recorded.
        command: the command that was decided, in one line; ``command_pos`` is where it was consumed.
        fields: what differs.
        chain: from the input that began it all to this record; filled in for the first divergence.
    """

    kind: Kind
    boot: str
    pos: int
    stream: str
    decider: str
    type: str
    command: str = ""
    command_pos: int = NO_CAUSE
    fields: tuple[FieldDiff, ...] = ()
    chain: tuple[Link, ...] = ()


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """How much of one decider was run again.

    Attributes:
        decisions: commands decided again, or steps planned again.
        events: recorded events that were compared.
        snapshots: recorded states that were compared.
        passed_over: of those, what could not be checked: it stands before the first state that is known, or an engine
            did not record what its plan was made from.
        diverged: of the compared, those that differ.
    """

    decider: str
    decisions: int = 0
    events: int = 0
    snapshots: int = 0
    passed_over: int = 0
    diverged: int = 0


class VerifyResult(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of running the decisions of a recording again.

    Attributes:
        source: what was replayed.
        records: control records read, in ``seconds``.
        checked: one for each decider that has something in the recording.
        requests: lives that were checked as wholes: one end each, everything given back, tokens that add up.
        first: the first divergence; ``num_diverged`` counts all.
        problems: what is wrong with whole lives.
        notes: what a reader should know, such as what was left out.
    """

    format_version: int = FORMAT_VERSION
    source: str = ""
    boots: tuple[str, ...] = ()
    records: int = 0
    seconds: float = 0.0
    checked: tuple[Checked, ...] = ()
    requests: int = 0
    first: Divergence | None = None
    num_diverged: int = 0
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether everything is as recorded."""
        return self.first is None and not self.problems


class TokenDivergence(msgspec.Struct, frozen=True, kw_only=True):
    """The first token of a request that the engine does not give again.

    Attributes:
        position: index in the output.
        recorded, replayed: token ids; None where one side had ended.
        logprob_recorded, logprob_replayed: of the two tokens, under the model's distribution of the replay.
    """

    request_id: str
    boot: str
    step: int
    position: int
    recorded: int | None
    replayed: int | None
    logprob_recorded: float | None = None
    logprob_replayed: float | None = None


class TokensResult(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of running the engine again.

    Attributes:
        model: the folder that was run; ``is_same_model`` says whether its fingerprint is the recorded one.
        requests: attempts that were run; ``left_out`` those whose content is not in the recording.
        steps, tokens: run and compared.
        diverged: one for each request whose tokens differ, in the order of the steps.
        notes: how this engine differs from the recorded one.
    """

    format_version: int = FORMAT_VERSION
    source: str = ""
    model: str = ""
    is_same_model: bool = True
    requests: int = 0
    left_out: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    diverged: tuple[TokenDivergence, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether every compared token is as recorded."""
        return not self.diverged


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """How requests fared. Times are milliseconds; None where there is nothing to measure."""

    requests: int = 0
    accepted: int = 0
    shrunk: int = 0
    queued: int = 0
    refused: int = 0
    expired: int = 0
    completed: int = 0
    queue_ms_p50: float | None = None
    queue_ms_p95: float | None = None
    ttft_ms_p50: float | None = None
    ttft_ms_p95: float | None = None
    e2e_ms_p50: float | None = None
    e2e_ms_p95: float | None = None


class WhatIfResult(msgspec.Struct, frozen=True, kw_only=True):
    """What another policy would have done.

    Attributes:
        changes: setting -> (recorded, tried).
        exact_decisions: decisions that are the same under both, up to ``first``.
        first: the first decision that differs; None means that the policy changes nothing.
        recorded: as it was.
        model: the recorded policy in the simulation that gives ``estimated``: how far the simulation is to be trusted.
        estimated: the changed policy; exact before ``first``, simulated after it.
        assumptions: what the estimate rests on.
    """

    format_version: int = FORMAT_VERSION
    source: str = ""
    boot: str = ""
    changes: dict[str, tuple[Any, Any]] = {}
    exact_decisions: int = 0
    first: Divergence | None = None
    recorded: Figures = Figures()
    model: Figures | None = None
    estimated: Figures | None = None
    assumptions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


Result: TypeAlias = VerifyResult | TokensResult | WhatIfResult


def to_json(result: Result) -> dict[str, Any]:
    """JSON types only, with ``mode`` and, where it applies, ``same``."""
    mode = {VerifyResult: "verify", TokensResult: "tokens", WhatIfResult: "what-if"}[type(result)]
    same = {} if isinstance(result, WhatIfResult) else {"same": result.same}
    return {"mode": mode, **same, **msgspec.to_builtins(result, str_keys=True)}
