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
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from load_client import Workload, run
from peers import find_peers
from side_by_side import folder_of, free_port, machine, running, table, wait_ready

WORKLOADS = {
    "1": Workload("1 stream", streams=1, requests=4),
    "8": Workload("8 streams", streams=8, requests=16),
    "32": Workload("32 streams", streams=32, requests=64),
    "shared": Workload("2 streams, shared prefix", streams=2, requests=8, prompt_words=20, shared_words=600),
}
GPTOSS = f"{sys.executable} -m gptoss serve {{model}} --port {{port}} --data-dir {{scratch}}"


def _memory_mb(process: psutil.Process) -> float:
    """Proportional memory of a server with its children, in MB: shared pages are counted once."""
    total = 0
    for part in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += part.memory_full_info().pss
    return total / 1e6


def measure(name: str, template: str, model: str, names: list[str]) -> dict[str, float]:
    """Start one server, load it with each workload, stop it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(tempfile.gettempdir()) / f"bench-{name}.log"
        command = template.format(port=port, model=model, scratch=scratch)
        started = time.perf_counter()
        with running(name, command, log) as process:
            served = wait_ready(name, process, url, model, log)
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


def _rounds(commands: dict[str, str], arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Measure all servers in turn; a peer that does not run is left out from then on."""
    model = folder_of(arguments.model)
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
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, {machine()}, medians of {arguments.rounds} rounds\n\n{table(results)}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
