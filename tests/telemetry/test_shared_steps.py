"""The steps that a request had a part in."""

from gptoss.messages import events as ev
from gptoss.messages.plan import Preemption
from gptoss.telemetry.shared_steps import COLUMNS_MAX, SharedSteps

MS = 1_000_000


def step(number: int, *rows: tuple[str, int, int], executor: str = "cpu", lost: str = "") -> ev.StepCommitted:
    return ev.StepCommitted(
        executor=executor,
        step=number,
        started_ns=number * 10 * MS,
        duration_ns=8 * MS,
        rows=tuple(ev.CommittedRow(name, 1, tokens, prefilled) for name, tokens, prefilled in rows),
        waiting=0,
        running=len(rows),
        kv_bytes_in_use=0,
        preemptions=(Preemption(lost, 1, "memory"),) if lost else (),
    )


def test_a_column_says_what_the_request_did_and_who_was_there() -> None:
    steps = SharedSteps("mine", begin_ns=10 * MS)
    steps.add(step(1, ("mine", 0, 12), ("other", 1, 0)))
    steps.add(step(2, ("other", 1, 0)))  # not one of its own
    steps.add(step(3, ("mine", 1, 0), ("other", 1, 0), ("third", 0, 64)))
    first, second = steps.columns()
    assert (first.start_ms, first.end_ms, first.longest_ms) == (0, 8, 8)
    assert (first.tokens, first.prefilled, first.others, first.others_prefilled) == (0, 12, 1, 0)
    assert (second.first_step, second.start_ms) == (3, 20)
    assert (second.tokens, second.prefilled, second.others, second.others_prefilled) == (1, 0, 2, 64)


def test_a_step_that_took_its_memory_is_its_own() -> None:
    steps = SharedSteps("mine", begin_ns=0)
    steps.add(step(1, ("other", 0, 5), lost="mine"))
    (column,) = steps.columns()
    assert column.is_preempted
    assert (column.tokens, column.others, column.others_prefilled) == (0, 1, 5)


def test_a_long_life_has_no_more_columns_and_loses_nothing() -> None:
    steps = SharedSteps("mine", begin_ns=0)
    for number in range(1, 5001):
        steps.add(step(number, ("mine", 1, 0), *[("other", 1, 0)] * (number == 777)))
    columns = steps.columns()
    assert COLUMNS_MAX / 2 <= len(columns) <= COLUMNS_MAX
    assert sum(column.tokens for column in columns) == sum(column.steps for column in columns) == 5000
    assert [column.first_step for column in columns] == sorted(column.first_step for column in columns)
    assert max(column.others for column in columns) == 1
    assert columns[-1].end_ms == 50_008


def test_steps_of_two_executors_are_never_one_column() -> None:
    steps = SharedSteps("mine", begin_ns=0)
    for number in range(1, 2001):
        steps.add(step(number, ("mine", 1, 0), executor="one" if number <= 1000 else "two"))
    columns = steps.columns()
    assert len(columns) <= COLUMNS_MAX
    assert sum(column.tokens for column in columns if column.executor == "one") == 1000
