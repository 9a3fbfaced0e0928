"""Makes the surveys of sealed segments while the server runs, so that the first bundle need not wait for them.

Rules:
- On a thread of its own that begins with the first sealed segment: neither who appends nor who commits does any of it.
- A frame at a time, with a pause after each: the event loop never waits for more than one frame.
- What cannot be read or kept is left to the reader who needs it, and to the words that it finds for that.
"""

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gptoss.errors import JournalError
from gptoss.telemetry.journal_index import JournalIndex
from gptoss.telemetry.segment_file import Frame, SegmentScan, list_segments

PAUSE_S = 0.010
STOP_TIMEOUT_S = 5.0


class SurveyKeeper:
    """See the module.

    Args:
        folder: of the segments.
        pause_s: after each frame.
    """

    def __init__(self, folder: Path, *, pause_s: float = PAUSE_S) -> None:
        self._folder = folder
        self._pause_s = pause_s
        self._has_work = threading.Event()
        self._is_stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._done: set[str] = set()

    def note_sealed(self) -> None:
        """A segment was sealed. Call it from one thread; it does not wait."""
        self._has_work.set()
        if self._thread is None and not self._is_stopping.is_set():
            thread = threading.Thread(target=self._run, name="journal-surveys", daemon=True)
            with suppress(RuntimeError):  # No thread to be had: the journal must not suffer for it.
                thread.start()
                self._thread = thread

    def stop(self) -> None:
        """Leave the segment that is being looked at; idempotent."""
        self._is_stopping.set()
        self._has_work.set()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        while self._has_work.wait() and not self._is_stopping.is_set():
            self._has_work.clear()
            with suppress(OSError, _Stopped):
                self._survey_all()

    def _survey_all(self) -> None:
        """Look at all that were not looked at yet, the newest first."""
        index = JournalIndex(self._folder)
        segments = [segment for segment in list_segments(self._folder) if segment.family == "control"]
        for segment in reversed(segments):
            if segment.path.name in self._done:
                continue
            with suppress(FileNotFoundError, JournalError), SegmentScan(segment.path) as scan:
                if scan.read_footer() is None:
                    continue
                self._done.add(segment.path.name)
                index.survey(segment, scan, self._slowly)

    def _slowly(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        for frame in frames:
            yield frame
            if self._is_stopping.wait(self._pause_s):
                raise _Stopped


class _Stopped(Exception):
    """The server is."""
