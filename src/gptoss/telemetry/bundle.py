"""From a recording to a bundle in one call: cut, redact, write.

    recording -> Slice (what belongs to it) -> Redacted (what may be seen) -> write_bundle

Each of the three is of use alone; each but the last is itself a ``Recording``.
"""

from pathlib import Path
from typing import IO

import msgspec

from gptoss.telemetry.bundle_format import BUNDLE_BYTES_MAX, ContentLevel, Manifest
from gptoss.telemetry.bundle_redact import Redacted
from gptoss.telemetry.bundle_slice import Selection, cut
from gptoss.telemetry.bundle_writer import Purpose, write_bundle
from gptoss.telemetry.recording import Recording

WINDOW_S = 600.0
"""What a bundle is of when nothing is chosen, in seconds before the newest record."""


class BundleOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What bundle is wanted.

    Attributes:
        selection: what it is about.
        content: the most that it may hold of prompts and answers.
        limit_bytes: the most that its records may take, unpacked.
    """

    selection: Selection = Selection(window_s=WINDOW_S)
    content: ContentLevel = "none"
    limit_bytes: int = BUNDLE_BYTES_MAX


class Maker(msgspec.Struct, frozen=True, kw_only=True):
    """Who makes a bundle, when, and with what.

    Attributes:
        key: of pseudonyms and hashes; bundles made with the same key compare.
        created_ns: wall time.
        created_by: program and version.
        spool_folder: where its temporary file is made; None is the system's own place.
    """

    key: bytes
    created_ns: int
    created_by: str
    spool_folder: Path | None = None


def make_bundle(file: IO[bytes], recording: Recording, order: BundleOrder, maker: Maker) -> Manifest:
    """Write the bundle that was ordered into ``file``, which is open for writing, seekable and empty.

    A bundle about chosen requests hides the ids of all others; one about everything hides none.

    Raises:
        RequestNotFound: nothing is recorded that was asked for.
        BundleError: it would be larger than the limit.
        JournalError: the recording cannot be read.
    """
    part = cut(recording, order.selection)
    keep = frozenset(part.request_ids) if order.selection.is_of_requests else None
    redacted = Redacted(part, content=order.content, keep=keep, key=maker.key)
    purpose = Purpose(
        created_ns=maker.created_ns,
        created_by=maker.created_by,
        reason=order.selection.in_words(),
        requests=part.request_ids,
        redaction=redacted.policy,
    )
    return write_bundle(file, redacted, purpose, limit_bytes=order.limit_bytes, spool_folder=maker.spool_folder)
