"""The input of a batch: one request a line, as JSON. Pure but for reading the file.

Rules:
- All lines are looked at before one runs. What is wrong is told with its line, ``FAULTS_MAX`` at most; codes are OpenAI's.
- A line's body is looked at no further than its size, its depth and its model: what it means is said when it runs, and
  goes to the error file if it is refused then.
- Faults quote nothing from the file: they are recorded in the control log.
- Empty lines count as lines and as nothing else.
"""

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from gptoss.errors import RequestError
from gptoss.http.decode import check_depth
from gptoss.messages.batch import BatchFault

ITEMS_MAX = 50_000
FAULTS_MAX = 100

CustomId = Annotated[str, Meta(min_length=1, max_length=512)]


class BatchLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line."""

    custom_id: CustomId
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


class _Model(msgspec.Struct, frozen=True):
    """As much of a body as is looked at beforehand."""

    model: str | None = None


_line_decoder = msgspec.json.Decoder(BatchLine)
_model_decoder = msgspec.json.Decoder(_Model)
_FIELDS = ("custom_id", "method", "url", "body")


class Lines:
    """Where the items of a file begin.

    Args:
        path: of the file.
        line_bytes_max: longest line.
    """

    def __init__(self, path: Path, line_bytes_max: int) -> None:
        self._path = path
        self._line_bytes_max = line_bytes_max
        self._offsets = array("Q")

    def __len__(self) -> int:
        return len(self._offsets)

    def index(self, endpoint: str, served_model: str) -> tuple[BatchFault, ...]:
        """Read the file through, note where its items begin, and say what is wrong with it."""
        del self._offsets[:]
        checker = _Checker(endpoint, served_model, self._line_bytes_max)
        for number, offset, line in self._read():
            if len(self._offsets) == ITEMS_MAX:
                return (BatchFault("too_many_tasks", f"the file has more than {ITEMS_MAX} requests"),)
            if not line.strip():
                continue
            self._offsets.append(offset)
            checker.check(number, line)
            if len(checker.faults) >= FAULTS_MAX:
                break
        if not self._offsets:
            return (BatchFault("empty_file", "the file has no requests"),)
        return tuple(checker.faults)

    def locate(self) -> None:
        """Find the items of a file that was looked at before, in an earlier run of the server."""
        del self._offsets[:]
        self._offsets.extend(offset for _, offset, line in self._read() if line.strip())

    def item(self, index: int) -> BatchLine:
        """An item of a file that has no faults."""
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            return _line_decoder.decode(file.readline(self._line_bytes_max + 2))

    def _read(self) -> Iterator[tuple[int, int, bytes]]:
        """Number from 1, place and bytes of each line; of one that is too long only the first are given."""
        offset, number = 0, 0
        with self._path.open("rb") as file:
            while line := file.readline(self._line_bytes_max + 2):
                number += 1
                begin = offset
                offset += len(line)
                given = line
                while not line.endswith(b"\n") and (line := file.readline(self._line_bytes_max + 2)):
                    offset += len(line)
                yield number, begin, given


class _Checker:
    """Looks at lines one after the other."""

    def __init__(self, endpoint: str, served_model: str, line_bytes_max: int) -> None:
        self.faults: list[BatchFault] = []
        self._endpoint = endpoint
        self._served_model = served_model
        self._line_bytes_max = line_bytes_max
        self._seen: set[str] = set()

    def check(self, number: int, line: bytes) -> None:
        """Take the next line."""
        fault = self._fault_of(line)
        if fault is not None:
            self.faults.append(msgspec.structs.replace(fault, line=number))

    def _fault_of(self, line: bytes) -> BatchFault | None:
        if len(line.rstrip(b"\r\n")) > self._line_bytes_max:
            return BatchFault("line_too_long", f"this line is longer than {self._line_bytes_max} bytes")
        try:
            line.decode()
            check_depth(line)
            msgspec.json.decode(line)
        except (RequestError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return BatchFault("invalid_json_line", "this line is not parseable as valid JSON")
        try:
            found = _line_decoder.decode(line)
            model = _model_decoder.decode(found.body).model
        except msgspec.ValidationError as error:
            field = next((name for name in _FIELDS if f"`{name}`" in str(error) or f"$.{name}" in str(error)), "body")
            return BatchFault("invalid_request", f"{field} is missing or not what it must be", param=field)
        if found.url != self._endpoint:
            return BatchFault("url_mismatch", f"url differs from the batch's endpoint {self._endpoint}", param="url")
        if model is not None and model != self._served_model:
            return BatchFault("model_not_found", f"this server has {self._served_model} and no other", param="model")
        if found.custom_id in self._seen:
            return BatchFault(
                "duplicate_custom_id", "another request of the file has this custom_id", param="custom_id"
            )
        self._seen.add(found.custom_id)
        return None
