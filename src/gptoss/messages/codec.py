"""Bytes <-> messages.

A record on disk is msgpack of ``[meta, payload]``. The payload stays encoded until it is wanted, so reading a log by
request never pays for the events it skips. An event of an older version passes through its upcasters, one version at
a time; an unknown type or a newer version is refused by name.
"""

import inspect
from collections.abc import Callable
from typing import Any

import msgspec

from gptoss.errors import JournalError
from gptoss.messages import batch_events, events
from gptoss.messages.batch_commands import BatchCommand
from gptoss.messages.commands import Command, DeciderCommand
from gptoss.messages.envelope import Event, Record, Stored

Upcaster = Callable[[list[Any]], list[Any]]

EVENT_TYPES: dict[str, type[Event]] = {
    name: cls
    for module in (events, batch_events)
    for name, cls in inspect.getmembers(module, inspect.isclass)
    if issubclass(cls, Event) and cls is not Event
}
UPCASTERS: dict[tuple[str, int], Upcaster] = {}
"""(type, version) -> function from the fields of that version to those of the next."""

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are nothing: text that is no UTF-8, and deep nesting, are not its own error."""

_encoder = msgspec.msgpack.Encoder()
encode_record: Callable[[Record], bytes] = _encoder.encode
"""Msgpack of a record, as it stands in a segment."""

_stored_decoder = msgspec.msgpack.Decoder(Stored)
_event_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
    name: msgspec.msgpack.Decoder(cls) for name, cls in EVENT_TYPES.items()
}
_command_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(DeciderCommand | BatchCommand)


def decode_stored(data: bytes | memoryview) -> Stored:
    """Read a record's meta and leave its event encoded.

    Raises:
        JournalError: the bytes are not a record.
    """
    try:
        return _stored_decoder.decode(data)
    except UNREADABLE as error:
        raise JournalError(f"not a record: {error}") from None


def decode_event(stored: Stored) -> Event:
    """Read the event of a stored record, upcasting it to the current version.

    Raises:
        JournalError: unknown type, a version newer than this program, or fields that do not fit.
    """
    meta = stored.meta
    cls = EVENT_TYPES.get(meta.type)
    if cls is None:
        raise JournalError(f"record {meta.pos} has the unknown event type {meta.type!r}")
    if meta.version < 1:
        raise JournalError(f"record {meta.pos} holds {meta.type} version {meta.version}, which never was")
    if meta.version > cls.VERSION:
        raise JournalError(
            f"record {meta.pos} holds {meta.type} version {meta.version}; this program knows up to {cls.VERSION}"
        )
    try:
        if meta.version == cls.VERSION:
            return _event_decoders[meta.type].decode(stored.payload)
        fields: list[Any] = msgspec.msgpack.decode(stored.payload)
        for version in range(meta.version, cls.VERSION):
            fields = UPCASTERS[meta.type, version](fields)
        return msgspec.convert(fields, cls)
    except UNREADABLE as error:
        raise JournalError(f"record {meta.pos}: {meta.type} does not decode: {error}") from None


def decode_record(data: bytes | memoryview) -> Record:
    """Read a whole record. Raises ``JournalError`` as ``decode_stored`` and ``decode_event`` do."""
    stored = decode_stored(data)
    return Record(meta=stored.meta, event=decode_event(stored))


def encode_command(command: Command) -> msgspec.Raw:
    """A decider's command as it stands inside ``CommandConsumed``."""
    return msgspec.Raw(_encoder.encode(command))


def decode_command(raw: msgspec.Raw) -> Command:
    """The command inside a ``CommandConsumed``.

    Raises:
        JournalError: it is not a command that this program knows.
    """
    try:
        return _command_decoder.decode(raw)
    except UNREADABLE as error:
        raise JournalError(f"not a command: {error}") from None


def as_json(record: Record) -> dict[str, Any]:
    """A record for people and HTTP: its meta, the event's type name and its fields by name."""
    fields = {name: _plain(getattr(record.event, name)) for name in record.event.__struct_fields__}
    return {**msgspec.structs.asdict(record.meta), "data": fields}


def _plain(value: Any) -> Any:
    return msgspec.msgpack.decode(value) if isinstance(value, msgspec.Raw) else msgspec.to_builtins(value)


def by_name(value: Any) -> Any:
    """JSON types; structs by field name, also those that are arrays on disk."""
    if isinstance(value, msgspec.Struct):
        return {name: by_name(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, tuple | list):
        return [by_name(each) for each in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return {str(key): by_name(each) for key, each in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return msgspec.to_builtins(value)
