"""``deploy/backup.sh``: a copy of a running server's data folder is a data folder."""

import asyncio
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from gptoss.actors.generation import GenerateRequest
from gptoss.app import ServingSystem
from gptoss.config import ENV_PREFIX, Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage
from gptoss.messages import events as ev
from gptoss.messages.sampling import SamplingParams
from gptoss.telemetry.journal_index import INDEX_NAME
from gptoss.telemetry.segments import SegmentReader
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeRenderer

SCRIPT = Path(__file__).parents[2] / "deploy" / "backup.sh"
MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)


def backup(data: Path, target: Path, command: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}
    environment["GPTOSS"] = str(command)
    return subprocess.run(
        [SCRIPT, data, target], env=environment, capture_output=True, text=True, check=False, timeout=50
    )


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """``gptoss`` of the very sources under test."""
    path = tmp_path / "gptoss"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m gptoss "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.mark.slow
async def test_a_backup_of_a_running_server_has_what_was_acknowledged(tmp_path: Path, command: Path) -> None:
    data, target = tmp_path / "data", tmp_path / "copy"
    settings = Settings(devices="cpu", data_dir=str(data))
    async with ServingSystem(settings, drivers=lambda _: FakeDriver(), renderer=FakeRenderer(), model=MODEL) as system:
        await system.ready(10.0)
        request = GenerateRequest(
            messages=(ChatMessage(role="user", content="Hi"),), sampling=SamplingParams(max_tokens=5), request_id="kept"
        )
        await system.submit(request).text()
        (data / "files").mkdir()
        (data / "files" / "file-1").write_text("uploaded", encoding="utf-8")
        store = sqlite3.connect(data / "responses.sqlite")
        store.execute("PRAGMA journal_mode=WAL")
        store.execute("CREATE TABLE kept (id TEXT)")
        store.execute("INSERT INTO kept VALUES ('answer')")
        store.commit()
        await asyncio.to_thread(system.journal.flush)
        assert list(SegmentReader(data / "journal").read(stream="admission"))
        done = await asyncio.to_thread(backup, data, target, command)
        assert done.returncode == 0, done.stderr
        store.close()
    ended = [
        record.event
        for record in SegmentReader(target / "journal").read()
        if isinstance(record.event, ev.RequestCompleted)
    ]
    assert len(ended) == 1
    assert (target / "node.key").read_bytes() == (data / "node.key").read_bytes()
    assert (target / "files" / "file-1").read_text(encoding="utf-8") == "uploaded"
    copy = sqlite3.connect(target / "responses.sqlite")
    assert copy.execute("SELECT id FROM kept").fetchall() == [("answer",)]
    copy.close()
    index = sqlite3.connect(target / "journal" / INDEX_NAME)
    assert index.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert index.execute("SELECT count(*) FROM frames").fetchone()[0] > 0
    index.close()
    assert not list(tmp_path.glob("*.part"))


def test_a_backup_overwrites_nothing_and_needs_a_journal(tmp_path: Path, command: Path) -> None:
    (tmp_path / "data" / "journal").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    assert backup(tmp_path / "data", tmp_path / "there", command).returncode == 2
    assert backup(tmp_path / "nothing", tmp_path / "new", command).returncode == 2
    assert not (tmp_path / "new").exists()
