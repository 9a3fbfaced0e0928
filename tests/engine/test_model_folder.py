"""What makes a model folder complete, and that publishing a prepared one is safe to repeat, share and kill."""

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptoss.engine import model_folder
from gptoss.engine.model_folder import (
    Manifest,
    check_folder,
    find_prepared,
    folder_name,
    no_progress,
    publish,
    read_manifest,
)
from gptoss.errors import ModelLoadError

CONFIG = {"model_type": "llama", "max_position_embeddings": 512}


def make_folder(folder: Path, *names: str) -> Path:
    """A model folder with a config and the given (empty) files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in names:
        (folder / name).write_bytes(b"{}")
    return folder


def test_a_folder_without_a_config_is_refused_and_a_gguf_in_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no config\.json$"):
        check_folder(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match=r"pass the file itself: .*m\.gguf"):
        check_folder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path, name, "tokenizer.json")
    with pytest.raises(ModelLoadError, match=f"only pickled weights .{name}.*safetensors or take a GGUF"):
        check_folder(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="has no weights"):
        check_folder(make_folder(tmp_path, "tokenizer.json"))


def test_missing_shards_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path, "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "../model-3.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"2 of 3 weight files are missing, first \.\./model-3"):
        check_folder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\ufeff{}", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    make_folder(tmp_path, "model.safetensors", "tokenizer.json")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"config\.json is not a JSON object"):
        check_folder(tmp_path)


def test_a_folder_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)  # root may read everything, so permissions cannot be tried for real
    with pytest.raises(ModelLoadError, match=r"cannot read .*: Permission denied"):
        check_folder(tmp_path)


# ---------------------------------------------------------------- publishing


def a_source(tmp_path: Path, content: bytes = b"weights") -> tuple[Path, Manifest]:
    source = tmp_path / "m.gguf"
    source.write_bytes(content)
    stat = source.stat()
    manifest = Manifest(
        source=str(source),
        source_bytes=stat.st_size,
        source_mtime_ns=stat.st_mtime_ns,
        sha256=hashlib.sha256(content).hexdigest(),
        dtype="bfloat16",
    )
    return source, manifest


def writer(content: bytes, calls: list[Path]) -> Callable[[Path], dict[str, str]]:
    def write(folder: Path) -> dict[str, str]:
        calls.append(folder)
        (folder / "config.json").write_bytes(content)
        return {"library": "1.0"}

    return write


def test_a_published_folder_is_found_until_its_source_changes(tmp_path: Path) -> None:
    source, manifest = a_source(tmp_path)
    models = tmp_path / "models"
    publish(models / "m-1", manifest, writer(b"{}", []), no_progress)
    assert find_prepared(models, source, "bfloat16") == models / "m-1"
    assert find_prepared(models, source, "float32") is None
    os.utime(source, ns=(1, 1))
    assert find_prepared(models, source, "bfloat16") is None


def test_a_folder_that_lost_or_shortened_a_file_is_not_taken(tmp_path: Path) -> None:
    source, manifest = a_source(tmp_path)
    target = tmp_path / "models" / "m"
    calls: list[Path] = []
    publish(target, manifest, writer(b"{}", calls), no_progress)
    (target / "config.json").write_bytes(b"")
    assert find_prepared(tmp_path / "models", source, "bfloat16") is None
    publish(target, manifest, writer(b"{}", calls), no_progress)
    assert len(calls) == 2
    assert find_prepared(tmp_path / "models", source, "bfloat16") == target


def test_a_folder_of_another_format_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, manifest = a_source(tmp_path)
    target = tmp_path / "models" / "m"
    publish(target, manifest, writer(b"old", []), no_progress)
    monkeypatch.setattr(model_folder, "FORMAT", model_folder.FORMAT + 1)
    assert find_prepared(tmp_path / "models", source, "bfloat16") is None


def test_a_failed_preparation_leaves_nothing_behind(tmp_path: Path) -> None:
    _, manifest = a_source(tmp_path)
    target = tmp_path / "models" / "m"

    def fail(folder: Path) -> dict[str, str]:
        (folder / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelLoadError, match="No space left on device; free some space"):
        publish(target, manifest, fail, no_progress)
    assert [path.name for path in target.parent.iterdir()] == ["m.lock"]


def test_what_a_killed_preparation_left_is_cleared(tmp_path: Path) -> None:
    _, manifest = a_source(tmp_path)
    target = tmp_path / "models" / "m"
    leftover = target.with_name("m.partial")
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    publish(target, manifest, writer(b"{}", []), no_progress)
    assert {path.name for path in target.iterdir()} == {"config.json", "gptoss.json"}
    assert not leftover.exists()


def test_two_that_prepare_at_once_do_the_work_once(tmp_path: Path) -> None:
    _, manifest = a_source(tmp_path)
    target = tmp_path / "models" / "m"
    calls: list[Path] = []
    threads = [
        threading.Thread(target=publish, args=(target, manifest, writer(b"{}", calls), no_progress)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(calls) == 1
    assert read_manifest(target)


def test_waiting_for_another_process_is_told_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, manifest = a_source(tmp_path)
    monkeypatch.setattr(model_folder, "LOCK_POLLS_MAX", 3)
    monkeypatch.setattr(model_folder, "LOCK_POLL_S", 0.001)
    stages: list[str] = []

    def report(stage: str, *_: object) -> None:
        stages.append(stage)

    with (tmp_path / "m.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ModelLoadError, match="another process has held"):
            publish(tmp_path / "m", manifest, writer(b"", []), report)
    assert stages == ["waiting for another process that prepares the same model"] * 3


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    _, manifest = a_source(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"cannot write the prepared model .*set another cache_dir"):
        publish(tmp_path / "file" / "m", manifest, writer(b"", []), no_progress)


def test_folder_names_hold_no_separators() -> None:
    assert folder_name("../a b/c", "12", "bf16") == "a-b-c-12-bf16"
