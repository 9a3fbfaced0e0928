"""What is known of a batch: a file of requests that are answered when nobody else needs the engine."""

from typing import Literal, TypeAlias

import msgspec

BatchEnding: TypeAlias = Literal["", "completed", "cancelled", "expired"]
BatchStatus: TypeAlias = Literal[
    "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
]
OVER: frozenset[BatchStatus] = frozenset(("completed", "failed", "expired", "cancelled"))
"""Statuses that do not change any more."""


class BatchFault(msgspec.Struct, frozen=True, array_like=True):
    """Why a batch cannot run. Messages are this program's own words and quote nothing from the file.

    Attributes:
        line: of the input file, counted from 1; 0 where no line is at fault.
        param: the field at fault; empty where none is.
    """

    code: str
    message: str
    line: int = 0
    param: str = ""


class Batch(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Where a batch stands. Items are numbered from 0 in the order of the file; times are Unix seconds, 0 for not yet.

    Attributes:
        output_file_id, error_file_id: of the files that its answers and refusals go to, chosen when it was made.
        total: items of the input file, once it was read.
        completed, failed: items that were answered, and that were refused or failed.
        next_item: the first that was never begun.
        in_flight: begun and not finished, in this run of the server.
        again: begun in an earlier run and not finished; they go first.
        output_bytes, error_bytes: how much of each file is true; what stands after it belongs to no finished item.
        ending: how it is to end once nothing is in flight any more.
    """

    batch_id: str
    endpoint: str
    input_file_id: str
    output_file_id: str
    error_file_id: str
    created_s: int
    expires_s: int
    status: BatchStatus = "validating"
    in_progress_s: int = 0
    cancelling_s: int = 0
    finalizing_s: int = 0
    ended_s: int = 0
    total: int = 0
    completed: int = 0
    failed: int = 0
    next_item: int = 0
    in_flight: tuple[int, ...] = ()
    again: tuple[int, ...] = ()
    output_bytes: int = 0
    error_bytes: int = 0
    ending: BatchEnding = ""
    faults: tuple[BatchFault, ...] = ()

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in OVER

    @property
    def unfinished(self) -> tuple[int, ...]:
        """Items without an answer, in their order."""
        return tuple(sorted((*self.in_flight, *self.again, *range(self.next_item, self.total))))
