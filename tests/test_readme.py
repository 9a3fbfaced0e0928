"""The README's examples are run, as they stand, against a server over a fake engine."""

import asyncio
import contextlib
import io
import re
import shutil
import subprocess
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import gptoss
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.http.server import serve
from gptoss.testing import FakeDriver, FakeRenderer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SERVED = "smollm2-135m-instruct"
MODEL = PreparedModel(folder="", model_name=SERVED, source="test", max_model_len=4096)
DEFAULT_URL = "http://127.0.0.1:8000"
CLIENT_CODE = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "OpenAI(" in code]
CURLS = re.findall(r"^curl (?:[^\n]*\\\n)*[^\n]*$", README, re.MULTILINE)


@pytest.fixture
async def url() -> AsyncIterator[str]:
    settings = Settings(journal="memory", devices="cpu")
    async with ServingSystem(settings, drivers=lambda _: FakeDriver(), renderer=FakeRenderer(), model=MODEL) as serving:
        await serving.ready(10.0)
        server = await serve(gptoss.make_app(serving), "127.0.0.1", 0)
        yield server.url
        await server.close()


def test_the_readme_has_examples() -> None:
    assert len(CLIENT_CODE) >= 2
    assert len(CURLS) >= 4


@pytest.mark.parametrize("code", CLIENT_CODE, ids=range(len(CLIENT_CODE)))
async def test_its_python_runs_and_prints_an_answer(code: str, url: str) -> None:
    def run() -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code.replace(DEFAULT_URL, url), {"__name__": "readme"})
        return out.getvalue()

    assert re.search(r"t\d+", await asyncio.to_thread(run)), "the fake engine's words"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("command", CURLS, ids=range(len(CURLS)))
async def test_its_curl_commands_are_answered(command: str, url: str, tmp_path: Path) -> None:
    placed = command.replace(DEFAULT_URL, url)
    if "REQUEST_ID" in placed:
        named = "-H 'X-Request-ID: REQUEST_ID' -H 'Content-Type: application/json'"
        made = f"""curl {url}/v1/completions {named} -d '{{"prompt": "x"}}'"""
        assert await asyncio.to_thread(_curl, made, tmp_path)
    answer = await asyncio.to_thread(_curl, placed, tmp_path)
    saved = list(tmp_path.iterdir())
    assert answer or saved, "printed, or with -O saved under the name that the server gave"
    assert '"error"' not in answer
    assert all(zipfile.is_zipfile(path) for path in saved)


def _curl(command: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", command.replace("curl ", "curl -sS --fail-with-body ", 1)],
        cwd=folder, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout
