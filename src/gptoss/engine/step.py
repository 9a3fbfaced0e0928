"""Runs the rows of a plan: the model, then the sampler. The outcome holds no tensors.

Rules:
- A failure is the failure of the row at fault: a step that raises is halved until that row stands alone.
- A step that runs out of memory first gives back what can be spared, then is halved: smaller steps need less. A row
  that fails alone for lack of memory is no error yet; nothing of it counts, and it can be run again.
- What a chunk overwrites in the ring of a sliding layer is put back before it is run again, and as far as it was of
  guesses that were wrong: the step is as if they had never been there.
- A draft is verified by drawing its positions as if they had come one by one: what is drawn counts as long as it is
  what was guessed, and the first that is not counts too. So drafts change no token.
"""

from collections.abc import Callable, Sequence

import msgspec
import torch

from gptoss.engine.attention import Chunk
from gptoss.engine.kv_cache import RequestKv
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
    undos = [Undo(task.chunk) for task in tasks]
    logits, faults = run_isolated(runner, undos, relieve)
    draws = _draw_isolated(tasks, {index: found for index, found in enumerate(logits) if found is not None}, faults)
    outcomes: list[RowOutcome] = []
    for index, (task, undo) in enumerate(zip(tasks, undos, strict=True)):
        accepted = _accepted(draws[index], task.draft) if index in draws else ()
        if index in faults:
            undo.since(task.chunk.start)
        elif task.draft:
            undo.since(task.position - 1 + len(accepted))
        outcomes.append(RowOutcome(accepted, faults.get(index)))
    return tuple(outcomes)


def _draw_isolated(
    tasks: Sequence[Task], logits: dict[int, torch.Tensor], faults: dict[int, Fault]
) -> dict[int, list[Draw]]:
    """Draw for each task that has logits; ``faults`` grows by those where that raises."""
    try:
        return _draw(tasks, logits)
    except Exception:  # noqa: BLE001 - as with the model, it is the failure of one; found out one by one
        draws: dict[int, list[Draw]] = {}
    for index, found in logits.items():
        try:
            draws |= _draw(tasks, {index: found})
        except Exception as error:  # noqa: BLE001 - see above
            faults[index] = Fault("memory" if is_out_of_memory(error) else "model", one_line(error))
    return draws


def _draw(tasks: Sequence[Task], logits: dict[int, torch.Tensor]) -> dict[int, list[Draw]]:
    rows: list[torch.Tensor] = []
    states: list[SamplerState] = []
    positions: list[int] = []
    for index, found in logits.items():
        task = tasks[index]
        rows += found.unbind(0)
        states += [task.sampler] * len(found)
        positions += range(task.position, task.position + len(found))
    draws = iter(draw_tokens(rows, states, positions))
    return {index: [next(draws) for _ in range(len(found))] for index, found in logits.items()}


class Undo:
    """A chunk that can be undone: it remembers what it overwrites, which is nothing but in rings."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self._end = chunk.start + len(chunk.token_ids)
        has_rings = isinstance(chunk.slot, RequestKv) and len(chunk.token_ids) > 1 and any(chunk.slot.geometry.windows)
        self._kept = chunk.slot.keep_overwritten(chunk.start, self._end) if has_rings else None

    def since(self, position: int) -> None:
        """Put back what was overwritten by ``position`` and those after it."""
        if self._kept and position < self._end:
            self.chunk.slot.undo(position, self._end, self._kept)


def _accepted(draws: list[Draw], draft: tuple[int, ...]) -> tuple[Draw, ...]:
    """The draws that count: those that were guessed, and the one after them."""
    count = next(
        (index for index, (draw, guess) in enumerate(zip(draws, draft, strict=False)) if draw.token_id != guess),
        len(draft),
    )
    return tuple(draws[: count + 1])


def run_isolated(
    runner: Runner, undos: Sequence[Undo], relieve: Callable[[], None]
) -> tuple[list[torch.Tensor | None], dict[int, Fault]]:
    """Run a step so that a failing chunk fails alone.

    Returns:
        the logits of each chunk, and for the index of each failed one what went wrong.
    """
    if not undos:
        return [], {}
    if not runner.is_batched and len(undos) > 1:
        return _join([run_isolated(runner, [undo], relieve) for undo in undos])
    try:
        return runner.forward([undo.chunk for undo in undos]), {}
    except Exception as error:  # noqa: BLE001 - the edge to model code and kernels, which can raise anything
        fault = Fault("memory" if is_out_of_memory(error) else "model", one_line(error))
    # Outside of the handler the exception is gone, and with it the frames that pin the step's tensors.
    for undo in undos:
        undo.since(undo.chunk.start)
    if fault.failure == "memory":
        relieve()
    if len(undos) == 1:
        return [None], {0: fault}
    half = len(undos) // 2
    return _join([run_isolated(runner, part, relieve) for part in (undos[:half], undos[half:])])


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
