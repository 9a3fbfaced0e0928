"""The preparing child process: ``python -m gptoss.engine.prepare``.

Rules:
- One JSON line in (``PrepareRequest``); JSON lines out (``Progressed``), the last one ``Prepared`` or ``Refused``.
- The protocol owns standard output; whatever libraries print goes to standard error.
- The end of standard input means that the parent is gone: exit at once.
"""

import os
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import msgspec

from gptoss.engine.model_source import (
    ChildLine,
    Prepared,
    PreparedModel,
    PrepareRequest,
    Progressed,
    Refused,
    prepare_model,
)
from gptoss.errors import GptossError, ModelLoadError

PROGRESS_STEPS = 200
"""At most about so many lines a stage, so that a fast download does not flood the pipe."""


def main() -> int:
    """Serve one request; the exit status is 0 if the model was prepared, else 1."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=PrepareRequest)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    reporter = _Reporter(output)
    try:
        reporter.send(Prepared(_prepare(request, reporter)))
    except GptossError as error:
        reporter.send(Refused(error.code, error.message))
        return 1
    return 0


def _prepare(request: PrepareRequest, reporter: "_Reporter") -> PreparedModel:
    try:
        return prepare_model(
            request.model, cache_dir=Path(request.cache_dir), dtype=request.dtype, progress=reporter.progress
        )
    except GptossError:
        raise
    except Exception as error:  # noqa: BLE001 - the edge of the process: the parent gets one line, whatever it is
        cause = " ".join(str(error).split())[:500]
        raise ModelLoadError(f"cannot prepare {request.model}: {type(error).__name__}: {cause}") from None


class _Reporter:
    """Writes lines to the parent, leaving out progress that nobody could see."""

    def __init__(self, output: BinaryIO) -> None:
        self._output = output
        self._stage = ""
        self._next = 0

    def progress(self, stage: str, done: int, total: int, unit: str) -> None:
        """See ``model_folder.Progress``."""
        if stage == self._stage and done < self._next and done != total:
            return
        self._stage = stage
        self._next = done + max(1, total // PROGRESS_STEPS)
        self.send(Progressed(stage, done, total, unit))

    def send(self, line: ChildLine) -> None:
        """Write one line."""
        self._output.write(msgspec.json.encode(line) + b"\n")
        self._output.flush()


def _exit_with_parent() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
