"""Commands to the decider of batches. ``wall_s`` is Unix time in seconds: deadlines of batches outlive the process."""

from typing import TypeAlias

from gptoss.messages.batch import Batch, BatchFault
from gptoss.messages.commands import Command


class RestoreBatches(Command, frozen=True, kw_only=True):
    """The first command of a run: what the runs before knew, as their log told it."""

    wall_s: int
    batches: tuple[Batch, ...]


class CreateBatch(Command, frozen=True, kw_only=True):
    """Run the requests of a file within ``window_s`` seconds."""

    wall_s: int
    window_s: int
    batch_id: str
    endpoint: str
    input_file_id: str
    output_file_id: str
    error_file_id: str


class AcceptBatch(Command, frozen=True, kw_only=True):
    """Every line of the input file is a request of its endpoint, as far as can be said before it runs."""

    wall_s: int
    batch_id: str
    num_items: int


class FailBatch(Command, frozen=True, kw_only=True):
    """The batch cannot run, or cannot go on."""

    wall_s: int
    batch_id: str
    faults: tuple[BatchFault, ...]


class FinishBatchItem(Command, frozen=True, kw_only=True):
    """An item's answer is on disk: a line of the output file for ``status`` 200, of the error file for any other.

    ``output_bytes`` and ``error_bytes`` are the sizes of the files with it.
    """

    wall_s: int
    batch_id: str
    item: int
    status: int
    output_bytes: int
    error_bytes: int


class DropBatchItem(Command, frozen=True, kw_only=True):
    """An item was stopped before it had an answer."""

    wall_s: int
    batch_id: str
    item: int


class CancelBatch(Command, frozen=True, kw_only=True):
    """Begin nothing more and stop what runs."""

    wall_s: int
    batch_id: str


class EndBatch(Command, frozen=True, kw_only=True):
    """The files are complete: what was never answered stands in the error file."""

    wall_s: int
    batch_id: str
    output_bytes: int
    error_bytes: int


class ExpireBatches(Command, frozen=True, kw_only=True):
    """Look for batches whose time is over."""

    wall_s: int


BatchCommand: TypeAlias = (
    RestoreBatches
    | CreateBatch
    | AcceptBatch
    | FailBatch
    | FinishBatchItem
    | DropBatchItem
    | CancelBatch
    | EndBatch
    | ExpireBatches
)
