"""What the server did second by second."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gptoss.clock import NS_PER_MS
from gptoss.messages import events as ev
from gptoss.telemetry.history import SECONDS_KEPT
from gptoss.telemetry.projection import Projection

if TYPE_CHECKING:
    from telemetry.conftest import Script

MB = 1 << 20


def fold(script: "Script") -> Projection:
    projection = Projection()
    for record in script.records:
        projection.fold(record)
    return projection


def seconds(script: "Script", after: int = 0) -> list[dict[str, Any]]:
    columns = fold(script).live(script.now_ns, after=after)["seconds"]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def total(found: list[dict[str, Any]], name: str) -> int:
    return sum(second[name] for second in found)


def test_a_second_counts_tokens_latencies_decisions_and_ends(script: "Script") -> None:
    script.completed("one", tokens=5)
    script.rejected("two")
    (second,) = seconds(script)
    assert second["at"] == script.now_ns // 1_000_000_000
    assert (second["tokens"], second["prefilled"]) == (5, 12)
    assert second["admission"] == {"queue": 1, "accept": 1, "reject": 1}
    assert second["ended"] == {"completed": 1, "rejected": 1}
    assert second["queued_max"] == 1
    assert second["token_ms"] == {"p50": 19.0, "max": 19.0}
    assert second["ttft_ms"]["p50"] == second["ttft_ms"]["max"] > 80


def test_levels_are_as_the_second_ended(script: "Script") -> None:
    script.receive("one")
    script.admit("one")
    script.route("one")
    script.step({"one": (0, 12)})
    script.at_ms += 2_000
    script.step({"one": (1, 0)})
    script.request("one", script.completion(1))
    script.release("one")
    first, last = seconds(script)
    assert last["at"] - first["at"] == 2  # in the silent second between nothing was done: it has no entry
    assert (first["running"], first["kv_reserved_bytes"], first["kv_in_use_bytes"]) == (1, 2 * MB, MB)
    assert (last["running"], last["kv_reserved_bytes"]) == (0, 0)
    assert first["kv_budget_bytes"] == 100 * MB


def test_a_step_that_brings_a_stream_several_tokens_is_shared_out(script: "Script") -> None:
    script.receive("one")
    script.route("one")
    script.step({"one": (4, 0)}, after_ms=41)
    assert seconds(script)[-1]["token_ms"] == {"p50": 10.0, "max": 10.0}


def test_only_the_seconds_since_are_told(script: "Script") -> None:
    for n in range(4):
        script.at_ms += 1_000
        script.completed(f"r{n}", tokens=1)
    everything = seconds(script)
    middle = everything[2]["at"]
    assert seconds(script, after=middle) == everything[2:]
    assert total(everything, "tokens") == 4


def test_old_seconds_are_forgotten(script: "Script") -> None:
    for n in range(SECONDS_KEPT + 20):
        script.at_ms += 1_000
        script.rejected(f"r{n}")
    found = seconds(script)
    assert len(found) == SECONDS_KEPT + 1  # and the one that goes on
    assert found[-1]["ended"] == {"rejected": 1}


def test_another_boot_begins_anew(busy: "Script", new_script: Callable[[str], "Script"]) -> None:
    second = new_script("boot2")
    second.start()
    projection = fold(busy)
    for record in second.records:
        projection.fold(record)
    live = projection.live(second.now_ns)
    assert live["boot"] == "boot2"
    assert sum(live["seconds"]["tokens"]) == 0


def test_a_live_answer_has_all_that_a_view_shows(busy: "Script") -> None:
    projection = fold(busy)
    live = projection.live(busy.now_ns, limit=2)
    assert live["now"] == busy.now_ns // (1000 * NS_PER_MS)
    assert live["health"] == projection.health(busy.now_ns)
    assert live["stats"] == projection.stats(busy.now_ns)
    assert live["memory"] == projection.memory_stats()
    assert live["requests"] == projection.recent_requests(2)


def test_a_record_that_counts_nothing_changes_nothing(script: "Script") -> None:
    before = seconds(script)
    script.add("node", ev.ClockAnchored(wall_ns=1), after_ms=0)
    assert seconds(script) == before
