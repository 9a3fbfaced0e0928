"""Frames between an engine process and its driver: four bytes of length, big-endian, then msgpack of one message.

A frame longer than ``FRAME_BYTES_MAX``, or one that is no message of ``engine.port``, is a protocol error: the two
sides are of one program, so there is nothing to repair.
"""

import socket
import struct
from typing import TypeVar

import msgspec

from gptoss.engine.port import EngineCommand, EngineEvent
from gptoss.errors import EngineProtocolError

FRAME_BYTES_MAX = 16 << 20
"""A prompt of two million tokens fits."""

T = TypeVar("T")

_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[EngineCommand] = msgspec.msgpack.Decoder(EngineCommand)
_event_decoder: msgspec.msgpack.Decoder[EngineEvent] = msgspec.msgpack.Decoder(EngineEvent)


def write_frame(channel: socket.socket, message: EngineCommand | EngineEvent) -> None:
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
