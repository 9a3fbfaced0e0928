"""How fast prefill is, learnt from steps."""

import pytest

from gptoss.engine.pace import PrefillPace
from gptoss.messages.plan import PlannedRow, StepPlan

MS = 1_000_000


def step(prefill: int = 0, decodes: int = 0, draft: int = 0) -> StepPlan:
    rows = [PlannedRow("d", 1, 50, 1 + draft, 1 + draft, draft) for _ in range(decodes)]
    return StepPlan(rows=(*rows, *([PlannedRow("p", 1, 0, prefill, 0)] if prefill else [])))


def test_nothing_is_known_before_a_step_has_prefilled() -> None:
    pace = PrefillPace()
    pace.observe(step(decodes=3), 20 * MS)
    assert pace.ms_per_token == 0.0


def test_the_time_of_decoding_is_not_counted_as_prefill() -> None:
    pace = PrefillPace()
    pace.observe(step(decodes=1, draft=4), 30 * MS)
    pace.observe(step(prefill=100, decodes=1), 80 * MS)
    assert pace.ms_per_token == pytest.approx(0.5)
    alone = PrefillPace()
    alone.observe(step(prefill=100), 80 * MS)
    assert alone.ms_per_token == pytest.approx(0.8)


def test_the_newest_steps_count_most() -> None:
    pace = PrefillPace()
    pace.observe(step(prefill=10), 100 * MS)
    for _ in range(10):
        pace.observe(step(prefill=200), 100 * MS)
    assert pace.ms_per_token == pytest.approx(0.5, rel=0.05)
