"""Running a plan's rows: faults stay with the row at fault, and drafts change no token."""

from collections.abc import Sequence

import pytest
import torch

from gptoss.engine.attention import Chunk
from gptoss.engine.sampler import Draw, SamplerState
from gptoss.engine.step import Task, Undo, is_out_of_memory, run_isolated, run_tasks
from gptoss.messages.model import KvLayout
from gptoss.messages.sampling import SamplingParams

VOCAB = 20


class StubRunner:
    """The best next token is the last one plus 1. Fails with tokens 13 (bug) and 17 (memory), and on larger steps."""

    is_batched = True
    is_row_invariant = True
    is_batch_invariant = True
    geometry = None
    layout = KvLayout(full_layers=1, sliding_layers=0, sliding_window=0, kv_heads=1, head_dim=1, dtype_bytes=1)

    def __init__(self, rows_max: int = 99) -> None:
        self.steps = 0
        self.rows_max = rows_max

    def new_slot(self, tokens: int) -> object:
        raise NotImplementedError

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        self.steps += 1
        token_ids = {token_id for chunk in chunks for token_id in chunk.token_ids}
        if 13 in token_ids:
            raise RuntimeError("poisoned\nby 13")
        if 17 in token_ids or sum(len(chunk.token_ids) for chunk in chunks) > self.rows_max:
            raise MemoryError("no room")
        return [
            torch.eye(VOCAB)[[(token_id + 1) % VOCAB for token_id in chunk.token_ids[-chunk.num_logits :]]]
            if chunk.num_logits
            else None
            for chunk in chunks
        ]


def chunk(*token_ids: int, num_logits: int = 1) -> Chunk:
    return Chunk(slot=None, token_ids=token_ids, start=0, num_logits=num_logits)


def relieved(calls: list[int]) -> None:
    calls.append(1)


def test_only_the_chunk_at_fault_fails() -> None:
    runner, calls = StubRunner(), list[int]()
    chunks = [chunk(token_id) for token_id in (1, 2, 13, 4, 5)]
    undos = [Undo(each) for each in chunks]
    logits, faults = run_isolated(runner, undos, lambda: relieved(calls))  # pyright: ignore[reportArgumentType]
    assert {index: (fault.failure, fault.message) for index, fault in faults.items()} == {
        2: ("model", "RuntimeError: poisoned by 13")
    }
    assert [None if rows is None else int(rows[0].argmax()) for rows in logits] == [2, 3, None, 5, 6]
    assert runner.steps <= 2 * len(chunks)
    assert not calls


def test_a_step_without_memory_is_relieved_and_halved() -> None:
    runner, calls = StubRunner(rows_max=2), list[int]()
    logits, faults = run_isolated(runner, [Undo(chunk(each)) for each in range(4)], lambda: relieved(calls))  # pyright: ignore[reportArgumentType]
    assert not faults
    assert all(rows is not None for rows in logits)
    assert len(calls) == 1
    _, faults = run_isolated(runner, [Undo(chunk(1)), Undo(chunk(17))], lambda: relieved(calls))  # pyright: ignore[reportArgumentType]
    assert {index: fault.failure for index, fault in faults.items()} == {1: "memory"}


def test_an_empty_step_runs_nothing() -> None:
    runner = StubRunner()
    assert run_tasks(runner, [], lambda: None) == ()  # pyright: ignore[reportArgumentType]
    assert runner.steps == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


@pytest.mark.parametrize(
    ("draft", "tokens"),
    [((), [5]), ((5, 6), [5, 6, 7]), ((5, 9), [5, 6]), ((8, 6), [5])],
)
def test_a_draft_counts_as_far_as_it_is_what_is_drawn(draft: tuple[int, ...], tokens: list[int]) -> None:
    state = SamplerState(SamplingParams(temperature=0.0), (), ())
    task = Task(chunk(4, *draft, num_logits=1 + len(draft)), draft, state, 9)
    other = Task(chunk(1), (), state, 3)
    prompt = Task(chunk(1, 2, num_logits=0), (), state, 3)
    outcomes = run_tasks(StubRunner(), [prompt, task, other], lambda: None)  # pyright: ignore[reportArgumentType]
    assert [draw.token_id for draw in outcomes[1].draws] == tokens
    assert outcomes[0].draws == ()
    assert outcomes[2].draws == (Draw(2),)


class Jammed:
    """A mask that cannot be asked."""

    is_over = False

    def allowed(self) -> torch.Tensor | None:
        raise KeyError("no such state")

    def push(self, token_id: int) -> None: ...


def test_a_draw_that_raises_is_the_failure_of_its_row_alone() -> None:
    good = SamplerState(SamplingParams(temperature=0.0), (), ())
    bad = SamplerState(SamplingParams(temperature=0.0), (), (), Jammed())
    tasks = [Task(chunk(token_id), (), state, 1) for token_id, state in ((1, good), (2, bad), (3, good))]
    outcomes = run_tasks(StubRunner(), tasks, lambda: None)  # pyright: ignore[reportArgumentType]
    assert [outcome.draws for outcome in outcomes] == [(Draw(2),), (), (Draw(4),)]
    fault = outcomes[1].fault
    assert fault is not None
    assert (fault.failure, "no such state" in fault.message) == ("model", True)
