"""``gptoss serve`` with an engine that pretends, for tests that send signals to a process: everything else is the real thing.

``python serving_process.py STEP_S SETTINGS``, the settings as JSON. SIGUSR1 crashes the memory guard.
"""

import asyncio
import functools
import signal
import sys
from typing import Any

import msgspec

from gptoss import server
from gptoss.app import ServingSystem
from gptoss.config import load_settings
from gptoss.engine.model_source import PreparedModel
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=100_000)


class Serving(ServingSystem):
    """The live system, that can be told to fail."""

    async def start(self) -> None:
        """Start, and listen for the signal."""
        await super().start()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._crash)

    def _crash(self) -> None:
        self.directory.tell("memory", object())


def main(step_s: float, values: dict[str, Any]) -> int:
    """Serve until told to stop; returns the exit status."""
    options = FakeOptions(step_s=step_s, max_model_len=100_000, kv_budget_bytes=1 << 30)
    made = functools.partial(Serving, drivers=lambda _: FakeDriver(options), renderer=FakeRenderer(), model=MODEL)
    setattr(server, "ServingSystem", made)  # noqa: B010 - the type checker knows a class there
    return server.run_server(load_settings(flags=values, environ={}))


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), msgspec.json.decode(sys.argv[2])))
