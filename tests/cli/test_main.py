import json
import os
import re
import socket
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gptoss.cli.main import main
from gptoss.cli.serve_options import PANELS
from gptoss.clock import SystemClock
from gptoss.config import Layered, Settings
from gptoss.errors import ModelLoadError
from gptoss.messages import events as ev
from gptoss.messages.envelope import Origin
from gptoss.telemetry.segments import SegmentJournal, SegmentOptions

GPTOSS = [sys.executable, "-m", "gptoss"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("GPTOSS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GPTOSS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("GPTOSS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERMINAL_WIDTH", "100")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Layered]:
    """Stands in for the server: what it was told to serve is listed here."""
    calls: list[Layered] = []

    def run_server(layered: Layered) -> int:
        calls.append(layered)
        if layered.settings.served_model_name == "broken":
            raise ModelLoadError("the weights\nare torn")
        return 7

    module = types.ModuleType("gptoss.server")
    vars(module)["run_server"] = run_server
    monkeypatch.setitem(sys.modules, "gptoss.server", module)
    return calls


def gptoss(*args: str) -> Result:
    return CliRunner().invoke(main, args, prog_name="gptoss")


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


# ---------------------------------------------------------------- help


def test_every_setting_is_an_option_of_serve() -> None:
    listed = [name for rows in PANELS.values() for name in rows]
    assert sorted(listed) == sorted(Settings.__struct_fields__)
    text = gptoss("serve", "--help").output
    assert not [name for name in listed if f"--{name.replace('_', '-')}" not in text]


@pytest.mark.parametrize("command", ["serve", "events", "doctor"])
def test_help_explains_every_command(command: str) -> None:
    assert command in gptoss("--help").output
    result = gptoss(command, "--help")
    assert result.exit_code == 0
    assert f"Usage: gptoss {command}" in result.output


def test_help_keeps_the_lines_of_its_examples() -> None:
    assert re.search(r"^ +gptoss serve +a small demo model", gptoss("--help").output, re.MULTILINE)
    assert "gptoss serve 20b --devices cuda:0 --port 8080\n" in re.sub(r" +\n", "\n", gptoss("serve", "--help").output)


def test_the_version_is_that_of_the_package() -> None:
    assert re.fullmatch(r"gptoss \d+\.\d+\.\d+\n", gptoss("--version").output)


def test_help_loads_neither_the_model_stack_nor_the_server() -> None:
    code = (
        "import sys; from gptoss.cli.main import main; main(['serve', '--help'], standalone_mode=False); "
        "print(sorted({'torch', 'transformers', 'aiohttp', 'gptoss.server', 'gptoss.app'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_misspelt_option_is_refused_with_a_suggestion() -> None:
    result = gptoss("serve", "--prot", "1")
    assert result.exit_code == 2
    assert "--port" in result.output


# ---------------------------------------------------------------- serve


def test_serve_runs_the_server_and_gives_back_its_status(served: list[Layered]) -> None:
    result = gptoss("serve", "20b", "--port", free_port(), "--max-queue", "3", "--auto-port", "--dtype", "float32")
    assert result.exit_code == 7
    settings = served[0].settings
    assert (settings.model, settings.max_queue, settings.auto_port, settings.dtype) == ("20b", 3, True, "float32")
    assert served[0].origins["max_queue"] == "--max-queue"
    assert served[0].origins["queue_timeout_s"] == "default"


def test_flags_go_before_the_environment_and_the_environment_before_the_file(
    served: list[Layered], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "gptoss.toml"
    file.write_text('max_queue = 1\nmax_batch_size = 1\nmax_model_len = 1\nmodel = "20b"\n')
    monkeypatch.setenv("GPTOSS_MAX_QUEUE", "2")
    monkeypatch.setenv("GPTOSS_MAX_BATCH_SIZE", "2")
    gptoss("serve", "--config", str(file), "--port", free_port(), "--max-queue", "3")
    settings = served[0].settings
    assert (settings.max_queue, settings.max_batch_size, settings.max_model_len) == (3, 2, 1)
    assert settings.model == "20b"


def test_a_switch_can_be_turned_off_again(served: list[Layered], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTOSS_AUTO_PORT", "true")
    gptoss("serve", "--port", free_port(), "--no-auto-port")
    assert served[0].settings.auto_port is False


def test_the_model_may_be_an_option_but_not_two_models(served: list[Layered]) -> None:
    gptoss("serve", "--model", "20b", "--port", free_port())
    assert served[0].settings.model == "20b"
    result = gptoss("serve", "20b", "--model", "120b")
    assert result.exit_code == 2
    assert result.stderr == "gptoss: model is given twice: '20b' and --model '120b'\n"


def test_show_config_tells_value_and_origin_and_starts_nothing(served: list[Layered], tmp_path: Path) -> None:
    result = gptoss("serve", "20b", "--show-config", "--port", "99")
    assert result.exit_code == 0
    assert not served
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()}
    assert rows["model"] == ["20b", "--model"]
    assert rows["port"] == ["99", "--port"]
    assert rows["max_queue"] == ["512", "default"]
    assert rows["auto_port"] == ["false", "default"]
    assert rows["num_threads"] == ["auto", "default"]
    assert set(Settings.__struct_fields__) <= set(rows)


def _bad_value(_: Path) -> list[str]:
    return ["--port", "99999"]


def _public_host(_: Path) -> list[str]:
    return ["--host", "0.0.0.0"]


def _no_such_model(folder: Path) -> list[str]:
    return [str(folder / "missing")]


def _empty_model(folder: Path) -> list[str]:
    return [str(folder)]


def _unwritable_data(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return ["--data-dir", str(folder / "file"), "--port", free_port()]


def _missing_file(folder: Path) -> list[str]:
    return ["--config", str(folder / "none.toml")]


def _broken_weights(_: Path) -> list[str]:
    return ["--served-model-name", "broken", "--port", free_port()]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (_bad_value, 2, "--port: port is '99999'"),
        (_public_host, 2, "--allow-public"),
        (_no_such_model, 2, "no such file or folder"),
        (_empty_model, 1, "config.json"),
        (_unwritable_data, 78, "cannot write to the data folder"),
        (_missing_file, 2, "cannot read the settings file"),
        (_broken_weights, 1, "the weights are torn"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    arguments: Callable[[Path], list[str]], status: int, said: str, served: list[Layered], tmp_path: Path
) -> None:
    result = gptoss("serve", *arguments(tmp_path))
    assert result.exit_code == status
    assert result.stdout == ""
    assert re.fullmatch(r"gptoss: [^\n]+\n", result.stderr)
    assert said in result.stderr


def test_a_taken_port_ends_a_real_process_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        done = subprocess.run(
            [*GPTOSS, "serve", "--port", port], capture_output=True, text=True, timeout=20, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith(f"gptoss: port {port} on 127.0.0.1 is in use;")


def test_an_unwritable_data_folder_ends_a_real_process_with_78() -> None:
    command = [*GPTOSS, "serve", "--port", free_port(), "--data-dir", "/proc/gptoss"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 78
    assert re.fullmatch(r"gptoss: cannot write to the data folder /proc/gptoss: [^\n]+--data-dir\n", done.stderr)


# ---------------------------------------------------------------- events


@pytest.fixture
def recorded(tmp_path: Path) -> str:
    """The id of a request in the journal of the default data folder."""
    folder = tmp_path / "data" / "journal"
    journal = SegmentJournal.open(folder, node="n", boot="b", clock=SystemClock(), options=SegmentOptions())
    received = ev.RequestReceived(
        request_id="req_1",
        endpoint="/v1/completions",
        model="demo",
        stream=True,
        num_messages=0,
        priority=0,
        deadline_ns=1,
    )
    rejected = ev.RequestRejected(code="queue_full", message="512 requests wait", status=429, retry_after_s=1.0)
    for event in (received, rejected):
        journal.append(event, Origin(stream="request/req_1", correlation="req_1"))
    journal.close()
    return "req_1"


def test_events_shows_a_timeline_and_says_where_it_is_from(recorded: str, tmp_path: Path) -> None:
    result = gptoss("events", recorded, "--data-dir", str(tmp_path / "data"))
    assert result.exit_code == 0
    assert result.stderr == f"from the journal in {tmp_path}/data/journal\n"
    assert result.stdout.startswith("req_1  rejected  demo  /v1/completions")
    assert "429 queue_full: 512 requests wait" in result.stdout
    assert "\x1b" not in result.stdout


def test_events_falls_back_to_the_default_folder_when_no_server_answers(
    recorded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTOSS_PORT", free_port())
    result = gptoss("events", recorded)
    assert result.exit_code == 0
    assert "from the journal in" in result.stderr


def test_events_as_json_is_one_object_a_line(recorded: str, tmp_path: Path) -> None:
    result = gptoss("events", recorded, "--data-dir", str(tmp_path / "data"), "--json")
    assert [json.loads(line)["type"] for line in result.stdout.splitlines()] == ["RequestReceived", "RequestRejected"]


def test_events_of_an_unknown_request_is_one_clear_line(recorded: str, tmp_path: Path) -> None:
    result = gptoss("events", "req_9", "--data-dir", str(tmp_path / "data"))
    assert result.exit_code == 1
    assert result.stderr == f"gptoss: the journal in {tmp_path}/data/journal knows no request req_9\n"
    assert result.stdout == ""


def test_events_takes_a_server_or_a_folder_but_not_both() -> None:
    result = gptoss("events", "req_1", "--url", "http://127.0.0.1:1", "--data-dir", ".")
    assert result.exit_code == 2
    assert "exclude each other" in result.stderr


def test_events_of_a_server_that_is_gone_is_one_clear_line() -> None:
    result = gptoss("events", "req_1", "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.startswith("gptoss: no server answers at http://127.0.0.1:1")
