"""Records and commands survive their encoding; what is not theirs is refused by name."""

import types
import typing
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_engine import tiny_capabilities

from gptoss.errors import JournalError
from gptoss.messages import batch_commands, codec, commands
from gptoss.messages.codec import (
    EVENT_TYPES,
    as_json,
    decode_command,
    decode_event,
    decode_record,
    decode_stored,
    encode_command,
    encode_record,
)
from gptoss.messages.commands import AdmitRequest, Command, WithdrawRequest
from gptoss.messages.envelope import Event, Meta, Record, Stored
from gptoss.messages.events import CommandConsumed, EngineLoaded, RequestRouted, StepTokens
from gptoss.messages.model import KvLayout, ModelFingerprint

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
INTEGERS = st.integers(-(2**63), 2**63 - 1)

COMMAND_TYPES: list[type[Command]] = [
    kind
    for module in (commands, batch_commands)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Command) and kind is not Command
]


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in SCALARS:
        return SCALARS[kind]
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in {types.UnionType, typing.Union}:
        return st.one_of([values_of(argument) for argument in arguments])
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=3)
    return structs_of(kind)


def structs_of(cls: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return st.builds(cls, **{name: values_of(hints[name]) for name in cls.__struct_fields__})


SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    str: TEXTS,
    int: INTEGERS,
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    type(None): st.none(),
    msgspec.Raw: st.builds(WithdrawRequest, now_ns=INTEGERS, request_id=TEXTS).map(encode_command),
}


def meta_of(event: Event, **changes: Any) -> Meta:
    meta = Meta("n", "b", 3, "s", 1, type(event).__name__, event.VERSION, -1, "r1", "", "", "a", 0, 99)
    return msgspec.structs.replace(meta, **changes)


def stored(type_name: str, version: int, fields: list[Any]) -> Stored:
    meta = Meta("n", "b", 3, "s", 1, type_name, version, -1, "", "", "", "", 0, 99)
    return Stored(meta, msgspec.Raw(msgspec.msgpack.encode(fields)))


def test_the_catalogue_is_complete() -> None:
    assert len(EVENT_TYPES) > 50
    assert all(name == cls.__name__ and cls.FAMILY in {"control", "content"} for name, cls in EVENT_TYPES.items())


@pytest.mark.parametrize("name", sorted(EVENT_TYPES))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_event_survives_its_encoding(name: str, data: st.DataObject) -> None:
    event = data.draw(structs_of(EVENT_TYPES[name]))
    record = Record(meta_of(event), event)
    decoded = decode_record(encode_record(record))
    assert decoded.meta == record.meta
    assert type(decoded.event) is type(event)
    assert encode_record(decoded) == encode_record(record)
    if not isinstance(event, CommandConsumed):  # A Raw compares by its buffer.
        assert decoded == record


@pytest.mark.parametrize("kind", COMMAND_TYPES, ids=lambda kind: kind.__name__)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_command_survives_its_encoding(kind: type[Command], data: st.DataObject) -> None:
    command = data.draw(structs_of(kind))
    assert decode_command(encode_command(command)) == command


def test_a_command_survives_inside_an_event() -> None:
    command = AdmitRequest(
        now_ns=1,
        request_id="r1",
        prompt_tokens=2,
        max_tokens=3,
        kv_bytes=4,
        kv_bytes_prompt=5,
        priority=0,
        deadline_ns=6,
    )
    event = CommandConsumed(decider="admission", command=encode_command(command))
    decoded = decode_record(encode_record(Record(meta_of(event), event))).event
    assert isinstance(decoded, CommandConsumed)
    assert decode_command(decoded.command) == command


def test_meta_is_read_without_the_event() -> None:
    event = RequestRouted(executor="cpu:0", attempt=1)
    data = encode_record(Record(meta_of(event), event))
    assert decode_stored(data).meta == meta_of(event)
    assert decode_event(decode_stored(data)) == event


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x92\x90", msgspec.msgpack.encode({"meta": 1})])
def test_bytes_that_are_no_record_are_refused(data: bytes) -> None:
    with pytest.raises(JournalError, match="not a record"):
        decode_record(data)


@pytest.mark.parametrize("data", [b"\xc1", msgspec.msgpack.encode({"type": "DropTables", "now_ns": 1})])
def test_an_unknown_command_is_refused(data: bytes) -> None:
    with pytest.raises(JournalError, match="not a command"):
        decode_command(msgspec.Raw(data))


def test_an_unknown_event_type_is_refused_by_name() -> None:
    with pytest.raises(JournalError, match="record 3 has the unknown event type 'NothingHappened'"):
        decode_event(stored("NothingHappened", 1, []))


def test_a_newer_version_is_refused_with_both_numbers() -> None:
    with pytest.raises(JournalError, match="holds RequestRouted version 9; this program knows up to 1"):
        decode_event(stored("RequestRouted", 9, ["cpu:0", 1]))


