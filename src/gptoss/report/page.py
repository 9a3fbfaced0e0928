"""A recording's facts as one HTML page.

Rules:
- The page needs nothing but itself: style and script stand in it, and its policy allows these two by their hashes and
  nothing else. It works without the script, which only filters the events.
- A recording may come from anyone. Every string is made printable and cut (``shown``), and the template escapes.
- Numbers become words here; the template only places them.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import jinja2
import msgspec

from gptoss.clock import NS_PER_MS, NS_PER_S
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.report.facts import BootFacts, Facts
from gptoss.report.figures import (
    chart_of,
    delay_segment,
    grid_of,
    phase_segment,
    request_segments,
)
from gptoss.report.replays import Verdict, verdict_of
from gptoss.report.stories import Told
from gptoss.telemetry.event_words import describe, tone_of
from gptoss.telemetry.logs import safe_text
from gptoss.telemetry.percentile import nearest_rank
from gptoss.telemetry.plain_text import took
from gptoss.telemetry.request_view import RequestRow, request_id_of
from gptoss.telemetry.timeline_phases import many, size
from gptoss.telemetry.timeline_text import DELAYS

DELAYS_SHOWN = 12
STORIES_OPEN = 1
FOCUS_OPEN = 4
_PERCENTILES = (50, 95)


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What the recording itself does not say.

    Attributes:
        title: of the page.
        subtitle: where the recording is from and what it was cut for.
        facts: (name, value) for the head of the page.
        focus: requests that it is about.
        missing: what a whole recording would have and this one has not.
        version: of the program that writes the page.
    """

    title: str
    subtitle: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    focus: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    version: str = ""


def render(facts: Facts, about: About, replays: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page.

    Args:
        facts: of the recording.
        about: what goes with it.
        replays: results of replays, each as ``replay.result.to_json`` gives it.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_printable
    )
    css, script = _text("report.css"), _text("report.js")
    policy = f"default-src 'none'; style-src '{_hash(css)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    return environment.from_string(_text("report.html.j2")).render(
        csp=policy, css=css, js=script, **_Page(facts, about).values(replays)
    )


