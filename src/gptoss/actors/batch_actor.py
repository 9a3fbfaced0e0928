"""Runs batches: keeps the work that goes on beside the actor in step with what the decider says.

After each command the tasks are compared with the state: a batch that is being validated has a task that reads its file,
an item in flight one that runs it, a batch that is finalizing one that completes its files. A task tells what came of it
as a command. So a restarted actor, or a restarted server, goes on with whatever the state says, and nothing is begun in
two places.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

import msgspec

from gptoss.actors.batches import Batches, BatchesState
from gptoss.actors.decider import DeciderActor, fold
from gptoss.actors.directory import Directory
from gptoss.actors.journal import Journal
from gptoss.actors.ref import Ref
from gptoss.actors.system import System, Timer
from gptoss.clock import NS_PER_S
from gptoss.errors import GptossError, JournalCorrupt, JournalWriteFailed
from gptoss.messages import batch_commands as cmd
from gptoss.messages.batch import Batch, BatchFault
from gptoss.messages.commands import Command

NAME = "batches"
ASK_TIMEOUT_S = 10.0
LOOK_EVERY_S = 600.0
"""While a batch is open, its deadline is looked at this often at least: the wall clock may be put forward."""

_log = logging.getLogger("gptoss.batches")


class FileSizes(msgspec.Struct, frozen=True):
    """How many bytes of a batch's files are true."""

    output_bytes: int
    error_bytes: int


class ItemAnswer(msgspec.Struct, frozen=True):
    """What came of an item: 200 and a line in the output file, another status and one in the error file."""

    status: int
    sizes: FileSizes


class BatchWork(Protocol):
    """What a batch needs of the world. Cancelling a coroutine stops what it does."""

    async def restore(self, batches: list[Batch]) -> None:
        """Before anything else: cut from the files of open batches what belongs to no finished item."""
        ...

    async def validate(self, batch: Batch) -> tuple[int, tuple[BatchFault, ...]]:
        """The number of items in a batch's file, and what is wrong with it."""
        ...

    async def run(self, batch: Batch, item: int) -> ItemAnswer:
        """Run an item until it has an answer, however often the server is too busy, and put the answer on disk."""
        ...

    async def finalize(self, batch: Batch) -> FileSizes:
        """Complete the files of a batch of which nothing runs any more."""
        ...


class BatchDesk:
    """Where others order batches and see how they stand; outlives the actor's incarnations. Use it from the event loop.

    Attributes:
        state: as of the last command.
        tasks: of the work that goes on, by batch and what it does.
        is_stopped: whether nothing more is to begin in this run of the server.
    """

    def __init__(self, system: System, work: BatchWork) -> None:
        self.system = system
        self.work = work
        self.state = BatchesState()
        self.tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self.is_stopped = False
        self._ref: Ref[Any] | None = None

    @property
    def batches(self) -> Mapping[str, Batch]:
        """Everything that is known, oldest first."""
        return self.state.batches

    async def open(self, decider: Batches, directory: Directory) -> None:
        """Take up what earlier runs left, and begin. Idempotent.

        Raises:
            JournalError: the log cannot be written.
            OSError: nor can the files of open batches.
        """
        if self._ref is not None:
            return
        journal = self.system.journal
        known = await self.system.run_in_thread(_recorded_batches, decider, journal)
        await self.work.restore(known)
        self._ref = self.system.spawn(
            lambda: BatchActor(decider, directory, self), name=NAME, supervisor=self.system.root
        )
        await self.order(cmd.RestoreBatches(now_ns=self.system.now_ns(), wall_s=self.wall_s(), batches=tuple(known)))

    async def order(self, command: Command) -> None:
        """Have a command carried out; what it led to is on disk when this returns.

        Raises:
            ActorError: the actor is gone or too busy.
            JournalWriteFailed: it was carried out, but is not on disk.
        """
        assert self._ref is not None
        await self._ref.ask(command, timeout_s=ASK_TIMEOUT_S)
        if not await self.system.run_in_thread(self.system.journal.flush):
            raise JournalWriteFailed("the log cannot be written: a restart of the server would not know of this")

    def stop_work(self) -> None:
        """Stop everything that runs, for good: the server is about to end, and the next run goes on from here."""
        self.is_stopped = True
        for task in self.tasks.values():
            task.cancel()

    def wall_s(self) -> int:
        """Unix time."""
        return self.system.clock.wall_ns() // NS_PER_S


