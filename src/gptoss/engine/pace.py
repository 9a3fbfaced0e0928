"""How fast prefill is, as the steps so far have shown it.

A step's time is that of its decoding part, taken from steps that only decode, plus that of its prefill. Recent steps
count most. The result goes into the plan, so that a replay need not measure anything.
"""

from gptoss.clock import NS_PER_MS
from gptoss.messages.plan import StepPlan

RECENT = 0.8
"""Weight of the past beside a new step."""


class PrefillPace:
    """Running estimate of the time for one token of prefill.

    Attributes:
        ms_per_token: 0 until a step has prefilled.
    """

    def __init__(self) -> None:
        self.ms_per_token = 0.0
        self._decode_ms = 0.0
        self._prefill_ms = 0.0
        self._prefill_tokens = 0.0

    def observe(self, plan: StepPlan, duration_ns: int) -> None:
        """Take in a step that ran."""
        duration_ms = duration_ns / NS_PER_MS
        tokens = sum(row.num_tokens for row in plan.rows if not _decodes(row.num_tokens, row.num_draft))
        decodes = sum(_decodes(row.num_tokens, row.num_draft) for row in plan.rows)
        if not tokens:
            self._decode_ms = RECENT * self._decode_ms + (1 - RECENT) * duration_ms if self._decode_ms else duration_ms
            return
        share_ms = duration_ms - self._decode_ms if decodes else duration_ms
        self._prefill_ms = RECENT * self._prefill_ms + max(share_ms, 0.0)
        self._prefill_tokens = RECENT * self._prefill_tokens + tokens
        self.ms_per_token = self._prefill_ms / self._prefill_tokens


def _decodes(num_tokens: int, num_draft: int) -> bool:
    return num_tokens - num_draft == 1
