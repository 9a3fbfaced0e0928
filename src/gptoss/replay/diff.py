"""What differs between two values of the messages, field by field, and records in one line."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import msgspec

from gptoss.errors import JournalError
from gptoss.messages.codec import by_name, decode_command
from gptoss.messages.commands import Command
from gptoss.messages.envelope import Event, Record
from gptoss.messages.events import CommandConsumed, SnapshotTaken, StepCommitted
from gptoss.replay.result import Divergence, FieldDiff, Link

SUMMARY_LENGTH = 160
FIELDS_MAX = 50


def diff(recorded: Any, replayed: Any) -> tuple[FieldDiff, ...]:
    """The fields that differ, with nested ones as paths such as ``ask.kv_bytes``; at most ``FIELDS_MAX`` of them.

    Args:
        recorded: an event or a state; None stands for one that is not there.
        replayed: likewise.
    """
    if recorded is None or replayed is None or type(recorded) is not type(replayed):
        return (FieldDiff(field="event", recorded=_named(recorded), replayed=_named(replayed)),)
    found = _differences("", recorded, replayed)
    return tuple(field for field, _ in zip(found, range(FIELDS_MAX), strict=False))


def plan_divergence(record: Record, step: StepCommitted, parts: Mapping[str, tuple[Any, Any]]) -> Divergence:
    """A step that would be planned differently: (recorded, replayed) of each part that differs."""
    meta = record.meta
    return Divergence(
        kind="plan",
        boot=meta.boot,
        pos=meta.pos,
        stream=meta.stream,
        decider="scheduler",
        type=meta.type,
        command=f"step {step.step}",
        command_pos=meta.pos,
        fields=tuple(
            FieldDiff(field=name, recorded=by_name(old), replayed=by_name(new)) for name, (old, new) in parts.items()
        ),
    )


def summary(record: Record) -> str:
    """A record in one line: the command that it consumed, or its event."""
    event = record.event
    if isinstance(event, SnapshotTaken):
        return "SnapshotTaken"
    if not isinstance(event, CommandConsumed):
        return message_text(event)
    try:
        return message_text(decode_command(event.command))
    except JournalError:
        return "a command that cannot be read"


def message_text(message: Event | Command) -> str:
    """A command or event as ``Name(field=value, ...)``; times and defaults are left out."""
    fields = [
        f"{name}={_short(getattr(message, name))}"
        for name in message.__struct_fields__
        if not name.endswith("_ns") and getattr(message, name) not in ("", None, ())
    ]
    text = f"{type(message).__name__}({', '.join(fields)})"
    return text if len(text) <= SUMMARY_LENGTH else f"{text[: SUMMARY_LENGTH - 1]}…"


def link(record: Record) -> Link:
    """A record as a link of a chain of causes."""
    meta = record.meta
    return Link(pos=meta.pos, stream=meta.stream, type=meta.type, mono_ns=meta.mono_ns, summary=summary(record))


def _differences(path: str, recorded: Any, replayed: Any) -> Iterator[FieldDiff]:
    if recorded == replayed:
        return
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(recorded, msgspec.Struct) and type(recorded) is type(replayed):
        dot = f"{path}." if path else ""
        pairs = [(f"{dot}{n}", getattr(recorded, n), getattr(replayed, n)) for n in recorded.__struct_fields__]
    elif isinstance(recorded, dict) and isinstance(replayed, dict):
        old, new = cast("dict[Any, Any]", recorded), cast("dict[Any, Any]", replayed)
        keys = sorted({*old, *new}, key=str)
        pairs = [(f"{path}[{key}]", old.get(key), new.get(key)) for key in keys]
    elif isinstance(recorded, tuple) and isinstance(replayed, tuple) and len(recorded) == len(replayed):  # pyright: ignore[reportUnknownArgumentType]
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(recorded, replayed, strict=True))]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if not pairs:
        yield FieldDiff(field=path, recorded=by_name(recorded), replayed=by_name(replayed))
    for inner, old, new in pairs:
        yield from _differences(inner, old, new)


def _named(event: Any) -> Any:
    return None if event is None else message_text(event)


def _short(value: Any) -> str:
    if isinstance(value, msgspec.Struct | tuple | dict):
        return "…"
    return str(value)
