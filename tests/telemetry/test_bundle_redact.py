"""Redaction: what a level or a pseudonym hides shows nowhere, and what is left still tells the truth."""

import io
import re
import typing
import zipfile
from pathlib import Path

import msgspec
import pytest

from gptoss.actors.admission_state import AdmissionRecord
from gptoss.actors.memory_state import GuardRecord
from gptoss.actors.router_state import RouterRecord
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.codec import EVENT_TYPES, encode_command, encode_record
from gptoss.messages.envelope import Event, Meta, Record
from gptoss.telemetry.bundle import BundleOrder, Maker, make_bundle
from gptoss.telemetry.bundle_format import CONTENT_LEVELS, ContentLevel, level_of
from gptoss.telemetry.bundle_redact import (
    _LEVELS,
    ID_FIELDS,
    NAMING_FIELDS,
    SNAPSHOT_FIELDS,
    Redacted,
)
from gptoss.telemetry.bundle_slice import Selection
from gptoss.telemetry.recording import JournalRecording, ListRecording

CANARY, STOP_CANARY = b"canary-7f3a", b"canary-stop-91bc"


def unpacked(folder: Path, selection: Selection, content: ContentLevel = "none", key: bytes = b"k") -> bytes:
    """Every byte of a bundle of the bad night."""
    file = io.BytesIO()
    order = BundleOrder(selection=selection, content=content)
    make_bundle(file, JournalRecording(folder / "journal"), order, Maker(key=key, created_ns=1, created_by="test"))
    with zipfile.ZipFile(file) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


@pytest.mark.parametrize("content", CONTENT_LEVELS)
@pytest.mark.parametrize("selection", [Selection(), Selection(request_ids=("night-07",))], ids=["all", "one"])
def test_a_canary_shows_at_its_own_level_and_not_below(
    bad_night: Path, content: ContentLevel, selection: Selection
) -> None:
    data = unpacked(bad_night, selection, content)
    assert (CANARY in data) == (content == "full")
    assert (STOP_CANARY in data) == (level_of(content) >= level_of("tokens"))


def test_a_bundle_of_one_request_names_no_other(bad_night: Path) -> None:
    data = unpacked(bad_night, Selection(request_ids=("night-07",)), "full")
    assert set(re.findall(rb"(?:night|crashed)-\d+|too-large", data)) == {b"night-07"}
    assert set(re.findall(rb"session-of-[\w-]+", data)) == {b"session-of-night-07"}
    assert b"anon_" in data


def test_a_bundle_of_everything_names_everybody(bad_night: Path) -> None:
    data = unpacked(bad_night, Selection())
    assert all(f"night-{number:02}".encode() in data for number in range(30))
    assert b"anon_" not in data


def test_pseudonyms_depend_on_the_key_alone(bad_night: Path) -> None:
    def pseudonyms(request_id: str, key: bytes) -> set[bytes]:
        return set(
            re.findall(rb"anon_[0-9a-f]{20}", unpacked(bad_night, Selection(request_ids=(request_id,)), key=key))
        )

    first, second = pseudonyms("night-07", b"one"), pseudonyms("night-08", b"one")
    assert len(first & second) > 10, "the two had the same neighbours"
    assert not first & pseudonyms("night-07", b"two")


def test_every_field_that_holds_ids_is_known() -> None:
    kinds: list[type[msgspec.Struct]] = [*EVENT_TYPES.values(), *typing.get_args(cmd.DeciderCommand)]
    kinds += [ev.CommittedRow, ev.ProducedRow, ev.HashedRow, ev.Ask, ev.Start, ev.Preemption]
    named = {name for kind in kinds for name in kind.__struct_fields__}
    assert {name for name in named if "request_id" in name} <= ID_FIELDS
    assert named >= ID_FIELDS | NAMING_FIELDS
    keyed = {
        name
        for state in (AdmissionRecord, GuardRecord, RouterRecord)
        for name, kind in typing.get_type_hints(state).items()
        if typing.get_origin(kind) in {dict, tuple}
        and name not in {"capacities", "pools", "executors", "lacking", "sessions", "prefixes", "faults"}
    }
    assert keyed == SNAPSHOT_FIELDS


def test_every_content_event_has_a_level() -> None:
    assert _LEVELS.keys() == {cls for cls in EVENT_TYPES.values() if cls.FAMILY == "content"}


def content(*events: Event) -> ListRecording:
    return ListRecording(
        (),
        [
            Record(Meta("n", "b", pos, "s", pos, type(event).__name__, 1, -1, "", "", "", "", 0, pos), event)
            for pos, event in enumerate(events)
        ],
    )


