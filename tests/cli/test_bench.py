"""``gptoss bench``: its tests run, end by themselves, and count right; their figures are of no interest here."""

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gptoss.bench.fake_system import FakeShape
from gptoss.bench.over_http import own_server
from gptoss.cli.main import main

pytestmark = pytest.mark.slow
PERCENTILES = {"count", "mean", "p50", "p90", "p99", "max"}


def gptoss(*args: str) -> Result:
    return CliRunner().invoke(main, args, prog_name="gptoss")


def figures(*args: str) -> Any:
    result = gptoss("bench", *args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_mailbox_test_counts_every_request_once_and_times_each_stage() -> None:
    found = figures("mailbox", "-n", "60", "--in-flight", "8", "--output", "1-4", "--slots", "4", "--executors", "3")
    assert (found["ended"], found["began"], found["completed"], found["unfinished"]) == ("all requests", 60, 60, 0)
    assert 60 <= found["tokens"] <= 240
    assert found["refused"] == found["failed"] == {}
    for stage in ("late", "admission", "route", "first token", "end", "end, since due"):
        assert found["stages"][stage].keys() == PERCENTILES
        assert found["stages"][stage]["count"] == 60
    means = [found["stages"][stage]["mean"] for stage in ("admission", "route", "first token", "end")]
    assert means == sorted(means)
    assert found["depths"].keys() == {"memory", "admission", "router", "telemetry", "executors"}
    assert found["requests_per_s"] > 0
    assert found["records_per_request"] > 20


def test_an_open_loop_does_not_wait_and_refusals_are_counted_by_their_reason() -> None:
    options = ("--rate", "1000", "--burst", "40", "--slots", "1", "--step-ms", "5", "--max-queue", "10")
    found = figures("mailbox", "-n", "40", "--output", "2", *options)
    assert found["refused"] == {"queue_full": 40 - found["completed"]}
    assert 11 <= found["completed"] < 40


def test_the_journal_of_a_test_can_be_kept_and_replays_the_same(tmp_path: Path) -> None:
    figures("mailbox", "-n", "20", "--priority", "0,5", "--data-dir", str(tmp_path))
    replayed = gptoss("replay", "--data-dir", str(tmp_path))
    assert replayed.exit_code == 0, replayed.output
    assert len(list((tmp_path / "journal").glob("*control*"))) == 1


def test_the_http_test_starts_its_own_server_and_times_what_comes_back() -> None:
    found = figures("http", "-n", "30", "--in-flight", "5", "--output", "8")
    assert (found["completed"], found["errors"], found["tokens"]) == (30, {}, 240)
    assert found["model"] == "fake"
    assert found["ttft"]["count"] == found["end"]["count"] == 30
    assert 0 < found["ttft"]["p50"] <= found["end"]["p99"]
    assert found["server_cpu_us_per_token"] > 0


def test_the_http_test_counts_refusals_by_code_and_sends_what_it_was_told() -> None:
    shape = FakeShape(slots=1, step_ms=20, max_queue=2)
    with own_server(shape) as server:
        burst = ("--url", server.url, "--rate", "1000", "--burst", "20", "-n", "20", "--output", "4")
        found = figures("http", *burst)
        wrong = figures("http", "--url", server.url, "-n", "3", "--extra", '{"max_tokens": -1}')
        unknown = figures("http", "--url", server.url, "-n", "2", "--model", "no-such-model")
    assert found["errors"] == {"429 queue_full": 20 - found["completed"]}
    assert found["completed"] >= 3
    assert found["server_cpu_us_per_token"] is None
    assert wrong["errors"] == {"400 invalid_request": 3}
    assert unknown["errors"] == {"404 model_not_found": 2}


def test_tables_name_every_stage_and_code() -> None:
    text = gptoss("bench", "mailbox", "-n", "5").output
    for word in ("5 requests", "requests/s", "admission", "first token", "end, since due", "router", "p99"):
        assert word in text
    text = gptoss("bench", "http", "-n", "5", "--rate", "100", "--step-ms", "5").output
    for word in ("fake at http://127.0.0.1:", "tokens/s", "between chunks", "end, since due", "late"):
        assert word in text


def interrupted(*args: str, once: Callable[[], bool]) -> None:
    """Give an endless test Ctrl-C once something is so, and look at what it tells."""
    command = [sys.executable, "-m", "gptoss", "bench", *args, "--rate", "50", "-n", "100000", "-t", "300", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as test:
        while not once():
            assert test.poll() is None
            time.sleep(0.05)
        test.send_signal(signal.SIGINT)
        text, _ = test.communicate(timeout=20)
    assert test.returncode == 130
    found = json.loads(text)
    assert found["ended"] == "interrupted"
    assert 0 < found["completed"] <= found["began"] < 100_000


def test_ctrl_c_tells_what_was_done_on_the_mailboxes(tmp_path: Path) -> None:
    def has_served() -> bool:
        return any(b"RequestCompleted" in file.read_bytes() for file in (tmp_path / "journal").glob("*control*"))

    interrupted("mailbox", "--data-dir", str(tmp_path), once=has_served)


def test_ctrl_c_tells_what_was_done_over_http() -> None:
    with own_server(FakeShape()) as server:

        def has_served() -> bool:
            with urllib.request.urlopen(server.url.replace("/v1", "/stats"), timeout=20) as answer:
                return json.load(answer)["requests"]["completed"] > 20

        interrupted("http", "--url", server.url, once=has_served)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("mailbox", "--rate", "5", "--in-flight", "5"), "--rate opens the loop and --in-flight closes it"),
        (("mailbox", "--output", "9-3"), "--output is '9-3'"),
        (("mailbox", "--prompt", "0"), "--prompt is '0'"),
        (("mailbox", "--priority", "high"), "the priorities are 'high'"),
        (("http", "--url", "http://192.0.2.1:8000/v1"), "192.0.2.1 is not this machine; pass --allow-remote"),
        (("http", "--url", "ftp://127.0.0.1/v1"), "the URL is 'ftp://127.0.0.1/v1'"),
        (("http", "--url", "http://127.0.0.1:1/v1"), "no server answers at http://127.0.0.1:1/v1"),
        (("http", "--extra", "[]"), "--extra is '[]', which is no JSON object"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(args: tuple[str, ...], message: str) -> None:
    result = gptoss("bench", *args)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"gptoss: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--requests", "--duration", "--executors"])
def test_every_bound_is_enforced(option: str) -> None:
    assert gptoss("bench", "mailbox", option, "100000000").exit_code == 2


def test_help_has_examples() -> None:
    assert "mailbox" in gptoss("bench", "--help").output
    assert "gptoss bench mailbox --rate 200 -t 60" in gptoss("bench", "mailbox", "--help").output
    assert "gptoss bench http --in-flight 64" in gptoss("bench", "http", "--help").output
