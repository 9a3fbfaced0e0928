"""The shipped rules in the real Prometheus: their unit tests, and a scrape of a server with the shipped configuration."""

import asyncio
import shutil
import socket
import subprocess
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

SHIPPED = Path(__file__).parents[2] / "deploy" / "prometheus"
EVALUATED_WITHIN_S = 40

Tool = Callable[[str], str]


def test_the_rules_pass_their_unit_tests(tool: Tool) -> None:
    done = subprocess.run(
        [tool("promtool"), "test", "rules", "gptoss.rules.test.yml"],
        capture_output=True,
        text=True,
        check=False,
        cwd=SHIPPED,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_configuration_and_rules_have_no_lint(tool: Tool) -> None:
    for command in (("check", "config", "prometheus.yml"), ("check", "rules", "--lint-fatal", "gptoss.rules.yml")):
        done = subprocess.run(
            [tool("promtool"), *command], capture_output=True, text=True, check=False, cwd=SHIPPED, timeout=50
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
async def test_prometheus_scrapes_a_server_and_evaluates_every_rule(
    eventful_url: str, tool: Tool, tmp_path: Path
) -> None:
    async with _prometheus(tool("prometheus"), eventful_url, tmp_path) as api, asyncio.timeout(EVALUATED_WITHIN_S):
        while not all(target["health"] == "up" for target in (await api("targets"))["activeTargets"]):
            await asyncio.sleep(0.2)
        rules: list[dict[str, Any]] = []
        while not rules or any(rule["health"] == "unknown" for rule in rules):
            await asyncio.sleep(0.2)
            rules = [rule for group in (await api("rules"))["groups"] for rule in group["rules"]]
        assert len(rules) >= 15
        assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}
        (found,) = (await api('query?query=vllm:request_success_total{finished_reason="length"}'))["result"]
        assert found["metric"]["job"] == "gptoss"
        assert float(found["value"][1]) >= 2


@asynccontextmanager
async def _prometheus(binary: str, target: str, folder: Path) -> AsyncGenerator[Callable[[str], Any]]:
    """A Prometheus with the shipped configuration, except that it does all every second and has one target."""
    home = folder / "prometheus"
    shutil.copytree(SHIPPED, home)
    for name in ("prometheus.yml", "gptoss.rules.yml"):
        text = (home / name).read_text(encoding="utf-8")
        text = text.replace("_interval: 15s", "_interval: 1s").replace(" interval: 30s", " interval: 1s")
        (home / name).write_text(text, encoding="utf-8")
    address = target.removeprefix("http://")
    (home / "targets" / "gptoss.yml").write_text(f'- targets: ["{address}"]\n', encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        binary,
        f"--config.file={home / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}/api/v1/") as session:

            async def api(path: str) -> Any:
                assert process.returncode is None, "Prometheus has ended"
                async with session.get(path) as response:
                    return (await response.json())["data"]

            await _until_it_answers(api)
            yield api
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _until_it_answers(api: Callable[[str], Any]) -> None:
    async with asyncio.timeout(20.0):
        while True:
            try:
                if (await api("targets"))["activeTargets"]:
                    return
            except (aiohttp.ClientError, KeyError):
                pass
            await asyncio.sleep(0.1)
