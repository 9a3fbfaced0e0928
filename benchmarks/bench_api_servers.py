"""gptoss beside vLLM's API server, both with engines that compute nothing: what HTTP and the way to the engine cost.

    python benchmarks/bench_api_servers.py                            both, if vLLM is installed (bench_serving.py --list-peers)
    python benchmarks/bench_api_servers.py --only gptoss --parts flood,calm
    python benchmarks/bench_api_servers.py --vllm ENV/bin/vllm --rounds 3

One client loads both with the same prompts, in turn (A B A B ...); the table has medians over the rounds. Both render prompts
with the tokenizer and chat template of one folder, and both have their engine in a process of its own, behind a real
scheduler and a real socket: gptoss has ``gptoss.bench.fake_worker``, vLLM its own EngineCore with ``vllm_fake_engine``.

"us" is processor time of the serving process; "with its engine" is that of the engine's process too. vLLM makes text of tokens in
the serving process, gptoss in the engine's, which pretends here: "with texts" adds what gptoss' detokenizer takes, measured alone.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
from peers import PEERS, find_peers
from side_by_side import folder_of, free_port, machine, running, table, wait_ready

from gptoss.bench.fake_system import FakeShape
from gptoss.bench.load import Load, Span
from gptoss.bench.over_http import HttpOptions, HttpReport, load_http, own_server
from gptoss.engine.detokenizer import Detokenizer
from gptoss.engine.prompt import load_tokenizer

SLOTS = 256
MAX_MODEL_LEN = 4096
MAX_QUEUE = 100_000
"""vLLM knows no bound; where the machine is busy, neither is to refuse what the other keeps waiting."""
SETTLE_S = 0.5
"""What a server does after its last answer is part of its work."""
WARM_UP = Load(requests=32, in_flight=16, prompt=Span(8, 8), output=Span(8, 8))
DETOKENIZED = 20_000
VLLM = (
    "{program} serve {model} --host 127.0.0.1 --port {port} --dtype bfloat16 --max-model-len {length} --max-num-seqs {slots} "
    "--distributed-executor-backend vllm_fake_engine.FakeExecutor --additional-config '{{\"step_ms\": {step_ms}}}'"
)
Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A server that serves.

    Attributes:
        url: its ``/v1``; ``model`` is its model's name there.
        texts_us: what a token's text takes, where that is left to the engine.
        chunk_field: of a request, where one can ask for so many tokens in a chunk.
    """

    url: str
    model: str
    process: psutil.Process
    texts_us: float = 0.0
    chunk_field: str = ""


# ---------------------------------------------------------------- servers


@contextlib.contextmanager
def gptoss_server(model: str, step_ms: float) -> Iterator[Endpoint]:
    """The server of ``gptoss bench http``, with a real tokenizer."""
    with own_server(FakeShape(slots=SLOTS, step_ms=step_ms, model=model, max_queue=MAX_QUEUE)) as server:
        process = psutil.Process(server.pid)
        name = wait_ready("gptoss", process, server.url, model, Path(os.devnull))
        yield Endpoint(server.url, name, process, detokenizer_us(model))


