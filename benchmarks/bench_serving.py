"""gptoss beside other servers, one at a time on this machine: time to ready, memory, TTFT and tokens a second.

    python benchmarks/bench_serving.py                                  the demo model, beside the peers that are installed
    python benchmarks/bench_serving.py --list-peers                     which those are, and how to install the others
    python benchmarks/bench_serving.py --only vllm --workloads 1,8
    python benchmarks/bench_serving.py --model DIR --peer "mine=PATH/server {model} --port {port}"

Every server is started anew in every round, in turn (A B A B ...), and loaded with the same prompts; the table shows
medians over the rounds and, for each peer, gptoss as a ratio to it. All load one folder: that of ``--model``, or the demo
model's bfloat16 copy, which is prepared first. A peer that does not run is said to, and left out.
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from load_client import Workload, run
from peers import find_peers

from gptoss.config import Settings
from gptoss.engine.model_folder import no_progress
from gptoss.engine.model_source import prepare_in_child

READY_TIMEOUT_S = 300
STOP_TIMEOUT_S = 30
WORKLOADS = {
    "1": Workload("1 stream", streams=1, requests=4),
    "8": Workload("8 streams", streams=8, requests=16),
    "32": Workload("32 streams", streams=32, requests=64),
    "shared": Workload("2 streams, shared prefix", streams=2, requests=8, prompt_words=20, shared_words=600),
}
GPTOSS = f"{sys.executable} -m gptoss serve {{model}} --port {{port}} --data-dir {{scratch}}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def _memory_mb(process: psutil.Process) -> float:
    """Proportional memory of a server with its children, in MB: shared pages are counted once."""
    total = 0
    for part in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += part.memory_full_info().pss
    return total / 1e6


@contextlib.contextmanager
def _server(name: str, command: str, log: Path) -> Iterator[psutil.Process]:
    with log.open("ab") as out:
        process = subprocess.Popen(
            shlex.split(command),
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
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


def measure(name: str, template: str, model: str, names: list[str]) -> dict[str, float]:
    """Start one server, load it with each workload, stop it."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}/v1"
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(tempfile.gettempdir()) / f"bench-{name}.log"
        command = template.format(port=port, model=model, scratch=scratch)
        started = time.perf_counter()
        with _server(name, command, log) as process:
            served: str | None = None
            while served is None or not _is_ready(url, served):
                if time.perf_counter() - started > READY_TIMEOUT_S or process.status() == psutil.STATUS_ZOMBIE:
                    raise RuntimeError(f"{name} did not become ready; see {log}")
                time.sleep(0.1)
                served = _served_name(url, model)
            found = {"ready_s": time.perf_counter() - started}
            for key in names:
                figures = run(url, served, WORKLOADS[key])
                found |= {
                    f"{key} tok/s": figures.tokens_per_s,
                    f"{key} TTFT ms": figures.ttft_ms,
                    f"{key} TPOT ms": figures.tpot_ms,
                }
            found["memory MB"] = _memory_mb(process)
    return found


def _table(results: dict[str, list[dict[str, float]]]) -> str:
    medians = {
        name: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        for name, rounds in results.items()
    }
    peers = [name for name in medians if name != "gptoss"]
    head = ["", *medians, *(f"gptoss / {peer}" for peer in peers)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key, own in medians["gptoss"].items():
        cells = [f"{values[key]:.1f}" for values in medians.values()]
        cells += [f"{own / medians[peer][key]:.2f}" for peer in peers]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _machine() -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return f"{cpu or platform.processor()}, {psutil.cpu_count()} cores, Python {platform.python_version()}"


def _folder(model: str) -> str:
    """What all servers are to load."""
    if model != "demo":
        return model
    cache = Settings().cache_path
    return prepare_in_child("demo", cache_dir=cache, dtype="bfloat16", progress=no_progress).folder


def _rounds(commands: dict[str, str], arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Measure all servers in turn; a peer that does not run is left out from then on."""
    model = _folder(arguments.model)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for number in range(arguments.rounds):
        for name in list(results):
            print(f"round {number + 1} of {arguments.rounds}: {name}", file=sys.stderr, flush=True)
            try:
                results[name].append(measure(name, commands[name], model, arguments.workloads.split(",")))
            except RuntimeError as error:
                if name == "gptoss":
                    raise
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
                del results[name]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument(
        "--only", default="", metavar="NAMES", help="of the peers that are found, comma-separated; or none"
    )
    parser.add_argument("--list-peers", action="store_true", help="say which peers are found, and end")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workloads", default="1,8,32,shared", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--options", default="", help="further options for gptoss serve")
    parser.add_argument("--json", metavar="FILE", help="write every round's figures there")
    arguments = parser.parse_args()
    found, variables, lines = find_peers()
    print("\n".join(["Peers:", *(f"  {line}" for line in lines)]), flush=True)
    if arguments.list_peers:
        return
    os.environ.update({name: value for name, value in variables.items() if name not in os.environ})
    wanted = set(arguments.only.split(",")) if arguments.only else set(found)
    commands = {"gptoss": f"{GPTOSS} {arguments.options}"}
    commands |= {name: command for name, command in found.items() if name in wanted}
    commands |= dict(peer.split("=", 1) for peer in arguments.peer)
    results = _rounds(commands, arguments)
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, {_machine()}, medians of {arguments.rounds} rounds\n\n{_table(results)}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
