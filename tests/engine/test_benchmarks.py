"""The engine's benchmarks run and say what they are for; their figures are of no interest here."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
Folders = Callable[[str], str]


def run(script: str, *options: str, **variables: str) -> str:
    """What a benchmark prints."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(text: str) -> list[list[str]]:
    """Cells of the lines of all Markdown tables, rulers left out."""
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_the_engine_benchmark_measures_streams_contexts_and_the_parts_of_a_step(tiny_folder: Folders) -> None:
    options = ["--kernels", "torch", "--threads", "1", "--budget-s", "0.05"]
    text = run(
        "bench_engine.py",
        "--model",
        tiny_folder("gpt_oss"),
        "--streams",
        "1,3",
        "--contexts",
        "300",
        "--parts",
        "2",
        *options,
    )
    found = {row[0]: row[1:] for row in rows(text)}
    assert {"1", "3", "300", "linear layers", "experts", "attention", "lm_head", "sampling"} <= found.keys()
    shares = [int(cells[0].rpartition("(")[2].rstrip("%)")) for cells in found.values() if cells[0].endswith("%)")]
    assert shares[-1] == 100
    assert 95 <= sum(shares[:-1]) <= 105


def test_perplexity_compares_ways_with_the_first(tiny_folder: Folders, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A short text of plain bytes, read twice. " * 8)
    text = run(
        "perplexity.py",
        *("--model", tiny_folder("llama"), "--text", str(tmp_path / "text.txt"), "--window", "128", "--threads", "1"),
        *("--ways", "float32,bfloat16-torch"),
    )
    head, reference, other = rows(text)
    assert head[3:] == ["perplexity", "against the first", "KL", "same best"]
    assert reference[4:] == ["+0.00%", "0.00000", "100.0%"]
    assert 0.0 < float(other[5]) < 0.1
    assert float(reference[3]) == pytest.approx(float(other[3]), rel=0.05)


def test_the_serving_benchmark_finds_the_peers_that_are_installed_and_says_how_to_install_the_others(
    tmp_path: Path,
) -> None:
    program = tmp_path / "vllm" / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    found = run("bench_serving.py", "--list-peers", PEERS_HOME=str(tmp_path), PATH="").splitlines()
    assert found[0] == "Peers:"
    assert found[1].strip() == f"vllm: {program}"
    for line in found[2:]:
        assert re.fullmatch(rf"  transformers(-cb)?: not found; .*{tmp_path}/hf/bin/pip install .*serving.*", line)


ONE_BROKEN = """
import argparse, bench_serving
def measure(name, *_):
    if name == "broken":
        raise RuntimeError("it ended with status 1")
    return {"ready_s": 4.0 if name == "gptoss" else 8.0}
bench_serving.measure = measure
arguments = argparse.Namespace(model="DIR", rounds=2, workloads="1")
results = bench_serving._rounds({"gptoss": "a", "broken": "b", "other": "c"}, arguments)
print(bench_serving.table(results))
"""


def test_a_peer_that_does_not_run_is_left_out_of_the_table() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ONE_BROKEN],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    head, *measured = rows(done.stdout)
    assert head[-3:] == ["gptoss", "other", "gptoss / other"]
    assert measured == [["ready_s", "4.0", "8.0", "0.50"]]
    assert done.stderr.count("broken is left out: it ended with status 1") == 1


def test_the_gpu_benchmark_can_be_rehearsed_without_one(tmp_path: Path) -> None:
    text = run(
        "bench_gpu.py",
        *("--device", "cpu", "--layers", "2", "--tiny", "--streams", "1,2", "--prompt", "40", "--output", "6"),
        *("--ways", "gptoss,generate", "--write", str(tmp_path / "table.md")),
    )
    assert re.search(r"gptoss: PackedRunner; KV in \d+ pages\n", text)
    measured = [row for row in rows(text) if row[0] in {"1", "2"}]
    assert [row[:2] for row in measured] == [["1", "gptoss"], ["1", "generate"], ["2", "gptoss"], ["2", "generate"]]
    assert all(float(cell) > 0 for row in measured for cell in row[2:6])
    assert text.strip() in (tmp_path / "table.md").read_text()


def test_the_gpu_benchmark_says_in_one_line_that_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA devices")
    assert re.fullmatch(r"bench_gpu: no CUDA device [^\n]*\n", run("bench_gpu.py"))


def test_the_grammar_benchmark_walks_answers_of_every_form(tiny_folder: Folders) -> None:
    text = run(
        "bench_grammar.py", "--tokenizer", tiny_folder("llama"), "--vocab", "300", "--end", "256", "--tokens", "40"
    )
    found = {row[0]: row[1:] for row in rows(text)}
    assert {"any object", "small schema", "schema of 60 fields", "regex"} <= found.keys()
    assert 0 < int(found["regex"][0]) <= 40


TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture
def talking_folder(tiny_folder: Folders, tmp_path: Path) -> str:
    """A folder with a chat template, for servers whose engines pretend."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


FEW = ("--rounds", "1", "--streams", "2", "--tokens", "20", "--repeats", "1", "--paced-tokens", "3", "--requests", "5")


def test_the_api_server_benchmark_measures_our_server_where_there_is_no_vllm(
    talking_folder: str, tmp_path: Path
) -> None:
    figures = tmp_path / "figures.json"
    text = run(
        "bench_api_servers.py",
        *("--model", talking_folder, *FEW, "--parts", "flood,full", "--json", str(figures)),
        PEERS_HOME=str(tmp_path),
        PATH="",
    )
    head, *measured = rows(text)
    assert head == ["gptoss"]
    found = {row[0]: float(row[1]) for row in measured}
    assert {name.partition(":")[0] for name in found} == {"flood", "full"}
    assert 1.0 <= found["flood: tokens a chunk"] <= 20.0
    assert found["flood: us a token, with texts"] > found["flood: us a token"] >= 0
    assert 0 < found["full: ms to the end, p50"] <= found["full: ms to the end, p99"]
    (kept,) = json.loads(figures.read_text())["gptoss"]
    assert kept.keys() == found.keys()


STAND_IN = """#!{python}
import asyncio, importlib.util, json, sys
sys.path[:0] = {path!r}
assert importlib.util.find_spec("vllm_fake_engine"), "its executor cannot be imported"
from gptoss.bench.fake_system import FakeShape, fake_system
from gptoss.http.server import serve
from gptoss.serving_context import make_app

verb, model, *rest = sys.argv[1:]
given = dict(zip(rest[::2], rest[1::2], strict=True))
assert (verb, given["--distributed-executor-backend"]) == ("serve", "vllm_fake_engine.FakeExecutor")

async def main():
    shape = FakeShape(model=model, journal="memory", **json.loads(given["--additional-config"]))
    async with fake_system(shape) as (serving, _):
        await serve(make_app(serving), given["--host"], int(given["--port"]))
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_the_api_server_benchmark_starts_vllm_with_an_executor_that_pretends_and_shows_ratios(
    talking_folder: str, tmp_path: Path
) -> None:
    program = tmp_path / "vllm"
    program.write_text(STAND_IN.format(python=sys.executable, path=sys.path))
    program.chmod(0o755)
    text = run(
        "bench_api_servers.py",
        *("--model", talking_folder, *FEW, "--parts", "paced", "--vllm", str(program)),
        TMPDIR=str(tmp_path),
    )
    head, *measured = rows(text)
    assert head == ["gptoss", "vllm", "gptoss / vllm"]
    found = {row[0]: row[1:] for row in measured}
    assert found["paced: tokens a chunk"] == ["1.0", "1.0", "1.00"]
    for cells in (found["paced: ms between chunks, p50"], found["paced: ms between chunks, p99"]):
        own, other, ratio = map(float, cells)
        assert ratio == pytest.approx(own / other, rel=0.1)
    assert float(found["paced: ms between chunks, p50"][1]) > 15  # the stand-in was told how long a step takes


def test_the_api_server_benchmark_refuses_what_it_does_not_have() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench_api_servers.py"), "--parts", "flood,other"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert "no such part: other; there are flood, chunks, calm, full, paced" in done.stderr


def test_the_executor_for_vllm_gives_a_token_to_each_request_whose_prompt_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = {
        "vllm.v1.core.sched.output": ["SchedulerOutput"],
        "vllm.v1.executor.abstract": ["Executor"],
        "vllm.v1.kv_cache_interface": ["FullAttentionSpec"],
        "vllm.v1.outputs": ["ModelRunnerOutput"],
        "vllm.v1.worker.worker_base": ["CompilationTimes"],
    }
    for name, classes in parts.items():  # vLLM itself is not among the packages of the tests
        module = types.ModuleType(name)
        for each in classes:
            setattr(module, each, type(each, (types.SimpleNamespace,), {}))
        monkeypatch.setitem(sys.modules, name, module)
    found = runpy.run_path(str(BENCHMARKS / "vllm_fake_engine.py"))
    executor = found["FakeExecutor"](vllm_config=types.SimpleNamespace(additional_config={}))
    executor._init_executor()

    def step(new: dict[str, int], running: dict[str, int], planned: dict[str, int]) -> dict[str, list[int]]:
        output = executor.execute_model(
            types.SimpleNamespace(
                finished_req_ids=set(),
                scheduled_new_reqs=[
                    types.SimpleNamespace(req_id=name, prompt_token_ids=[1] * length, num_computed_tokens=0)
                    for name, length in new.items()
                ],
                scheduled_cached_reqs=types.SimpleNamespace(
                    req_ids=list(running), num_computed_tokens=list(running.values())
                ),
                num_scheduled_tokens=planned,
            )
        )
        return dict(zip(output.req_ids, output.sampled_token_ids, strict=True))

    assert step({"a": 5, "b": 8}, {}, {"a": 5, "b": 3}) == {"a": [1000], "b": []}
    assert step({}, {"a": 5, "b": 3}, {"a": 1, "b": 5}) == {"a": [1007], "b": [1000]}
