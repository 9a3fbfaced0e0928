"""What an executor is told by whoever runs the fleet."""

import msgspec

STOP_TIMEOUT_S = 5.0
"""How long an engine may take to end in peace."""


class RestartExecutor(msgspec.Struct, frozen=True, kw_only=True):
    """Replace the engine by a new one. Those in flight may go on for ``timeout_s`` seconds."""

    origin: str
    timeout_s: float


class StopEngine(msgspec.Struct, frozen=True, kw_only=True):
    """An ask, answered once the engine is gone; it is killed when it takes longer than ``STOP_TIMEOUT_S``."""


class TuneExecutor(msgspec.Struct, frozen=True, kw_only=True):
    """See ``ExecutorConfig.step_timeout_s``."""

    step_timeout_s: float
