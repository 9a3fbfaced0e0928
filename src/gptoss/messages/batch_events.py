"""The events of batches, in the stream ``batches``.

BatchCreated -> BatchValidated or BatchFailed -> BatchItemStarted, BatchItemFinished for each item -> BatchFinalizing ->
BatchEnded. Each run of the server begins with BatchesRestored, which holds everything that is still known, so that no
earlier run's log is needed. Items are named by their number, never by the client's ``custom_id``; the request that runs
one is ``<batch_id>-<item>``.
"""

from gptoss.messages.batch import Batch, BatchEnding, BatchFault
from gptoss.messages.envelope import Event

# ---------------------------------------------------------------- batches


class BatchesRestored(Event, frozen=True, kw_only=True):
    """A run of the server began with these. Items that the run before left in flight are to run again."""

    batches: tuple[Batch, ...]


class BatchCreated(Event, frozen=True, kw_only=True):
    """A batch was ordered; its file is being read."""

    batch_id: str
    endpoint: str
    input_file_id: str
    output_file_id: str
    error_file_id: str
    created_s: int
    expires_s: int


class BatchValidated(Event, frozen=True, kw_only=True):
    """Its file holds so many requests, and they may run."""

    batch_id: str
    num_items: int
    at_s: int


class BatchFailed(Event, frozen=True, kw_only=True):
    """It cannot run, or cannot go on. A terminal event of the batch."""

    batch_id: str
    faults: tuple[BatchFault, ...]
    at_s: int


class BatchItemStarted(Event, frozen=True, kw_only=True):
    """An item is being run, by the request ``<batch_id>-<item>``."""

    batch_id: str
    item: int


class BatchItemFinished(Event, frozen=True, kw_only=True):
    """An item's answer stands in the output file (``status`` 200) or the error file, which have these sizes now."""

    batch_id: str
    item: int
    status: int
    output_bytes: int
    error_bytes: int


class BatchItemDropped(Event, frozen=True, kw_only=True):
    """An item was stopped without an answer, since its batch was."""

    batch_id: str
    item: int


class BatchCancelRequested(Event, frozen=True, kw_only=True):
    """Nothing more begins; what runs is stopped."""

    batch_id: str
    at_s: int


class BatchExpired(Event, frozen=True, kw_only=True):
    """Its time is over: nothing more begins, and what runs is stopped."""

    batch_id: str
    at_s: int


class BatchFinalizing(Event, frozen=True, kw_only=True):
    """Nothing of it runs any more; its files are being completed."""

    batch_id: str
    ending: BatchEnding
    at_s: int


class BatchEnded(Event, frozen=True, kw_only=True):
    """It is over and its files are complete. A terminal event of the batch."""

    batch_id: str
    ending: BatchEnding
    output_bytes: int
    error_bytes: int
    at_s: int


class BatchForgotten(Event, frozen=True, kw_only=True):
    """It ended long ago and made room for newer ones; its files stay."""

    batch_id: str