class BatchActor(DeciderActor[BatchesState]):
    """See the module."""

    def __init__(self, decider: Batches, directory: Directory, desk: BatchDesk) -> None:
        super().__init__(decider, directory)
        self._desk = desk
        self._timer: Timer | None = None

    def on_start(self) -> None:
        """After a crash, go on from what is recorded."""
        super().on_start()
        self._follow_state()

    def on_stop(self) -> None:
        """Look at no deadline any more."""
        if self._timer is not None:
            self._timer.cancel()

    def on_receive(self, message: Command) -> None:
        """Decide, then bring the work in step."""
        super().on_receive(message)
        self._follow_state()

    def _follow_state(self) -> None:
        self._desk.state = self.state
        if self._desk.is_stopped:
            return
        wanted: dict[tuple[str, str], Callable[[], Coroutine[Any, Any, Command]]] = {}
        open_batches = [batch for batch in self.state.batches.values() if not batch.is_over]
        for batch in open_batches:
            wanted.update(self._work_of(batch))
        tasks = self._desk.tasks
        for key, task in tuple(tasks.items()):
            if key not in wanted:
                task.cancel()
        for key, make in wanted.items():
            if key not in tasks:
                task = tasks[key] = self.context.system.run_task(
                    self._carry_out(key, make), name=f"batches/{'/'.join(key)}"
                )
                task.add_done_callback(lambda done, key=key: self._forget(key, done))
        self._watch_deadlines(open_batches)

    def _forget(self, key: tuple[str, str], done: "asyncio.Task[None]") -> None:
        if self._desk.tasks.get(key) is done:
            del self._desk.tasks[key]

    def _work_of(self, batch: Batch) -> dict[tuple[str, str], Callable[[], Coroutine[Any, Any, Command]]]:
        """What a batch needs to have going on."""
        name = batch.batch_id
        if batch.status == "validating":
            return {(name, "validate"): lambda: self._validate(batch)}
        if batch.status == "finalizing":
            return {(name, "finalize"): lambda: self._finalize(batch)}
        stops = bool(batch.ending)
        return {
            (name, f"{'drop' if stops else 'run'}-{item}"): (
                lambda item=item: self._drop(batch, item) if stops else self._run(batch, item)
            )
            for item in batch.in_flight
        }

    async def _carry_out(self, key: tuple[str, str], make: Callable[[], Coroutine[Any, Any, Command]]) -> None:
        try:
            command = await make()
        except GptossError as error:
            command = self._failed(key[0], BatchFault(error.code, error.message))
        except OSError as error:
            _log.exception("the files of %s failed", key[0])
            fault = BatchFault("storage_error", f"the batch's files cannot be used: {error.strerror}")
            command = self._failed(key[0], fault)
        except Exception:  # noqa: BLE001 - the edge of the work: its failure must end the batch
            _log.exception("%s of %s failed", key[1], key[0])
            command = self._failed(key[0], BatchFault("internal_error", "the server failed on this batch"))
        self.context.ref.tell(command)

    async def _validate(self, batch: Batch) -> Command:
        num_items, faults = await self._desk.work.validate(batch)
        if faults:
            return self._failed(batch.batch_id, *faults)
        return cmd.AcceptBatch(
            now_ns=self._now_ns(), wall_s=self._desk.wall_s(), batch_id=batch.batch_id, num_items=num_items
        )

    async def _run(self, batch: Batch, item: int) -> Command:
        answer = await self._desk.work.run(batch, item)
        return cmd.FinishBatchItem(
            now_ns=self._now_ns(),
            wall_s=self._desk.wall_s(),
            batch_id=batch.batch_id,
            item=item,
            status=answer.status,
            output_bytes=answer.sizes.output_bytes,
            error_bytes=answer.sizes.error_bytes,
        )

    async def _drop(self, batch: Batch, item: int) -> Command:
        """Wait until an item that was told to stop has; it may have had its answer already, and told of it first."""
        running = self._desk.tasks.get((batch.batch_id, f"run-{item}"))
        if running is not None:
            await asyncio.wait({running})
        return cmd.DropBatchItem(now_ns=self._now_ns(), wall_s=self._desk.wall_s(), batch_id=batch.batch_id, item=item)

    async def _finalize(self, batch: Batch) -> Command:
        sizes = await self._desk.work.finalize(batch)
        return cmd.EndBatch(
            now_ns=self._now_ns(),
            wall_s=self._desk.wall_s(),
            batch_id=batch.batch_id,
            output_bytes=sizes.output_bytes,
            error_bytes=sizes.error_bytes,
        )

    def _failed(self, batch_id: str, *faults: BatchFault) -> Command:
        return cmd.FailBatch(now_ns=self._now_ns(), wall_s=self._desk.wall_s(), batch_id=batch_id, faults=tuple(faults))

    def _watch_deadlines(self, open_batches: list[Batch]) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadlines = [batch.expires_s for batch in open_batches if not batch.ending]
        if deadlines:
            wait_s = min(max(1.0, min(deadlines) - self._desk.wall_s()), LOOK_EVERY_S)
            self._timer = self.context.system.send_after(
                wait_s,
                self.context.ref,
                lambda: cmd.ExpireBatches(now_ns=self._now_ns(), wall_s=self._desk.wall_s()),
            )

    def _now_ns(self) -> int:
        return self.context.system.now_ns()


def _recorded_batches(decider: Batches, journal: Journal) -> list[Batch]:
    """What earlier runs of the server recorded. Blocks on the disk."""
    state = decider.initial()
    try:
        for record in journal.read(stream=NAME):
            state = fold(decider, state, record.event)
    except JournalCorrupt as error:
        _log.error("batches go on from what of their log can be read: %s", error.message)
    return list(state.batches.values())
