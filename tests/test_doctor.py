import io
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from click.testing import CliRunner
from huggingface_hub import constants
from rich.console import Console

from gptoss import doctor
from gptoss.cli.main import main
from gptoss.config import Settings
from gptoss.doctor import Finding, examine, render
from gptoss.engine import demo
from gptoss.engine.native import build


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache of its own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), port=0)


def always(answer: object) -> Callable[..., object]:
    def function(*_: object) -> object:
        return answer

    return function


def find(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def look(settings: Settings, name: str) -> Finding:
    """One finding, without the slow import of torch."""
    checks = [check for check in doctor.CHECKS if check is not doctor._machine]
    return find([finding for check in checks for finding in check(settings)], name)


def test_a_sound_machine_has_no_failures_and_nothing_is_changed(settings: Settings, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    findings = examine(settings)
    assert not [finding for finding in findings if finding.status == "fail"]
    areas = list(dict.fromkeys(finding.area for finding in findings))
    assert areas == ["Software", "Machine", "Storage", "Models", "Network"]
    assert {"torch", "CPU", "memory", "data folder", "demo", "gpt-oss-20b", "gpt-oss-120b"} <= {
        f.name for f in findings
    }
    assert sorted(tmp_path.rglob("*")) == before


def test_every_warning_and_failure_says_what_to_do(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", always(Usage(100, 100, 0)))
    monkeypatch.setattr(demo, "find_demo_gguf", always(None))
    bad = [finding for finding in examine(settings) if finding.status != "ok"]
    assert {finding.name for finding in bad} >= {"data folder", "cache folder", "demo"}
    assert not [finding for finding in bad if not finding.advice]


def test_an_unwritable_folder_is_a_failure(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", always(False))
    finding = look(settings, "data folder")
    assert finding.status == "fail"
    assert "--data-dir" in finding.advice


def test_a_file_in_place_of_a_folder_is_a_failure(settings: Settings) -> None:
    settings.data_path.write_text("")
    assert look(settings, "data folder").status == "fail"


def test_a_package_that_is_too_old_is_a_failure(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        return "4.0" if name == "transformers" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    finding = look(settings, "transformers")
    assert finding.status == "fail"
    assert finding.detail.startswith("4.0, needs ")
    assert finding.advice.startswith("pip install 'transformers")


def test_a_missing_package_is_a_failure_and_a_missing_extra_is_not(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in {"pykka", "codespell"}:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert look(settings, "pykka").detail.startswith("not installed, needs ")
    extra = look(settings, "extra dev")
    assert extra.status == "ok"
    assert "1 missing" in extra.detail


def test_a_broken_torch_is_a_failure(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    finding = find(list(doctor._machine(settings)), "GPU")
    assert finding.status == "fail"
    assert finding.detail.startswith("torch cannot be imported")


def test_every_gpu_is_listed_with_its_memory(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def mem_get_info(index: int) -> tuple[int, int]:
        return (index + 1) << 30, 80 << 30

    def get_device_name(index: int) -> str:
        return f"GPU {index}"

    cuda = SimpleNamespace(
        is_available=always(True),
        device_count=always(2),
        mem_get_info=mem_get_info,
        get_device_name=get_device_name,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    findings = list(doctor._machine(settings))
    assert find(findings, "cuda:1").detail == "GPU 1, 2.0 GiB free of 80.0 GiB"
    assert not [finding for finding in findings if finding.name == "GPU"]


def test_little_memory_is_a_warning(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cgroup_room", lambda: 100 << 20)
    finding = find(list(doctor._machine(settings)), "memory")
    assert (finding.status, finding.detail[:8]) == ("warn", "100 MiB ")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_taken_port_is_a_warning(taken_port: int, tmp_path: Path) -> None:
    finding = look(Settings(port=taken_port, data_dir=str(tmp_path), cache_dir=str(tmp_path)), "port")
    assert finding.status == "warn"
    assert "running already" in finding.advice


def test_a_public_host_without_consent_is_a_failure(tmp_path: Path) -> None:
    finding = look(Settings(host="0.0.0.0", data_dir=str(tmp_path), cache_dir=str(tmp_path)), "port")
    assert finding.status == "fail"


def test_a_model_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    settings = Settings(model=str(tmp_path / "none"), data_dir=str(tmp_path), cache_dir=str(tmp_path), port=0)
    assert look(settings, "configured").status == "fail"


def test_cached_models_are_listed_with_their_size(settings: Settings, hub: Path) -> None:
    blobs = hub / "models--openai--gpt-oss-20b" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc").write_bytes(bytes(3 << 20))
    assert look(settings, "gpt-oss-20b").detail.startswith("3 MiB in the hub cache; takes 39.0 GiB of memory")
    assert "takes 217.6 GiB of memory" in look(settings, "gpt-oss-120b").detail
    (blobs / "def.incomplete").write_bytes(b"")
    assert look(settings, "gpt-oss-20b").status == "warn"


def test_a_prepared_folder_that_is_broken_is_a_warning(settings: Settings) -> None:
    folder = settings.cache_path / "models" / "demo-abc"
    folder.mkdir(parents=True)
    (folder / "gptoss.json").write_text("{")
    finding = look(settings, "prepared")
    assert finding.status == "warn"
    assert str(folder) in finding.advice


def test_the_text_fits_80_columns() -> None:
    findings = [
        Finding(area="Storage", name="data folder", status="ok", detail="/a/long/path" * 12),
        Finding(area="Network", name="port", status="warn", detail="in use", advice="take another " * 10),
    ]
    out = io.StringIO()
    render(findings, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "ready to serve, 1 to know about"
    render([Finding(area="A", name="n", status="fail", detail="d", advice="a")], Console(file=out, width=80))
    assert out.getvalue().splitlines()[-1] == "1 to mend before serving, 0 to know about"


def test_the_command_exits_with_1_only_for_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding(area="A", name="n", status="warn", detail="d", advice="a")]
    monkeypatch.setattr(doctor, "examine", always(found))
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == [{"area": "A", "name": "n", "status": "warn", "detail": "d", "advice": "a"}]
    found.append(Finding(area="A", name="m", status="fail", detail="d", advice="a"))
    assert CliRunner().invoke(main, ["doctor"]).exit_code == 1


def test_a_missing_compiler_is_a_warning_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(cache_dir=str(tmp_path))
    (found,) = [finding for finding in examine(settings) if finding.name == "CPU kernels"]
    assert (found.status, "at the first start" in found.detail) == ("ok", True)
    monkeypatch.setattr(build, "COMPILERS", ())
    (found,) = [finding for finding in examine(settings) if finding.name == "CPU kernels"]
    assert (found.status, "apt install g++" in found.advice) == ("warn", True)
