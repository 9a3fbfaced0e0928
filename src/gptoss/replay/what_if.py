"""What another policy would have done: the recorded commands go to the deciders of the changed settings.

Rules:
- As long as every decision comes out as recorded, nothing in the recording can be other than it was: that part is exact.
  Decisions are compared by what they choose, not by the numbers that they were chosen from: a larger budget changes
  those at once.
- From the first decision that comes out differently on, a simulation goes on from the very state that was reached
  (``simulate``). The same simulation of the recorded policy says how far it is to be trusted.
- One boot is looked at, the newest unless another is named.
"""

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import msgspec

from gptoss.actors.deciders import REQUEST_PREFIX
from gptoss.clock import NS_PER_S
from gptoss.errors import ReplayError
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.codec import decode_command
from gptoss.messages.commands import Command
from gptoss.messages.envelope import Record
from gptoss.replay.chain import causal_chain
from gptoss.replay.exact import Divided, Exact
from gptoss.replay.figures import Fares
from gptoss.replay.policy import Policy, check_changes
from gptoss.replay.recorded import settings_of
from gptoss.replay.result import WhatIfResult
from gptoss.replay.simulate import Script, Simulation
from gptoss.replay.step_cost import StepCost, StepCosts
from gptoss.telemetry.recording import Recording

EXTERNAL = (
    cmd.BeginRequest,
    cmd.SetMemoryPool,
    cmd.DropMemoryPool,
    cmd.SetExecutor,
    cmd.DropExecutor,
    cmd.DrainExecutor,
    cmd.RateExecutor,
    cmd.ChangeSettings,
    cmd.SetCapacity,
    cmd.StartDraining,
)
"""Commands that come from outside of the deciders, whoever decides."""
TAIL_NS = 3600 * NS_PER_S
"""How long a simulation may go on after the recording's end."""


def what_if(
    recording: Recording,
    changes: Mapping[str, Any],
    *,
    source: str = "",
    boot: str | None = None,
    from_start: bool = False,
) -> WhatIfResult:
    """Run a boot again under changed settings.

    Args:
        recording: what was recorded; it is read several times.
        changes: settings by name.
        source: its name in the report.
        boot: which boot; None is the newest.
        from_start: simulate from the first request on, whether or not a decision differs.

    Raises:
        ConfigError: a setting cannot be tried.
        ReplayError: the recording has no such boot, or does not begin with its settings.
    """
    changes = check_changes(changes, "policy")
    boots = recording.boots()
    if not boots or (boot is not None and boot not in boots):
        raise ReplayError(f"the recording has no boot {boot}" if boots else "the recording is empty")
    boot = boot or boots[-1]
    started = next(_events(recording, boot, ev.NodeStarted), None)
    if started is None:
        raise ReplayError(f"boot {boot} has no NodeStarted in this recording: its settings are not known")
    settings, notes = settings_of(started)
    script, cost, recorded = _read(recording, boot)
    policy = Policy(settings, changes)
    exact = Exact(policy, from_start=from_start)
    divided = next((found for found in map(exact.observe, recording.records(boot=boot)) if found), None) or exact.end()
    result = WhatIfResult(
        source=source,
        boot=boot,
        changes={name: (getattr(settings, name), value) for name, value in changes.items()},
        exact_decisions=exact.num_decisions,
        recorded=recorded.figures(),
        notes=tuple(notes),
    )
    if divided is None:
        return result
    first = divided.divergence
    if first is not None:
        first = msgspec.structs.replace(first, chain=causal_chain(recording, boot, first.pos))
    if cost is None:
        note = "there is no step in the recording to learn from: nothing after the first difference can be estimated"
        return msgspec.structs.replace(result, first=first, notes=(*notes, note))
    estimate = _Estimate(recording=recording, boot=boot, divided=divided, script=script, cost=cost)
    (model, ends), (estimated, also_ends) = estimate.run(Policy(settings, {})), estimate.run(policy)
    if recorded.num_strangers:
        notes.append(
            f"{recorded.num_strangers} other requests are in this recording only where they met those that it is of: how they went on "
            "is not known, and the estimate is a rough one; a bundle of the whole time (--window) knows"
        )
    if not (ends and also_ends):
        notes.append("the simulation was still busy an hour after the recording's end and was stopped")
    return msgspec.structs.replace(
        result,
        first=first,
        model=model.figures(),
        estimated=estimated.figures(),
        assumptions=_assumptions(script, cost, recorded),
        notes=tuple(notes),
    )


