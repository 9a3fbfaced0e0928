"""A restart loses no counter: what earlier boots counted is found in their journal, however they ended."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gptoss.clock import SystemClock
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Meta, Origin, Record
from gptoss.telemetry import carried_counters
from gptoss.telemetry.carried_counters import counters_before
from gptoss.telemetry.metrics import Metrics
from gptoss.telemetry.segments import SegmentJournal, SegmentOptions, SegmentReader

if TYPE_CHECKING:
    from telemetry.conftest import Script

GAUGES = ("vllm:num_requests", "vllm:kv", "kv_bytes", "gptoss_executor_ready", "gptoss_prefix", "sessions_active")


def samples(metrics: Metrics) -> dict[str, float]:
    """Every counter and histogram sample but those that count the records of counting itself."""
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in parse_text(metrics.render()[0].decode())
        for sample in family.samples
        if not sample.name.startswith(GAUGES) and not sample.labels.get("type", "").startswith("Counters")
    }


@contextmanager
def journal_of(folder: Path, boot: str, **options: int) -> Generator[SegmentJournal]:
    journal = SegmentJournal.open(
        folder, node="node", boot=boot, clock=SystemClock(), options=SegmentOptions(**options)
    )
    try:
        yield journal
    finally:
        journal.close()


def append(journal: SegmentJournal, script: "Script") -> list[Record]:
    return [
        journal.append(one.event, Origin(stream=one.meta.stream, correlation=one.meta.correlation))
        for one in script.records
    ]


def save(journal: SegmentJournal, metrics: Metrics, pos: int) -> None:
    state = msgspec.Raw(msgspec.msgpack.encode(metrics.saved()))
    metrics.fold(journal.append(ev.CountersSaved(pos=pos, state=state), Origin(stream="counters")))


def carried_into(folder: Path, boot: str = "next") -> Metrics:
    """The metrics of a boot that has recorded nothing but what it carries."""
    state = counters_before(SegmentReader(folder), boot)
    assert state is not None
    event: Event = ev.CountersCarried(state=state)
    meta = Meta("node", boot, 0, "counters", 0, "CountersCarried", 1, -1, "", "", "", "app", 0, 1)
    metrics = Metrics()
    metrics.fold(Record(meta, event))
    return metrics


@pytest.mark.parametrize("saved_at", [None, 5, 40, -1])
def test_whatever_was_saved_all_is_carried(tmp_path: Path, busy: "Script", saved_at: int | None) -> None:
    """Saved early, late, last or never: requests that were under way at that moment are counted as well."""
    live = Metrics()
    with journal_of(tmp_path, "boot1") as journal:
        for index, record in enumerate(append(journal, busy)):
            live.fold(record)
            if saved_at is not None and index == saved_at % len(busy.records):
                save(journal, live, record.meta.pos)
    assert samples(carried_into(tmp_path)) == samples(live)


def test_the_newest_of_several_counts(tmp_path: Path, busy: "Script") -> None:
    live = Metrics()
    with journal_of(tmp_path, "boot1", segment_bytes=8000) as journal:
        for index, record in enumerate(append(journal, busy)):
            live.fold(record)
            if index % 25 == 0:
                save(journal, live, record.meta.pos)
                journal.flush()
    assert len(SegmentReader(tmp_path).first_positions("boot1")) > 2
    assert samples(carried_into(tmp_path)) == samples(live)


def test_counters_go_on_over_many_boots(tmp_path: Path, new_script: "Callable[[str], Script]") -> None:
    total = 0.0
    for number in range(4):
        script = new_script(f"boot{number}")
        script.start()
        for index in range(number + 1):
            script.completed(f"req_{index}")
        with journal_of(tmp_path, f"boot{number}") as journal:
            state = counters_before(SegmentReader(tmp_path), f"boot{number}")
            assert (state is None) == (number == 0)
            if state is not None:
                journal.append(ev.CountersCarried(state=state), Origin(stream="counters"))
            append(journal, script)
        total += number + 1
    found = samples(carried_into(tmp_path))
    name = "vllm:request_success_total[('engine', 'cpu'), ('finished_reason', 'stop'), ('model_name', 'demo-20b')]"
    assert found[name] == total


def test_a_boot_that_ended_before_it_carried_anything_breaks_no_chain(tmp_path: Path, busy: "Script") -> None:
    live = Metrics()
    with journal_of(tmp_path, "boot1") as journal:
        for record in append(journal, busy):
            live.fold(record)
        save(journal, live, len(busy.records) - 1)
    with journal_of(tmp_path, "boot2") as journal:
        journal.append(ev.DeadLettered(to="a", message_type="m", reason="full"), Origin(stream="system"))
    found, before = samples(carried_into(tmp_path)), samples(live)
    assert found["gptoss_dead_letters_total[('reason', 'full')]"] == 1
    name = "vllm:generation_tokens_total[('engine', 'cpu'), ('model_name', 'demo-20b')]"
    assert found[name] == before[name] > 0


def test_a_long_boot_of_a_version_that_carried_nothing_is_left_out(
    tmp_path: Path, busy: "Script", monkeypatch: pytest.MonkeyPatch
) -> None:
    with journal_of(tmp_path, "boot1") as journal:
        append(journal, busy)
    monkeypatch.setattr(carried_counters, "WHOLE_SEGMENTS_MAX", 0)
    assert "vllm:generation_tokens_total" not in str(samples(carried_into(tmp_path)))


def test_families_that_have_changed_begin_again_and_the_others_go_on(tmp_path: Path, busy: "Script") -> None:
    live = Metrics()
    for record in busy.records:
        live.fold(record)
    families = live.saved().families
    ttft = families["vllm:time_to_first_token_seconds"]
    families["vllm:time_to_first_token_seconds"] = msgspec.structs.replace(ttft, bounds=(1.0, 2.0))
    families["gone_total"] = families["llm_admission_total"]
    again = Metrics()
    again.add(families)
    found = samples(again)
    assert "vllm:time_to_first_token_seconds" not in str(found)
    assert found["llm_admission_total[('action', 'reject')]"] == 1


def test_a_state_that_cannot_be_read_begins_at_zero() -> None:
    metrics = Metrics()
    meta = Meta("node", "boot", 0, "counters", 0, "CountersCarried", 1, -1, "", "", "", "app", 0, 1)
    metrics.fold(Record(meta, ev.CountersCarried(state=msgspec.Raw(msgspec.msgpack.encode([1, 2])))))
    assert "vllm" not in str(samples(metrics))


def test_a_damaged_journal_is_said_and_begins_at_zero(
    tmp_path: Path, busy: "Script", caplog: pytest.LogCaptureFixture
) -> None:
    with journal_of(tmp_path, "boot1") as journal:
        append(journal, busy)
    segment = next(tmp_path.glob("control-*.seg"))
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 0xFF
    segment.write_bytes(data)
    assert counters_before(SegmentReader(tmp_path), "next") is None
    assert "begin at zero" in caplog.text