@contextlib.contextmanager
def vllm_server(program: str, model: str, step_ms: float) -> Iterator[Endpoint]:
    """vLLM as it comes, but for its executor."""
    port = free_port()
    log = Path(tempfile.gettempdir()) / "bench-vllm-api.log"
    command = VLLM.format(program=program, model=model, port=port, step_ms=step_ms, length=MAX_MODEL_LEN, slots=SLOTS)
    variables = {
        **next(peer.variables for peer in PEERS if peer.name == "vllm"),
        "PYTHONPATH": str(Path(__file__).resolve().parent),
        "PATH": f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with running("vllm", command, log, **variables) as process:
        url = f"http://127.0.0.1:{port}/v1"
        name = wait_ready("vllm", process, url, model, log)
        yield Endpoint(url, name, process, chunk_field="stream_interval")


def detokenizer_us(model: str) -> float:
    """Microseconds of processor time in which gptoss' detokenizer makes text of a token."""
    tokenizer = load_tokenizer(model)
    detokenizer, vocabulary = Detokenizer(tokenizer), tokenizer.get_vocab_size()
    began = time.process_time()
    for position in range(DETOKENIZED):
        detokenizer.push((1000 + position * 7 % 1000) % vocabulary)  # the tokens of ``vllm_fake_engine``
    return (time.process_time() - began) / DETOKENIZED * 1e6


def processor_us(process: psutil.Process) -> tuple[float, float]:
    """Processor time so far in microseconds: of a process, and of it with its children."""
    used: list[float] = []
    for part in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = part.cpu_times()
            used.append((times.user + times.system) * 1e6)
    return used[0], sum(used)


def load_server(endpoint: Endpoint, load: Load, chunk: int = 0) -> tuple[HttpReport, float, float]:
    """Load a server: what came of it, and the processor time that it took, alone and with its engine's.

    Args:
        endpoint: the server.
        load: what to feed.
        chunk: tokens of a chunk, where one can ask for that; 0 leaves it to the server.

    Raises:
        RuntimeError: an answer did not come whole.
    """
    before = processor_us(endpoint.process)
    fields: dict[str, object] = {"model": endpoint.model}
    if chunk and endpoint.chunk_field:
        fields[endpoint.chunk_field] = chunk
    options = HttpOptions(url=endpoint.url, fields=fields)
    report = asyncio.run(load_http(load, options, asyncio.Event(), lambda _: None))
    time.sleep(SETTLE_S)
    after = processor_us(endpoint.process)
    if report.errors or report.unfinished or not report.completed:
        raise RuntimeError(f"{endpoint.url}: {report.errors or 'no errors'}, {report.unfinished} unfinished")
    return report, after[0] - before[0], after[1] - before[1]


# ---------------------------------------------------------------- parts


def tokens_of(name: str, endpoint: Endpoint, load: Load, chunk: int) -> Figures:
    """Streams of many tokens."""
    report, alone_us, with_engine_us = load_server(endpoint, load, chunk)
    each_us = alone_us / report.tokens
    return {
        f"{name}: us a token": each_us,
        f"{name}: us a token, with texts": each_us + endpoint.texts_us,
        f"{name}: us a token, with its engine": with_engine_us / report.tokens,
        f"{name}: tokens a chunk": report.tokens / max(1, report.chunks),
        f"{name}: ms between chunks, p50": report.gap.p50,
        f"{name}: ms between chunks, p99": report.gap.p99,
    }


def requests_of(name: str, endpoint: Endpoint, load: Load, _: int) -> Figures:
    """Requests of one token."""
    report, alone_us, with_engine_us = load_server(endpoint, load)
    return {
        f"{name}: us a request": alone_us / report.completed,
        f"{name}: us a request, with its engine": with_engine_us / report.completed,
        f"{name}: requests/s": report.requests_per_s,
        f"{name}: ms to the end, p50": report.end.p50,
        f"{name}: ms to the end, p99": report.end.p99,
    }


@dataclasses.dataclass(frozen=True)
class Part:
    """What is measured: with which load, of what, how long a step of the engine takes, and how many tokens a chunk is to have."""

    load: Callable[[argparse.Namespace], Load]
    figures: Callable[[str, Endpoint, Load, int], Figures]
    step_ms: float = 0.0
    chunk: int = 0


def flood(options: argparse.Namespace) -> Load:
    lengths = Span(options.tokens, options.tokens)
    requests = options.streams * options.repeats
    return Load(requests=requests, in_flight=options.streams, output=lengths, duration_s=options.seconds)


def paced(options: argparse.Namespace) -> Load:
    lengths = Span(options.paced_tokens, options.paced_tokens)
    return Load(requests=options.streams, in_flight=options.streams, output=lengths, duration_s=options.seconds)


def calm(options: argparse.Namespace) -> Load:
    return Load(requests=options.requests, rate=200, output=Span(1, 1), duration_s=options.seconds)


def full(options: argparse.Namespace) -> Load:
    return Load(requests=options.requests, in_flight=options.streams, output=Span(1, 1), duration_s=options.seconds)


PARTS = {
    "flood": Part(flood, tokens_of),
    "chunks": Part(flood, tokens_of, chunk=64),
    "calm": Part(calm, requests_of),
    "full": Part(full, requests_of),
    "paced": Part(paced, tokens_of, step_ms=30.0),
}
"""Tokens as fast as they can; the same in chunks of 64, where one can ask for that; 200 requests/s; requests as fast as they can;
a token for each stream every 30 ms."""
Start = Callable[[str, float], contextlib.AbstractContextManager[Endpoint]]


def measure(start: Start, model: str, names: list[str], options: argparse.Namespace) -> Figures:
    """Measure one server in all parts; it is started anew for another length of its engine's steps."""
    found: Figures = {}
    for step_ms in dict.fromkeys(PARTS[name].step_ms for name in names):
        with start(model, step_ms) as endpoint:
            load_server(endpoint, WARM_UP)
            for name in names:
                if (part := PARTS[name]).step_ms == step_ms:
                    found |= part.figures(name, endpoint, part.load(options), part.chunk)
    return found


def vllm_program(given: str) -> str | None:
    """The command of vLLM; says on standard error what would install it where there is none."""
    commands, _, lines = find_peers()
    program = shutil.which(given) if given else commands.get("vllm", "").partition(" ")[0]
    if not program:
        line = next(line for line in lines if line.startswith("vllm"))
        print(f"{given} is no program" if given else line, file=sys.stderr, flush=True)
    return program or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a folder with a tokenizer and a config; no weights are read")
    parser.add_argument("--vllm", default="", metavar="PROGRAM", help="its command, where it is not found by itself")
    parser.add_argument("--only", choices=["gptoss", "vllm"], help="one of the two")
    parser.add_argument("--parts", default=",".join(PARTS), help="of those that this is without it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024, help="of a stream, as fast as they can")
    parser.add_argument("--repeats", type=int, default=4, help="streams one after another in each place")
    parser.add_argument("--paced-tokens", type=int, default=256, help="of a stream, one a step of 30 ms")
    parser.add_argument("--requests", type=int, default=2000, help="of one token")
    parser.add_argument("--seconds", type=float, default=60.0, help="at most so long for one measurement")
    parser.add_argument("--json", metavar="FILE", help="write every round's figures there")
    options = parser.parse_args()
    names = options.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    program = None if options.only == "gptoss" else vllm_program(options.vllm)
    starts: dict[str, Start] = {} if options.only == "vllm" else {"gptoss": gptoss_server}
    if program:
        starts["vllm"] = lambda model, step_ms: vllm_server(program, model, step_ms)
    model = folder_of(options.model)
    results: dict[str, list[Figures]] = {name: [] for name in starts}
    for number in range(options.rounds):
        for name, start in starts.items():
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            results[name].append(measure(start, model, names, options))
    print(f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, medians of {options.rounds} rounds\n\n{table(results)}")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
