"""Walking through a recording."""

import io
from collections.abc import Iterator

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console
from scenarios import bundles_folder

from gptoss.cli.main import main
from gptoss.errors import ReplayError
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.replay.report import print_moment
from gptoss.replay.walk import Walk
from gptoss.telemetry.bundle_reader import BundleReader

PREEMPTED = str(bundles_folder() / "preempted.gptoss.zip")


@pytest.fixture
def bundle() -> Iterator[BundleReader]:
    with BundleReader(bundles_folder() / "preempted.gptoss.zip") as reader:
        yield reader


def first(bundle: BundleReader, kind: type[ev.Event]) -> Record:
    return next(record for record in bundle.records() if isinstance(record.event, kind))


def test_a_deciders_state_is_that_after_the_record(bundle: BundleReader) -> None:
    granted = first(bundle, ev.ReservationGranted)
    walk = Walk(bundle, bundle.boots()[0], granted.meta.pos)
    assert walk.record == granted
    moment = walk.moment("memory")
    assert list(moment.state["grants"]) == ["yields"]
    assert moment.is_known
    assert walk.back()
    assert walk.moment("memory").state["grants"] == {}
    assert walk.next()
    assert list(walk.moment("memory").state["grants"]) == ["yields"]


def test_a_mailbox_holds_what_was_sent_and_not_yet_consumed(bundle: BundleReader) -> None:
    granted = first(bundle, ev.ReservationGranted)
    consumed = next(
        r
        for r in bundle.records(stream="admission")
        if r.meta.cause == granted.meta.pos and r.meta.pos > granted.meta.pos
    )
    # Until admission consumes it, the guard's yes waits; it was told right after it was recorded.
    walk = Walk(bundle, bundle.boots()[0], consumed.meta.pos - 1)
    waiting = walk.moment("admission").mailbox
    told_later = walk.record.meta.pos == granted.meta.pos
    assert told_later or [each.pos for each in waiting] == [consumed.meta.pos]
    assert walk.next()
    assert consumed.meta.pos not in [each.pos for each in walk.moment("admission").mailbox]


def test_an_executors_requests_are_shown_with_what_they_have_computed(bundle: BundleReader) -> None:
    preempted = first(bundle, ev.Preempted)
    walk = Walk(bundle, bundle.boots()[0], preempted.meta.pos)
    state = walk.moment("executor/cpu:0").state
    assert state["waiting"]["yields"]["num_computed"] == 0
    assert state["waiting"]["yields"]["num_tokens"] > 30
    running = [*state["running"]]
    assert len(running) == 1
    assert state["kv_bytes_in_use"] == state["running"][running[0]]["kv_bytes"]
    out = io.StringIO()
    print_moment(walk.moment("executor/cpu:0"), Console(file=out, width=100))
    assert "num_computed: 0" in out.getvalue()


def test_who_is_unknown_is_refused_with_the_known_names(bundle: BundleReader) -> None:
    walk = Walk(bundle, bundle.boots()[0], 60)
    with pytest.raises(ReplayError, match=r"nobody-here.*admission"):
        walk.moment("nobody-here")
    with pytest.raises(ReplayError, match="no record up to"):
        Walk(bundle, "boot_none", 3)


def test_steps_are_walked_by_lines_of_input() -> None:
    keys = "n\n\np\nmemory\nnobody\n?\nq\nn\n"
    result = CliRunner().invoke(main, ["replay", PREEMPTED, "--until", "40", "--step"], input=keys)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [int(line.split()[0]) for line in lines[:4]] == [40, 41, 42, 41]
    assert "memory at record 41" in result.stdout
    assert "nothing was recorded of 'nobody'" in result.stderr


def test_an_actors_state_as_json() -> None:
    result = CliRunner().invoke(main, ["replay", PREEMPTED, "--until", "60", "--actor", "router", "--json"])
    assert result.exit_code == 0
    moment = msgspec.json.decode(result.stdout)
    assert moment["actor"] == "router"
    assert moment["record"]["pos"] <= 60
    assert "cpu:0" in moment["state"]["executors"]


@pytest.mark.parametrize(("until", "status"), [("x", 2), ("boot_none:3", 2)])
def test_a_place_that_is_none_is_refused(until: str, status: int) -> None:
    result = CliRunner().invoke(main, ["replay", PREEMPTED, "--until", until])
    assert result.exit_code == status
    assert "--until" in result.stderr
