"""The chain of causes that led to a record, from the input that began it."""

from array import array

from gptoss.messages.envelope import Record
from gptoss.replay.diff import link
from gptoss.replay.result import Link
from gptoss.telemetry.recording import Recording

LINKS_MAX = 100


def causal_chain(recording: Recording, boot: str, pos: int) -> tuple[Link, ...]:
    """The record at ``pos``, its cause, the cause of that and so on; the input comes first.

    Reads the boot twice up to ``pos`` and holds eight bytes for each position. A cause that a bundle left out ends the
    chain.
    """
    causes = array("q")
    for record in recording.records(boot=boot):
        meta = record.meta
        if meta.pos > pos:
            break
        causes.extend([NOT_HERE] * (meta.pos - len(causes)))
        causes.append(meta.cause)
    wanted: set[int] = set()
    at = pos
    while 0 <= at < len(causes) and causes[at] != NOT_HERE and len(wanted) < LINKS_MAX:
        wanted.add(at)
        at = causes[at]
    found: list[Record] = []
    for record in recording.records(boot=boot):
        if record.meta.pos in wanted:
            found.append(record)
        if record.meta.pos >= pos:
            break
    return tuple(link(record) for record in found)


NOT_HERE = -2
