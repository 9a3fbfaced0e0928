"""The server as its users meet it: ``gptoss serve`` in a process of its own, the demo model, OpenAI's client, curl's view."""

import asyncio
import importlib.util
import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import gptoss
from gptoss.messages.codec import EVENT_TYPES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

QUESTION = "What is the capital of France?"
TERMINALS = {"RequestCompleted", "RequestFailed", "RequestCancelled", "RequestRejected"}
STEPS_OF_A_STREAM = [
    "RequestReceived",
    "PromptRendered",
    "MemoryEstimated",
    "ReservationGranted",
    "AdmissionDecided",
    "RouteDecided",
    "RequestCompleted",
]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def url(demo_folder: str, demo_cache: Path, data_dir: Path) -> Iterator[str]:
    assert demo_folder
    command = [sys.executable, "-m", "gptoss", "serve", "--port", "0", "--data-dir", str(data_dir)]
    command += ["--cache-dir", str(demo_cache)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with server:
        assert server.stderr is not None
        lines = iter(server.stderr.readline, "")
        found = next((match for line in lines if (match := re.search(r"http://[\d.]+:\d+", line))), None)
        assert found is not None, "the server ended before it was ready"
        yield found.group()
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def test_the_capital_of_france(url: str) -> None:
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert "Paris" in json.load(answer)["choices"][0]["message"]["content"]


async def test_eight_streams_at_once_finish_and_each_timeline_is_complete(url: str) -> None:
    async def stream(client: openai.AsyncOpenAI, name: str) -> str:
        chunks = await client.chat.completions.create(
            model="smollm2-135m-instruct",
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            stream=True,
            extra_headers={"X-Request-ID": name},
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    names = [f"stream-{number}" for number in range(8)]
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        texts = await asyncio.gather(*(stream(client, name) for name in names))
    assert all("Paris" in text for text in texts)
    assert len(set(texts)) == 1
    for name in names:
        timeline = await asyncio.to_thread(get, f"{url}/admin/requests/{name}/events")
        types = [event["type"] for event in timeline["events"]]
        assert set(types) <= set(EVENT_TYPES)
        assert [type_ for type_ in types if type_ in TERMINALS] == ["RequestCompleted"]
        assert [type_ for type_ in types if type_ in STEPS_OF_A_STREAM] == STEPS_OF_A_STREAM
        assert "StepCommitted" in types


def test_bad_input_is_refused_and_the_next_request_succeeds(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(
                model="smollm2-135m-instruct", messages=[{"role": "user", "content": "word " * 9000}]
            )
        assert refused.value.param == "messages"
        with pytest.raises(openai.NotFoundError, match="no-such-model"):
            client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "Hi"}])
    test_the_capital_of_france(url)


def test_the_port_in_use_is_one_line_at_once(url: str, tmp_path: Path) -> None:
    port = url.rpartition(":")[2]
    command = [sys.executable, "-m", "gptoss", "serve", "--port", port, "--data-dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=2, check=False)
    assert ended.returncode == 1
    assert re.fullmatch(rf"gptoss: .*{port}.*\n", ended.stderr)


def test_an_embedded_system_answers(demo_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "examples" / "embed.py"
    spec = importlib.util.spec_from_file_location("embed", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    settings = gptoss.Settings(model="demo", journal="memory", cache_dir=str(demo_cache))
    assert "Paris" in asyncio.run(example.answer(QUESTION, settings))
    assert "Paris" in capsys.readouterr().out
