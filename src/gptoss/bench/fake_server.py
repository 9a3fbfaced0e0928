"""A server whose engines pretend, for load tests: ``python -m gptoss.bench.fake_server``, with a ``FakeShape`` as JSON.

It is the server of ``gptoss serve`` but for its engines and its tokenizer, on a free port of loopback. It prints the port
once it serves, and stops when its standard input ends.
"""

import asyncio
import signal
import sys

import msgspec

from gptoss.bench.fake_system import FakeShape, fake_system
from gptoss.http.server import serve
from gptoss.server import calm_collector
from gptoss.serving_context import make_app


async def main(shape: FakeShape) -> None:
    """Serve until standard input ends."""
    async with fake_system(shape) as (serving, _):
        server = await serve(make_app(serving), "127.0.0.1", 0)
        with calm_collector():
            sys.stdout.write(f"{server.port}\n")
            sys.stdout.flush()
            await asyncio.to_thread(sys.stdin.read)
        await server.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the client, which closes standard input
    asyncio.run(main(msgspec.json.decode(sys.argv[1], type=FakeShape)))