class _Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a simulation needs but the policy."""

    recording: Recording
    boot: str
    divided: Divided
    script: Script
    cost: StepCost

    def run(self, policy: Policy) -> tuple[Fares, bool]:
        """Go on from where the policies part. Returns how requests fare, and whether it came to an end."""
        divided, fares = self.divided, self.divided.fares.copy()
        simulation = Simulation(policy, self.script, self.cost, fares.observe)
        divided.put_into(simulation, policy)
        last_ns = divided.at_ns
        for record in self.recording.records(boot=self.boot):
            last_ns = record.meta.mono_ns
            if isinstance(record.event, ev.DrainStarted):
                break  # the recording's end is no end of what might have been
            if record.meta.pos >= divided.pos:
                _play(simulation, record, divided.pos, policy)
        return fares, simulation.run(last_ns + TAIL_NS)


def _play(simulation: Simulation, record: Record, parted: int, policy: Policy) -> None:
    """What of a record happens under any policy, once they have parted at a position."""
    meta, event = record.meta, record.event
    was_on_its_way = 0 <= meta.cause < parted or meta.pos == parted
    match event:
        case ev.EngineLoaded():
            simulation.at(meta.mono_ns, lambda: simulation.load_engine(meta.stream, event.capabilities))
        case ev.EngineExited():
            simulation.at(meta.mono_ns, lambda: simulation.lose_engine(meta.stream, event))
        case ev.ExecutorAccepted() if was_on_its_way:
            simulation.at(meta.mono_ns, lambda: simulation.accept(meta.stream, event))
        case ev.CommandConsumed():
            command = decode_command(event.command)
            if was_on_its_way or _is_given(command):
                simulation.tell(command.now_ns, meta.stream, policy.command(command, _life_end(simulation, command)))
        case _:
            pass


def _life_end(simulation: Simulation, command: Command) -> int | None:
    if not isinstance(command, cmd.AdmitRequest):
        return None
    state = simulation.states.get(f"{REQUEST_PREFIX}{command.request_id}")
    return state.deadline_ns if state else None


def _is_given(command: Command) -> bool:
    if isinstance(command, cmd.CancelRequest):
        return command.reason != "deadline"
    return isinstance(command, EXTERNAL)


def _read(recording: Recording, boot: str) -> tuple[Script, StepCost | None, Fares]:
    """What the whole boot says: of its requests, of its steps, and how they fared."""
    render: dict[str, tuple[int, Command]] = {}
    arrivals: dict[str, int] = {}
    outputs: dict[str, int] = {}
    hits: dict[str, int] = {}
    costs, fares = StepCosts(), Fares()
    for record in recording.records(boot=boot):
        event, request_id = record.event, record.meta.correlation
        match event:
            case ev.CommandConsumed() if record.meta.stream.startswith(REQUEST_PREFIX):
                command = decode_command(event.command)
                if isinstance(command, cmd.BeginRequest):
                    arrivals[request_id] = command.now_ns
                elif isinstance(command, cmd.PromptReady | cmd.PromptUnusable) and request_id in arrivals:
                    render[request_id] = (command.now_ns - arrivals[request_id], command)
            case ev.StepCommitted():
                costs.observe(event)
                for start in event.starts:
                    hits.setdefault(start.request_id, start.num_cached)
            case ev.RequestCompleted():
                outputs[request_id] = max(1, event.completion_tokens)
            case _:
                pass
        if request_id:
            fares.observe(record.meta.mono_ns, request_id, event)
    typical = int(median(outputs.values())) if outputs else 1
    return Script(render=render, outputs=outputs, hits=hits, typical_output=typical), costs.learn(), fares


def _events(recording: Recording, boot: str, kind: type[ev.NodeStarted]) -> Iterator[ev.NodeStarted]:
    return (r.event for r in recording.records(boot=boot, stream="system") if isinstance(r.event, kind))


def _assumptions(script: Script, cost: StepCost, recorded: Fares) -> tuple[str, ...]:
    unknown = recorded.figures().requests - len(script.outputs)
    found = [
        f"estimated: a step takes {cost.base_ms + cost.gap_ms:.2f} ms, {cost.decode_row_ms:.3f} more for each decoding "
        f"request and {cost.prefill_token_ms:.4f} for each token of prefill, as {cost.steps} recorded steps say",
        "estimated: arrivals, rendering, cancels by clients and deaths of engines as recorded; other messages take no time; "
        "the server's stop is left out",
        "estimated: who came to an end makes as many tokens as recorded, which is the least for one that had been shrunk",
    ]
    if unknown:
        found.append(
            f"estimated: {unknown} requests were cut short or never ran; each makes {script.typical_output} tokens, "
            "half of the others make fewer"
        )
    return tuple(found)
