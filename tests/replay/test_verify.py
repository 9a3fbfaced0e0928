"""Whatever a server does replays without a difference, and any change of what it decided is found where it is."""

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scenarios import (
    INCIDENTS,
    all_of,
    engine_killed,
    fakes,
    queued_past_deadline,
    record,
    request,
)

from gptoss.actors.decider import fold, recorded_form
from gptoss.actors.deciders import deciders_of
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.messages import events as ev
from gptoss.messages.envelope import NO_CAUSE, Event, Record
from gptoss.replay.verify import verify
from gptoss.telemetry.recording import ListRecording
from gptoss.testing import FakeOptions

SLOW_EXAMPLES = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
DECIDERS = ("memory", "admission", "router", "request/")


@pytest.fixture(scope="module")
def recordings() -> list[ListRecording]:
    async def both() -> list[ListRecording]:
        return [await engine_killed(), await queued_past_deadline()]

    return asyncio.run(both())


def is_decided(record: Record) -> bool:
    return record.meta.cause != NO_CAUSE and record.meta.actor == record.meta.stream and is_of_decider(record)


def is_of_decider(record: Record) -> bool:
    is_event = not isinstance(record.event, ev.CommandConsumed | ev.SnapshotTaken)
    return is_event and record.meta.stream.startswith(DECIDERS)


def changed(value: Any) -> Any:
    """Another value of the same type; None where there is none that this test can make."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value}x"
        case tuple() if value:
            return value[:-1]  # pyright: ignore[reportUnknownVariableType]
        case _:
            return None


# ---------------------------------------------------------------- what happened replays


@SLOW_EXAMPLES
@given(
    work=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(-1, 1)), min_size=1, max_size=25),
    budget=st.integers(60, 400),
    places=st.integers(1, 4),
    dies_at=st.sampled_from([0, 0, 2, 5]),
    max_queue=st.integers(1, 20),
)
def test_a_random_workload_replays(
    work: list[tuple[int, int, int]], budget: int, places: int, dies_at: int, max_queue: int
) -> None:
    async def run(system: ServingSystem) -> None:
        requests = [
            request(words, max_tokens=tokens, seed=seed, priority=priority)
            for seed, (words, tokens, priority) in enumerate(work)
        ]
        await all_of(system, *requests)

    options = FakeOptions(kv_budget_bytes=budget, max_batch_size=places)
    dying = msgspec.structs.replace(options, die_at_step=dies_at)
    found = asyncio.run(record(run, drivers=fakes(options, first=dying), max_queue=max_queue))
    result = verify(found)
    assert result.first is None
    assert result.problems == ()
    assert result.requests == len(work)
    assert result.notes == ()


@pytest.mark.parametrize("name", ["clean", "shrunk"])
def test_every_decided_event_is_compared(name: str) -> None:
    found = asyncio.run(INCIDENTS[name]())
    compared = sum(each.events for each in verify(found).checked if each.decider != "scheduler")
    assert compared == sum(map(is_decided, found.records())) > 10


def test_a_recording_that_breaks_off_anywhere_replays(recordings: list[ListRecording]) -> None:
    records = list(recordings[0].records())
    for end in range(0, len(records), 3):
        result = verify(ListRecording(records[:end]))
        assert result.first is None
        assert result.problems == ()


# ---------------------------------------------------------------- what was changed is found


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_changed_decision_is_reported_at_its_event(recordings: list[ListRecording], data: st.DataObject) -> None:
    found = data.draw(st.sampled_from(recordings))
    records = list(found.records())
    index = data.draw(st.sampled_from([i for i, record in enumerate(records) if is_decided(record)]))
    event = records[index].event
    fields = {name: changed(getattr(event, name)) for name in event.__struct_fields__}
    names = [name for name, value in fields.items() if value is not None]
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    records[index] = Record(records[index].meta, msgspec.structs.replace(event, **{name: fields[name]}))
    first = verify(ListRecording(records)).first
    assert first is not None
    assert (first.pos, first.kind) == (records[index].meta.pos, "differs")
    assert {field.field.partition("[")[0].partition(".")[0] for field in first.fields} == {name}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_removed_decision_is_reported_at_its_command(recordings: list[ListRecording], data: st.DataObject) -> None:
    records = list(data.draw(st.sampled_from(recordings)).records())
    lasts = {record.meta.stream: index for index, record in enumerate(records)}
    # The last record of a stream may have been cut off with the recording's end: nobody can tell.
    choices = [i for i, each in enumerate(records) if is_decided(each) and lasts[each.meta.stream] != i]
    gone = records.pop(data.draw(st.sampled_from(choices)))
    first = verify(ListRecording(records)).first
    assert first is not None
    assert (first.pos, first.kind, first.type) == (gone.meta.cause, "missing", gone.meta.type)


def test_an_event_that_nobody_decided_is_reported(recordings: list[ListRecording]) -> None:
    records = list(recordings[0].records())
    stream = [i for i, each in enumerate(records) if each.meta.stream == "router" and is_decided(each)]
    last = records[stream[-1]]
    meta = msgspec.structs.replace(records[-1].meta, stream="router", actor="router", seq=last.meta.seq + 1)
    following = [r for r in records[stream[-1] + 1 :] if r.meta.stream == "router"]
    meta = msgspec.structs.replace(meta, pos=meta.pos + 1, seq=last.meta.seq + 1 + len(following), type=last.meta.type)
    first = verify(ListRecording([*records, Record(meta, last.event)])).first
    assert first is not None
    assert (first.pos, first.kind) == (meta.pos, "unexpected")


def test_missing_records_are_a_gap_and_checking_goes_on_behind_it(recordings: list[ListRecording]) -> None:
    records = list(recordings[0].records())
    mine = [i for i, each in enumerate(records) if each.meta.stream == "memory"]
    cut = set(mine[4:10])
    result = verify(ListRecording([each for i, each in enumerate(records) if i not in cut]))
    assert result.first is not None
    assert result.first.stream == "memory"
    assert result.first.kind in {"gap", "missing"}
    assert {each.decider: each.diverged for each in result.checked if each.decider != "memory"}.keys() >= {"router"}


def test_a_leaked_reservation_is_reported_though_every_decision_is_right(recordings: list[ListRecording]) -> None:
    """As if the request's actor had forgotten to give its memory back: no decider sees that."""
    records = list(recordings[0].records())
    victim = next(r.meta.correlation for r in records if isinstance(r.event, ev.ReservationReleased))
    left: list[Record] = []
    seq = 0
    for each in records:
        if each.meta.stream == "memory":
            if isinstance(each.event, ev.ReservationReleased) and each.event.request_id == victim:
                left.pop()  # the command
                seq -= 1
                continue
            left.append(Record(msgspec.structs.replace(each.meta, seq=seq), each.event))
            seq += 1
        else:
            left.append(each)
    found = verify(ListRecording(left))
    assert any(f"{victim}: a reservation was not released" in problem for problem in found.problems)


