"""Takes out of a recording what its reader shall not see, so that it still replays.

Rules:
- Content keeps to a level. ``hash`` puts keyed hashes in the place of tokens; they form a chain over prompt and output,
  so they say where two answers part and nothing else.
- A pseudonym is a keyed hash of a request's id, the same everywhere in the recording: in streams, correlations, events,
  consumed commands and snapshots. No decision orders by id, so every decision comes out the same.
- With its id, a request loses what else could name it: its trace, and the engine's messages about it. Sessions get
  pseudonyms too, since decisions go by them, unless a request that keeps its id is of the session.
- Without the key, nobody can tell from a guessed id or prompt whether it was this one.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar, cast

import msgspec

from gptoss.messages import events as ev
from gptoss.messages.codec import decode_command, encode_command
from gptoss.messages.envelope import Event, Record
from gptoss.telemetry.bundle_format import ContentLevel, Redaction, level_of
from gptoss.telemetry.recording import Recording

PSEUDONYM_HEX = 20
KEY_ID_HEX = 16
_NOTHING = msgspec.Raw(msgspec.msgpack.encode(None))
_NAMED_FOR_REQUEST = re.compile(r"((?:actor/)?(?:request|task/render)/)(.+)")

S = TypeVar("S", bound=msgspec.Struct)

ID_FIELDS = frozenset({"request_id", "request_ids", "refused"})
"""Fields of events, commands and their parts that hold ids of requests."""
SNAPSHOT_FIELDS = frozenset({"waiting", "pending", "running", "grants", "routes", "parked"})
"""Fields of the deciders' states that are keyed by id, or lists of ids."""
SESSION_FIELD = "session_id"
SESSIONS_FIELD = "sessions"
"""Field of the deciders' states that is keyed by session."""
NAMING_FIELDS = frozenset({"traceparent"})

_LEVELS: dict[type[Event], ContentLevel] = {
    ev.MessagesReceived: "full",
    ev.AnswerDelivered: "full",
    ev.PromptTokens: "tokens",
    ev.StepTokens: "tokens",
    ev.PromptHashed: "hash",
    ev.StepHashed: "hash",
}


class Redacted:
    """A recording as its reader may see it: itself a ``Recording``.

    Args:
        recording: what to redact.
        content: the most that is left of content.
        keep: ids that stay as they are; None keeps all.
        key: of the hashes.

    Attributes:
        policy: for the manifest.
    """

    def __init__(self, recording: Recording, *, content: ContentLevel, keep: frozenset[str] | None, key: bytes) -> None:
        hides: Literal["nobody", "others", "everybody"] = (
            "nobody" if keep is None else "others" if keep else "everybody"
        )
        key_id = "" if keep is None and content != "hash" else key_id_of(key)
        self.policy = Redaction(content=content, pseudonymised=hides, key_id=key_id)
        self._recording = recording
        self._content: ContentLevel = content
        self._key = key
        self._names = None if keep is None else _Names(keep, key)
        self._knows_sessions = not keep

    def name_of(self, request_id: str) -> str:
        """The name under which a request stands."""
        return request_id if self._names is None else self._names.of(request_id)

    def boots(self) -> list[str]:
        """See ``Recording``."""
        return self._recording.boots()

    def records(self, *, boot: str | None = None, stream: str | None = None) -> Iterator[Record]:
        """See ``Recording``; ``stream`` is named as it is in here."""
        if self._names is None:
            yield from self._recording.records(boot=boot, stream=stream)
            return
        if not self._knows_sessions:
            self._names.learn_sessions(self._recording.records())
            self._knows_sessions = True
        for record in self._recording.records(boot=boot):
            renamed = self._names.rename(record)
            if stream is None or renamed.meta.stream == stream:
                yield renamed

    def content(self, *, boot: str | None = None) -> Iterator[Record]:
        """See ``Recording``."""
        if self._content == "none":
            return
        chain = _Chain(self._key)
        for record in self._recording.content(boot=boot):
            event = record.event
            if level_of(_LEVELS[type(event)]) > level_of(self._content):
                hashed = chain.hashed(event) if self._content == "hash" else None
                if hashed is None:
                    continue
                meta = msgspec.structs.replace(record.meta, type=type(hashed).__name__, version=hashed.VERSION)
                record = Record(meta, hashed)  # noqa: PLW2901 - the redacted record takes its place
            yield record if self._names is None else self._names.rename(record)


def bundle_key(node_key: bytes) -> bytes:
    """The key of a node's bundles, from the key of its prompt hashes: neither tells anything about the other."""
    return hmac.new(node_key, b"bundle", hashlib.sha256).digest()


def key_id_of(key: bytes) -> str:
    """What tells two keys apart without telling either."""
    return hmac.new(key, b"key id", hashlib.sha256).hexdigest()[:KEY_ID_HEX]


# ---------------------------------------------------------------- names


