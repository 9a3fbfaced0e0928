"""Frames between an engine process and its driver: four bytes of length, big-endian, then msgpack of one message.

A frame longer than ``FRAME_BYTES_MAX``, or one that is no message of ``engine.port``, is a protocol error: the two
sides are of one program, so there is nothing to repair.
"""

import socket
import struct
from collections.abc import Iterator
from typing import TypeAlias, TypeVar

import msgspec

from gptoss.engine.port import (
    CoreCommand,
    EngineCommand,
    EngineEvent,
    Load,
    Shutdown,
)
from gptoss.errors import EngineProtocolError
from gptoss.messages.plan import StepPlan

FRAME_BYTES_MAX = 16 << 20
"""A prompt of two million tokens fits."""

T = TypeVar("T")

_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()


class Join(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a further rank of a tensor-parallel engine, first: what to load, and as whom. They meet in ``folder``."""

    load: Load
    rank: int
    size: int
    folder: str


class RunStep(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a further rank: carry out this plan. ``drawn`` are the tokens of the step before it."""

    plan: StepPlan
    drawn: tuple[int, ...]


RankCommand: TypeAlias = Join | RunStep | CoreCommand | Shutdown
_rank_decoder: msgspec.msgpack.Decoder[RankCommand] = msgspec.msgpack.Decoder(RankCommand)
_command_decoder: msgspec.msgpack.Decoder[EngineCommand] = msgspec.msgpack.Decoder(EngineCommand)
_event_decoder: msgspec.msgpack.Decoder[EngineEvent] = msgspec.msgpack.Decoder(EngineEvent)


def write_frames(channel: socket.socket, *messages: EngineCommand | EngineEvent | RankCommand) -> None:
    """Send messages in one go, for each system call wakes the other side; blocks while that does not read.

    Raises:
        EngineProtocolError: one is too long.
        OSError: the other side is gone.
    """
    channel.sendall(b"".join(map(frame, messages)))


def frame(message: EngineCommand | EngineEvent | RankCommand) -> bytes:
    """One message as it goes over the socket. Raises ``EngineProtocolError`` when it is too long."""
    body = _encoder.encode(message)
    if len(body) > FRAME_BYTES_MAX:
        raise EngineProtocolError(f"a {type(message).__name__} of {len(body)} bytes is above {FRAME_BYTES_MAX}")
    return _LENGTH.pack(len(body)) + body


class EventFrames:
    """Finds the events in bytes that come in pieces of any size."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def push(self, data: bytes) -> Iterator[EngineEvent]:
        """The events that are whole now. Raises ``EngineProtocolError``."""
        held = self._bytes
        held += data
        at = 0
        while len(held) - at >= _LENGTH.size:
            start = at + _LENGTH.size
            end = start + _length(held, at)
            if end > len(held):
                break
            yield _decode(_event_decoder, held[start:end])
            at = end
        del held[:at]


class FrameReader:
    """Reads the frames of one blocking socket."""

    def __init__(self, channel: socket.socket) -> None:
        self._file = channel.makefile("rb", buffering=1 << 18)

    def command(self) -> EngineCommand | None:
        """The next command; None when the other side is gone. Raises ``EngineProtocolError``."""
        body = self._body()
        return None if body is None else _decode(_command_decoder, body)

    def rank_command(self) -> RankCommand | None:
        """The next command to a further rank; None when the other side is gone. Raises ``EngineProtocolError``."""
        body = self._body()
        return None if body is None else _decode(_rank_decoder, body)

    def event(self) -> EngineEvent | None:
        """The next event; None when the other side is gone. Raises ``EngineProtocolError``."""
        body = self._body()
        return None if body is None else _decode(_event_decoder, body)

    def close(self) -> None:
        """Release the socket's file."""
        self._file.close()

    def _body(self) -> bytes | None:
        try:
            head = self._file.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                return None
            length = _length(head, 0)
            body = self._file.read(length)
        except OSError:
            return None
        return body if len(body) == length else None


def _length(data: bytes | bytearray, at: int) -> int:
    (length,) = _LENGTH.unpack_from(data, at)
    if length > FRAME_BYTES_MAX:
        raise EngineProtocolError(f"a frame of {length} bytes is above {FRAME_BYTES_MAX}")
    return length


def _decode(decoder: msgspec.msgpack.Decoder[T], body: bytes | bytearray) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineProtocolError(f"a frame is not of the engine protocol: {error}") from None
