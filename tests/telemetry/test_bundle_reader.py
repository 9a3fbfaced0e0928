"""The reader believes nothing: whatever a file holds, it is read, or refused by one line."""

import contextlib
import hashlib
import io
import json
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss.errors import BundleError, ReplayError, UnsupportedSchema
from gptoss.messages.envelope import Meta
from gptoss.telemetry.bundle import BundleOrder, Maker, make_bundle
from gptoss.telemetry.bundle_format import FORMAT, MANIFEST_NAME
from gptoss.telemetry.bundle_reader import BundleReader
from gptoss.telemetry.bundle_slice import Selection
from gptoss.telemetry.recording import JournalRecording
from gptoss.telemetry.segment_file import batch_bytes

Entries = dict[str, bytes]


@pytest.fixture(scope="module")
def good(bad_night: Path) -> bytes:
    """A bundle of one request of the bad night, with content."""
    file = io.BytesIO()
    order = BundleOrder(selection=Selection(request_ids=("night-07",)), content="tokens")
    maker = Maker(key=b"k", created_ns=1, created_by="test")
    make_bundle(file, JournalRecording(bad_night / "journal"), order, maker)
    return file.getvalue()


def read_all(path: Path) -> int:
    with BundleReader(path) as reader:
        return sum(1 for _ in reader.records()) + sum(1 for _ in reader.content()) + len(reader.boots())


