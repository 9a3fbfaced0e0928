"""What the model argument may be, what is refused and why, and that preparing is safe to repeat, share and kill."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptoss.engine.model_folder import check_folder, no_progress, read_manifest
from gptoss.engine.model_source import (
    PreparedModel,
    find_ready,
    prepare_in_child,
    resolve_model,
)
from gptoss.errors import ConfigError, ModelLoadError

CONFIG = {"model_type": "llama", "max_position_embeddings": 512}


def make_folder(folder: Path, *names: str) -> Path:
    """A model folder with a config and the given (empty) files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in names:
        (folder / name).write_bytes(b"{}")
    return folder


# ---------------------------------------------------------------- resolving


def test_short_names_stand_for_hub_models() -> None:
    assert (resolve_model("20b").kind, resolve_model("20b").location) == ("hub", "openai/gpt-oss-20b")
    assert resolve_model("20b").model_name == "gpt-oss-20b"
    assert resolve_model("120b").location == "openai/gpt-oss-120b"
    assert (resolve_model("demo").kind, resolve_model("demo").model_name) == ("demo", "smollm2-135m-instruct")


def test_a_hub_id_is_served_under_its_last_part() -> None:
    spec = resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (spec.kind, spec.model_name) == ("hub", "SmolLM2-135M-Instruct")


def test_what_exists_on_disk_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "org" / "name")
    spec = resolve_model("org/name")
    assert (spec.kind, spec.location, spec.model_name) == ("folder", str(tmp_path / "org" / "name"), "name")
    assert resolve_model(".").model_name == tmp_path.name


def test_a_gguf_file_is_served_under_its_stem(tmp_path: Path) -> None:
    (tmp_path / "Tiny.Q4_0.gguf").write_bytes(b"GGUF")
    spec = resolve_model(str(tmp_path / "Tiny.Q4_0.gguf"))
    assert (spec.kind, spec.model_name) == ("gguf", "Tiny.Q4_0")


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        ("", "give demo, 20b"),
        ("a\0b", "give demo, 20b"),
        ("7b", "neither demo, 20b or 120b"),
        ("a/b/c", "neither demo, 20b or 120b"),
        ("../nowhere", "no such file or folder"),
        ("/nowhere/model", "no such file or folder"),
        ("missing.gguf", "no such file or folder"),
        ("https://huggingface.co/org/name", "neither demo, 20b or 120b"),
        ("org/na me", "neither demo, 20b or 120b"),
    ],
)
def test_anything_else_is_refused_with_what_would_be_accepted(model: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause) as caught:
        resolve_model(model)
    assert "\n" not in caught.value.message


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"not \.gguf"):
        resolve_model(str(tmp_path / "pytorch_model.bin"))


# ---------------------------------------------------------------- folders


def test_a_complete_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tiny", "model.safetensors", "tokenizer.json")
    before = sorted(folder.iterdir())
    model = prepare_in_child(str(folder), cache_dir=tmp_path / "cache", dtype="auto", progress=no_progress)
    assert model == PreparedModel(folder=str(folder), model_name="tiny", source=str(folder), max_model_len=512)
    assert sorted(folder.iterdir()) == before
    assert not (tmp_path / "cache").exists()


