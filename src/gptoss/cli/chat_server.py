"""The server that a chat talks to: one that runs, or one that lives as long as the chat."""

import contextlib
from collections.abc import AsyncGenerator

import msgspec
from rich.console import Console

from gptoss.cli.chat_client import ChatClient
from gptoss.cli.chat_talk import ChatOptions
from gptoss.clock import SystemClock
from gptoss.config import Settings
from gptoss.errors import JournalError, NotReady


@contextlib.asynccontextmanager
async def server_of(options: ChatOptions, settings: Settings, notes: Console) -> AsyncGenerator[ChatClient]:
    """A client of the server to talk to.

    Raises:
        GptossError: there is none, and none can be started.
    """
    clock = SystemClock()
    client = ChatClient(options.url or f"http://127.0.0.1:{settings.port}", options.api_key, clock)
    try:
        if options.url is not None:
            await client.models()
        elif not await _serves(client, options.spec):
            await client.close()
            async with _own_server(settings, notes) as url:
                client = ChatClient(url, None, clock)
                yield client
                await client.close()
            return
        yield client
    finally:
        await client.close()


async def _serves(client: ChatClient, spec: str | None) -> bool:
    """Whether a server is there that has the model."""
    try:
        models = await client.models()
    except NotReady:
        return False
    return spec is None or spec in models


@contextlib.asynccontextmanager
async def _own_server(settings: Settings, notes: Console) -> AsyncGenerator[str]:
    """A server in this process, with the engine in one of its own; its address."""
    from gptoss.app import ServingSystem  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.http.server import serve  # noqa: PLC0415 - as above
    from gptoss.preflight import check_settings  # noqa: PLC0415 - as above
    from gptoss.serving_context import make_app  # noqa: PLC0415 - as above

    check_settings(settings)
    with notes.status(f"starting {settings.model}"):
        serving = ServingSystem(settings)
        try:
            await serving.start()
        except JournalError:  # another server has the data folder: this one keeps its log to itself
            serving = ServingSystem(msgspec.structs.replace(settings, journal="memory"))
            await serving.start()
    try:
        with notes.status(f"loading {settings.model}"):
            await serving.ready()
        server = await serve(make_app(serving), "127.0.0.1", 0)
        try:
            yield server.url
        finally:
            await serving.drain(0.0)
            await server.close()
    finally:
        await serving.stop()
