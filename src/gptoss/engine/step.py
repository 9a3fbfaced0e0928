"""Runs the rows of a plan: the model, then the sampler. The outcome holds no tensors.

Rules:
- A failure is the failure of the row at fault: a step that raises is halved until that row stands alone.
- A step that runs out of memory first gives back what can be spared, then is halved: smaller steps need less. A row
  that fails alone for lack of memory is no error yet; nothing of it counts, and it can be run again.
- A draft is verified by drawing its positions as if they had come one by one: what is drawn counts as long as it is
  what was guessed, and the first that is not counts too. So drafts change no token.
"""

from collections.abc import Callable, Sequence

import msgspec
import torch

from gptoss.engine.attention import Chunk
from gptoss.engine.runner import Runner
from gptoss.engine.sampler import Draw, SamplerState, draw_tokens
from gptoss.messages.plan import RowFailure

# pyright: reportUnknownMemberType=false
# torch is only partly typed.

_NO_MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


class Fault(msgspec.Struct, frozen=True):
    """Why a chunk failed."""

    failure: RowFailure
    message: str


class RowOutcome(msgspec.Struct, frozen=True):
    """What came of a planned row.

    Attributes:
        draws: tokens chosen, for consecutive positions; none inside a prompt. If the last has no token, the logits there
            were not finite.
        fault: set if the row did not run; then there are no draws.
    """

    draws: tuple[Draw, ...] = ()
    fault: Fault | None = None


class Task(msgspec.Struct, frozen=True):
    """A planned row with what it takes to run it.

    Attributes:
        draft: the guesses at the end of ``chunk.token_ids``.
        position: absolute position of the first token that is drawn.
    """

    chunk: Chunk
    draft: tuple[int, ...]
    sampler: SamplerState
    position: int


def run_tasks(runner: Runner, tasks: Sequence[Task], relieve: Callable[[], None]) -> tuple[RowOutcome, ...]:
    """Run a step.

    Args:
        runner: the model.
        tasks: in the plan's order.
        relieve: gives memory back; called when the step runs out of it.
    """
    logits, faults = run_isolated(runner, [task.chunk for task in tasks], relieve)
    rows: list[torch.Tensor] = []
    states: list[SamplerState] = []
    positions: list[int] = []
    for task, found in zip(tasks, logits, strict=True):
        if found is not None:
            rows += found.unbind(0)
            states += [task.sampler] * len(found)
            positions += range(task.position, task.position + len(found))
    draws = iter(draw_tokens(rows, states, positions))
    return tuple(
        RowOutcome(_accepted([next(draws) for _ in found], task.draft) if found is not None else (), faults.get(index))
        for index, (task, found) in enumerate(zip(tasks, logits, strict=True))
    )


def _accepted(draws: list[Draw], draft: tuple[int, ...]) -> tuple[Draw, ...]:
    """The draws that count: those that were guessed, and the one after them."""
    count = next(
        (index for index, (draw, guess) in enumerate(zip(draws, draft, strict=False)) if draw.token_id != guess),
        len(draft),
    )
    return tuple(draws[: count + 1])


def run_isolated(
    runner: Runner, chunks: Sequence[Chunk], relieve: Callable[[], None]
) -> tuple[list[torch.Tensor | None], dict[int, Fault]]:
    """Run a step so that a failing chunk fails alone.

    Returns:
        the logits of each chunk, and for the index of each failed one what went wrong.
    """
    if not chunks:
        return [], {}
    if not runner.is_batched and len(chunks) > 1:
        return _join([run_isolated(runner, [chunk], relieve) for chunk in chunks])
    try:
        return runner.forward(chunks), {}
    except Exception as error:  # noqa: BLE001 - the edge to model code and kernels, which can raise anything
        fault = Fault("memory" if is_out_of_memory(error) else "model", one_line(error))
    # Outside of the handler the exception is gone, and with it the frames that pin the step's tensors.
    if fault.failure == "memory":
        relieve()
    if len(chunks) == 1:
        return [None], {0: fault}
    half = len(chunks) // 2
    return _join([run_isolated(runner, part, relieve) for part in (chunks[:half], chunks[half:])])


def is_out_of_memory(error: Exception) -> bool:
    """Whether ``error`` says that memory ran out, on whichever device: torch has no class for that on a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY_WORDS)


def one_line(error: Exception) -> str:
    """The class and message of ``error``, at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _join(
    parts: list[tuple[list[torch.Tensor | None], dict[int, Fault]]],
) -> tuple[list[torch.Tensor | None], dict[int, Fault]]:
    rows: list[torch.Tensor | None] = []
    faults: dict[int, Fault] = {}
    for part_rows, part_faults in parts:
        faults |= {len(rows) + index: fault for index, fault in part_faults.items()}
        rows += part_rows
    return rows, faults
