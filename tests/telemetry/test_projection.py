"""The projection answers from records alone."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from gptoss.actors.journal import JournalHealth
from gptoss.clock import NS_PER_MS, NS_PER_S
from gptoss.messages import codec
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.telemetry import projection as projection_module
from gptoss.telemetry.projection import Projection

if TYPE_CHECKING:
    from telemetry.conftest import Script

MB = 1 << 20


def fold(script: "Script", **options: Any) -> Projection:
    projection = Projection(**options)
    for record in script.records:
        projection.fold(record)
    return projection


def answers(projection: Projection, now_ns: int) -> list[Any]:
    return [
        projection.readiness(now_ns),
        projection.health(now_ns),
        projection.stats(now_ns),
        projection.memory_stats(),
        projection.executor_details(),
        projection.recent_requests(1000),
        projection.recent_errors(),
    ]


def test_a_rebuilt_projection_equals_the_live_one(busy: "Script") -> None:
    live = fold(busy)
    rebuilt = Projection()
    for record in busy.records:
        rebuilt.fold(codec.decode_record(codec.encode_record(record)))
    assert answers(rebuilt, busy.now_ns) == answers(live, busy.now_ns)


def test_the_log_of_older_boots_does_not_change_the_picture(
    busy: "Script", new_script: Callable[[str], "Script"]
) -> None:
    second = new_script("boot2")
    second.start()
    second.completed("req_done")
    both = Projection()
    for record in (*busy.records, *second.records):
        both.fold(record)
    assert answers(both, second.now_ns) == answers(fold(second), second.now_ns)


# ---------------------------------------------------------------- readiness


def test_a_server_without_a_loaded_executor_is_starting_and_not_ready(new_script: Callable[[str], "Script"]) -> None:
    script = new_script("boot1")
    script.add("executor/cpu", ev.EngineStarted(executor="cpu", device="cpu", model="m", folder="/m"))
    script.add("executor/cpu", ev.EngineLoadProgressed(executor="cpu", stage="weights", done=25, total=100))
    projection = fold(script)
    assert projection.readiness(script.now_ns).reason == "no executor is ready: cpu loading"
    health = projection.health(script.now_ns)
    assert (health["status"], health["ready"]) == ("starting", False)
    assert health["executors"][0]["progress"] == 0.25


def test_preparing_the_model_shows_until_there_are_executors(new_script: Callable[[str], "Script"]) -> None:
    script = new_script("boot1")
    script.add("system", ev.EngineLoadProgressed(executor=ev.PREPARATION, stage="reading the weights", done=0, total=0))
    assert fold(script).readiness(script.now_ns).reason == "no executor is ready: prepare loading"
    script.add("executor/cpu", ev.EngineStarted(executor="cpu", device="cpu", model="m", folder="/m"))
    assert [each["name"] for each in fold(script).health(script.now_ns)["executors"]] == ["cpu"]


def test_a_loaded_executor_makes_the_server_ready(script: "Script") -> None:
    assert fold(script).readiness(script.now_ns).ready


@pytest.mark.parametrize(
    ("event", "reason", "status"),
    [
        (ev.DrainStarted(timeout_s=30), "draining", "draining"),
        (ev.SupervisorEscalated(child="executor/cpu", restarts=3, within_s=60), "stays down", "degraded"),
        (ev.LogDegraded(reason="no space left"), "no space left", "degraded"),
        (ev.ExecutorLeft(executor="cpu", reason="crashed"), "cpu restarting", "degraded"),
        (ev.EngineStalled(executor="cpu", silent_ms=60_000), "cpu restarting", "degraded"),
        (ev.EngineLoadFailed(executor="cpu", code="model_load_failed", message="bad"), "cpu failed", "degraded"),
    ],
)
def test_what_stops_progress_makes_the_server_not_ready(script: "Script", event: Any, reason: str, status: str) -> None:
    script.add("node", event)
    projection = fold(script)
    readiness = projection.readiness(script.now_ns)
    assert not readiness.ready
    assert reason in readiness.reason
    assert projection.health(script.now_ns)["status"] == status


def test_a_stopped_journal_makes_the_server_not_ready(script: "Script") -> None:
    journal = JournalHealth(ok=False, reason="fsync: EIO", last_pos=9, committed_pos=5, stored_bytes=1)
    readiness = fold(script).readiness(script.now_ns, journal)
    assert (readiness.ready, readiness.reason) == (False, "the journal has stopped: fsync: EIO")


def test_a_disk_that_does_not_answer_makes_the_server_not_ready(script: "Script") -> None:
    journal = JournalHealth(ok=True, reason="", last_pos=9, committed_pos=5, stored_bytes=1, commit_ns=9 * NS_PER_S)
    projection = fold(script)
    assert projection.readiness(script.now_ns, journal).ready
    hangs = msgspec.structs.replace(journal, commit_ns=11 * NS_PER_S)
    readiness = projection.readiness(script.now_ns, hangs)
    assert (readiness.ready, readiness.reason) == (False, "the journal's disk has not answered for 11 s")


def test_health_says_what_is_switched_on(script: "Script") -> None:
    health = fold(script).health(script.now_ns)
    assert (health["cache_enabled"], health["tracing_enabled"], health["observability_enabled"]) == (False, False, True)
    loaded = next(one for one in script.records if isinstance(one.event, ev.EngineLoaded))
    assert isinstance(loaded.event, ev.EngineLoaded)
    can = msgspec.structs.replace(loaded.event.capabilities, prefix_cache_bytes=MB)
    script.add("executor/cpu", msgspec.structs.replace(loaded.event, capabilities=can))
    started = script.records[0]
    assert isinstance(started.event, ev.NodeStarted)
    settings = '{"otlp_endpoint": "http://collector"}'
    script.records[0] = Record(started.meta, msgspec.structs.replace(started.event, settings=settings))
    health = fold(script).health(script.now_ns)
    assert (health["cache_enabled"], health["tracing_enabled"]) == (True, True)


def test_the_newest_reading_of_the_machine_and_dropped_spans_are_in_the_statistics(script: "Script") -> None:
    assert fold(script).stats()["host"] is None
    reading = ev.HostObserved(
        cpu_s=1.0,
        rss_bytes=2,
        open_fds=3,
        num_threads=4,
        loop_late_ms=0.5,
        children=(ev.ProcessReading(7, 1.5, 9),),
        host_cpu_percent=50.0,
        load_1m=0.5,
        memory_available_bytes=5,
        memory_total_bytes=6,
        disk_free_bytes=7,
    )
    script.add("system", reading)
    script.add("system", ev.SpansExported(exported=5, refused=2, overflowed=1))
    stats = fold(script).stats()
    assert stats["host"]["children"] == [{"pid": 7, "cpu_s": 1.5, "rss_bytes": 9}]
    assert stats["host"]["open_fds"] == 3
    assert stats["traces"] == {"exported": 5, "dropped": 3}


def test_an_executor_that_makes_no_step_while_requests_run_is_not_ready(busy: "Script") -> None:
    projection = fold(busy, step_timeout_s=60)
    last_step_ns = max(r.meta.mono_ns for r in busy.records if isinstance(r.event, ev.StepCommitted))
    assert projection.readiness(last_step_ns + 60 * NS_PER_S).ready
    readiness = projection.readiness(last_step_ns + 61 * NS_PER_S)
    assert (readiness.ready, readiness.reason) == (False, "cpu made no step for 61 s with 1 running")


def test_an_idle_executor_may_be_silent_for_ever(script: "Script") -> None:
    script.completed("req_1")
    assert fold(script).readiness(script.now_ns + 3600 * NS_PER_S).ready


def test_silence_counts_from_the_acceptance_after_an_idle_time(script: "Script") -> None:
    script.completed("req_1")
    script.at_ms += 3_600_000
    script.receive("req_2")
    script.admit("req_2")
    script.route("req_2")
    assert fold(script).readiness(script.now_ns + 59 * NS_PER_S).ready


def test_an_observed_memory_reading_is_no_progress(script: "Script") -> None:
    script.receive("req_1")
    script.route("req_1")
    reading = ev.MemoryObserved(
        executor="cpu", used_bytes=1, total_bytes=2, kv_bytes_in_use=0, kv_bytes_reserved=0, pressure=0.1
    )
    script.add("memory", reading, after_ms=61_000)
    assert not fold(script).readiness(script.now_ns).ready


# ---------------------------------------------------------------- health and stats


def test_health_keeps_the_older_servers_fields(script: "Script") -> None:
    health = fold(script).health(script.now_ns + 5 * NS_PER_S)
    assert {
        "status": "healthy",
        "version": "0.1.0",
        "model": "demo-20b",
        "profile": "latency_first",
        "observability_enabled": True,
        "cache_enabled": False,
        "gpu_routing_enabled": False,
    }.items() <= health.items()
    assert health["uptime_s"] == pytest.approx(5.004)


def test_a_restarted_executor_is_ready_again_with_its_new_incarnation(script: "Script") -> None:
    script.retried("req_1")
    (executor,) = fold(script).health(script.now_ns)["executors"]
    assert (executor["state"], executor["incarnation"], executor["running"]) == ("ready", 1, 0)


def test_requests_are_counted_by_how_they_ended(busy: "Script") -> None:
    requests = fold(busy).stats()["requests"]
    assert requests == {
        "total": 5,
        "received": 0,
        "queued": 0,
        "admitted": 0,
        "running": 1,
        "completed": 2,
        "failed": 0,
        "cancelled": 1,
        "rejected": 1,
    }


def test_a_waiting_request_shows_as_queued(script: "Script") -> None:
    script.receive("req_1")
    script.enqueue("req_1")
    stats = fold(script).stats()
    assert (stats["queued"], stats["requests"]["queued"]) == (1, 1)


def test_ttft_and_e2e_come_from_the_times_of_the_records(script: "Script") -> None:
    start = script.now_ns
    script.completed("req_1", queued=False)
    received = next(r for r in script.records if isinstance(r.event, ev.RequestReceived)).meta.mono_ns
    first = next(r for r in script.records if isinstance(r.event, ev.FirstTokenProduced)).meta.mono_ns
    end = next(r for r in script.records if isinstance(r.event, ev.RequestCompleted)).meta.mono_ns
    latency = fold(script).stats()["latency"]
    assert received > start
    assert latency["ttft_ms"]["p50"] == (first - received) / NS_PER_MS
    assert latency["e2e_ms"]["p99"] == (end - received) / NS_PER_MS


def test_percentiles_are_by_nearest_rank_and_none_without_samples(script: "Script") -> None:
    assert fold(script).stats()["latency"]["ttft_ms"] == {"p50": None, "p95": None, "p99": None, "count": 0}
    for index in range(20):
        name = f"req_{index}"
        script.receive(name)
        script.request(name, ev.FirstTokenProduced(attempt=1), after_ms=index + 1)
    # 8 ms from arrival to the estimate's record, then 1..20 ms
    base = fold(script).stats()["latency"]["ttft_ms"]["p50"] - 10
    assert fold(script).stats()["latency"]["ttft_ms"] == {
        "p50": base + 10,
        "p95": base + 19,
        "p99": base + 20,
        "count": 20,
    }


def test_tokens_per_second_is_of_the_last_ten_seconds_only(script: "Script") -> None:
    script.completed("req_1", tokens=50)
    projection = fold(script)
    assert projection.stats()["tokens_per_s"] == 5.0
    assert projection.stats(script.now_ns + 30 * NS_PER_S)["tokens_per_s"] == 0.0


def test_routing_admission_and_cache_are_counted(busy: "Script") -> None:
    stats = fold(busy).stats()
    assert stats["admission"] == {"accept": 4, "queue": 1, "reject": 1}
    assert stats["gpu_routing"]["by_executor"] == {"cpu": {"count": 5, "share": 1.0}}
    assert stats["gpu_routing"]["by_reason"] == {"least_loaded": {"count": 5, "share": 1.0}}
    assert stats["cache_stats"] == {
        "enabled": False,
        "hits": 1,
        "misses": 1,
        "prompt_tokens": 36,
        "cached_tokens": 4,
        "hit_rate": 0.1111,
        "bytes": 3 << 20,
    }
    assert stats["faults"] == {"dead_letters": 1, "engine_exits": 1}


def test_generated_tokens_are_those_of_the_steps(busy: "Script") -> None:
    assert fold(busy).stats()["tokens"] == {"prompt": 36, "prefilled": 60, "cached": 4, "generated": 15}


# ---------------------------------------------------------------- memory


def test_reservations_are_held_while_a_request_runs_and_none_is_left_when_idle(script: "Script") -> None:
    script.receive("req_1")
    script.admit("req_1")
    assert fold(script).memory_stats()["unbound_bytes"] == 2 * MB
    script.route("req_1")
    memory = fold(script).memory_stats()
    assert memory["executors"]["cpu"]["kv_reserved_bytes"] == 2 * MB
    assert memory["memory_pressure"] == 0.02
    script.request("req_1", ev.RequestCancelled(reason="client"))
    script.release("req_1")
    assert fold(script).memory_stats()["kv_reserved_bytes"] == 0


def test_memory_readings_are_shown(script: "Script") -> None:
    reading = ev.MemoryObserved(
        executor="cpu", used_bytes=70, total_bytes=100, kv_bytes_in_use=3, kv_bytes_reserved=5, pressure=0.0
    )
    script.add("memory", reading)
    memory = fold(script).memory_stats()["executors"]["cpu"]
    assert (memory["memory_used_bytes"], memory["memory_total_bytes"], memory["kv_in_use_bytes"]) == (70, 100, 3)


def test_reservations_of_a_dropped_pool_are_unbound_again(script: "Script") -> None:
    script.receive("req_1")
    script.admit("req_1")
    script.route("req_1")
    script.add("memory", ev.MemoryPoolDropped(executor="cpu", reservations_lost=1))
    memory = fold(script).memory_stats()
    assert (memory["unbound_bytes"], memory["kv_budget_bytes"]) == (2 * MB, 0)


# ---------------------------------------------------------------- requests and errors


def test_recent_requests_are_newest_first_with_their_facts(busy: "Script") -> None:
    requests = fold(busy).recent_requests(10)
    assert [r["request_id"] for r in requests] == ["req_open", "req_again", "req_left", "req_refused", "req_done"]
    again = requests[1]
    assert (again["state"], again["outcome"], again["retries"], again["attempt"]) == ("completed", "stop", 1, 2)
    assert requests[0]["completion_tokens"] == 2
    assert requests[3]["outcome"] == "queue_full"
    # 5 records come before the first arrival, one millisecond each
    assert requests[4]["received_unix_s"] == pytest.approx(1_700_000_000.005)
    assert len(fold(busy).recent_requests(2)) == 2


def test_finished_requests_beyond_the_limit_are_forgotten(script: "Script", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection_module, "FINISHED_MAX", 3)
    for index in range(5):
        script.rejected(f"req_{index}")
    projection = fold(script)
    assert [r["request_id"] for r in projection.recent_requests(10)] == ["req_4", "req_3", "req_2"]
    assert projection.request("req_0") is None
    assert projection.stats()["requests"]["rejected"] == 5


def test_an_id_that_is_used_again_shows_its_newest_life(script: "Script") -> None:
    script.rejected("req_1")
    script.completed("req_1")
    (request,) = fold(script).recent_requests(10)
    assert (request["state"], request["completion_tokens"]) == ("completed", 5)


def test_recent_errors_are_the_warnings_and_errors_as_lines(busy: "Script") -> None:
    events = [line["event"] for line in fold(busy).recent_errors()]
    assert events == ["executor_faulted", "engine_exited", "attempt_retried", "dead_letter"]
