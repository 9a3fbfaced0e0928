"""The decider of batches as given events, when command, then events."""

from random import Random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from gptoss.actors.batches import KEPT_MAX, Batches, BatchesState
from gptoss.messages import batch_commands as cmd
from gptoss.messages import batch_events as ev
from gptoss.messages.batch import BatchFault
from gptoss.messages.codec import decode_command, encode_command
from gptoss.messages.commands import Command
from gptoss.messages.envelope import Event

BATCHES = Batches(concurrency=2)
WINDOW_S = 100


def run(*commands: Command, state: BatchesState | None = None) -> tuple[BatchesState, list[Event]]:
    """The state after all commands, and the events of the last."""
    state = state or BATCHES.initial()
    events: list[Event] = []
    for command in commands:
        events = BATCHES.decide(state, decode_command(encode_command(command)))
        for event in events:
            state = BATCHES.evolve(state, event)
    return state, events


def create(name: str, at: int = 0) -> cmd.CreateBatch:
    return cmd.CreateBatch(
        now_ns=0,
        wall_s=at,
        window_s=WINDOW_S,
        batch_id=name,
        endpoint="/v1/completions",
        input_file_id="in",
        output_file_id=f"out-{name}",
        error_file_id=f"err-{name}",
    )


def accept(name: str, items: int) -> cmd.AcceptBatch:
    return cmd.AcceptBatch(now_ns=0, wall_s=1, batch_id=name, num_items=items)


def finish(name: str, item: int, *, status: int = 200, at: int = 2, size: int = 0) -> cmd.FinishBatchItem:
    return cmd.FinishBatchItem(
        now_ns=0, wall_s=at, batch_id=name, item=item, status=status, output_bytes=size, error_bytes=0
    )


def drop(name: str, item: int) -> cmd.DropBatchItem:
    return cmd.DropBatchItem(now_ns=0, wall_s=3, batch_id=name, item=item)


def cancel(name: str) -> cmd.CancelBatch:
    return cmd.CancelBatch(now_ns=0, wall_s=3, batch_id=name)


def end(name: str) -> cmd.EndBatch:
    return cmd.EndBatch(now_ns=0, wall_s=9, batch_id=name, output_bytes=10, error_bytes=0)


def restore(state: BatchesState, at: int = 5) -> cmd.RestoreBatches:
    return cmd.RestoreBatches(now_ns=0, wall_s=at, batches=tuple(state.batches.values()))


def started(events: list[Event]) -> list[tuple[str, int]]:
    return [(event.batch_id, event.item) for event in events if isinstance(event, ev.BatchItemStarted)]


def test_no_more_items_run_than_may() -> None:
    state, events = run(create("a"), accept("a", 5))
    assert started(events) == [("a", 0), ("a", 1)]
    _, events = run(finish("a", 1), state=state)
    assert started(events) == [("a", 2)]


def test_an_older_batch_goes_first_and_the_next_fills_what_it_leaves() -> None:
    _, events = run(create("a"), create("b"), accept("b", 5), accept("a", 1), finish("b", 0))
    assert started(events) == [("a", 0)]
    _, events = run(create("a"), create("b"), accept("a", 1), accept("b", 3))
    assert started(events) == [("b", 0)]


def test_the_life_of_a_batch() -> None:
    state, _ = run(create("a"), accept("a", 2), finish("a", 0, status=400), finish("a", 1, size=10))
    assert state.batches["a"].status == "finalizing"
    state, events = run(end("a"), state=state)
    batch = state.batches["a"]
    assert (batch.status, batch.completed, batch.failed, batch.total) == ("completed", 1, 1, 2)
    assert (batch.created_s, batch.in_progress_s, batch.finalizing_s, batch.ended_s) == (0, 1, 2, 9)
    assert isinstance(events[0], ev.BatchEnded)


def test_a_file_with_faults_fails_the_batch_before_anything_runs() -> None:
    fault = BatchFault("invalid_json_line", "no", 3)
    state, events = run(create("a"), cmd.FailBatch(now_ns=0, wall_s=1, batch_id="a", faults=(fault,)))
    assert state.batches["a"].status == "failed"
    assert state.batches["a"].faults == (fault,)
    assert not started(events)


