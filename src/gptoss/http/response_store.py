"""Responses that clients may come back to: by id, and as the beginning of a longer conversation.

They are in one SQLite file of the data folder, bounded in number and size, the longest unused forgotten first; without a
folder they are in memory. A journal is no place for them: its control family holds no text, and clients may delete a
response at any time. Deleted bytes are overwritten. Writing goes through a log of SQLite's own, so that a killed process
loses nothing, and does not wait for the disk.
"""

import contextlib
import logging
import os
import sqlite3
from pathlib import Path

import msgspec

from gptoss.engine.port import ChatMessage
from gptoss.errors import ResponseNotFound
from gptoss.http.response_schema import ResponseBody, StoredItem
from gptoss.messages.codec import UNREADABLE

MAX_RESPONSES = 1000
MAX_BYTES = 64 << 20
BROKEN_SUFFIX = ".broken"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, used INTEGER NOT NULL, size INTEGER NOT NULL, stored BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON responses (used);
"""
_log = logging.getLogger("gptoss.http")


class StoredResponse(msgspec.Struct, frozen=True):
    """A response and what it came from.

    Attributes:
        body: as it was answered.
        items: its own input.
        messages: the conversation up to and including its output, without its instructions.
    """

    body: ResponseBody
    items: list[StoredItem]
    messages: tuple[ChatMessage, ...]


_decoder = msgspec.json.Decoder(StoredResponse)


class ResponseStore:
    """Stored responses. Use it from the event loop.

    Args:
        path: of the file; None keeps them in memory. Its folder is made with the first response.
        max_responses: how many are kept.
        max_bytes: how large they may be together, as JSON; conversations count for each response that ends one.
    """

    def __init__(
        self, path: Path | None = None, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES
    ) -> None:
        self._path = path
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._opened: sqlite3.Connection | None = None

    def __contains__(self, response_id: str) -> bool:
        return self._db.execute("SELECT 1 FROM responses WHERE id = ?", (response_id,)).fetchone() is not None

    def keep(self, stored: StoredResponse) -> None:
        """Keep a response, and forget others for it; one that is larger than all may be is not kept.

        A store that fails is told of in the log: the answer itself is as good without it.
        """
        data = msgspec.json.encode(stored)
        if len(data) > self._max_bytes:
            return
        try:
            with self._db as db:
                db.execute(
                    "INSERT OR REPLACE INTO responses SELECT ?, coalesce(max(used), 0) + 1, ?, ? FROM responses",
                    (stored.body.id, len(data), data),
                )
                self._make_room(db)
        except sqlite3.Error as error:
            _log.warning("a response could not be stored: %s", error)

    def get(self, response_id: str, *, param: str) -> StoredResponse:
        """A response; ``param`` names the field that asks for it.

        Raises:
            ResponseNotFound: there is none, or none any more.
        """
        with self._db as db:
            row = db.execute("SELECT stored FROM responses WHERE id = ?", (response_id,)).fetchone()
            if row is not None:
                db.execute(
                    "UPDATE responses SET used = (SELECT max(used) + 1 FROM responses) WHERE id = ?", (response_id,)
                )
        with contextlib.suppress(*UNREADABLE):  # of another version of this program: as good as forgotten
            if row is not None:
                return _decoder.decode(row[0])
        raise ResponseNotFound(
            f"no response is kept under the id {response_id[:128]!a}; it may have been deleted or forgotten, "
            "or was created with store false",
            param=param,
        )

    def delete(self, response_id: str) -> None:
        """Forget a response, for good. Raises as ``get``."""
        self.get(response_id, param="response_id")
        with self._db as db:
            db.execute("DELETE FROM responses WHERE id = ?", (response_id,))
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the write-ahead log holds its text too

    def close(self) -> None:
        """Let go of the file; idempotent."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    # ---- the file

    @property
    def _db(self) -> sqlite3.Connection:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> sqlite3.Connection:
        if self._path is None:
            return _connect(":memory:")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            return _connect(str(self._path))
        except sqlite3.DatabaseError as error:
            aside = self._path.with_name(self._path.name + BROKEN_SUFFIX)
            _log.warning("%s is no store of responses (%s); it is %s now", self._path.name, error, aside.name)
            self._path.rename(aside)
            return self._open()

    def _make_room(self, db: sqlite3.Connection) -> None:
        count, size = db.execute("SELECT count(*), coalesce(sum(size), 0) FROM responses").fetchone()
        oldest = db.execute("SELECT id, size FROM responses ORDER BY used")
        surplus: list[tuple[str]] = []
        while count > self._max_responses or size > self._max_bytes:
            name, freed = oldest.fetchone()
            surplus.append((name,))
            count, size = count - 1, size - freed
        db.executemany("DELETE FROM responses WHERE id = ?", surplus)


def _connect(name: str) -> sqlite3.Connection:
    db = sqlite3.connect(name, timeout=1.0)
    try:
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "secure_delete = ON"):
            db.execute(f"PRAGMA {pragma}")
        db.executescript(_SCHEMA)
    except sqlite3.DatabaseError:
        db.close()
        raise
    return db
