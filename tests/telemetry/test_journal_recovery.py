"""Damaged segments: torn tails are cut, everything else is set aside and raises where it stands."""

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.clock import SystemClock
from gptoss.errors import JournalCorrupt, JournalError
from gptoss.messages.codec import encode_record
from gptoss.messages.envelope import Origin, Record
from gptoss.messages.events import ClockAnchored
from gptoss.telemetry.segment_file import FORMAT_VERSION, Header, SegmentScan, frame_bytes, header_bytes, list_segments
from gptoss.telemetry.segments import SegmentJournal, SegmentOptions, SegmentReader

NUM_FILES = 3
LAST = "control-000001-000003.seg"
INNER = "control-000001-000002.seg"


class Image(NamedTuple):
    """A folder as ``kill -9`` left it: two sealed segments and one that is not, and what was in them."""

    files: dict[str, bytes]
    records: list[Record]
    frames: dict[str, list[tuple[int, int]]]
    """File name -> (offset behind the frame, position behind the frame) of each frame."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    folder = tmp_path_factory.mktemp("image")
    journal = open_journal(folder, "b1")
    records: list[Record] = []
    while len(list(folder.glob("control-*"))) < NUM_FILES or len(records) % 7:
        for _ in range(3):
            records.append(journal.append(ClockAnchored(wall_ns=len(records)), Origin(stream="s", correlation="r1")))
        assert journal.flush()
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("control-*"))}
    frames: dict[str, list[tuple[int, int]]] = {}
    for name in files:
        with SegmentScan(folder / name) as scan:
            frames[name] = [(scan.end, scan.next_pos) for _ in scan.frames()]
    journal.close()
    return Image(files, records, frames)


def open_journal(folder: Path, boot: str) -> SegmentJournal:
    return SegmentJournal.open(
        folder, node="n", boot=boot, clock=SystemClock(), options=SegmentOptions(segment_bytes=1000)
    )


@contextmanager
def recovered(files: dict[str, bytes]) -> Generator[SegmentJournal]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        journal = open_journal(folder, "b2")
        try:
            yield journal
        finally:
            journal.close()


def read_until_corrupt(journal: SegmentJournal) -> tuple[list[Record], str]:
    records: list[Record] = []
    try:
        records.extend(journal.read())  # A list keeps what came before the error.
    except JournalCorrupt as error:
        return records, error.message
    return records, ""


def flipped(data: bytes, offset: int, bit: int = 0) -> bytes:
    return data[:offset] + bytes([data[offset] ^ (1 << bit)]) + data[offset + 1 :]


def folder_of(journal: SegmentJournal) -> Path:
    return journal._reader._folder


def test_the_image_is_what_the_other_tests_take_it_for(image: Image) -> None:
    assert list(image.files) == ["control-000001-000001.seg", INNER, LAST]
    assert len(image.frames[LAST]) > 1


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_cut_off_the_end_the_rest_is_a_gapless_prefix(image: Image, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(image.files[LAST])))
    whole = [pos for end, pos in image.frames[LAST] if end <= length]
    kept = whole[-1] if whole else image.frames[INNER][-1][1]
    with recovered({**image.files, LAST: image.files[LAST][:length]}) as journal:
        assert read_until_corrupt(journal) == (image.records[:kept], "")
        assert list(journal.read(correlation="r1")) == image.records[:kept]
        assert journal.recovery.quarantined == ()
        cut = sum(tail.num_bytes for tail in journal.recovery.torn)
        ends = [end for end, _ in image.frames[LAST] if end <= length]
        if ends:
            assert cut == length - ends[-1]
        assert SegmentReader(folder_of(journal)).verify() == []


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_never_changes_a_record_and_never_goes_unnoticed(image: Image, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(image.files)))
    offset = data.draw(st.integers(0, len(image.files[name]) - 1))
    bit = data.draw(st.integers(0, 7))
    with recovered({**image.files, name: flipped(image.files[name], offset, bit)}) as journal:
        records, problem = read_until_corrupt(journal)
        assert records == image.records[: len(records)]
        before = [pos for number in image.frames.values() for _, pos in number if number is not image.frames[name]]
        untouched = [pos for end, pos in image.frames[name] if end <= offset]
        earlier = [pos for pos in before if pos <= image.frames[name][0][1] - 1]
        assert len(records) >= max(untouched + earlier, default=0)
        noticed = problem or journal.recovery.torn
        assert noticed
        if problem:
            assert name in problem
            assert "offset" in problem


@settings(max_examples=25, deadline=None)
@given(garbage=st.one_of(st.binary(min_size=1, max_size=200), st.just(bytes(4096))))
def test_garbage_behind_the_last_frame_is_cut(image: Image, garbage: bytes) -> None:
    with recovered({**image.files, LAST: image.files[LAST] + garbage}) as journal:
        assert read_until_corrupt(journal) == (image.records, "")
        assert [tail.num_bytes for tail in journal.recovery.torn] == [len(garbage)]


def test_a_bad_frame_with_a_good_one_behind_it_is_set_aside_untouched(image: Image) -> None:
    damaged = flipped(image.files[LAST], image.frames[LAST][0][0] - 1)
    with recovered({**image.files, LAST: damaged}) as journal:
        (quarantined,) = journal.recovery.quarantined
        assert quarantined.path.name == f"{LAST}.corrupt"
        assert quarantined.path.read_bytes() == damaged
        records, problem = read_until_corrupt(journal)
        assert records == image.records[: image.frames[INNER][-1][1]]
        assert f"{LAST}.corrupt: the bytes at offset" in problem


def test_corruption_in_a_sealed_segment_raises_when_it_is_read(image: Image) -> None:
    damaged = flipped(image.files[INNER], image.frames[INNER][0][0] - 1)
    with recovered({**image.files, INNER: damaged}) as journal:
        assert journal.recovery.quarantined == ()
        records, problem = read_until_corrupt(journal)
        assert len(records) == image.frames["control-000001-000001.seg"][-1][1]
        assert f"{INNER}: the bytes at offset" in problem
        assert len(SegmentReader(folder_of(journal)).verify()) == 1


def test_a_request_that_may_be_in_the_corrupt_part_raises_after_what_was_found(image: Image) -> None:
    damaged = flipped(image.files[INNER], image.frames[INNER][0][0] - 1)
    with recovered({**image.files, INNER: damaged}) as journal:
        found: list[Record] = []
        with pytest.raises(JournalCorrupt, match=INNER):
            found.extend(journal.read(correlation="r1"))
        first, last = image.frames["control-000001-000001.seg"], image.frames[LAST]
        assert len(found) == first[-1][1] + last[-1][1] - image.frames[INNER][-1][1]
        with pytest.raises(JournalCorrupt, match=INNER):
            list(journal.read(correlation="unknown"))
        journal.append(ClockAnchored(wall_ns=1), Origin(stream="s", correlation="r2"))
        assert journal.flush()
        assert [record.meta.boot for record in journal.read(correlation="r2")] == ["b2"]
        assert [record.meta.boot for record in journal.read(boot="b2")] == ["b2"]


def test_a_missing_segment_raises(image: Image) -> None:
    files = {name: data for name, data in image.files.items() if name != INNER}
    with recovered(files) as journal:
        records, problem = read_until_corrupt(journal)
        assert len(records) == image.frames["control-000001-000001.seg"][-1][1]
        assert "are missing" in problem


def test_a_segment_of_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    header = Header(FORMAT_VERSION + 1, "n", "b", "control", 1, 1, 0)
    path = tmp_path / "control-000001-000001.seg"
    path.write_bytes(header_bytes(header))
    with pytest.raises(JournalError, match="format version 2; this program knows version 1"):
        open_journal(tmp_path, "b2")
    assert [segment.path for segment in list_segments(tmp_path)] == [path]


def test_a_frame_that_is_no_batch_is_corruption(tmp_path: Path, image: Image) -> None:
    header = header_bytes(Header(FORMAT_VERSION, "n", "b1", "control", 1, 1, 0))
    body = b"\xdd\x00\x00\x00\x01" + encode_record(image.records[0])[:-1] + b"\xc1"
    path = tmp_path / "control-000001-000001.seg"
    path.write_bytes(header + frame_bytes(body))
    with pytest.raises(JournalCorrupt, match="holds no records"):
        list(SegmentReader(tmp_path).read())


def test_a_file_that_was_only_just_created_is_removed(tmp_path: Path) -> None:
    (tmp_path / "control-000001-000001.seg").write_bytes(b"GPTO")
    journal = open_journal(tmp_path, "b2")
    assert [(tail.offset, tail.num_bytes) for tail in journal.recovery.torn] == [(0, 4)]
    assert list(journal.read()) == []
    journal.close()
