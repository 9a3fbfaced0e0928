"""``gptoss serve``: the live system behind HTTP, with the process-wide set-up that embedders do not want.

Start: journal, model, actors, HTTP; the port answers (``/health/live``) while the engine still loads. Stop: the first
SIGTERM or SIGINT drains for ``drain_timeout_s``, the second ends at once. SIGHUP reads the settings again, all layers of them:
what can change while the server runs does, the rest is named in the log.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import sys
from collections.abc import Generator
from typing import Literal

from rich.console import Console

from gptoss.app import ServingSystem
from gptoss.config import Layered, Settings
from gptoss.errors import ConfigError
from gptoss.http.server import RunningServer, serve
from gptoss.serving_context import make_app
from gptoss.telemetry.logs import LogWriter

logger = logging.getLogger(__name__)
EXIT_FAILED = 1
SIGNAL_EXIT = 128


def run_server(layered: Layered) -> int:
    """Serve until told to stop; returns the exit status.

    Raises:
        GptossError: the server cannot start; the command line turns it into one line and an exit status.
    """
    try:
        return asyncio.run(_serve(layered))
    except KeyboardInterrupt:
        return SIGNAL_EXIT + signal.SIGINT


async def _serve(layered: Layered) -> int:
    settings = layered.settings
    serving = ServingSystem(settings, log=LogWriter(sys.stdout, _log_format(settings), settings.log_level))
    stop = asyncio.Event()
    _watch_signals(stop)
    await serving.start()
    server: RunningServer | None = None
    try:
        server = await serve(make_app(serving), settings.host, settings.port, auto_port=settings.auto_port)
        if not await _until_ready(serving, stop):
            return 0
        with calm_collector():
            serving.system.on_escalated(lambda _: stop.set())
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload_settings, serving, layered)
            _welcome(settings, server.port, serving.gateway.served_model)
            await stop.wait()
            await serving.drain(serving.settings.drain_timeout_s)
    finally:
        if server is not None:
            await server.close()
        await serving.stop()
    return EXIT_FAILED if serving.escalated else 0


async def _until_ready(serving: ServingSystem, stop: asyncio.Event) -> bool:
    """False when a signal came before the model was ready.

    Raises:
        ModelLoadError: the engine cannot load the model.
    """
    ready = asyncio.ensure_future(serving.ready())
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            await ready
            return True
        return False
    finally:
        ready.cancel()
        stopped.cancel()


@contextlib.contextmanager
def calm_collector() -> Generator[None]:
    """Have the garbage collector look rarely, and not at what was imported and loaded by now.

    A request leaves no cycles behind, so there is nothing for it to find; by default it would look after every few requests.
    """
    usual = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


def _watch_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.is_set():
            # The second signal: the engine processes end with this one, since their socket closes.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.set()

    loop.add_signal_handler(signal.SIGHUP, logger.warning, "SIGHUP: the server still starts; nothing was read")
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)


def reload_settings(serving: ServingSystem, layered: Layered) -> None:
    """What SIGHUP does: read all layers again and take what can change; the log names what cannot."""
    try:
        read = layered.reload()
    except ConfigError as error:
        logger.error("SIGHUP: nothing was changed: %s", error.message)  # noqa: TRY400 - the message says it all
        return
    changed, refused = serving.reload_settings(read.settings, origin="SIGHUP")
    if not changed and not refused:
        logger.warning("SIGHUP: no setting is other than before")


def _log_format(settings: Settings) -> Literal["json", "console"]:
    if settings.log_format == "auto":
        return "console" if sys.stdout.isatty() else "json"
    return settings.log_format


def _welcome(settings: Settings, port: int, model: str) -> None:
    host = settings.host if settings.host not in {"0.0.0.0", "::"} else "127.0.0.1"  # noqa: S104 - compared, not bound
    url = f"http://{host}:{port}"
    console = Console(stderr=True, highlight=False)
    line = f"[bold green]Ready[/]  {model} at [bold]{url}[/]   page: {url}/   API: {url}/v1   stop: Ctrl-C"
    console.print(f"\n{line}\n", soft_wrap=True)
