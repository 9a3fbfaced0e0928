"""``gptoss replay``: what it prints, and its exit status."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from scenarios import FAKE, all_of, bundles_folder, fakes, request

from gptoss.app import ServingSystem
from gptoss.cli.main import main
from gptoss.config import Settings
from gptoss.testing import FakeRenderer

CLEAN = bundles_folder() / "clean.gptoss.zip"
DOCTORED = bundles_folder() / "doctored.gptoss.zip"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["replay", *map(str, arguments)])


def test_the_same_is_0_and_says_so() -> None:
    result = run(CLEAN)
    assert result.exit_code == 0
    assert "every decision is as recorded" in result.stdout
    assert "admission" in result.stdout


def test_a_divergence_is_1_and_shows_record_fields_and_causes() -> None:
    result = run(DOCTORED)
    assert result.exit_code == 1
    for words in ("first difference", "max_tokens", "takes BeginRequest", "says AdmissionDecided", "diverged"):
        assert words in result.stdout


def test_json_is_for_machines() -> None:
    found = msgspec.json.decode(run(DOCTORED, "--json").stdout)
    assert (found["mode"], found["same"], found["num_diverged"]) == ("verify", False, 1)
    assert found["first"]["fields"][0]["field"] == "max_tokens"
    assert found["first"]["chain"][-1]["pos"] == found["first"]["pos"]


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut"])
def test_a_bad_bundle_is_2_and_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gptoss.zip"
    data = {"empty": b"", "text": b"not a ZIP" * 50, "cut": CLEAN.read_bytes()[:-200]}.get(damage)
    if data is not None:
        path.write_bytes(data)
    result = run(path)
    assert result.exit_code == 2
    assert result.stderr.startswith("gptoss: ")
    assert result.stderr.count("\n") == 1


def test_a_bundle_of_the_future_is_3(tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "future.gptoss.zip"
    with zipfile.ZipFile(CLEAN) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "manifest.json":
                manifest = msgspec.json.decode(data)
                manifest["format_version"] += 1
                data = msgspec.json.encode(manifest)
            new.writestr(name, data)
    result = run(path)
    assert result.exit_code == 3
    assert "format version" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give a bundle"),
        ((CLEAN, "--data-dir", "."), "give a bundle"),
        ((CLEAN, "--tokens", "--step"), "exclude each other"),
        ((CLEAN, "--force"), "belong to --tokens"),
        ((CLEAN, "--policy", "/nowhere.toml"), "cannot read"),
    ],
)
def test_options_that_make_no_sense_are_2(arguments: tuple[object, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_what_if_prints_before_and_after(tmp_path: Path) -> None:
    policy = tmp_path / "changed.toml"
    policy.write_text("kv_budget_mb = 1\n")
    result = run(bundles_folder() / "shrunk.gptoss.zip", "--policy", policy)
    assert result.exit_code == 0
    assert "kv_budget_mb: 0 -> 1" in result.stdout
    assert "estimated" in result.stdout
    found = msgspec.json.decode(run(bundles_folder() / "shrunk.gptoss.zip", "--policy", policy, "--json").stdout)
    assert (found["mode"], found["recorded"]["shrunk"], found["estimated"]["shrunk"]) == ("what-if", 1, 0)


def test_a_dead_servers_journal_replays(tmp_path: Path) -> None:
    async def serve() -> None:
        settings = Settings(data_dir=str(tmp_path), devices="cpu")
        async with ServingSystem(settings, drivers=fakes(), renderer=FakeRenderer(), model=FAKE) as system:
            await system.ready(30.0)
            await all_of(system, request(request_id="here"))

    asyncio.run(serve())
    assert run("--data-dir", tmp_path).exit_code == 0
    assert run("--data-dir", tmp_path, "--request", "here").exit_code == 0
    unknown = run("--data-dir", tmp_path, "--request", "gone")
    assert unknown.exit_code == 1
    assert "knows no request gone" in unknown.stderr
    assert run("--data-dir", tmp_path / "none").exit_code == 2
