"""What benchmarks of servers side by side have in common: starting one, waiting until it serves, and the table."""

import contextlib
import json
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from gptoss.config import Settings
from gptoss.engine.model_folder import no_progress
from gptoss.engine.model_source import prepare_in_child

READY_TIMEOUT_S = 300
STOP_TIMEOUT_S = 30


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(name: str, command: str, log: Path, **variables: str) -> Iterator[psutil.Process]:
    """A server in a process group of its own, until the context ends.

    Raises:
        RuntimeError: it had ended by then.
    """
    with log.open("ab") as out:
        process = subprocess.Popen(
            shlex.split(command),
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **variables},
        )
    try:
        yield psutil.Process(process.pid)
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with status {process.returncode}; see {log}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_ready(name: str, process: psutil.Process, url: str, model: str, log: Path) -> str:
    """The name of the model at a server, once a token can be had there.

    Raises:
        RuntimeError: it ended, or took too long.
    """
    started = time.perf_counter()
    served: str | None = None
    while served is None or not _is_ready(url, served):
        if time.perf_counter() - started > READY_TIMEOUT_S or process.status() == psutil.STATUS_ZOMBIE:
            raise RuntimeError(f"{name} did not become ready; see {log}")
        time.sleep(0.1)
        served = _served_name(url, model)
    return served


def _served_name(url: str, model: str) -> str | None:
    """The name of the model at a server, once it listens; one that cannot list its models is asked for the folder."""
    try:
        with urllib.request.urlopen(f"{url}/models", timeout=2) as answer:
            return json.load(answer)["data"][0]["id"]
    except urllib.error.HTTPError:
        return model
    except (OSError, ValueError, LookupError):
        return None


def _is_ready(url: str, model: str) -> bool:
    """Whether one token can be had: some servers listen long before they can serve."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=READY_TIMEOUT_S) as answer:
            return answer.status == 200
    except OSError:
        return False


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Medians over the rounds, and gptoss, where it is among them, as a ratio to each of the others."""
    medians = {
        name: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        for name, rounds in results.items()
    }
    own = medians.get("gptoss", {})
    peers = [name for name in medians if name != "gptoss"] if own else []
    head = ["", *medians, *(f"gptoss / {peer}" for peer in peers)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key in next(iter(medians.values())):
        cells = [f"{values[key]:.1f}" for values in medians.values()]
        cells += [f"{own[key] / medians[peer][key]:.2f}" if medians[peer][key] else "-" for peer in peers]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> str:
    """What this ran on."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return f"{cpu or platform.processor()}, {psutil.cpu_count()} cores, Python {platform.python_version()}"


def folder_of(model: str) -> str:
    """What all servers are to load: a folder, or ``demo`` for the demo model's bfloat16 copy, which is prepared first."""
    if model != "demo":
        return model
    cache = Settings().cache_path
    return prepare_in_child("demo", cache_dir=cache, dtype="bfloat16", progress=no_progress).folder
