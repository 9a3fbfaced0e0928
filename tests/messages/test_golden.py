"""Every version of every event that was ever written stays readable: ``tests/messages/golden`` has one of each."""

import json
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gptoss.messages.codec import EVENT_TYPES, as_json, decode_record, encode_record
from gptoss.messages.events import RequestRouted

GOLDEN = Path(__file__).with_name("golden")
FILES = sorted(GOLDEN.glob("*.json"))


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def includes(new: Any, old: Any) -> bool:
    """Whether ``new`` is ``old``, perhaps with more at the end of arrays and more keys in maps."""
    if not isinstance(old, list | dict):
        return type(new) is type(old) and new == old
    if isinstance(old, list) and isinstance(new, list):
        olds, news = typing.cast("list[Any]", old), typing.cast("list[Any]", new)
        return len(news) >= len(olds) and all(map(includes, news, olds))
    if isinstance(old, dict) and isinstance(new, dict):
        before, after = typing.cast("dict[Any, Any]", old), typing.cast("dict[Any, Any]", new)
        return all(key in after and includes(after[key], value) for key, value in before.items())
    return False


@pytest.mark.parametrize("name", sorted(EVENT_TYPES))
def test_every_event_type_has_a_golden_file_of_each_version(name: str) -> None:
    for version in range(1, EVENT_TYPES[name].VERSION + 1):
        path = GOLDEN / f"{name}.v{version}.json"
        assert path.exists(), f"{path.name} is missing: run python tools/golden.py and commit it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_golden_record_decodes_and_encodes_to_the_same_bytes(path: Path) -> None:
    golden = load(path)
    data = bytes.fromhex(golden["record"])
    record = decode_record(data)
    again = encode_record(record)
    if again != data:
        old, new = msgspec.msgpack.decode(data), msgspec.msgpack.decode(again)
        cls = type(record.event)
        grew = len(cls.__struct_fields__) > len(golden["fields"]) or not includes(old, new)
        assert grew, "the same content has other bytes"
        assert record.meta.version < cls.VERSION or includes(new, old), "recorded content is lost or changed"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_fields_of_a_version_are_only_ever_added_at_the_end_with_a_default(path: Path) -> None:
    name, version = path.stem.rsplit(".v", 1)
    cls = EVENT_TYPES.get(name)
    assert cls is not None, f"{name} is gone, but logs hold it; keep the class"
    if int(version) != cls.VERSION:
        return
    recorded = load(path)["fields"]
    hints = typing.get_type_hints(cls, include_extras=True)
    current = {field: type_name(hints[field]) for field in cls.__struct_fields__}
    assert list(current.items())[: len(recorded)] == list(recorded.items()), (
        f"a field of {name} version {version} changed: make it a new VERSION with an upcaster"
    )
    added = msgspec.structs.fields(cls)[len(recorded) :]
    assert all(not field.required for field in added), f"a new field of {name} needs a default"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_golden_record_shows_the_same_content_to_people(path: Path) -> None:
    golden = load(path)
    shown = msgspec.to_builtins(as_json(decode_record(bytes.fromhex(golden["record"]))))
    if shown["version"] == golden["json"]["version"]:
        assert includes(json.loads(json.dumps(shown)), golden["json"])


def test_a_longer_array_and_a_larger_map_include_the_older_ones() -> None:
    assert includes([1, {"a": [2], "b": 3}, 4], [1, {"a": [2]}])
    assert not includes([1], [1, 2])
    assert not includes([2, 1], [1])
    assert not includes({"a": 1.0}, {"a": 1})


def test_golden_files_have_no_event_at_its_defaults() -> None:
    golden = load(GOLDEN / "RequestRouted.v1.json")
    assert set(golden["json"]["data"]) == set(RequestRouted.__struct_fields__)
