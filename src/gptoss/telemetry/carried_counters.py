"""What the boots before this one counted, from their journal, so that a restart loses no counter.

Rules:
- A boot begins with ``CountersCarried``, all that those before it counted, and now and then records ``CountersSaved``.
  So the newest boot alone says everything: its last ``CountersSaved``, and the records after it.
- Finding that reads frames from the end without decoding them; folding the rest is bounded by how often they are saved.
- A boot that ended before it recorded either is folded whole, and the one before it is asked. One that is too long for
  that was written by a version that carried nothing, and is left out.
"""

import logging
from pathlib import Path

import msgspec

from gptoss.actors.journal import Journal
from gptoss.errors import JournalCorrupt
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.telemetry.metrics import Metrics, SavedMetrics
from gptoss.telemetry.segments import SegmentJournal, SegmentReader

WHOLE_SEGMENTS_MAX = 2

_log = logging.getLogger("gptoss.telemetry")
_saved_decoder = msgspec.msgpack.Decoder(SavedMetrics)


def counters_carried_into(journal: Journal, folder: Path) -> msgspec.Raw | None:
    """The counters that this boot of a journal begins with; None where no journal outlives its process."""
    return counters_before(SegmentReader(folder), journal.boot) if isinstance(journal, SegmentJournal) else None


def counters_before(reader: SegmentReader, boot: str) -> msgspec.Raw | None:
    """The state of the ``CountersCarried`` with which ``boot`` begins; None when nothing was counted before it."""
    total = Metrics()
    earlier = [name for name in reader.boots() if name != boot]
    if not earlier:
        return None
    try:
        for name in reversed(earlier):
            if _count(reader, name, total):
                break
    except JournalCorrupt as error:
        _log.warning("counters begin at zero, for what was counted cannot be read: %s", error)
        return None
    families = {name: saved for name, saved in total.saved().families.items() if saved.rows}
    return msgspec.Raw(msgspec.msgpack.encode(families))


def _count(reader: SegmentReader, boot: str, total: Metrics) -> bool:
    """Add what a boot counted; True when that holds all that was counted before it, too."""
    marks = reader.newest(boot, frozenset({ev.CountersSaved.__name__, ev.CountersCarried.__name__}))
    saved = None if marks is None else _saved_in(marks)
    if saved is not None:
        metrics, after = Metrics.restored(saved[1]), saved[0]
    elif len(reader.first_positions(boot)) <= WHOLE_SEGMENTS_MAX:
        metrics, after = Metrics(), -1
    else:
        return False
    for record in reader.read(boot=boot, after=after):
        metrics.fold(record)
    total.add(metrics.saved().families)
    return marks is not None


def _saved_in(record: Record) -> tuple[int, SavedMetrics] | None:
    if not isinstance(record.event, ev.CountersSaved):
        return None
    try:
        return record.event.pos, _saved_decoder.decode(record.event.state)
    except msgspec.DecodeError:
        return None  # of another version, or taken out of the recording
