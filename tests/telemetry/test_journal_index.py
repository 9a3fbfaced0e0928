"""The index only says where to look: with or without it, deleted or damaged, the answers are the same."""

import random
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptoss.clock import SystemClock
from gptoss.messages.envelope import Origin, Record
from gptoss.messages.events import ClockAnchored, PromptTokens
from gptoss.telemetry.journal_index import INDEX_NAME
from gptoss.telemetry.segments import SegmentJournal, SegmentOptions, SegmentReader

FILTERS: list[dict[str, Any]] = [
    *({"correlation": f"r{number}"} for number in range(8)),
    *({"stream": f"s{number}"} for number in range(4)),
    {"correlation": "r3", "stream": "s1"},
    {"correlation": "r3", "boot": "b2"},
    {"stream": "s2", "boot": "b1", "after": 40},
    {"stream": "s2", "family": "content"},
    {"correlation": "r1", "family": "content", "limit": 3},
    {"stream": "nothing"},
]


def fill(folder: Path, boot: str, seed: int) -> None:
    draw = random.Random(seed)
    journal = SegmentJournal.open(
        folder, node="n", boot=boot, clock=SystemClock(), options=SegmentOptions(segment_bytes=1500)
    )
    for number in range(150):
        origin = Origin(stream=f"s{draw.randrange(4)}", correlation=draw.choice(["", f"r{draw.randrange(8)}"]))
        journal.append(ClockAnchored(wall_ns=number), origin)
        if draw.random() < 0.3:
            journal.append(PromptTokens(request_id="r", token_ids=(number,)), origin)
        if draw.random() < 0.2:
            assert journal.flush()
    journal.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(tmp_path, "b1", seed=1)
    fill(tmp_path, "b2", seed=2)
    return tmp_path


def scan(folder: Path, *, limit: int | None = None, family: Any = "control", **wanted: Any) -> list[Record]:
    """The same question answered from a full read, without the index."""
    after = wanted.pop("after", -1)
    records = [
        record
        for record in SegmentReader(folder).read(family=family)
        if record.meta.pos > after and all(getattr(record.meta, name) == value for name, value in wanted.items())
    ]
    return records[:limit]


def answers(folder: Path) -> list[list[Record]]:
    reader = SegmentReader(folder)
    return [list(reader.read(**wanted)) for wanted in FILTERS]


def test_the_index_answers_as_a_full_read_does(folder: Path) -> None:
    expected = [scan(folder, **wanted) for wanted in FILTERS]
    assert sum(map(len, expected)) > 300
    assert answers(folder) == expected
    assert (folder / INDEX_NAME).exists()
    assert answers(folder) == expected


def delete(file: Path) -> None:
    file.unlink()


def overwrite(file: Path) -> None:
    file.write_bytes(b"this is no database at all, not even nearly" * 50)


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [delete, overwrite, empty])
def test_a_lost_or_damaged_index_changes_no_answer(folder: Path, damage: Callable[[Path], None]) -> None:
    expected = answers(folder)
    damage(folder / INDEX_NAME)
    assert answers(folder) == expected
    assert answers(folder) == expected


def test_an_index_that_cannot_be_kept_is_built_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [scan(folder, **wanted) for wanted in FILTERS]
    (folder / INDEX_NAME).unlink(missing_ok=True)
    connect = sqlite3.connect

    def refuse_files(file: str, **options: Any) -> sqlite3.Connection:
        if file != ":memory:":
            raise sqlite3.OperationalError("attempt to write a readonly database")
        return connect(file, **options)

    monkeypatch.setattr(sqlite3, "connect", refuse_files)
    assert answers(folder) == expected
    assert not (folder / INDEX_NAME).exists()


def test_the_index_catches_up_with_a_log_that_grows(tmp_path: Path) -> None:
    journal = SegmentJournal.open(
        tmp_path, node="n", boot="b1", clock=SystemClock(), options=SegmentOptions(segment_bytes=700)
    )
    for number in range(60):
        journal.append(ClockAnchored(wall_ns=number), Origin(stream="s", correlation=f"r{number % 2}"))
        if number % 3 == 0:
            assert journal.flush()
        found = [record.meta.pos for record in journal.read(correlation="r0")]
        assert found == list(range(0, number + 1, 2))
    journal.close()


def test_unlinked_segments_are_forgotten(folder: Path) -> None:
    answers(folder)
    for path in sorted(folder.glob("control-000001-*"))[:2]:
        path.unlink()
    expected = [scan(folder, **wanted) for wanted in FILTERS]
    assert answers(folder) == expected
    db = sqlite3.connect(folder / INDEX_NAME)
    known = {name for (name,) in db.execute("SELECT name FROM segments")}
    db.close()
    assert known <= {path.name for path in folder.iterdir()}


def test_an_index_of_another_log_under_the_same_names_is_not_believed(tmp_path: Path) -> None:
    for seed in (1, 2):
        fill(tmp_path / f"log{seed}", f"boot{seed}", seed)
    answers(tmp_path / "log1")
    shutil.copy(tmp_path / "log1" / INDEX_NAME, tmp_path / "log2" / INDEX_NAME)
    assert answers(tmp_path / "log2") == [scan(tmp_path / "log2", **wanted) for wanted in FILTERS]


def test_many_threads_may_ask_while_the_index_is_built(folder: Path) -> None:
    expected = [scan(folder, **wanted) for wanted in FILTERS]
    results: list[list[list[Record]]] = []
    threads = [threading.Thread(target=lambda: results.append(answers(folder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


def test_a_reader_does_not_wait_for_an_index_that_another_process_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(folder)
    monkeypatch.setattr("gptoss.telemetry.journal_index._BUSY_TIMEOUT_S", 0.01)
    (folder / INDEX_NAME).unlink()
    holder = sqlite3.connect(folder / INDEX_NAME, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        assert answers(folder) == expected
    finally:
        holder.close()
