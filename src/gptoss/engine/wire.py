"""Frames between an engine process and its driver: four bytes of length, big-endian, then msgpack of one message.

A frame longer than ``FRAME_BYTES_MAX``, or one that is no message of ``engine.port``, is a protocol error: the two
sides are of one program, so there is nothing to repair.
"""

import socket
import struct
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


def write_frame(channel: socket.socket, message: EngineCommand | EngineEvent | RankCommand) -> None:
    """Send one message; blocks while the other side does not read.

    Raises:
        EngineProtocolError: it is too long.
        OSError: the other side is gone.
    """
    body = _encoder.encode(message)
    if len(body) > FRAME_BYTES_MAX:
        raise EngineProtocolError(f"a {type(message).__name__} of {len(body)} bytes is above {FRAME_BYTES_MAX}")
    channel.sendall(_LENGTH.pack(len(body)) + body)


class FrameReader:
    """Reads the frames of one socket."""

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
            (length,) = _LENGTH.unpack(head)
            if length > FRAME_BYTES_MAX:
                raise EngineProtocolError(f"a frame of {length} bytes is above {FRAME_BYTES_MAX}")
            body = self._file.read(length)
        except OSError:
            return None
        return body if len(body) == length else None


def _decode(decoder: msgspec.msgpack.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineProtocolError(f"a frame is not of the engine protocol: {error}") from None