def test_a_cancelled_batch_begins_nothing_and_ends_when_nothing_runs() -> None:
    state, events = run(create("a"), accept("a", 5), cancel("a"))
    assert [type(event) for event in events] == [ev.BatchCancelRequested]
    assert state.batches["a"].status == "cancelling"
    state, events = run(drop("a", 0), state=state)
    assert [type(event) for event in events] == [ev.BatchItemDropped]
    state, events = run(finish("a", 1), state=state)
    assert state.batches["a"].status == "finalizing"
    assert state.batches["a"].unfinished == (0, 2, 3, 4)
    state, _ = run(end("a"), state=state)
    assert (state.batches["a"].status, state.batches["a"].completed) == ("cancelled", 1)


def test_a_batch_that_is_cancelled_while_it_is_validated_runs_nothing() -> None:
    state, _ = run(create("a"), cancel("a"))
    assert state.batches["a"].status == "finalizing"
    _, events = run(accept("a", 5), state=state)
    assert events == []


def test_the_window_ends_a_batch() -> None:
    state, events = run(create("a"), accept("a", 5), cmd.ExpireBatches(now_ns=0, wall_s=WINDOW_S - 1))
    assert events == []
    state, events = run(cmd.ExpireBatches(now_ns=0, wall_s=WINDOW_S), state=state)
    assert [type(event) for event in events] == [ev.BatchExpired]
    state, _ = run(drop("a", 0), drop("a", 1), end("a"), state=state)
    assert state.batches["a"].status == "expired"


def test_a_restart_runs_what_was_in_flight_again_and_what_is_done_not() -> None:
    state, _ = run(create("a"), accept("a", 5), finish("a", 0), finish("a", 2))
    assert state.batches["a"].in_flight == (1, 3)
    _, events = run(restore(state))
    assert started(events) == [("a", 1), ("a", 3)]
    assert isinstance(events[0], ev.BatchesRestored)


def test_a_window_that_ended_while_the_server_was_down_is_seen_at_the_start() -> None:
    state, _ = run(create("a"), accept("a", 5))
    state, events = run(restore(state, at=WINDOW_S + 1))
    assert not started(events)
    assert state.batches["a"].status == "finalizing"
    assert state.batches["a"].ending == "expired"


def test_what_is_late_changes_nothing() -> None:
    state, _ = run(create("a"), accept("a", 1), finish("a", 0), end("a"))
    for command in (finish("a", 0), drop("a", 0), cancel("a"), end("a"), accept("a", 3), finish("b", 0), cancel("b")):
        assert run(command, state=state) == (state, [])


def test_the_oldest_that_are_over_make_room() -> None:
    state, _ = run(create("open"), accept("open", 9))
    over = msgspec.structs.replace(state.batches["open"], status="completed", in_flight=())
    others = {f"b{n}": msgspec.structs.replace(over, batch_id=f"b{n}") for n in range(KEPT_MAX - 1)}
    state = BatchesState(batches={**state.batches, **others})
    state, events = run(create("new"), state=state)
    assert [event.batch_id for event in events if isinstance(event, ev.BatchForgotten)] == ["b0"]
    assert len(state.batches) == KEPT_MAX


@given(
    st.lists(st.sampled_from(["finish", "fail", "drop", "cancel", "restart", "expire"]), max_size=30),
    st.randoms(use_true_random=False),
)
def test_every_item_is_finished_at_most_once_and_counts_add_up(steps: list[str], random: Random) -> None:
    choose = random.choice
    state, events = run(create("a"), accept("a", 6))
    finished: list[int] = []
    for step in steps:
        running = state.batches["a"].in_flight
        if step in {"finish", "fail"} and running:
            item = choose(running)
            command: Command = finish("a", item, status=200 if step == "finish" else 400)
        elif step == "drop" and running and state.batches["a"].ending:
            command = drop("a", choose(running))
        elif step == "restart":
            command = restore(state)
        elif step == "cancel":
            command = cancel("a")
        else:
            command = cmd.ExpireBatches(now_ns=0, wall_s=50)
        state, events = run(command, state=state)
        finished += [event.item for event in events if isinstance(event, ev.BatchItemFinished)]
        batch = state.batches["a"]
        assert len(set(finished)) == len(finished) == batch.completed + batch.failed
        assert set(finished) | set(batch.unfinished) == set(range(6))
        assert not set(finished) & set(batch.unfinished)
        assert len(batch.in_flight) <= 2
        assert not (batch.ending and started(events))


def test_the_state_survives_a_snapshot() -> None:
    state, _ = run(create("a"), accept("a", 5), finish("a", 0))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=BatchesState) == state
