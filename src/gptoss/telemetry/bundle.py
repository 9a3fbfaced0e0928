"""From a recording to a bundle in one call: cut, redact, write.

    recording -> Slice (what belongs to it) -> Redacted (what may be seen) -> write_bundle

Each of the three is of use alone; each but the last is itself a ``Recording``.
"""

from pathlib import Path
from typing import IO

import msgspec

from gptoss.errors import RequestError
from gptoss.telemetry.bundle_format import ContentLevel, Manifest, Redaction, level_of
from gptoss.telemetry.bundle_order import BundleOrder
from gptoss.telemetry.bundle_reader import BundleReader
from gptoss.telemetry.bundle_redact import Redacted
from gptoss.telemetry.bundle_slice import cut
from gptoss.telemetry.bundle_writer import Purpose, write_bundle
from gptoss.telemetry.recording import Recording
from gptoss.telemetry.timeline_phases import many


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
        BundleTooLarge: it would be larger than the limit.
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


def redact_bundle(
    file: IO[bytes], bundle: BundleReader, *, content: ContentLevel, everybody: bool, maker: Maker
) -> Manifest:
    """Write a bundle that shows less than ``bundle`` does.

    Args:
        file: as for ``make_bundle``.
        bundle: what to redact; it is not changed.
        content: the most that is left.
        everybody: put all requests under pseudonyms.
        maker: its key need not be that of ``bundle``.

    Raises:
        RequestError: ``bundle`` holds less content than that already.
        BundleError: it is bad.
    """
    before = bundle.manifest
    if level_of(content) > level_of(before.redaction.content):
        raise RequestError(
            f"content is {content!a}, but {bundle.path} holds only {before.redaction.content}", param="content"
        )
    redacted = Redacted(bundle, content=content, keep=frozenset() if everybody else None, key=maker.key)
    after = redacted.policy
    policy = Redaction(
        content=content,
        pseudonymised="everybody" if everybody else before.redaction.pseudonymised,
        # Hashes that were there are of the key that made them.
        key_id=before.redaction.key_id if before.redaction.content == "hash" or not after.key_id else after.key_id,
    )
    purpose = Purpose(
        created_ns=maker.created_ns,
        created_by=maker.created_by,
        reason=f"{many(len(before.requests), 'request')} under pseudonyms"
        if everybody and before.requests
        else before.reason,
        requests=tuple(map(redacted.name_of, before.requests)),
        redaction=policy,
    )
    return write_bundle(file, redacted, purpose, spool_folder=maker.spool_folder)