def _text(name: str) -> str:
    return files("gptoss.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _printable(value: Any) -> Any:
    """Every string that the template puts out, except what is markup already."""
    return safe_text(value) if type(value) is str and not value.isprintable() else value


class _Page:
    def __init__(self, facts: Facts, about: About) -> None:
        self._facts = facts
        self._about = about
        self._boots = {boot.boot: boot for boot in facts.boots}
        slowest = sorted(facts.stories, key=lambda told: -told.timeline.total_ms)[:STORIES_OPEN]
        self._open = set(about.focus[:FOCUS_OPEN] or [told.timeline.request_id for told in slowest])
        self._story_of = {(told.boot, told.timeline.request_id): index for index, told in enumerate(facts.stories)}

    def values(self, replays: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        facts, about = self._facts, self._about
        return {
            "title": shown(about.title),
            "subtitle": shown(about.subtitle),
            "facts": [(name, shown(value)) for name, value in (*about.facts, *self._head())],
            "outcomes": [
                {"state": state, "reason": shown(reason), "count": count}
                for (state, reason), count in facts.outcomes.most_common(20)
            ],
            "latencies": _latencies(facts.requests),
            "missing": [shown(gap) for gap in about.missing[:10]],
            "replays": [_printable_verdict(verdict_of(result)) for result in replays],
            "boots": [self._boot(boot) for boot in facts.boots],
            "requests_left_out": facts.requests_left_out,
            "stories": [self._story(told) for told in facts.stories],
            "decisions": [self._decision(record) for record in facts.decisions],
            "decisions_left_out": facts.decisions_left_out,
            "events": [self._event(record) for record in facts.events],
            "events_left_out": facts.events_left_out,
            "footer": f"Written by gptoss {about.version} from {many(sum(b.records for b in facts.boots), 'record')}.",
        }

    def _head(self) -> list[tuple[str, str]]:
        boots = self._facts.boots
        started = next((boot.started for boot in reversed(boots) if boot.started is not None), None)
        engine = next((boot.engines[-1] for boot in reversed(boots) if boot.engines), None)
        found: list[tuple[str, str]] = []
        if boots:
            first, last = boots[0], boots[-1]
            begin, end = _when(first, first.origin_ns), _when(last, last.last_ns)
            same_day = begin.partition(" ")[0] == end.partition(" ")[0]
            begin, end = begin.removesuffix(" UTC"), end.partition(" ")[2] if same_day else end
            found.append(("recorded", f"{begin} to {end}" if begin else "at an unknown time"))
        if engine is not None:
            can = engine.capabilities
            found.append(("model", f"{can.model_name}, {can.dtype} on {can.device}"))
        if started is not None:
            found.append(("server", f"gptoss {started.version}, Python {started.python}"))
        return found

    # ---- one boot

    def _boot(self, boot: BootFacts) -> dict[str, Any]:
        span_ms = (boot.last_ns - boot.origin_ns) / NS_PER_MS
        rows = [row for row in self._facts.requests if row.boot == boot.boot]
        charts = [
            chart_of("Requests", boot, {"running": ("decode", boot.running), "queued": ("queue", boot.queued)}),
            chart_of(
                "KV memory",
                boot,
                {"reserved": ("prefill", boot.reserved), "in use": ("decode", boot.in_use)},
                level=boot.budget,
                unit=size,
            ),
        ]
        return {
            "name": shown(boot.boot),
            "begin": _when(boot, boot.origin_ns),
            "end": _when(boot, boot.last_ns),
            "span": took(span_ms),
            "axis": f"{_when(boot, boot.origin_ns)} + {took(span_ms)}",
            "rows": [self._row(row, boot) for row in rows],
            "charts": [chart for chart in charts if chart["lines"]],
            "grids": [self._grid(boot, name) for name in boot.grids],
            "facts": [(name, shown(value)) for name, value in _boot_facts(boot)],
            "settings": [(shown(k), shown(v), shown(d)) for k, (v, d) in sorted(boot.settings.items())],
        }

    def _row(self, row: RequestRow, boot: BootFacts) -> dict[str, Any]:
        outcome = row.state if row.outcome in {"", row.state} else f"{row.state}: {row.outcome}"
        outcome += f", {row.retries + 1} attempts" if row.retries else ""
        total, queued, ttft = took(row.e2e_ms), took(row.queue_ms or None), took(row.ttft_ms)
        parts = [f"queued {queued}" if queued else "", f"first token after {ttft}" if ttft else "", total]
        return {
            "id": shown(row.request_id),
            "story": self._story_of.get((row.boot, row.request_id)),
            "focus": row.request_id in self._about.focus,
            "when": _clock(row.received_unix_s),
            "state": row.state,
            "outcome": shown(outcome),
            "segments": request_segments(row, boot),
            "label": ", ".join(part for part in parts if part) or "no times",
            "queued": queued,
            "ttft": ttft,
            "total": total,
            "tokens": f"{row.prompt_tokens} / {row.completion_tokens}",
        }

    def _grid(self, boot: BootFacts, executor: str) -> dict[str, Any]:
        order = [row.request_id for row in self._facts.requests if row.boot == boot.boot]
        grid = grid_of(boot.grids[executor], order)
        for row in grid["rows"]:
            row["story"] = self._story_of.get((boot.boot, row["id"]))
            row["id"] = shown(row["id"])
        return {**grid, "executor": shown(executor)}

    # ---- requests, decisions, events

    def _story(self, told: Told) -> dict[str, Any]:
        life = told.timeline
        facts = [f"first token after {took(life.ttft_ms)}" if life.ttft_ms is not None else ""]
        if life.decode is not None:
            facts.append(f"{many(life.decode.tokens, 'token')} in {many(life.decode.steps, 'step')}")
            facts.append(f"shared with up to {life.decode.others_max}" if life.decode.others_max else "")
        facts.append(f"{life.attempts} attempts" if life.attempts > 1 else "")
        phases = [
            {
                "name": phase.name,
                "at": took(phase.start_ms),
                "took": "" if phase.mark else took(phase.end_ms - phase.start_ms),
                "segment": phase_segment(phase, life.total_ms),
                "label": f"{phase.name} at {took(phase.start_ms)}",
                "detail": shown(phase.detail),
            }
            for phase in life.phases
        ]
        delays = [
            {
                "kind": DELAYS[delay.kind][0],
                "who": shown(delay.who),
                "at": took(delay.start_ms),
                "took": took(delay.took_ms),
                "share": f"{delay.share:.0%}",
                "segment": delay_segment(delay, life.total_ms),
                "label": f"from {took(delay.start_ms)} to {took(delay.end_ms)}",
                "detail": shown(delay.detail),
            }
            for delay in told.delays[:DELAYS_SHOWN]
        ]
        return {
            "id": shown(life.request_id),
            "open": life.request_id in self._open,
            "state": life.outcome if life.outcome in {"completed", "failed", "rejected", "cancelled"} else "running",
            "outcome": life.outcome,
            "total": took(life.total_ms),
            "facts": ", ".join(fact for fact in facts if fact),
            "phases": phases,
            "delays": delays,
            "delays_left_out": max(0, len(told.delays) - DELAYS_SHOWN),
        }

    def _decision(self, record: Record) -> dict[str, Any]:
        event: Any = record.event
        candidates: list[str] = []
        if isinstance(event, ev.AdmissionDecided):
            tone = {"accept": "good-ink", "reject": "bad-ink"}.get(event.action, "warn")
            decision = event.action
            numbers = (
                f"{event.reason}; {event.running} of {event.slots} slots taken, {event.queued} queued; "
                f"{size(event.kv_bytes)} of KV, at most {event.max_tokens} tokens; policy {event.policy}"
            )
        elif isinstance(event, ev.ReservationRefused):
            tone, decision = "bad-ink", "no memory"
            numbers = (
                f"{size(event.kv_bytes)} wanted, at most {size(event.kv_bytes_free_max)} free on one executor; "
                f"pressure {event.pressure:.0%}"
            )
        else:
            tone, decision = ("good-ink" if event.executor else "warn"), event.executor or "none"
            numbers = event.reason
            candidates = [
                f"{one.executor}: score {one.score:.3f}, {one.running} of {one.slots} running, "
                f"{size(one.kv_bytes_free)} free"
                for one in event.candidates[:16]
            ]
        return {
            "at": self._at(record),
            "who": shown(record.meta.stream),
            "request": shown(event.request_id),
            "decision": shown(decision),
            "tone": tone,
            "numbers": shown(numbers),
            "candidates": [shown(line) for line in candidates],
        }

    def _event(self, record: Record) -> dict[str, Any]:
        tone = tone_of(record.event)
        return {
            "pos": record.meta.pos,
            "at": self._at(record),
            "type": record.meta.type,
            "tone": f"{tone}-ink" if tone in {"good", "bad"} else tone,
            "about": shown(request_id_of(record) or record.meta.stream),
            "says": shown(describe(record)),
        }

    def _at(self, record: Record) -> str:
        """Since the first record of the boot."""
        return f"{(record.meta.mono_ns - self._boots[record.meta.boot].origin_ns) / NS_PER_S:.3f} s"


def shown(value: Any) -> str:
    """A string that is safe to look at: printable and not too long."""
    return safe_text(value if isinstance(value, str) else str(value))


def _printable_verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "tone": verdict.tone,
        "headline": shown(verdict.headline),
        "lines": [shown(line) for line in verdict.lines],
        "sides": verdict.sides,
        "fields": [tuple(shown(cell) for cell in row) for row in verdict.fields],
        "chain": [
            {**link, **{name: shown(link[name]) for name in ("stream", "type", "summary")}} for link in verdict.chain
        ],
    }


def _boot_facts(boot: BootFacts) -> list[tuple[str, str]]:
    found = [("node", boot.node), ("records", str(boot.records))]
    if (started := boot.started) is not None:
        found += [("system", f"{started.os}, {many(started.cpu_count, 'CPU')}")]
        found += [("packages", ", ".join(f"{name} {version}" for name, version in sorted(started.packages.items())))]
    for engine in boot.engines[-4:]:
        can, mark = engine.capabilities, engine.fingerprint
        found.append(
            (
                f"engine {engine.executor}",
                f"{can.architecture}, context {can.max_model_len}, {can.max_batch_size} slots, "
                f"{size(can.kv_budget_bytes)} of KV, {many(can.num_threads, 'thread')}; loaded in {took(engine.load_ms)}",
            )
        )
        hashes = {"weights": mark.weights, "tokenizer": mark.tokenizer, "template": mark.chat_template}
        if any(hashes.values()):
            said = ", ".join(f"{name} {value[:12]}" for name, value in hashes.items() if value)
            found.append((f"fingerprint {engine.executor}", said))
    return found


def _latencies(rows: Sequence[RequestRow]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, field in (("in the queue", "queue_ms"), ("to the first token", "ttft_ms"), ("in all", "e2e_ms")):
        ended = [row for row in rows if row.state == "completed" or field == "ttft_ms"]
        values = sorted(value for row in ended if (value := getattr(row, field)) is not None)
        if values:
            p50, p95 = (took(nearest_rank(values, p)) for p in _PERCENTILES)
            found.append({"name": name, "count": len(values), "p50": p50, "p95": p95, "longest": took(values[-1])})
    return found


def _when(boot: BootFacts, mono_ns: int) -> str:
    return "" if boot.wall_offset_ns is None else _clock((mono_ns + boot.wall_offset_ns) / NS_PER_S, date=True)


def _clock(unix_s: float | None, *, date: bool = False) -> str:
    """Wall time in UTC: a report is read in more than one place."""
    if unix_s is None:
        return ""
    try:
        moment = datetime.fromtimestamp(unix_s, tz=UTC)
    except (OverflowError, ValueError, OSError):
        return "at no time"
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC" if date else f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03}"