def entries_of(data: bytes) -> Entries:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(entries: Entries | list[tuple[str | zipfile.ZipInfo, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in entries.items() if isinstance(entries, dict) else entries:
            archive.writestr(name, data)
    return file.getvalue()


def with_manifest(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The bundle with its manifest changed."""
    entries = entries_of(data)
    manifest = json.loads(entries[MANIFEST_NAME])
    change(manifest)
    return zipped({**entries, MANIFEST_NAME: json.dumps(manifest).encode()})


def with_part(data: bytes, part: bytes, *, records: int | None = None) -> bytes:
    """The bundle with its events replaced, and a manifest that vouches for them."""
    entries = entries_of(data)
    manifest = json.loads(entries[MANIFEST_NAME])
    first = manifest["parts"][0]
    first |= {"size": len(part), "sha256": hashlib.sha256(part).hexdigest()}
    if records is not None:
        first["records"] = records
    return zipped({**entries, MANIFEST_NAME: json.dumps(manifest).encode(), first["name"]: part})


def record(data: bytes, *, type: str = "ClockAnchored", version: int = 1, payload: bytes | None = None) -> bytes:  # noqa: A002
    """One encoded record that stands where the first of the bundle stood."""
    part = json.loads(entries_of(data)[MANIFEST_NAME])["parts"][0]
    meta = Meta("n", part["boot"], part["first_pos"], "system", 0, type, version, -1, "", "", "", "", 0, 0)
    body = msgspec.msgpack.encode([1]) if payload is None else payload
    return msgspec.msgpack.encode((meta, msgspec.Raw(body)))


def test_a_good_bundle_is_read_and_may_be_zipped_anew(good: bytes, tmp_path: Path) -> None:
    for number, data in enumerate((good, zipped(entries_of(good)), zipped(entries_of(good), zipfile.ZIP_STORED))):
        path = tmp_path / f"{number}.zip"
        path.write_bytes(data)
        assert read_all(path) > 100


def test_a_future_manifest_field_is_passed_over(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(with_manifest(good, lambda manifest: manifest.update(novelty=[1])))
    assert read_all(path) > 100


def set_part(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["parts"][0].update(fields)


def link(data: bytes) -> bytes:
    entry = zipfile.ZipInfo("events/000001.records")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    rest = {name: body for name, body in entries_of(data).items() if name != entry.filename}
    return zipped([*rest.items(), (entry, b"/etc/passwd")])


def encrypted(data: bytes) -> bytes:
    changed = bytearray(data)
    at = changed.find(b"PK\x01\x02")
    changed[at + 8] |= 1
    return bytes(changed)


def twice(data: bytes) -> bytes:
    entries = list(entries_of(data).items())
    with pytest.warns(UserWarning, match="Duplicate name"):
        return zipped([*entries, entries[-1]])


def doubled(data: bytes) -> bytes:
    """The same events a second time, under another name."""
    entries = entries_of(data)
    manifest = json.loads(entries[MANIFEST_NAME])
    manifest["parts"].insert(1, {**manifest["parts"][0], "name": "events/000002.records"})
    entries["events/000002.records"] = entries["events/000001.records"]
    return zipped({**entries, MANIFEST_NAME: json.dumps(manifest).encode()})


def bomb(data: bytes) -> bytes:
    """Ten gigabytes of zeros would be worse; the reader may not unpack more than the manifest says."""
    entries = entries_of(data)
    name = json.loads(entries[MANIFEST_NAME])["parts"][0]["name"]
    return zipped({**entries, name: bytes(50_000_000)})


def frame(*records: bytes) -> bytes:
    return batch_bytes(records)


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "it is empty"),
    "text": (lambda _: b"hello " * 100, "not a ZIP"),
    "short": (lambda _: b"PK", "not a ZIP"),
    "truncated": (lambda good: good[:-100], "cut off"),
    "no_beginning": (lambda good: good[100:], "before or behind"),
    "something_before": (lambda good: b"#!/bin/sh\n" + good, "before or behind"),
    "commented": (lambda good: good[:-2] + b"\x02\x00hi", "not a ZIP"),
    "empty_zip": (lambda _: zipped({}), "0 entries"),
    "foreign_zip": (lambda _: zipped({"word/document.xml": b"<x/>"}), "first entry is 'word/document.xml'"),
    "foreign_manifest": (lambda _: zipped({MANIFEST_NAME: b'{"name": "extension"}'}), "not a bundle of gptoss"),
    "manifest_no_json": (lambda _: zipped({MANIFEST_NAME: b"\xff{"}), "not a bundle of gptoss"),
    "manifest_deep": (lambda _: zipped({MANIFEST_NAME: b"[" * 100_000}), "not a bundle of gptoss"),
    "manifest_wrong": (lambda good: with_manifest(good, lambda m: m.update(parts=3)), "manifest is unreadable"),
    "manifest_late": (lambda good: zipped(dict(reversed(entries_of(good).items()))), "first entry is"),
    "manifest_huge": (lambda _: zipped({MANIFEST_NAME: b" " * (17 * 2**20)}), "more than 16 MiB"),
    "too_many": (lambda _: zipped({f"{n}": b"" for n in range(5000)}), "5000 entries"),
    "traversing": (lambda good: zipped({**entries_of(good), "../../evil": b"x"}), "differ: '../../evil'"),
    "absolute": (lambda good: zipped({**entries_of(good), "/etc/evil": b"x"}), "differ: '/etc/evil'"),
    "traversing_listed": (
        lambda good: zipped(
            {
                name.replace("events/000001", "events/../../1"): body.replace(b"events/000001", b"events/../../1")
                for name, body in entries_of(good).items()
            }
        ),
        "a bundle has none of that name",
    ),
    "link": (link, "is a link"),
    "encrypted": (encrypted, "encrypted"),
    "twice": (twice, "two entries of one name"),
    "odd_method": (lambda good: zipped(entries_of(good), zipfile.ZIP_LZMA), "unknown way"),
    "doubled": (doubled, "000002.records is out of order"),
    "bomb": (bomb, "has 50000000 bytes"),
    "huge_part": (lambda good: with_manifest(good, set_part(size=2**40)), "manifest is unreadable"),
    "negative": (lambda good: with_manifest(good, set_part(records=-1)), "manifest is unreadable"),
    "doctored": (lambda good: with_manifest(good, set_part(sha256="0" * 64)), "changed after it was written"),
    "listed_twice": (lambda good: with_manifest(good, lambda m: m["parts"].append(m["parts"][0])), "differ"),
    "count": (lambda good: with_manifest(good, set_part(records=1)), "records; its manifest says 1"),
    "other_boot": (lambda good: with_manifest(good, set_part(boot="b")), "of another boot"),
    "other_family": (lambda good: with_manifest(good, set_part(family="content")), "none of that name"),
    "positions": (lambda good: with_manifest(good, set_part(first_pos=9)), "out of order"),
    "half_frame": (lambda good: with_part(good, b"\x00\x00"), "ends inside a frame"),
    "bad_frame": (lambda good: with_part(good, bytes(100)), "fails its checksum"),
    "no_records": (lambda good: with_part(good, frame(b"\x01")), "damaged"),
    "deep_record": (lambda good: with_part(good, frame(nested(100_000))), "damaged"),
    "deep_event": (lambda good: with_part(good, frame(record(good, payload=nested(100_000)))), "damaged"),
    "odd_event": (lambda good: with_part(good, frame(record(good, payload=b"\x91\xa1x"))), "does not decode"),
    "content_as_control": (lambda good: with_part(good, frame(record(good, type="StepTokens"))), "no place there"),
    "version_0": (lambda good: with_part(good, frame(record(good, version=0))), "no place there"),
    "repeated": (lambda good: with_part(good, frame(record(good), record(good)), records=2), "out of order"),
}  # fmt: skip
FUTURE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "format": (lambda good: with_manifest(good, lambda m: m.update(format_version=2)), "format version 2"),
    "format_alone": (
        lambda _: zipped({MANIFEST_NAME: json.dumps({"format": FORMAT, "format_version": 9}).encode()}),
        "format version 9",
    ),
    "event": (
        lambda good: with_manifest(good, lambda m: m["events"].update(StepCommitted=7)),
        "StepCommitted version 7",
    ),
    "event_type": (lambda good: with_manifest(good, lambda m: m["events"].update(Novelty=1)), "Novelty version 1"),
    "hidden_event": (lambda good: with_part(good, frame(record(good, version=9))), "ClockAnchored version 9"),
    "hidden_type": (lambda good: with_part(good, frame(record(good, type="Novelty"))), "Novelty version 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_bundle_is_refused_in_one_line(name: str, good: bytes, tmp_path: Path) -> None:
    change, why = BAD[name]
    path = tmp_path / "x.zip"
    path.write_bytes(change(good))
    with pytest.raises(BundleError, match=why) as caught:
        read_all(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", FUTURE)
def test_what_a_newer_program_wrote_is_called_so(name: str, good: bytes, tmp_path: Path) -> None:
    change, what = FUTURE[name]
    path = tmp_path / "x.zip"
    path.write_bytes(change(good))
    with pytest.raises(UnsupportedSchema, match=what):
        read_all(path)


def test_no_file_and_a_folder_are_refused_too(tmp_path: Path) -> None:
    for path in (tmp_path / "none.zip", tmp_path):
        with pytest.raises(BundleError, match=str(path)):
            BundleReader(path)


def test_a_part_that_nobody_reads_is_not_unpacked(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(with_manifest(good, set_part(sha256="0" * 64)))
    with BundleReader(path) as reader:
        assert sum(1 for _ in reader.content()) > 0
        with pytest.raises(BundleError, match="changed after"):
            next(reader.records())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_bundle_is_read_or_refused_and_nothing_else(data: st.DataObject, good: bytes, tmp_path: Path) -> None:
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "copy"])):
            case "flip":
                changed[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del changed[at : at + data.draw(st.integers(1, 2000))]
            case "insert":
                changed[at:at] = data.draw(st.binary(min_size=1, max_size=50))
            case _:
                changed[at : at + 30] = changed[data.draw(st.integers(0, len(changed) - 1)) :][:30]
        if not changed:
            changed = bytearray(b"P")
    check(tmp_path / "x.zip", bytes(changed))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_part_with_a_checksum_that_fits_is_read_or_refused(
    data: st.DataObject, good: bytes, tmp_path: Path
) -> None:
    part = bytearray(entries_of(good)["events/000001.records"])
    length = int.from_bytes(part[:4], "big")
    for _ in range(data.draw(st.integers(1, 5))):
        part[data.draw(st.integers(8, 8 + length - 1))] = data.draw(st.integers(0, 255))
    part[4:8] = zlib.crc32(part[8 : 8 + length]).to_bytes(4, "big")
    check(tmp_path / "x.zip", with_part(good, bytes(part)))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_odd_manifest_is_read_or_refused(data: st.DataObject, good: bytes, tmp_path: Path) -> None:
    odd = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=9), inner, max_size=2),
        max_leaves=4,
    )

    def change(manifest: dict[str, Any]) -> None:
        target = data.draw(st.sampled_from([manifest, manifest["parts"][0], manifest["boots"][0]]))
        target[data.draw(st.sampled_from(sorted(target)))] = data.draw(odd)

    check(tmp_path / "x.zip", with_manifest(good, change))


def check(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with contextlib.suppress(ReplayError):
        read_all(path)
    assert [other.name for other in path.parent.iterdir()] == [path.name]