def test_a_folder_without_tokenizer_json_gets_one_in_an_overlay(tmp_path: Path, demo_folder: str) -> None:
    source = make_folder(tmp_path / "slow", "model.safetensors")
    tokenizer = json.loads((Path(demo_folder) / "tokenizer.json").read_text())
    (source / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    merges = (" ".join(pair) for pair in tokenizer["model"]["merges"])
    (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    prepared = [
        prepare_in_child(str(source), cache_dir=tmp_path / "cache", dtype="auto", progress=no_progress)
        for _ in range(2)
    ]
    overlay = Path(prepared[0].folder)
    assert prepared[0] == prepared[1]
    assert overlay.parent == tmp_path / "cache" / "models"
    assert not (source / "tokenizer.json").exists()
    assert (overlay / "tokenizer.json").stat().st_size > 1_000_000
    assert (overlay / "model.safetensors").resolve() == source / "model.safetensors"
    assert check_folder(overlay) == CONFIG


# ---------------------------------------------------------------- the demo, for real


def test_the_demo_is_prepared_whole(demo_folder: str) -> None:
    names = {path.name for path in Path(demo_folder).iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    } <= names
    config = check_folder(Path(demo_folder))
    assert config["torch_dtype" if "torch_dtype" in config else "dtype"] == "bfloat16"
    assert "quantization_config" not in config
    manifest = read_manifest(Path(demo_folder))
    assert manifest
    assert set(manifest.versions) == {"torch", "transformers", "gguf"}


def test_a_prepared_demo_is_found_without_a_child(
    demo_folder: str, demo_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    model = prepare_in_child("demo", cache_dir=demo_cache, dtype="auto", progress=no_progress)
    assert (model.folder, model.max_model_len) == (demo_folder, 8192)
    assert find_ready(resolve_model("demo"), cache_dir=demo_cache, dtype="float32") is None


# ---------------------------------------------------------------- the child


def test_a_broken_gguf_file_is_one_line_from_the_child(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\xff" * 100)
    stages: list[str] = []

    def report(stage: str, *_: object) -> None:
        stages.append(stage)

    with pytest.raises(ModelLoadError, match=r"cannot read .*broken\.gguf as a GGUF model") as caught:
        prepare_in_child(str(broken), cache_dir=tmp_path / "cache", dtype="auto", progress=report)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600
    assert stages[0] == "hashing the GGUF file"
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()] == []


def test_without_a_network_a_hub_model_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with pytest.raises(ModelLoadError, match=r"hub cannot be reached: run `hf download openai/gpt-oss-20b`"):
        prepare_in_child("20b", cache_dir=tmp_path, dtype="auto", progress=no_progress)


def stand_in_child(monkeypatch: pytest.MonkeyPatch, code: str) -> list["subprocess.Popen[bytes]"]:
    """Let ``prepare_in_child`` start ``code`` instead of the real child; returns what it started."""
    started: list[subprocess.Popen[bytes]] = []
    real: Any = subprocess.Popen

    def start(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        assert command[1:] == ["-m", "gptoss.engine.prepare"]
        started.append(real([sys.executable, "-c", code], **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    return started


def test_a_child_that_dies_is_reported_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_child(monkeypatch, "import sys; input(); sys.exit('out of luck')")
    with pytest.raises(ModelLoadError, match=r"preparing 20b broke off \(exit status 1: out of luck\)"):
        prepare_in_child("20b", cache_dir=tmp_path, dtype="auto", progress=no_progress)


def test_a_killed_child_is_reported_by_its_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_child(monkeypatch, "import os; input(); os.kill(os.getpid(), 9)")
    with pytest.raises(ModelLoadError, match=r"broke off \(signal 9, perhaps out of memory\)"):
        prepare_in_child("20b", cache_dir=tmp_path, dtype="auto", progress=no_progress)


def test_cancelling_ends_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = stand_in_child(monkeypatch, "import time; time.sleep(600)")
    with pytest.raises(ModelLoadError, match="cancelled"):
        prepare_in_child(
            "20b", cache_dir=tmp_path, dtype="auto", progress=no_progress, is_cancelled=lambda: bool(started)
        )
    assert started[0].returncode == -9


def test_an_error_in_the_progress_callback_ends_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = '{"type": "Progressed", "stage": "s", "done": 1, "total": 2, "unit": "u"}'
    started = stand_in_child(monkeypatch, f"import time; print('{line}', flush=True); time.sleep(600)")

    def fail(*args: object) -> None:
        raise KeyboardInterrupt(*args)

    with pytest.raises(KeyboardInterrupt) as caught:
        prepare_in_child("20b", cache_dir=tmp_path, dtype="auto", progress=fail)
    assert caught.value.args == ("s", 1, 2, "u")
    assert started[0].returncode == -9


def test_the_child_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gptoss.engine.prepare"]
    request = {"model": "demo", "cache_dir": str(tmp_path), "dtype": "float32"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stdout
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()
        assert b"hashing" in child.stdout.readline()
        child.stdin.close()
        assert child.wait(timeout=30) == 1


def test_nothing_but_the_protocol_reaches_standard_output(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "m", "model.safetensors", "tokenizer.json")
    request = json.dumps({"model": str(source), "cache_dir": str(tmp_path), "dtype": "auto"})
    code = (
        "import sys, gptoss.engine.prepare as prepare\n"
        "real = prepare.prepare_model\n"
        "prepare.prepare_model = lambda *args, **kw: (print('noise'), real(*args, **kw))[1]\n"
        "sys.exit(prepare.main())\n"
    )
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as child:
        assert child.stdin
        assert child.stdout
        assert child.stderr
        child.stdin.write(request + "\n")
        child.stdin.flush()  # and kept open: its end would end the child
        assert [json.loads(line)["type"] for line in child.stdout] == ["Prepared"]
        assert "noise" in child.stderr.read()


def test_importing_the_quick_path_needs_no_model_stack() -> None:
    code = (
        "import sys, gptoss.engine.model_source\n"
        "print([n for n in ('torch', 'transformers', 'numpy', 'huggingface_hub', 'tokenizers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert done.stdout.strip() == "[]"
