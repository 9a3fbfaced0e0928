"""The base of every event, and the record that wraps an event once it is in the journal."""

from typing import ClassVar, Literal

import msgspec

Family = Literal["control", "content"]

NO_CAUSE = -1


class Event(msgspec.Struct, frozen=True, array_like=True, kw_only=True, gc=False):
    """A fact. Encoded as an array, so fields are append-only and a new field needs a default.

    Any other change to the fields is a new ``VERSION`` with an upcaster in ``codec``.

    Attributes:
        VERSION: schema version that this class describes.
        FAMILY: ``control`` events never hold text or token ids; those live in ``content`` with its own, shorter
            retention.
    """

    VERSION: ClassVar[int] = 1
    FAMILY: ClassVar[Family] = "control"


class Meta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Who recorded an event, when, and because of what.

    ``(node, boot, family, pos)`` identifies the record: ``pos`` counts without gaps from 0 in each family of each boot.

    Attributes:
        stream: what the event is about, such as ``request/req_1`` or ``executor/cpu:0``; ``seq`` counts within it.
        cause: ``pos`` of the control record that led to this one, ``NO_CAUSE`` if none did.
        correlation: the request concerned, or empty.
        actor: name of the recording actor; ``incarnation`` counts its restarts.
        mono_ns: monotonic time of recording; compare only within a boot.
    """

    node: str
    boot: str
    pos: int
    stream: str
    seq: int
    type: str
    version: int
    cause: int
    correlation: str
    trace_id: str
    span_id: str
    actor: str
    incarnation: int
    mono_ns: int


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An event in the journal. Encoded as it stands on disk, see ``codec``."""

    meta: Meta
    event: Event


class Stored(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A record as bytes on disk: the event stays encoded until someone asks for it."""

    meta: Meta
    payload: msgspec.Raw


class Origin(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What an appender knows about a record; the journal adds the rest."""

    stream: str
    cause: int = NO_CAUSE
    correlation: str = ""
    trace_id: str = ""
    span_id: str = ""
    actor: str = ""
    incarnation: int = 0