def test_fields_that_do_not_fit_are_refused() -> None:
    with pytest.raises(JournalError, match="record 3: RequestRouted does not decode"):
        decode_event(stored("RequestRouted", 1, ["cpu:0", "not a number"]))


class Renamed(Event, frozen=True, kw_only=True):
    """An event whose third version merged what its first two kept apart."""

    VERSION: ClassVar[int] = 3

    name: str
    bytes_total: int


def test_an_old_version_passes_through_its_upcasters_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def kib_to_bytes(fields: list[Any]) -> list[Any]:
        return [fields[0], fields[1] * 1024, fields[2] * 1024]

    def used_and_free_to_total(fields: list[Any]) -> list[Any]:
        return [fields[0], fields[1] + fields[2]]

    monkeypatch.setitem(codec.EVENT_TYPES, "Renamed", Renamed)
    monkeypatch.setitem(codec._event_decoders, "Renamed", msgspec.msgpack.Decoder(Renamed))
    monkeypatch.setitem(codec.UPCASTERS, ("Renamed", 1), kib_to_bytes)
    monkeypatch.setitem(codec.UPCASTERS, ("Renamed", 2), used_and_free_to_total)
    expected = Renamed(name="pool", bytes_total=3072)
    assert decode_event(stored("Renamed", 1, ["pool", 1, 2])) == expected
    assert decode_event(stored("Renamed", 2, ["pool", 1024, 2048])) == expected
    assert decode_event(stored("Renamed", 3, ["pool", 3072])) == expected
    with pytest.raises(JournalError, match="Renamed does not decode"):
        decode_event(stored("Renamed", 2, ["pool", 1024, 2048.5]))


def test_every_older_version_has_its_upcaster() -> None:
    wanted = {(name, version) for name, cls in EVENT_TYPES.items() for version in range(1, cls.VERSION)}
    assert set(codec.UPCASTERS) == wanted


def test_json_names_the_type_and_every_field() -> None:
    event = RequestRouted(executor="cpu:0", attempt=2)
    shown = as_json(Record(meta_of(event), event))
    assert shown["type"] == "RequestRouted"
    assert shown["pos"] == 3
    assert shown["correlation"] == "r1"
    assert shown["data"] == {"executor": "cpu:0", "attempt": 2}


def test_json_opens_commands_and_nested_structs() -> None:
    event = CommandConsumed(decider="admission", command=encode_command(WithdrawRequest(now_ns=1, request_id="r1")))
    assert as_json(Record(meta_of(event), event))["data"] == {
        "decider": "admission",
        "command": {"type": "WithdrawRequest", "now_ns": 1, "request_id": "r1"},
    }
    layout = KvLayout(full_layers=1, sliding_layers=0, sliding_window=0, kv_heads=1, head_dim=4, dtype_bytes=2)
    loaded = EngineLoaded(
        executor="cpu:0",
        capabilities=tiny_capabilities(
            max_model_len=10, max_batch_size=1, kv_budget_bytes=1, kv_layout=layout, weights_bytes=1, eos_token_ids=(2,)
        ),
        fingerprint=ModelFingerprint(weights="w", tokenizer="t", chat_template="c", config="c"),
        load_ms=1.5,
        pid=7,
    )
    data = as_json(Record(meta_of(loaded), loaded))["data"]
    assert data["capabilities"]["kv_layout"]["head_dim"] == 4
    assert data["fingerprint"]["weights"] == "w"


def test_content_events_are_the_only_ones_with_token_ids() -> None:
    holders = {
        name
        for name, cls in EVENT_TYPES.items()
        if any(field in {"token_ids", "text", "content", "messages", "prompt"} for field in cls.__struct_fields__)
    }
    assert all(EVENT_TYPES[name].FAMILY == "content" for name in holders)
    assert StepTokens.FAMILY == "content"


RECORD = Record(
    Meta("n", "b", 1, "request/req_1", 0, "RequestRouted", 1, -1, "req_1", "", "", "a", 0, 9),
    RequestRouted(executor="cpu:0", attempt=1),
)


@pytest.mark.parametrize("written", [b"req_1", b"cpu:0"])
def test_bytes_that_are_no_text_are_no_record_either(written: bytes) -> None:
    data = encode_record(RECORD)
    bad = data.replace(written, written[:-1] + b"\xb0")
    assert bad != data
    with pytest.raises(JournalError):
        decode_record(bad)


def test_deep_nesting_is_refused() -> None:
    for decode in (decode_record, decode_command):
        with pytest.raises(JournalError):
            decode(msgspec.Raw(b"\x91" * 100_000))


@pytest.mark.parametrize("version", [0, -1])
def test_a_version_that_never_was_is_refused(version: int) -> None:
    meta = msgspec.structs.replace(RECORD.meta, version=version)
    with pytest.raises(JournalError, match="never was"):
        decode_record(encode_record(Record(meta, RECORD.event)))
