"""Files that clients upload and batches write, in a folder of their own.

Rules:
- A file is two: its bytes under its id, and ``<id>.json``, which makes it exist. Both are synced before a client is told,
  so a file that was acknowledged survives a crash; an upload that never ended is swept away at the next start.
- Ids are drawn here; nothing that a client writes becomes part of a path.
- One file and all files together are bounded.
- Methods block on the disk: call them from a thread. The index of notes is in memory and needs none.
"""

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Collection, Generator
from pathlib import Path
from typing import IO, Any

import msgspec
from aiohttp import web

from gptoss.clock import IdSource
from gptoss.errors import BodyTooLarge, FileUnknown
from gptoss.messages.codec import UNREADABLE
from gptoss.telemetry.segment_writer import sync_folder

FILES_MAX = 10_000
NOTE_SUFFIX = ".json"
PART_SUFFIX = ".part"
FILE_ID = re.compile(r"file-[0-9a-f]{8,64}", re.ASCII)


class FileNote(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a file beside its bytes; ``bytes`` is their number."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str


class FileStore:
    """See the module.

    Args:
        folder: where the files are; made when the first comes. None takes a temporary one, which ``close`` removes.
        file_bytes_max: largest file that a client may upload.
        total_bytes_max: all files together; what batches write counts, and is never refused.
    """

    def __init__(self, folder: Path | None, *, file_bytes_max: int, total_bytes_max: int) -> None:
        self.file_bytes_max = file_bytes_max
        self._total_bytes_max = total_bytes_max
        self._given = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._notes: dict[str, FileNote] = {}
        self._lock = threading.Lock()

    def load(self) -> None:
        """Read the notes, and sweep away what an upload that never ended left behind."""
        if self._given is None or not self._given.is_dir():
            return
        found: list[FileNote] = []
        for path in self._folder.glob(f"file-*{NOTE_SUFFIX}"):
            with contextlib.suppress(*UNREADABLE, OSError):
                found.append(msgspec.json.decode(path.read_bytes(), type=FileNote))
        self._notes = {note.id: note for note in sorted(found, key=lambda note: (note.created_at, note.id))}
        for path in self._folder.glob(f"*{PART_SUFFIX}"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder if it is a temporary one."""
        if self._temporary is not None:
            self._temporary.cleanup()

    # ---- what there is

    @property
    def notes(self) -> list[FileNote]:
        """Every file, oldest first."""
        return list(self._notes.values())

    def note(self, file_id: str, *, param: str = "file_id") -> FileNote:
        """What is known of a file.

        Raises:
            FileUnknown: there is none of this id.
        """
        found = self._notes.get(file_id)
        if found is None:
            raise FileUnknown(f"no file is kept under the id {file_id[:128]!a}", param=param)
        return found

    def path(self, file_id: str) -> Path:
        """Where a file's bytes are, or will be."""
        if not FILE_ID.fullmatch(file_id):
            raise FileUnknown(f"{file_id[:128]!a} is no id of a file", param="file_id")
        return self._folder / file_id

    # ---- changes

    def check_room(self, num_bytes: int) -> None:
        """Refuse an upload of this size so far.

        Raises:
            BodyTooLarge: it, or all files together, would be too large; or there are too many files.
        """
        if num_bytes > self.file_bytes_max:
            raise BodyTooLarge(f"the file is larger than {self.file_bytes_max} bytes", param="file")
        kept = sum(note.bytes for note in self._notes.values())
        if kept + num_bytes > self._total_bytes_max or len(self._notes) >= FILES_MAX:
            raise BodyTooLarge(
                f"{len(self._notes)} files of {kept} bytes are kept and there is no room for more; delete some",
                param="file",
            )

    @contextlib.contextmanager
    def part(self, file_id: str) -> Generator[IO[bytes]]:
        """A file to write an upload to; without ``keep`` it is gone at the end."""
        self._make_folder()
        path = self.path(file_id).with_suffix(PART_SUFFIX)
        with path.open("wb") as file:
            try:
                yield file
            finally:
                path.unlink(missing_ok=True)

    def keep(self, note: FileNote, part: IO[bytes]) -> None:
        """Make an upload a file, for good."""
        part.flush()
        os.fsync(part.fileno())
        path = self.path(note.id)
        path.with_suffix(PART_SUFFIX).rename(path)
        self.publish(note)

    def publish(self, note: FileNote) -> None:
        """Make bytes that lie in their place already a file that clients see."""
        self._write_json(self.path(note.id).name + NOTE_SUFFIX, note)
        with self._lock:
            self._notes[note.id] = note

    def delete(self, file_id: str) -> None:
        """Remove a file. Raises ``FileUnknown``."""
        self.note(file_id)
        with self._lock:
            self._notes.pop(file_id, None)
        path = self.path(file_id)
        path.with_name(path.name + NOTE_SUFFIX).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        sync_folder(self._folder)

    # ---- what batches write

    def cut(self, file_id: str, num_bytes: int) -> None:
        """Cut off what a crash left behind the first ``num_bytes`` of a file that a batch writes."""
        path = self.path(file_id)
        if path.exists() and path.stat().st_size > num_bytes:
            with path.open("r+b") as file:
                file.truncate(num_bytes)
                os.fsync(file.fileno())

    def extend(self, file_id: str, at: int, data: bytes) -> int:
        """Write ``data`` at the end of a file that a batch writes, which is ``at``; returns the new end, synced.

        Raises:
            OSError: the disk fails, or the file is shorter than that.
        """
        self._make_folder()
        path = self.path(file_id)
        with path.open("r+b" if path.exists() else "w+b") as file:
            if file.seek(0, os.SEEK_END) < at:
                raise OSError(0, f"{file_id} is shorter than the log says")
            file.seek(at)
            file.write(data)
            file.truncate()
            file.flush()
            os.fdatasync(file.fileno())
        return at + len(data)

    def keep_metadata(self, batch_id: str, metadata: dict[str, str]) -> None:
        """Keep a client's notes on a batch: text, which has no place in the control log."""
        self._write_json(batch_id + NOTE_SUFFIX, metadata)

    def forget_metadata(self, kept: Collection[str]) -> None:
        """Remove the notes on batches that nobody knows any more."""
        if self._given is not None:
            for path in self._given.glob(f"batch_*{NOTE_SUFFIX}"):
                if path.stem not in kept:
                    path.unlink(missing_ok=True)

    def metadata(self, batch_id: str) -> dict[str, str] | None:
        """The client's notes on a batch; None where there are none."""
        try:
            return msgspec.json.decode((self._folder / (batch_id + NOTE_SUFFIX)).read_bytes(), type=dict[str, str])
        except (OSError, *UNREADABLE):
            return None

    # ---- the disk

    @property
    def _folder(self) -> Path:
        if self._given is not None:
            return self._given
        with self._lock:
            if self._temporary is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="gptoss-files-")
        return Path(self._temporary.name)

    def _make_folder(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _write_json(self, name: str, value: Any) -> None:
        self._make_folder()
        target = self._folder / name
        part = target.with_suffix(PART_SUFFIX)
        with part.open("wb") as file:
            file.write(msgspec.json.encode(value))
            file.flush()
            os.fsync(file.fileno())
        part.rename(target)
        sync_folder(self._folder)


def new_file_id(ids: IdSource) -> str:
    """An id as OpenAI's files have them."""
    return ids.new_id("file").replace("_", "-", 1)


FILES: web.AppKey[FileStore] = web.AppKey("files", FileStore)
