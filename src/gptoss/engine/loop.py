"""The loop that serves an engine: load, then commands and steps in turn, in whatever thread or process owns it.

Rules:
- Commands are taken between steps, all that are there; without work the loop sleeps until one comes. So a cancel takes
  effect within one step, and a snapshot's answer shows that steps still end.
- The model stack is imported by ``serve``, not with this module, so that its owner is up before that takes its seconds.
- The queue is bounded by ``COMMANDS_MAX``. Admission lets far fewer requests through; an engine behind by that many
  commands is as good as hung, and its driver ends it.
"""

import os
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec
import psutil

from gptoss.clock import NS_PER_MS, Clock
from gptoss.engine.model_folder import check_folder
from gptoss.engine.port import (
    CoreCommand,
    EngineCommand,
    EngineEvent,
    EngineStatus,
    Load,
    Loaded,
    LoadFailed,
    LoadProgressed,
    Shutdown,
)
from gptoss.errors import EngineProtocolError, GptossError, ModelLoadError

if TYPE_CHECKING:
    from gptoss.engine.load import LoadedModel
    from gptoss.engine.ranks import Ranks

COMMANDS_MAX = 65_536
EXIT_LOAD_FAILED = 1


class Emit(Protocol):
    """Tells the driver of events; those of one call go out together."""

    def __call__(self, *events: EngineEvent) -> None:
        """All of them, in order."""
        ...


class Core(Protocol):
    """A loaded engine as the loop sees it: commands and steps go in, events come out."""

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        ...

    def handle(self, command: CoreCommand) -> list[EngineEvent]:
        """Take a command between two steps."""
        ...

    def step(self) -> list[EngineEvent]:
        """Do one step."""
        ...


def serve(
    load: Load,
    commands: "queue.Queue[EngineCommand]",
    emit: Emit,
    clock: Clock,
    *,
    owns_process: bool,
) -> int:
    """Load and run until ``Shutdown``.

    Args:
        load: what to load.
        commands: in order of arrival; filled by another thread.
        emit: called in this thread.
        clock: for times.
        owns_process: whether torch's thread count may be set without being asked for.

    Returns:
        0 after ``Shutdown``, ``EXIT_LOAD_FAILED`` if the model could not be loaded.
    """
    started_ns = clock.monotonic_ns()
    emit(LoadProgressed(stage="import", done=0, total=0, unit="modules"))
    try:
        check_folder(Path(load.folder))  # a folder that is no model need not wait for the imports
        from gptoss.engine.core import EngineCore, core_options  # noqa: PLC0415 - see the module's rules

        ranks = _start_ranks(load, owns_process=owns_process)
        if load.num_threads or owns_process:
            _set_num_threads(load.num_threads or psutil.cpu_count(logical=False) or 1)
        model = _load(load, emit)
    except GptossError as error:
        emit(LoadFailed(code=error.code, message=error.message))
        return EXIT_LOAD_FAILED
    options = core_options(load, model)
    if ranks is not None:
        options = msgspec.structs.replace(options, announce=ranks.run)
    core = EngineCore(model.runner, model.capabilities, model.tokenizer, clock, options)
    emit(LoadProgressed(stage="grammars", done=0, total=0, unit="tokens"))
    core.grammars.prepare()  # a second or two for a large vocabulary, which no step should have to wait for
    emit(
        Loaded(
            capabilities=core.capabilities,
            fingerprint=model.fingerprint,
            load_ms=(clock.monotonic_ns() - started_ns) / NS_PER_MS,
            pid=os.getpid(),
            notes=(*model.notes, *core.notes),
        )
    )
    run(core, commands, emit, ranks)
    if ranks is not None:
        ranks.end()
    return 0


def _load(load: Load, emit: Emit) -> "LoadedModel":
    from gptoss.engine.load import load_model  # noqa: PLC0415 - see the module's rules

    def progress(stage: str, done: int, total: int, unit: str) -> None:
        emit(LoadProgressed(stage=stage, done=done, total=total, unit=unit))

    return load_model(load, progress)


def _start_ranks(load: Load, *, owns_process: bool) -> "Ranks | None":
    from gptoss.engine.ranks import Ranks, joined_devices  # noqa: PLC0415 - see the module's rules

    if not joined_devices(load):
        return None
    if not owns_process:
        raise ModelLoadError(
            "gpu_mode is tensor, which needs processes of its own: no engine in this process can do it"
        )
    ranks = Ranks(load)
    ranks.start()
    return ranks


def _set_num_threads(num_threads: int) -> None:
    import torch  # noqa: PLC0415 - see the module's rules

    torch.set_num_threads(num_threads)


def run(
    core: Core,
    commands: "queue.Queue[EngineCommand]",
    emit: Emit,
    ranks: "Ranks | None" = None,
) -> None:
    """Commands and steps in turn, until ``Shutdown``."""
    while True:
        for command in _take(commands, wait=not core.has_work()):
            if isinstance(command, Shutdown):
                return
            if isinstance(command, Load):
                raise EngineProtocolError("a second Load was sent to a loaded engine")
            if ranks is not None:
                ranks.tell(command)
            emit(*_with_others(core.handle(command), ranks))
        if core.has_work():
            events = core.step()
            if ranks is not None:
                ranks.note(events)
            emit(*events)


def _with_others(events: list[EngineEvent], ranks: "Ranks | None") -> list[EngineEvent]:
    """The events, with what the other ranks have in a status."""
    if ranks is None:
        return events
    return [ranks.with_others(event) if isinstance(event, EngineStatus) else event for event in events]


def _take(commands: "queue.Queue[EngineCommand]", *, wait: bool) -> Iterator[EngineCommand]:
    """The commands that are there now; with ``wait``, at least one."""
    if wait:
        yield commands.get()
    for _ in range(commands.qsize()):
        yield commands.get()
