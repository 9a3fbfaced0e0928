"""What an executor makes of its engine's silence and failures.

    silent for a quarter of ``step_timeout_s`` with work to do  -> suspect: the router takes others first
    silent for all of it                                       -> stalled: killed and replaced
    ``SICK_FAILURES`` requests failed, no token in between     -> sick: killed and replaced

An answered probe shows that the process lives; only steps and ends of requests show that it gets on.
"""

from typing import Literal, TypeAlias

from gptoss.clock import NS_PER_MS, NS_PER_S
from gptoss.engine import port
from gptoss.errors import EngineError

SUSPECT_SHARE = 0.25
SICK_FAILURES = 5
PROGRESS = (port.StepDone, port.Finished, port.Failed)

Silence: TypeAlias = Literal["", "suspect", "stalled"]


class EngineWatch:
    """The health of one engine.

    Args:
        step_timeout_s: how long it may be silent with work to do.

    Attributes:
        failures: requests that failed since the last token.
    """

    def __init__(self, step_timeout_s: float) -> None:
        self.step_timeout_s = step_timeout_s
        self.failures = 0
        self._progress_ns = 0

    def begin(self) -> None:
        """There is a new engine."""
        self.failures = 0

    def hear(self, message: object, now_ns: int, *, has_work: bool) -> None:
        """Take note of a message to the executor."""
        if isinstance(message, PROGRESS) or not has_work:
            self._progress_ns = now_ns
        if isinstance(message, port.Failed):
            self.failures += message.code == EngineError.code
        elif isinstance(message, port.StepDone) and any(row.token_ids for row in message.rows):
            self.failures = 0

    @property
    def is_sick(self) -> bool:
        """Whether it fails whatever it is given."""
        return self.failures >= SICK_FAILURES

    def silent_ms(self, now_ns: int) -> float:
        """Since it last got on."""
        return (now_ns - self._progress_ns) / NS_PER_MS

    def silence(self, now_ns: int, *, has_work: bool) -> Silence:
        """What its silence means by now."""
        silent_ns = now_ns - self._progress_ns
        if not has_work:
            return ""
        if silent_ns > self.step_timeout_s * NS_PER_S:
            return "stalled"
        return "suspect" if silent_ns > SUSPECT_SHARE * self.step_timeout_s * NS_PER_S else ""
