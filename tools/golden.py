"""Write the golden file of every event type that has none: ``python tools/golden.py``.

A golden file is one record as some version of this program encoded it. It is kept for ever, so existing files are never
touched; a version that was never released may be deleted by hand and written anew.
"""

import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

import msgspec

from gptoss.messages.codec import EVENT_TYPES, as_json, encode_command, encode_record
from gptoss.messages.commands import WithdrawRequest
from gptoss.messages.envelope import Event, Meta, Record

FOLDER = Path(__file__).parent.parent / "tests" / "messages" / "golden"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, cls in EVENT_TYPES.items():
        path = FOLDER / f"{name}.v{cls.VERSION}.json"
        if not path.exists():
            path.write_text(json.dumps(golden(cls), indent=1) + "\n", encoding="utf-8")
            print(f"wrote {path.name}")
    sys.stdout.flush()


def golden(cls: type[Event]) -> dict[str, Any]:
    """What a golden file holds: the fields' names and types, the encoded record in hex, and its content."""
    record = Record(meta_of(cls), cls(**{name: example(kind, name) for name, kind in field_types(cls).items()}))
    return {
        "fields": {name: type_name(kind) for name, kind in field_types(cls).items()},
        "record": encode_record(record).hex(),
        "json": as_json(record),
    }


def meta_of(cls: type[Event]) -> Meta:
    return Meta(
        "node-1",
        "boot_1",
        41,
        "request/req_1",
        7,
        cls.__name__,
        cls.VERSION,
        40,
        "req_1",
        "0" * 32,
        "1" * 16,
        "a",
        1,
        9,
    )


def field_types(cls: type[msgspec.Struct]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: hints[name] for name in cls.__struct_fields__}


def type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def example(kind: Any, name: str) -> Any:
    """A value of a type; never its default, so that an old file shows every field."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in SCALARS:
        return scalar(kind, name)
    if origin is typing.Literal:
        return arguments[-1]
    if origin in {types.UnionType, typing.Union}:
        return example(arguments[0], name)
    if origin is tuple:
        return (example(arguments[0], name), example(arguments[0], name))
    if origin is dict:
        return {example(arguments[0], name): example(arguments[1], name)}
    if issubclass(kind, msgspec.Struct):
        return kind(**{field: example(of, field) for field, of in field_types(kind).items()})
    raise SystemExit(f"golden.py knows no example of {kind} (field {name})")


SCALARS = (str, int, float, bool, msgspec.Raw)


def scalar(kind: Any, name: str) -> Any:
    if kind is str:
        return f"{name} \u00e9"
    if kind is int:
        return 1000 + len(name)
    if kind is float:
        return len(name) + 0.5
    return True if kind is bool else encode_command(WithdrawRequest(now_ns=5, request_id="req_1"))


if __name__ == "__main__":
    main()
