"""What a manifest says of the records in its bundle, folded from those records as they pass.

Causal completeness is judged here, by the writer and again by whoever verifies a bundle:
- A decider's stream begins at its first record or at a snapshot of its state, and has no holes after that.
- A request's stream begins with its arrival, has no holes, and ends.
- An executor's stream has no holes once steps are in it, and its ``EngineLoaded`` is there.
"""

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from gptoss.actors.directory import EXECUTOR_PREFIX, REQUEST_PREFIX, STANDING_DECIDERS
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Meta, Record
from gptoss.telemetry.bundle_format import BootFacts, EngineFacts, Gap
from gptoss.telemetry.recording import Recording
from gptoss.telemetry.wall_clock import wall_offset_ns

GAPS_MAX = 1000
"""More gaps than this are counted in the last one's place."""


def facts_of(recording: Recording) -> "BundleFacts":
    """The facts of a whole recording."""
    facts = BundleFacts()
    for records in (recording.records(), recording.content()):
        for record in records:
            facts.fold(record)
    return facts


class _Stream:
    """How far one stream has come."""

    __slots__ = ("ended", "hole_at", "is_loaded", "next_seq", "starts_well", "stepped")

    def __init__(self, *, starts_well: bool) -> None:
        self.starts_well = starts_well
        self.next_seq = -1
        self.hole_at = -1
        self.ended = False
        self.is_loaded = False
        self.stepped = False


