"""An event loop on a thread of its own, for tests that drive an engine process from ordinary code."""

import asyncio
import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="engine-loop", daemon=True).start()
    return loop


def on_loop(function: Callable[..., T], *args: Any) -> T:
    """Call a function on the loop, and return what it returns."""

    async def call() -> T:
        return function(*args)

    return asyncio.run_coroutine_threadsafe(call(), _loop()).result(timeout=30)
