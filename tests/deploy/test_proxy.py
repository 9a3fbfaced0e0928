"""The shipped site in the real nginx, with TLS: what passes, what does not, and that a stream is one."""

import asyncio
import io
import socket
import ssl
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

import gptoss
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.http.server import serve
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

SITE = Path(__file__).parents[2] / "deploy" / "nginx" / "gptoss.conf"
MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
STEP_S = 0.05
TOKENS = 12
STREAM = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}

Tool = Callable[[str], str]


@pytest.fixture
async def slow_server() -> AsyncIterator[str]:
    """The address of a server that takes its time over each token."""
    settings = Settings(journal="memory", devices="cpu")
    options = FakeOptions(step_s=STEP_S)
    async with ServingSystem(
        settings, drivers=lambda _: FakeDriver(options), renderer=FakeRenderer(), model=MODEL
    ) as system:
        await system.ready(10.0)
        server = await serve(gptoss.make_app(system), "127.0.0.1", 0)
        yield server.url.removeprefix("http://")
        await server.close()


@pytest.mark.slow
async def test_streams_pass_as_they_come_and_nothing_but_the_api_does(
    slow_server: str, tool: Tool, tmp_path: Path
) -> None:
    async with _nginx(tool, slow_server, tmp_path) as outside:
        assert (await outside.get("/v1/models")).status == 200
        assert (await outside.get("/health/ready")).status == 200
        for inside in ("/metrics", "/admin/requests", "/docs", "/", "/stats", "/v1/../metrics"):
            assert (await outside.get(inside)).status == 404
        assert (await outside.post("/v1/chat/completions", data=io.BytesIO(bytes(3 << 20)))).status == 413
        loop = asyncio.get_running_loop()
        async with outside.post("/v1/chat/completions", json={**STREAM, "max_tokens": TOKENS}) as stream:
            assert stream.status == 200
            assert stream.headers["Content-Type"] == "text/event-stream"
            arrivals = [loop.time() async for _ in stream.content.iter_any()]
        # All of it is far smaller than a buffer of nginx: buffered, it would come in one piece at the end.
        assert len(arrivals) >= TOKENS / 2
        assert arrivals[-1] - arrivals[0] > TOKENS * STEP_S / 2


@pytest.mark.slow
async def test_a_client_that_goes_stops_its_request(slow_server: str, tool: Tool, tmp_path: Path) -> None:
    async with _nginx(tool, slow_server, tmp_path) as outside, aiohttp.ClientSession(f"http://{slow_server}") as inside:
        stream = await outside.post(
            "/v1/chat/completions", json={**STREAM, "max_tokens": 500}, headers={"X-Request-ID": "gone"}
        )
        await stream.content.readany()
        stream.close()
        async with asyncio.timeout(5.0):
            state = ""
            while state != "cancelled":
                listed = await (await inside.get("/admin/requests")).json()
                (state,) = (row["state"] for row in listed["data"] if row["request_id"] == "gone")
                await asyncio.sleep(0.02)


@asynccontextmanager
async def _nginx(tool: Tool, upstream: str, folder: Path) -> AsyncGenerator[aiohttp.ClientSession]:
    """nginx with the shipped site in front of ``upstream``, and a client that trusts its certificate."""
    binary, certificate, key = tool("nginx"), folder / "cert.pem", folder / "key.pem"
    wanted = (
        "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    command = [tool("openssl"), "req", "-x509", *wanted.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, capture_output=True, check=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    site = SITE.read_text(encoding="utf-8")
    changes = {
        "server 127.0.0.1:8000;": f"server {upstream};",
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "listen [::]:443 ssl;": "",
        "/etc/ssl/llm.example.com/fullchain.pem": str(certificate),
        "/etc/ssl/llm.example.com/privkey.pem": str(key),
        "llm.example.com": "localhost",
    }
    for old, new in changes.items():
        assert old in site
        site = site.replace(old, new)
    paths = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    whole = f"daemon off; pid {folder}/pid; events {{}} http {{ access_log off; {paths}\n{site}\n}}"
    (folder / "nginx.conf").write_text(whole, encoding="utf-8")
    started = (binary, "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf"))
    process = await asyncio.create_subprocess_exec(*started, stderr=asyncio.subprocess.DEVNULL)
    try:
        await _until_it_listens(port, process)
        context = ssl.create_default_context(cafile=certificate)
        async with aiohttp.ClientSession(
            f"https://localhost:{port}", connector=aiohttp.TCPConnector(ssl=context)
        ) as session:
            yield session
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _until_it_listens(port: int, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(10.0):
        while True:
            assert process.returncode is None, "nginx has ended"
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return
