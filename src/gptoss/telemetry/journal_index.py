"""Which frames hold a stream or a request, and surveys of sealed segments: a SQLite file, rebuilt from them at any time.

Rules:
- The segments are the truth. The index only says where to look; whoever asks still checks every record it finds, so a
  hash collision or a stale entry costs time, never a wrong answer.
- What holds a stream is brought up to date when a query needs it, never while the server appends. Surveys are made behind
  its back (``survey_keeper``), or when a bundle needs them.
- A kept survey counts for the segment alone whose seal it names, sha256 of all its bytes included.
- It may be deleted at any time. Where it cannot be kept (a read-only folder, a locked file) it is built in memory.
"""

import os
import sqlite3
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from gptoss.errors import JournalCorrupt
from gptoss.messages.codec import UNREADABLE
from gptoss.telemetry.journal_base import Query
from gptoss.telemetry.segment_file import Frame, Header, Segment, SegmentScan, footer_bytes, header_bytes, walk
from gptoss.telemetry.segment_survey import SURVEY_VERSION, Pace, SegmentSurvey, survey_segment

T = TypeVar("T")

INDEX_NAME = "index-v1.sqlite3"
_BUSY_TIMEOUT_S = 5.0
_IN_MEMORY = ":memory:"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS segments(
  id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, identity INTEGER NOT NULL,
  indexed_to INTEGER NOT NULL, next_pos INTEGER NOT NULL, is_sealed INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS frames(
  key INTEGER NOT NULL, segment INTEGER NOT NULL, at INTEGER NOT NULL, PRIMARY KEY(key, segment, at)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS surveys(
  name TEXT PRIMARY KEY, version INTEGER NOT NULL, seal BLOB NOT NULL, crc32 INTEGER NOT NULL, survey BLOB NOT NULL
);
"""
_survey_encoder = msgspec.msgpack.Encoder()
_survey_decoder = msgspec.msgpack.Decoder(SegmentSurvey)


class Located(NamedTuple):
    """Where to look.

    Attributes:
        offsets: segment name -> offsets of its frames, ascending.
        problems: boot ordinal and error of each segment that could not be read to its end.
    """

    offsets: dict[str, list[int]]
    problems: list[tuple[int, JournalCorrupt]]


class _Progress(NamedTuple):
    id: int
    indexed_to: int
    next_pos: int
    is_sealed: bool


class JournalIndex:
    """The index of one journal folder. Any thread or process may ask; SQLite serialises the writing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_out_of_reach = False

    def locate(self, scope: Sequence[tuple[Segment, Header | None]], query: Query) -> Located:
        """The frames of these segments that may hold what a query by stream or correlation wants."""
        located = self._ask(lambda db: self._locate_in(db, scope, query))
        if located is None:
            with closing(_connect(_IN_MEMORY)) as db:
                located = self._locate_in(db, scope, query)
        return located

    def survey(self, segment: Segment, scan: SegmentScan, pace: Pace = iter) -> SegmentSurvey:
        """The survey of a segment: of a sealed one the kept survey, if there is one that fits.

        Once the file could not be used, this object makes all further surveys itself: waiting for it happens once.

        Raises:
            JournalCorrupt: as ``walk`` does; a segment whose survey is kept is not read.
        """
        footer = scan.read_footer()
        if footer is None or segment.quarantined or self._is_out_of_reach:
            return survey_segment(segment, scan, pace)
        seal = footer_bytes(footer)
        kept = self._ask(lambda db: _kept_survey(db, segment.path.name, seal))
        if kept is not None:
            return kept
        survey = survey_segment(segment, scan, pace)
        if not self._is_out_of_reach:
            self._ask(lambda db: self._keep_survey(db, segment.path.name, seal, survey))
        return survey

    def forget_unlinked(self) -> None:
        """Drop what is known of segments that are gone."""
        if (self._folder / INDEX_NAME).exists():
            self._ask(self._forget_unlinked)

    def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T | None:
        """What the file has to say; None when it cannot be asked. A damaged one is deleted."""
        file = self._folder / INDEX_NAME
        try:
            with closing(_connect(str(file))) as db:
                return question(db)
        except sqlite3.OperationalError:  # Locked or not writable: not the file's fault.
            self._is_out_of_reach = True
            return None
        except sqlite3.DatabaseError:
            with suppress(OSError):
                file.unlink()
            return None

    def _keep_survey(self, db: sqlite3.Connection, name: str, seal: bytes, survey: SegmentSurvey) -> None:
        self._forget_unlinked(db)
        data = _survey_encoder.encode(survey)
        row = (name, SURVEY_VERSION, seal, zlib.crc32(data), data)
        db.execute("INSERT OR REPLACE INTO surveys VALUES (?, ?, ?, ?, ?)", row)

    def _locate_in(
        self, db: sqlite3.Connection, scope: Sequence[tuple[Segment, Header | None]], query: Query
    ) -> Located:
        self._forget_unlinked(db)
        problems: list[tuple[int, JournalCorrupt]] = []
        for segment, header in scope:
            try:
                _catch_up(db, segment, header)
            except JournalCorrupt as error:
                problems.append((segment.ordinal, error))
            except FileNotFoundError:
                continue
        return Located(_find(db, query), problems)

    def _forget_unlinked(self, db: sqlite3.Connection) -> None:
        present = {path.name for path in self._folder.iterdir()}
        known: list[tuple[int, str]] = db.execute("SELECT id, name FROM segments").fetchall()
        for segment_id, name in known:
            if name not in present:
                _forget(db, segment_id)
        surveyed: list[tuple[str]] = db.execute("SELECT name FROM surveys").fetchall()
        db.executemany("DELETE FROM surveys WHERE name = ?", [row for row in surveyed if row[0] not in present])


def _make_private(file: Path) -> None:
    """Surveys name requests: the file is its owner's alone, like the segments."""
    with suppress(OSError):
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    # Not through a descriptor: closing one would drop the locks that other threads hold on the file.
    with suppress(OSError):
        file.chmod(0o600)


def _connect(file: str) -> sqlite3.Connection:
    """The index in a file or in memory, with its tables.

    Raises:
        sqlite3.Error: it cannot be used.
    """
    db = sqlite3.connect(file, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
    try:
        if file != _IN_MEMORY:
            _make_private(Path(file))
        db.execute("PRAGMA synchronous=NORMAL")
        db.executescript(_SCHEMA)
    except BaseException:
        db.close()
        raise
    return db


def _kept_survey(db: sqlite3.Connection, name: str, seal: bytes) -> SegmentSurvey | None:
    found: tuple[int, bytes] | None = db.execute(
        "SELECT crc32, survey FROM surveys WHERE name = ? AND version = ? AND seal = ?", (name, SURVEY_VERSION, seal)
    ).fetchone()
    if found is None or found[0] != zlib.crc32(found[1]):
        return None
    try:
        return _survey_decoder.decode(found[1])
    except UNREADABLE:
        return None


def _find(db: sqlite3.Connection, query: Query) -> dict[str, list[int]]:
    key = _key("r", query.correlation) if query.correlation is not None else _key("s", query.stream or "")
    offsets: dict[str, list[int]] = defaultdict(list)
    rows: list[tuple[str, int]] = db.execute(
        "SELECT name, at FROM frames JOIN segments ON segments.id = frames.segment WHERE key = ? ORDER BY segment, at",
        (key,),
    ).fetchall()
    for name, at in rows:
        offsets[name].append(at)
    return offsets


def _catch_up(db: sqlite3.Connection, segment: Segment, header: Header | None) -> None:
    """Index what a segment has gained, up to its end or its first bad bytes."""
    if header is None:
        raise JournalCorrupt(f"{segment.path}: the header at offset 0 is unreadable")
    identity = zlib.crc32(header_bytes(header))
    progress = _progress(db, segment.path.name, identity)
    if progress is not None and progress.is_sealed:
        return
    with SegmentScan(segment.path) as scan:
        if progress is not None and progress.indexed_to > scan.size:
            _forget(db, progress.id)
            progress = None
        if progress is not None and progress.indexed_to == scan.size:
            return
        problem = _index_gain(db, segment, scan, identity)
    if problem is not None:
        raise problem


def _index_gain(db: sqlite3.Connection, segment: Segment, scan: SegmentScan, identity: int) -> JournalCorrupt | None:
    """Index from where the last time ended; what is good before bad bytes stays indexed."""
    problem: JournalCorrupt | None = None
    with db:
        db.execute("BEGIN IMMEDIATE")
        progress = _progress(db, segment.path.name, identity) or _register(db, segment, scan, identity)
        end, next_pos = progress.indexed_to, progress.next_pos
        try:
            for frame in walk(segment, scan, end, next_pos):
                db.executemany("INSERT OR IGNORE INTO frames VALUES (?, ?, ?)", _entries(frame, progress.id))
                end, next_pos = scan.end, scan.next_pos
        except JournalCorrupt as error:
            problem = error
        db.execute(
            "UPDATE segments SET indexed_to = ?, next_pos = ?, is_sealed = ? WHERE id = ?",
            (end, next_pos, problem is None and scan.footer is not None, progress.id),
        )
    return problem


def _progress(db: sqlite3.Connection, name: str, identity: int) -> _Progress | None:
    row = db.execute(
        "SELECT id, indexed_to, next_pos, is_sealed, identity FROM segments WHERE name = ?", (name,)
    ).fetchone()
    if row is None:
        return None
    if row[4] != identity:  # Another journal's segment stood here under the same name.
        _forget(db, row[0])
        return None
    return _Progress(row[0], row[1], row[2], bool(row[3]))


def _register(db: sqlite3.Connection, segment: Segment, scan: SegmentScan, identity: int) -> _Progress:
    row_id = db.execute(
        "INSERT INTO segments(name, identity, indexed_to, next_pos, is_sealed) VALUES (?, ?, ?, ?, 0) RETURNING id",
        (segment.path.name, identity, scan.end, scan.next_pos),
    ).fetchone()[0]
    return _Progress(row_id, scan.end, scan.next_pos, is_sealed=False)


def _forget(db: sqlite3.Connection, segment_id: int) -> None:
    db.execute("DELETE FROM frames WHERE segment = ?", (segment_id,))
    db.execute("DELETE FROM segments WHERE id = ?", (segment_id,))


def _entries(frame: Frame, segment_id: int) -> list[tuple[int, int, int]]:
    names: set[tuple[str, str]] = set()
    for stored in frame.stored():
        names.add(("s", stored.meta.stream))
        if stored.meta.correlation:
            names.add(("r", stored.meta.correlation))
    return [(_key(kind, name), segment_id, frame.offset) for kind, name in names]


def _key(kind: str, value: str) -> int:
    return int.from_bytes(blake2b(f"{kind}{value}".encode(), digest_size=8).digest(), "big", signed=True)
