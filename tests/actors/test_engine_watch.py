"""What silence and failures of an engine mean."""

from gptoss.actors.engine_watch import SICK_FAILURES, EngineWatch
from gptoss.engine import port

S = 10**9


def failed(code: str = "engine_error") -> port.Failed:
    return port.Failed(request_id="r", attempt=1, code=code, message="NaN")


def step(*token_ids: int) -> port.StepDone:
    row = port.StepRow(request_id="r", attempt=1, token_ids=token_ids)
    return port.StepDone(step=1, started_ns=0, duration_ns=0, rows=(row,), waiting=0, running=1, kv_bytes_in_use=0)


def test_silence_with_work_is_first_suspect_and_then_a_stall() -> None:
    watch = EngineWatch(8.0)
    watch.hear(step(1), 0, has_work=True)
    silences = [watch.silence(at * S, has_work=True) for at in (1, 3, 8, 9)]
    assert silences == ["", "suspect", "suspect", "stalled"]
    assert watch.silence(9 * S, has_work=False) == ""


def test_an_answered_probe_is_no_progress_and_a_step_is() -> None:
    watch = EngineWatch(8.0)
    watch.hear(step(1), 0, has_work=True)
    status = port.EngineStatus(
        nonce=1, step=1, waiting=0, running=1, kv_bytes_in_use=0, memory_bytes=0, device_memory_total_bytes=0
    )
    watch.hear(status, 9 * S, has_work=True)
    assert watch.silence(9 * S, has_work=True) == "stalled"
    watch.hear(step(), 9 * S, has_work=True)
    assert watch.silence(9 * S, has_work=True) == ""


def test_failures_in_a_row_are_sickness_and_a_token_between_them_is_health() -> None:
    watch = EngineWatch(8.0)
    for _ in range(SICK_FAILURES - 1):
        watch.hear(failed(), 0, has_work=True)
    watch.hear(step(), 0, has_work=True)
    watch.hear(step(7), 0, has_work=True)
    watch.hear(failed(), 0, has_work=True)
    assert not watch.is_sick
    for _ in range(SICK_FAILURES - 1):
        watch.hear(failed(), 0, has_work=True)
    assert watch.is_sick


def test_requests_that_the_engine_rightly_refuses_do_not_make_it_sick() -> None:
    watch = EngineWatch(8.0)
    for _ in range(2 * SICK_FAILURES):
        watch.hear(failed("memory_exhausted"), 0, has_work=True)
    assert not watch.is_sick