def hashes(recording: ListRecording, key: bytes = b"k") -> list[str]:
    redacted = Redacted(recording, content="hash", keep=None, key=key)
    found: list[str] = []
    for record in redacted.content():
        if isinstance(record.event, ev.PromptHashed):
            found.append(record.event.hmac)
        elif isinstance(record.event, ev.StepHashed):
            found += [row.hmac for row in record.event.rows]
    return found


def step(number: int, *token_ids: int, position: int = 0) -> ev.StepTokens:
    return ev.StepTokens(executor="cpu", step=number, rows=(ev.ProducedRow("r", 1, position, token_ids),))


def test_hashes_say_where_two_answers_part_and_nothing_else() -> None:
    prompt = ev.PromptTokens(request_id="r", token_ids=(1, 2), stop=("x",))
    one = hashes(content(prompt, step(1, 5), step(2, 5, position=1), step(3, 6, position=2)))
    other = hashes(content(prompt, step(1, 5), step(2, 5, position=1), step(3, 7, position=2)))
    assert one[:3] == other[:3]
    assert one[3] != other[3]
    assert len(set(one)) == 4, "the same token twice gives two hashes"
    guessed = hashes(content(prompt, step(1, 5, 5), step(2, 6, position=2)))
    assert guessed[1:] == one[2:], "how the tokens fell into steps does not matter"
    assert not set(one) & set(hashes(content(prompt, step(1, 5), step(2, 5)), key=b"other"))


def test_text_is_left_out_below_full() -> None:
    text = [
        ev.MessagesReceived(request_id="r", messages="[]"),
        ev.PromptTokens(request_id="r", token_ids=(1,)),
        ev.AnswerDelivered(request_id="r", text="x"),
    ]
    kinds = {
        level: [r.meta.type for r in Redacted(content(*text), content=level, keep=None, key=b"k").content()]
        for level in CONTENT_LEVELS
    }
    assert kinds == {
        "none": [],
        "hash": ["PromptHashed"],
        "tokens": ["PromptTokens"],
        "full": ["MessagesReceived", "PromptTokens", "AnswerDelivered"],
    }


def test_sessions_have_one_pseudonym_everywhere_unless_a_kept_request_is_of_them() -> None:
    def session(name: str, request_id: str) -> list[Event]:
        ask = ev.Ask(max_tokens=1, kv_bytes=1, priority=0, deadline_ns=0, shrunk=False, session_id=f"{name}@t")
        received = ev.RequestReceived(
            request_id=request_id,
            endpoint="",
            model="",
            stream=False,
            num_messages=0,
            priority=0,
            deadline_ns=0,
            session_id=name,
        )
        reserve = cmd.ReserveMemory(now_ns=0, request_id=request_id, kv_bytes=1, session_id=f"{name}@t")
        state = msgspec.msgpack.encode(
            {
                "grants": {request_id: {"kv_bytes": 1, "executor": "", "session_id": f"{name}@t"}},
                "sessions": {f"{name}@t": {"kv_bytes": 1}},
            }
        )
        return [
            received,
            ev.MemoryRequested(request_id=request_id, ask=ask),
            ev.CommandConsumed(decider="memory", command=encode_command(reserve)),
            ev.SnapshotTaken(decider="memory", state=msgspec.Raw(state)),
            ev.SessionEvicted(
                session_id=f"{name}@t", executor="cpu", reason="idle", kv_bytes=1, used_ns=0, pressure=0.0
            ),
        ]

    events = [*session("theirs", "other"), *session("mine", "kept")]
    recorded = ListRecording(
        Record(Meta("n", "b", pos, "s", pos, type(event).__name__, 1, -1, "", "", "", "", 0, pos), event)
        for pos, event in enumerate(events)
    )
    redacted = Redacted(recorded, content="none", keep=frozenset({"kept"}), key=b"k")
    data = b"".join(encode_record(record) for record in redacted.records())
    assert b"theirs" not in data
    assert data.count(b"mine@t") == data.count(b"mine") - 1 == 5
    found = set(re.findall(rb"(anon_[0-9a-f]{20})@t", data))
    assert len(found) == 1, "the same name in events, commands and snapshots"


def test_saved_counters_lose_what_names_those_who_were_running() -> None:
    state = msgspec.Raw(msgspec.msgpack.encode({"requests": {"open": {"secret-request": {}}}}))
    meta = Meta("n", "b", 0, "counters", 0, "CountersSaved", 1, -1, "", "", "", "telemetry", 0, 1)
    recording = ListRecording([Record(meta, ev.CountersSaved(pos=0, state=state))])
    (seen,) = Redacted(recording, content="none", keep=frozenset({"kept"}), key=b"k").records()
    (whole,) = Redacted(recording, content="none", keep=None, key=b"k").records()
    assert b"secret-request" not in encode_record(seen)
    assert b"secret-request" in encode_record(whole)
