"""The format of a bundle: a ZIP that holds a manifest, then events, then content.

    bundle = manifest.json | events/000001.records ... | content/000001.records ...
    .records = frame ...          of one family and one boot, at most ``PART_BYTES_MAX``
    frame    = length u32 | crc32 u32 | msgpack array32 of records, as in a journal's segment

Rules:
- The manifest is the first entry. It names every other entry with its size and sha256; there are no further entries.
- Records stand in the order of their boots, and within a boot in the order of their positions. Positions have gaps.
- A part is small enough to be read, checked and decoded whole, so nobody ever needs more memory than one part takes.
- Unknown fields of a manifest are passed over. A reader refuses a ``format_version`` or an event version above its own.
"""

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from gptoss.clock import NS_PER_S
from gptoss.messages.envelope import Family
from gptoss.messages.model import EngineCapabilities, ModelFingerprint

FORMAT: Final = "gptoss-bundle"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
ABOUT = "A debug bundle of gptoss. Look at it with `gptoss bundle inspect FILE`, re-run it with `gptoss replay FILE`."

PART_BYTES = 4 * 2**20
"""A part that has grown to this is followed by the next."""
PART_BYTES_MAX = 32 * 2**20
MANIFEST_BYTES_MAX = 16 * 2**20
PARTS_MAX = 4096
BUNDLE_BYTES_MAX = 2 * 2**30 - 1
"""Largest bundle, as a file and unpacked alike."""

PART_NAME = re.compile(r"(events|content)/[0-9]{6}\.records", re.ASCII)
FOLDERS: dict[Family, str] = {"control": "events", "content": "content"}

ContentLevel: TypeAlias = Literal["none", "hash", "tokens", "full"]
CONTENT_LEVELS: tuple[ContentLevel, ...] = ("none", "hash", "tokens", "full")
"""From the least to the most: nothing, keyed hashes, token ids and stop strings, text."""

Count = Annotated[int, Meta(ge=0, le=2**62)]
Hex = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One ``.records`` entry.

    Attributes:
        size: bytes, unpacked; ``sha256`` is of these.
        first_pos, last_pos: positions of its first and last record.
    """

    name: str
    family: Family
    boot: str
    records: Count
    first_pos: Count
    last_pos: Count
    size: Annotated[int, Meta(ge=0, le=PART_BYTES_MAX)]
    sha256: Hex


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that loaded its model, as its ``EngineLoaded`` says."""

    executor: str
    capabilities: EngineCapabilities
    fingerprint: ModelFingerprint
    notes: tuple[str, ...] = ()


class BootFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a server, as its ``NodeStarted`` says, and what the bundle has of it.

    Attributes:
        settings: the effective settings, without secrets.
        first_ns, last_ns: wall time of its first and last record in the bundle, 0 when unknown.
    """

    boot: str
    node: str
    version: str = ""
    python: str = ""
    packages: dict[str, str] = {}
    os: str = ""
    cpu_count: int = 0
    settings: dict[str, Any] = {}
    engines: tuple[EngineFacts, ...] = ()
    first_ns: int = 0
    last_ns: int = 0


class Redaction(msgspec.Struct, frozen=True, kw_only=True):
    """What was taken out or replaced.

    Attributes:
        content: what is left of prompts and answers.
        pseudonymised: whose ids are keyed hashes: ``nobody``, ``others`` (than the requests that the bundle is about) or
            ``everybody``.
        key_id: tells whether two bundles used the same key, and so whether their hashes compare; empty without hashes.
    """

    content: ContentLevel = "none"
    pseudonymised: Literal["nobody", "others", "everybody"] = "nobody"
    key_id: str = ""


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a whole bundle would hold and this one does not.

    Attributes:
        stream: of which stream, or which request's content.
        what: what is missing, and what follows for a replay.
    """

    boot: str
    stream: str
    what: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The first entry.

    Attributes:
        created_ns: wall time.
        reason: in words, what it was cut for.
        requests: ids of the requests that it is about, in the order of their arrival; empty when it is about all.
        num_requests: how many requests are in it with their own stream.
        events: newest version of each event type in it.
        missing: what is not causally complete; empty in a bundle of which every decision replays.
    """

    format: str
    format_version: Annotated[int, Meta(ge=1)]
    about: str = ABOUT
    created_ns: int = 0
    created_by: str = ""
    reason: str = ""
    requests: tuple[str, ...] = ()
    num_requests: Count = 0
    boots: tuple[BootFacts, ...] = ()
    events: dict[str, int] = {}
    redaction: Redaction = Redaction()
    missing: tuple[Gap, ...] = ()
    parts: tuple[Part, ...] = ()


class _Version(msgspec.Struct, frozen=True):
    format: str
    format_version: int


_version_decoder = msgspec.json.Decoder(_Version)
_manifest_decoder = msgspec.json.Decoder(Manifest)


def file_name(manifest: Manifest) -> str:
    """A good name for the bundle's file: of the one request that it is about, else of the time when it was cut."""
    if len(manifest.requests) == 1:
        return f"gptoss-{re.sub(r'[^A-Za-z0-9_.-]', '_', manifest.requests[0])[:100]}.zip"
    created = datetime.fromtimestamp(manifest.created_ns / NS_PER_S, tz=UTC)
    return f"gptoss-{created:%Y%m%dT%H%M%SZ}.zip"


def decode_version(data: bytes) -> int | None:
    """The format version that a manifest states, None when it is no manifest of a bundle. Never raises."""
    try:
        stated = _version_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return stated.format_version if stated.format == FORMAT else None


def decode_manifest(data: bytes) -> Manifest:
    """The manifest of this program's version.

    Raises:
        ValueError: it is not one; says why.
    """
    try:
        return _manifest_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its manifest is unreadable: {error}") from None


def level_of(content: ContentLevel) -> int:
    """Rank of a content level, 0 for ``none``."""
    return CONTENT_LEVELS.index(content)