class BundleFacts:
    """Folds control records, then content records, in their order."""

    def __init__(self) -> None:
        self.events: dict[str, int] = {}
        self._boots: dict[str, BootFacts] = {}
        self._offsets: dict[str, int] = {}
        self._span: dict[str, tuple[int, int]] = {}
        self._streams: dict[tuple[str, str], _Stream] = {}
        self._aborted: set[tuple[str, str]] = set()
        self._requests: set[tuple[str, str]] = set()
        self._rendered: dict[str, str] = {}
        self._notes: dict[type[Event], Callable[[Record], None]] = {
            ev.NodeStarted: self._note_started,
            ev.ClockAnchored: self._note_anchor,
            ev.EngineLoaded: self._note_loaded,
            ev.RunsAborted: self._note_aborted,
            ev.PromptRendered: self._note_rendered,
        }

    def fold(self, record: Record) -> None:
        """Take a record in."""
        meta, event = record.meta, record.event
        self.events[meta.type] = event.VERSION
        if event.FAMILY == "content":
            if isinstance(event, ev.PromptTokens | ev.PromptHashed):
                self._rendered.pop(event.request_id, None)
            return
        span = self._span.get(meta.boot)
        if span is None:
            self._boots[meta.boot] = BootFacts(boot=meta.boot, node=meta.node)
        self._span[meta.boot] = (span[0] if span else meta.mono_ns, meta.mono_ns)
        note = self._notes.get(type(event))
        if note is not None:
            note(record)
        self._follow(record)

    # ---- what it comes to

    def boots(self) -> tuple[BootFacts, ...]:
        """Each boot with its wall times."""
        dated: list[BootFacts] = []
        for boot, facts in self._boots.items():
            offset = self._offsets.get(boot)
            first, last = (0, 0) if offset is None else (self._span[boot][0] + offset, self._span[boot][1] + offset)
            dated.append(msgspec.structs.replace(facts, first_ns=first, last_ns=last))
        return tuple(dated)

    @property
    def num_requests(self) -> int:
        """Requests that are in the bundle with their own stream."""
        return len(self._requests)

    def gaps(self, *, with_content: bool) -> tuple[Gap, ...]:
        """What is missing. ``with_content``: prompts should be there, as tokens or as hashes."""
        found = [gap for (boot, name), stream in self._streams.items() for gap in self._gaps_of(boot, name, stream)]
        if with_content:
            found += [
                Gap(
                    boot=boot,
                    stream=f"{REQUEST_PREFIX}{request_id}",
                    what="its content was not recorded or is forgotten",
                )
                for request_id, boot in self._rendered.items()
            ]
        found += [
            Gap(boot=boot, stream="system", what="NodeStarted is not kept: settings and versions are unknown")
            for boot in self._boots
            if not self._boots[boot].version
        ]
        if len(found) > GAPS_MAX:
            rest = Gap(boot="", stream="", what=f"and {len(found) - GAPS_MAX} more")
            return (*found[:GAPS_MAX], rest)
        return tuple(found)

    # ---- folding

    def _follow(self, record: Record) -> None:
        meta, event = record.meta, record.event
        stream = self._streams.get((meta.boot, meta.stream))
        if stream is None:
            starts_well = meta.seq == 0 or isinstance(event, ev.SnapshotTaken | ev.RequestReceived)
            stream = self._streams[meta.boot, meta.stream] = _Stream(starts_well=starts_well)
        elif meta.seq != stream.next_seq and stream.hole_at < 0 and _is_hole(meta, stream):
            stream.hole_at = meta.pos
        stream.next_seq = meta.seq + 1
        if isinstance(event, ev.TERMINAL_EVENTS):
            stream.ended = True
        elif isinstance(event, ev.RequestReceived):
            stream.ended = False
            self._requests.add((meta.boot, meta.stream))
        elif isinstance(event, ev.EngineLoaded):
            stream.is_loaded = True
        elif isinstance(event, ev.StepCommitted | ev.ExecutorAccepted):
            stream.stepped = True

    def _gaps_of(self, boot: str, name: str, stream: _Stream) -> Iterable[Gap]:
        is_request = name.startswith(REQUEST_PREFIX)
        if not stream.starts_well and (is_request or name in STANDING_DECIDERS):
            yield Gap(
                boot=boot,
                stream=name,
                what="its beginning is forgotten; decisions before its first snapshot do not replay",
            )
        if stream.hole_at >= 0 and (is_request or name in STANDING_DECIDERS or _is_executor(name)):
            yield Gap(boot=boot, stream=name, what=f"records are missing before position {stream.hole_at}")
        if is_request and not stream.ended and (boot, name) not in self._aborted:
            yield Gap(boot=boot, stream=name, what="it had not ended when the bundle was cut")
        if _is_executor(name) and stream.stepped and not stream.is_loaded:
            yield Gap(boot=boot, stream=name, what="EngineLoaded is forgotten; its steps do not replay")

    def _note_started(self, record: Record) -> None:
        event = record.event
        assert isinstance(event, ev.NodeStarted)
        self._note_anchor(record)
        self._boots[record.meta.boot] = BootFacts(
            boot=record.meta.boot,
            node=record.meta.node,
            version=event.version,
            python=event.python,
            packages=event.packages,
            os=event.os,
            cpu_count=event.cpu_count,
            settings=_settings(event.settings),
        )

    def _note_anchor(self, record: Record) -> None:
        self._offsets[record.meta.boot] = wall_offset_ns(record, 0)

    def _note_loaded(self, record: Record) -> None:
        event = record.event
        assert isinstance(event, ev.EngineLoaded)
        facts = self._boots[record.meta.boot]
        loaded = EngineFacts(
            executor=event.executor, capabilities=event.capabilities, fingerprint=event.fingerprint, notes=event.notes
        )
        others = tuple(engine for engine in facts.engines if engine.executor != event.executor)
        self._boots[record.meta.boot] = msgspec.structs.replace(facts, engines=(*others, loaded))

    def _note_aborted(self, record: Record) -> None:
        assert isinstance(record.event, ev.RunsAborted)
        self._aborted.update((record.event.boot, f"{REQUEST_PREFIX}{name}") for name in record.event.request_ids)

    def _note_rendered(self, record: Record) -> None:
        self._rendered[record.meta.correlation] = record.meta.boot


def _is_hole(meta: Meta, stream: _Stream) -> bool:
    if _is_executor(meta.stream):
        return stream.stepped  # what stood between its EngineLoaded and the first step of interest was left out
    # The stream of a request that had ended begins at 0 again when its id is used for another one.
    return not (meta.seq == 0 and stream.ended)


def _is_executor(stream: str) -> bool:
    return stream.startswith(EXECUTOR_PREFIX)


def _settings(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
