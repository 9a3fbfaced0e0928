"""``gptoss bundle`` as a user meets it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gptoss.cli.main import main
from gptoss.telemetry.bundle_format import Redaction
from gptoss.telemetry.bundle_writer import Purpose, write_bundle
from gptoss.telemetry.recording import JournalRecording, ListRecording

Run = Callable[..., Result]


@pytest.fixture
def run(bad_night: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``gptoss bundle`` in an empty folder; ``DATA`` stands for the folder of the bad night."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def invoke(*arguments: str) -> Result:
        words = [str(bad_night) if word == "DATA" else word for word in arguments]
        result = CliRunner().invoke(main, ["bundle", *words])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return invoke


def create(run: Run, *arguments: str) -> Path:
    result = run("create", "--data-dir", "DATA", *arguments)
    assert result.exit_code == 0, result.output
    return Path(result.stdout.split()[1])


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_request_becomes_a_file_with_its_name_and_a_word_on_what_to_do_next(run: Run, tmp_path: Path) -> None:
    result = run("create", "--data-dir", "DATA", "--request", "night-07")
    assert result.exit_code == 0
    assert listing(tmp_path) == {"gptoss-night-07.zip"}
    assert "missing    nothing: every decision in it replays" in result.stdout
    assert "gptoss replay gptoss-night-07.zip" in result.stdout
    assert "none: no prompts, no answers; other requests under pseudonyms" in result.stdout


def test_inspect_says_what_happened(run: Run) -> None:
    shown = run("inspect", str(create(run, "--errors"))).stdout
    for said in (
        "requests that failed",
        "rejected memory_exhausted",
        "failed aborted_by_crash",
        "gptoss 0.1.0 on",
    ):
        assert said in shown
    assert "content=full" in shown, "settings that are not the default are shown"
    assert "memory_exhausted" in shown
    found = json.loads(run("inspect", str(create(run, "--last", "2", "-o", "two.zip")), "--json").stdout)
    assert len(found["summary"]["requests"]) == 2
    assert found["manifest"]["format"] == "gptoss-bundle"


def test_a_file_that_is_there_is_not_replaced_unless_told(run: Run, tmp_path: Path) -> None:
    Path("here.zip").write_text("precious")
    again = ("create", "--data-dir", "DATA", "--last", "1", "-o", "here.zip")
    result = run(*again)
    assert (result.exit_code, Path("here.zip").read_text()) == (2, "precious")
    assert "here.zip is there already; choose another name with -o, or replace it with --force" in result.stderr
    assert run(*again, "--force").exit_code == 0
    assert Path("here.zip").read_bytes().startswith(b"PK")
    assert listing(tmp_path) == {"here.zip"}
    create(run, "--request", "night-01")
    assert run("create", "--data-dir", "DATA", "--request", "night-01").exit_code == 2


def test_a_folder_as_output_takes_a_file_of_a_good_name(run: Run) -> None:
    Path("out").mkdir()
    assert create(run, "--request", "night-02", "-o", "out") == Path("out/gptoss-night-02.zip")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--request", "nobody"), 1, "no request has the id 'nobody'"),
        (("--last", "0"), 2, "--last: last is '0'"),
        (("--window", "soon"), 2, "--window: window is 'soon'"),
        (("--slow", "1h"), 1, "nothing is recorded that would be requests slower than 3600 s"),
        (("--limit-mb", "x"), 2, "--limit-mb"),
        (("-o", "none/x.zip"), 2, "there is no folder none"),
        (("--url", "http://127.0.0.1:9"), 2, "exclude each other"),
    ],
)
def test_what_cannot_be_made_is_one_line_and_leaves_nothing(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], status: int, said: str
) -> None:
    result = run("create", "--data-dir", "DATA", *arguments)
    assert result.exit_code == status
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert listing(tmp_path) == set()


def test_neither_a_server_nor_a_journal_is_said(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTOSS_PORT", "9")
    monkeypatch.setenv("GPTOSS_DATA_DIR", str(tmp_path / "none"))
    result = run("create")
    assert result.exit_code == 1
    assert "no server answers at http://127.0.0.1:9" in result.stderr
    assert "pass --url or --data-dir" in result.stderr
    assert run("create", "--url", "ftp://x").exit_code == 2


def test_a_sound_bundle_is_verified_and_an_incomplete_one_told(run: Run, bad_night: Path) -> None:
    path = create(run, "--request", "night-07", "--content", "tokens")
    result = run("verify", str(path))
    assert (result.exit_code, "nothing is missing" in result.stdout) == (0, True)
    assert json.loads(run("verify", str(path), "--json").stdout)["missing"] == []
    records = [r for r in JournalRecording(bad_night / "journal").records() if r.meta.type != "EngineLoaded"]
    with Path("holed.zip").open("wb") as file:
        write_bundle(
            file, ListRecording(records), Purpose(created_ns=0, created_by="", reason="", redaction=Redaction())
        )
    result = run("verify", "holed.zip")
    assert (result.exit_code, "EngineLoaded is forgotten" in result.stdout) == (1, True)
    assert "missing    executor/cpu:0: " in run("inspect", "holed.zip").stdout


def test_a_doctored_byte_is_found(run: Run) -> None:
    path = create(run, "--request", "night-07")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for command in ("verify", "inspect"):
        result = run(command, str(path))
        assert result.exit_code == 2
        assert result.stderr.startswith(f"gptoss: {path}")
        assert result.stderr.count("\n") == 1


def test_redacting_takes_out_and_never_puts_in(run: Run) -> None:
    path = create(run, "--request", "night-07", "--content", "tokens")
    shown = json.loads(run("redact", str(path), "-o", "less.zip", "--content", "hash", "--everybody", "--json").stdout)
    manifest = shown["manifest"]
    assert (manifest["redaction"]["content"], manifest["redaction"]["pseudonymised"]) == ("hash", "everybody")
    assert b"night-07" not in json.dumps(manifest).encode()
    assert "anon_" in run("inspect", "less.zip").stdout
    assert "night-" not in run("inspect", "less.zip", "--json").stdout
    assert run("verify", "less.zip").exit_code == 0
    refused = run("redact", "less.zip", "-o", "more.zip", "--content", "tokens")
    assert (refused.exit_code, Path("more.zip").exists()) == (1, False)
    assert "holds only hash" in refused.stderr
    assert run("redact", "less.zip", "-o", "same.zip").exit_code == 2


def test_a_diff_names_what_differs(run: Run) -> None:
    one = create(run, "--request", "night-07", "--content", "tokens")
    other = create(run, "--request", "s1", "--content", "tokens")
    assert run("diff", str(one), str(one)).exit_code == 0
    result = run("diff", str(one), str(other))
    assert result.exit_code == 1
    assert "kv_budget_bytes" in result.stdout
    found = json.loads(run("diff", str(one), str(other), "--json").stdout)
    assert found["same"] is False
    assert [(r["request_id"], r["a"] is None, r["b"] is None) for r in found["requests"]] == [
        ("night-07", False, True),
        ("s1", True, False),
    ]


def test_a_newer_format_is_status_3_and_a_foreign_file_status_2_without_a_traceback(tmp_path: Path) -> None:
    import zipfile

    newer = tmp_path / "newer.zip"
    with zipfile.ZipFile(newer, "w") as archive:
        archive.writestr("manifest.json", '{"format": "gptoss-bundle", "format_version": 99}')
    foreign = tmp_path / "x.zip"
    foreign.write_bytes(b"hello")
    for path, status in ((newer, 3), (foreign, 2), (tmp_path / "none.zip", 2), (tmp_path, 2)):
        command = [sys.executable, "-m", "gptoss", "bundle", "inspect", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
        assert done.returncode == status
        assert done.stdout == ""
        assert done.stderr.startswith(f"gptoss: {path}: ")
        assert done.stderr.count("\n") == 1


def test_an_option_without_a_value_means_its_default(run: Run) -> None:
    result = run("create", "--data-dir", "DATA", "--slow")
    assert "slower than 10 s" in result.stderr


def test_what_every_command_prints_as_json_is_json(run: Run) -> None:
    path = str(create(run, "--last", "1"))
    outputs: list[Any] = [
        run("create", "--data-dir", "DATA", "-o", "all.zip", "--json"),
        run("inspect", path, "--json"),
        run("verify", path, "--json"),
        run("diff", path, path, "--json"),
        run("redact", path, "-o", "r.zip", "--everybody", "--json"),
    ]
    assert all(isinstance(json.loads(result.stdout), dict) for result in outputs)