class _Names:
    """Replaces the ids of requests that are not to be known."""

    def __init__(self, keep: frozenset[str], key: bytes) -> None:
        self._keep = keep
        self._key = key
        self._known: dict[str, str] = {}
        self._sessions: set[str] = set()

    def learn_sessions(self, records: Iterable[Record]) -> None:
        """Note the sessions of those who keep their ids: they keep their names too."""
        for record in records:
            if isinstance(record.event, ev.RequestReceived) and record.event.request_id in self._keep:
                self._sessions.add(record.event.session_id)

    def session(self, name: str) -> str:
        """The name under which a session stands, alone or within its tenant (``name@tenant``)."""
        session_id, at, tenant = name.partition("@")
        if not session_id or session_id in self._sessions:
            return name
        return f"{self._pseudonym('session', session_id)}{at}{tenant}"

    def of(self, request_id: str) -> str:
        """The name under which a request stands."""
        if not request_id or request_id in self._keep:
            return request_id
        name = self._known.get(request_id)
        if name is None:
            name = self._known[request_id] = self._pseudonym("request", request_id)
        return name

    def _pseudonym(self, kind: str, name: str) -> str:
        digest = hmac.new(self._key, f"{kind} {name}".encode(), hashlib.sha256).hexdigest()
        return f"anon_{digest[:PSEUDONYM_HEX]}"

    def rename(self, record: Record) -> Record:
        """The record with every id replaced."""
        meta = record.meta
        correlation = self.of(meta.correlation)
        hidden = correlation != meta.correlation
        renamed = msgspec.structs.replace(
            meta,
            stream=self._actor(meta.stream),
            correlation=correlation,
            actor=self._actor(meta.actor),
            trace_id="" if hidden else meta.trace_id,
            span_id="" if hidden else meta.span_id,
        )
        return Record(renamed, self._event(record.event, hidden=hidden))

    def _actor(self, name: str) -> str:
        """A stream or an actor, which may be named for a request: ``request/ID``, ``actor/request/ID``."""
        about = _NAMED_FOR_REQUEST.fullmatch(name)
        return about[1] + self.of(about[2]) if about else name

    def _event(self, event: Event, *, hidden: bool) -> Event:
        if isinstance(event, ev.CommandConsumed):
            command = self._struct(decode_command(event.command), hidden=hidden)
            return msgspec.structs.replace(event, command=encode_command(command))
        if isinstance(event, ev.SnapshotTaken):
            return msgspec.structs.replace(event, state=self._state(event.state))
        if isinstance(event, ev.CountersSaved):
            return msgspec.structs.replace(event, state=_NOTHING)  # it names everybody who was running
        if isinstance(event, ev.DeadLettered):
            return msgspec.structs.replace(event, to=self._actor(event.to))
        if isinstance(event, ev.ExecutorFaulted) and hidden:
            event = msgspec.structs.replace(event, message="")
        return self._struct(event, hidden=hidden)

    def _state(self, state: msgspec.Raw) -> msgspec.Raw:
        fields: dict[str, Any] = msgspec.msgpack.decode(state)
        for name in SNAPSHOT_FIELDS & fields.keys():
            if isinstance(fields[name], dict):
                fields[name] = {self.of(key): self._held(value) for key, value in fields[name].items()}
            elif isinstance(fields[name], list):
                fields[name] = [self.of(request_id) for request_id in fields[name]]
        if SESSIONS_FIELD in fields:
            fields[SESSIONS_FIELD] = {self.session(key): value for key, value in fields[SESSIONS_FIELD].items()}
        return msgspec.Raw(msgspec.msgpack.encode(fields))

    def _held(self, value: Any) -> Any:
        """What a state holds for a request."""
        if isinstance(value, dict) and SESSION_FIELD in value:
            held = cast("dict[str, Any]", value)
            return {**held, SESSION_FIELD: self.session(held[SESSION_FIELD])}
        return cast("Any", value)

    def _struct(self, value: S, *, hidden: bool) -> S:
        changes: dict[str, Any] = {}
        for name in value.__struct_fields__:
            before: Any = getattr(value, name)
            if name in ID_FIELDS:
                after = self.of(before) if isinstance(before, str) else tuple(map(self.of, before))
            elif name == SESSION_FIELD:
                after = self.session(before)
            elif name in NAMING_FIELDS and hidden:
                after = ""
            elif isinstance(before, msgspec.Struct):
                after = self._struct(before, hidden=hidden)
            elif isinstance(before, tuple) and before and isinstance(before[0], msgspec.Struct):
                parts = cast("tuple[msgspec.Struct, ...]", before)
                after = tuple(self._struct(part, hidden=hidden) for part in parts)
            else:
                continue
            if after != before:
                changes[name] = after
        return msgspec.structs.replace(value, **changes) if changes else value


# ---------------------------------------------------------------- hashes


class _Chain:
    """For each request, the keyed hash of its prompt and of its output so far."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._links: dict[str, bytes] = {}

    def hashed(self, event: Event) -> Event | None:
        """What stands in the place of a content event; None when nothing does."""
        if isinstance(event, ev.PromptTokens):
            link = self._link(b"prompt", msgspec.msgpack.encode((event.token_ids, event.stop, event.grammar)))
            self._links[event.request_id] = link
            return ev.PromptHashed(request_id=event.request_id, num_tokens=len(event.token_ids), hmac=link.hex())
        if isinstance(event, ev.StepTokens):
            rows = tuple(self._row(row) for row in event.rows)
            return ev.StepHashed(executor=event.executor, step=event.step, rows=rows)
        return None

    def _row(self, row: ev.ProducedRow) -> ev.HashedRow:
        link = self._links.get(row.request_id, b"")
        for token_id in row.token_ids:
            link = self._link(link, token_id.to_bytes(8, "big"))
        self._links[row.request_id] = link
        return ev.HashedRow(row.request_id, row.attempt, row.position, len(row.token_ids), link.hex())

    def _link(self, before: bytes, data: bytes) -> bytes:
        return hmac.new(self._key, before + data, hashlib.sha256).digest()
