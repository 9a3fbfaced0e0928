"""The report: one file that needs nothing else, whatever is in the recording."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gptoss.cli.main import main
from gptoss.clock import NS_PER_MS
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Meta, Record
from gptoss.report.facts import ROWS_MAX, STORIES_MAX, gather
from gptoss.report.page import About, render
from gptoss.report.replays import verdict_of
from gptoss.report.series import COLUMNS_MAX, POINTS_MAX, PREFILLED, Series, StepGrid
from gptoss.telemetry.recording import ListRecording

BUNDLES = Path(__file__).parents[1] / "replay" / "bundles"
HOSTILE = "<script>alert(1)</script>\" onload='x' \x1b[31m\u202e&lt;</title></style>"


class Page(HTMLParser):
    """What a browser would make of the page, as far as safety is concerned."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, str] = {}
        self.ids: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in {"script", "style"}:
            self.raw[self._open[-1]] = self.raw.get(self._open[-1], "") + data


def check_safe(html: str) -> Page:
    page = Page(html)
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == names.count("style") == 1
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attrs), (tag, attrs)
        assert tag not in {"img", "iframe", "link", "object", "embed", "base", "form"}
        assert "src" not in attrs
        assert (attrs.get("href") or "#").startswith("#")
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.raw[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert len(page.ids) == len(set(page.ids))
    targets = {(attrs.get("href") or "")[1:] for tag, attrs in page.tags if tag == "a"}
    assert targets <= set(page.ids)
    return page


class Recorder:
    """Records as actors would journal them."""

    def __init__(self, boot: str = "b1") -> None:
        self.boot = boot
        self.records: list[Record] = []
        self.now_ns = 10**9
        self._seqs: dict[str, int] = {}

    def add(self, stream: str, event: Event, correlation: str = "", *, after_ms: float = 1.0) -> None:
        self.now_ns += int(after_ms * NS_PER_MS)
        seq = self._seqs[stream] = self._seqs.get(stream, -1) + 1
        pos = len(self.records)
        kind = type(event)
        meta = Meta("n", self.boot, pos, stream, seq, kind.__name__, 1, -1, correlation, "", "", stream, 0, self.now_ns)
        self.records.append(Record(meta, event))

    def request(self, name: str, event: Event) -> None:
        self.add(f"request/{name}", event, name)

    def start(self, settings: str = "{}", text: str = "x") -> None:
        node = ev.NodeStarted(
            version=text, settings=settings, python=text, packages={text: text}, os=text, cpu_count=1, wall_ns=10**18
        )
        self.add("system", node)

    def receive(self, name: str) -> None:
        received = ev.RequestReceived(
            request_id=name, endpoint=name, model=name, stream=True, num_messages=1, priority=0, deadline_ns=0
        )
        self.request(name, received)

    def step(self, number: int, rows: dict[str, tuple[int, int]], executor: str = "cpu") -> None:
        self.now_ns += 10 * NS_PER_MS
        committed = ev.StepCommitted(
            executor=executor,
            step=number,
            started_ns=self.now_ns - 10 * NS_PER_MS,
            duration_ns=9 * NS_PER_MS,
            rows=tuple(ev.CommittedRow(name, 1, *counts) for name, counts in rows.items()),
            waiting=0,
            running=len(rows),
            kv_bytes_in_use=number,
        )
        self.add(f"executor/{executor}", committed, after_ms=0)


def page_of(records: list[Record], **about: Any) -> str:
    return render(gather(ListRecording(records), about.get("focus", ())), About(title="A report", **about))


def test_hostile_strings_are_escaped_wherever_they_stand() -> None:
    recorder = Recorder(boot=HOSTILE)
    recorder.start(settings=json.dumps({HOSTILE: HOSTILE, "port": 1}), text=HOSTILE)
    recorder.receive(HOSTILE)
    ask = ev.Ask(max_tokens=1, kv_bytes=1, priority=0, deadline_ns=0, shrunk=False)
    recorder.add("admission", ev.Enqueued(request_id=HOSTILE, position=0, queued=1, reason=HOSTILE, ask=ask), HOSTILE)
    decided = ev.AdmissionDecided(
        request_id=HOSTILE, action="queue", reason=HOSTILE, max_tokens=1, kv_bytes=1, running=0, queued=0, slots=1,
        policy=HOSTILE,
    )  # fmt: skip
    recorder.add(HOSTILE, decided, HOSTILE)
    candidate = ev.RouteCandidate(executor=HOSTILE, running=0, slots=1, kv_bytes_bound=0, kv_bytes_free=0, score=0.0)
    route = ev.RouteDecided(request_id=HOSTILE, executor=HOSTILE, reason=HOSTILE, candidates=(candidate,))
    recorder.add(HOSTILE, route, HOSTILE)
    recorder.step(1, {HOSTILE: (1, 5), f"other {HOSTILE}": (1, 0)}, executor=HOSTILE)
    recorder.request(HOSTILE, ev.RequestFailed(code=HOSTILE, message=HOSTILE))
    recorder.add(HOSTILE, ev.DeadLettered(to=HOSTILE, message_type=HOSTILE, reason=HOSTILE))
    verify = {
        "mode": "verify",
        "first": {
            "kind": HOSTILE, "pos": HOSTILE, "stream": HOSTILE, "type": HOSTILE, "command": HOSTILE,
            "fields": [{"field": HOSTILE, "recorded": HOSTILE, "replayed": {HOSTILE: HOSTILE}}],
            "chain": [{"pos": 1, "stream": HOSTILE, "type": HOSTILE, "summary": HOSTILE}],
        },
    }  # fmt: skip
    facts = gather(ListRecording(recorder.records), [HOSTILE])
    html = render(
        facts,
        About(title=HOSTILE, subtitle=HOSTILE, facts=((HOSTILE, HOSTILE),), focus=(HOSTILE,), missing=(HOSTILE,)),
        [verify],
    )
    page = check_safe(html)
    assert "<script>alert" not in html
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert sum(tag == "details" for tag, _ in page.tags) == 1


def test_thousands_of_steps_and_requests_stay_a_small_page() -> None:
    recorder = Recorder()
    recorder.start()
    names = [f"req_{number:05}" for number in range(1500)]
    for step, name in enumerate(names):
        recorder.receive(name)
        for part in range(4):
            batch = names[max(0, step - 7) : step + 1]
            recorder.step(4 * step + part, {one: (1, 40 if one == name and part == 0 else 0) for one in batch})
        if step >= 8:
            done = ev.RequestCompleted(finish_reason="stop", prompt_tokens=4, completion_tokens=32, cached_tokens=0)
            recorder.request(names[step - 8], done)
    html = page_of(recorder.records)
    check_safe(html)
    assert len(html) < 2_000_000
    assert "6000 steps" in html
    assert "a column is 16 steps" in html
    assert f"{1500 - ROWS_MAX} more requests are in the recording" in html
    assert html.count("<details") == STORIES_MAX


def test_an_empty_recording_is_a_page_that_says_so() -> None:
    html = page_of([])
    check_safe(html)
    assert "no requests" in html


def test_requests_that_went_wrong_get_their_story_before_the_slow_ones() -> None:
    recorder = Recorder()
    recorder.start()
    for number in range(60):
        recorder.receive(f"slow-{number}")
    recorder.receive("broken")
    recorder.request("broken", ev.RequestFailed(code="engine_lost", message="gone"))
    done = ev.RequestCompleted(finish_reason="stop", prompt_tokens=1, completion_tokens=1, cached_tokens=0)
    for number in range(60):
        recorder.request(f"slow-{number}", done)
    facts = gather(ListRecording(recorder.records), ["slow-59"])
    told = {story.timeline.request_id for story in facts.stories}
    assert {"broken", "slow-59", "slow-0"} <= told
    assert "slow-58" not in told


def test_a_request_cut_off_by_a_crash_is_a_failed_one_and_counted_once() -> None:
    before, after = Recorder("b1"), Recorder("b2")
    before.start()
    before.receive("req_1")
    after.start()
    after.request("req_1", ev.RequestFailed(code="aborted_by_crash", message="the server process ended"))
    facts = gather(ListRecording([*before.records, *after.records]))
    assert dict(facts.outcomes) == {("failed", "aborted_by_crash"): 1}
    assert [story.timeline.outcome for story in facts.stories] == ["failed"]


@pytest.mark.parametrize("path", sorted(BUNDLES.glob("*.zip")), ids=lambda path: path.name.partition(".")[0])
def test_every_committed_bundle_has_a_report_with_its_replay(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    result = CliRunner().invoke(main, ["bundle", "report", str(path), "-o", str(target)])
    assert result.exit_code == 0, result.output
    html = target.read_text(encoding="utf-8")
    check_safe(html)
    is_doctored = "doctored" in path.name
    assert ("The replay diverges: differs at #" in html) == is_doctored
    assert ("Every decision is made again as recorded" in html) != is_doctored


def test_a_bundle_that_is_none_or_a_result_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.zip"
    bad.write_bytes(b"PK nothing")
    result = CliRunner().invoke(main, ["bundle", "report", str(bad)])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    good = next(BUNDLES.glob("clean*"))
    result = CliRunner().invoke(main, ["bundle", "report", str(good), "--replay", str(bad)])
    assert result.exit_code == 2
    assert "is no result of gptoss replay --json" in result.stderr


# ---------------------------------------------------------------- parts


def test_a_long_series_keeps_its_top() -> None:
    series = Series()
    for at in range(50_000):
        series.add(at, 99.0 if at == 31_337 else at % 7)
    assert len(series.points) < 2 * POINTS_MAX
    assert series.top == 99.0
    assert [at for at, _ in series.points] == sorted(at for at, _ in series.points)


def test_a_grid_of_many_steps_forgets_none() -> None:
    grid = StepGrid()
    recorder = Recorder()
    for step in range(5001):
        recorder.step(step, {"a": (1, 0), **({"rare": (0, 8)} if step == 2222 else {})})
    for record in recorder.records:
        assert isinstance(record.event, ev.StepCommitted)
        grid.add(record.event)
    assert len(grid.columns) <= COLUMNS_MAX
    assert grid.num_steps == 5001
    assert (grid.columns[0].first_step, grid.columns[-1].last_step) == (0, 5000)
    assert sum(column.tokens for column in grid.columns) == 5001
    (holder,) = [column for column in grid.columns if "rare" in column.cells]
    assert holder.first_step <= 2222 <= holder.last_step
    assert holder.cells["rare"] == PREFILLED
    joints = [(a.last_step + 1, b.first_step) for a, b in zip(grid.columns, grid.columns[1:], strict=False)]
    assert all(end == begin for end, begin in joints)


@pytest.mark.parametrize(
    "result",
    [
        {},
        {"mode": "verify", "first": 3, "checked": "x"},
        {"mode": "tokens", "diverged": [1]},
        {"mode": "what-if", "changes": []},
    ],
)
def test_a_result_of_another_shape_is_no_error(result: dict[str, Any]) -> None:
    assert verdict_of(result).headline


def test_what_if_shows_both_columns_and_that_it_is_estimated() -> None:
    verdict = verdict_of(
        {
            "mode": "what-if",
            "changes": {"max_queue": [4, 8]},
            "exact_decisions": 7,
            "first": {"pos": 3},
            "recorded": {"refused": 9},
            "estimated": {"refused": 2},
            "assumptions": ["steps take as long as recorded"],
        }
    )
    assert verdict.headline == "What if: max_queue 4 -> 8"
    assert verdict.sides == ("as it was", "estimated")
    assert verdict.fields == (("refused", "9", "2"),)
    assert any(re.match("estimated: ", line) for line in verdict.lines)