# ---------------------------------------------------------------- snapshots


@pytest.fixture
def few_commands_to_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss.actors.decider.SNAPSHOT_COMMANDS_MIN", 5)
    monkeypatch.setattr("gptoss.actors.decider.SNAPSHOT_BYTES_PER_COMMAND", 1_000_000)


async def many(system: ServingSystem) -> None:
    await all_of(system, *(request(3 + n, seed=n) for n in range(6)))


@pytest.mark.usefixtures("few_commands_to_a_snapshot")
async def test_a_state_from_a_snapshot_is_the_state_from_the_beginning() -> None:
    found = await record(many, drivers=fakes(FakeOptions(kv_budget_bytes=60)))
    deciders = deciders_of(Settings())
    for name in ("memory", "admission", "router"):
        decider = deciders.of(name)
        assert decider is not None
        events = [r.event for r in found.records(stream=name)]
        places = [i for i, event in enumerate(events) if isinstance(event, ev.SnapshotTaken)]
        assert len(places) > 1
        whole = decider.initial()
        for event in events:
            whole = fold(decider, whole, event) if not isinstance(event, ev.SnapshotTaken) else whole
        for place in places:
            state = decider.initial()
            for event in events[place:]:
                state = fold(decider, state, event)
            assert recorded_form(decider, state) == recorded_form(decider, whole)


@pytest.mark.usefixtures("few_commands_to_a_snapshot")
async def test_a_recording_may_begin_at_snapshots() -> None:
    found = await record(many, drivers=fakes(FakeOptions(kv_budget_bytes=60)))
    records = list(found.records())
    begins = {
        name: max(r.meta.pos for r in records if r.meta.stream == name and isinstance(r.event, ev.SnapshotTaken))
        for name in ("memory", "admission", "router")
    }
    result = verify(ListRecording(r for r in records if r.meta.pos >= begins.get(r.meta.stream, 0)))
    assert result.first is None
    assert sum(each.passed_over for each in result.checked if each.decider != "scheduler") == 0
    assert all(each.decisions for each in result.checked if each.decider not in {"scheduler", "router"})


@pytest.mark.usefixtures("few_commands_to_a_snapshot")
async def test_a_wrong_snapshot_is_reported() -> None:
    found = await record(many, drivers=fakes(FakeOptions(kv_budget_bytes=60)))
    records = list(found.records())
    index = next(
        i for i, r in enumerate(records) if isinstance(r.event, ev.SnapshotTaken) and r.meta.stream == "memory"
    )
    event = records[index].event
    assert isinstance(event, ev.SnapshotTaken)
    state = msgspec.msgpack.decode(event.state)
    state["grants"] = {"nobody": {"kv_bytes": 1, "executor": ""}}
    wrong: Event = msgspec.structs.replace(event, state=msgspec.Raw(msgspec.msgpack.encode(state)))
    records[index] = Record(records[index].meta, wrong)
    first = verify(ListRecording(records)).first
    assert first is not None
    assert (first.pos, first.kind) == (records[index].meta.pos, "snapshot")


def state_of(system: ServingSystem, name: str) -> Any:
    actor: Any = system.system._cells[name]._actor
    return recorded_form(actor.decider, actor.state)


def has_restarted(system: ServingSystem, name: str) -> bool:
    return any(r.meta.actor == name and isinstance(r.event, ev.ActorRestarted) for r in system.journal.read())


@pytest.mark.usefixtures("few_commands_to_a_snapshot")
async def test_a_restarted_decider_has_the_state_that_it_had() -> None:
    async def work(system: ServingSystem) -> None:
        await many(system)
        for name in ("memory", "admission", "router"):
            before = state_of(system, name)
            ref = system.directory.get(name)
            assert ref is not None
            ref.tell(object())  # no command: the actor fails
            async with asyncio.timeout(10.0):
                while not has_restarted(system, name):
                    await asyncio.sleep(0.005)
            assert state_of(system, name) == before
        await many(system)

    result = verify(await record(work, drivers=fakes(FakeOptions(kv_budget_bytes=60))))
    assert result.first is None
    assert result.problems == ()
    assert result.requests == 12
