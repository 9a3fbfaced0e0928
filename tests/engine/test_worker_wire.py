"""Frames between the engine process and its driver."""

import socket
import struct
from collections.abc import Iterator

import msgspec
import pytest

from gptoss.engine.port import Cancel, Drained, Finished, Snapshot, StepDone, StepRow, Submit, TokenLogprob
from gptoss.engine.wire import FRAME_BYTES_MAX, FrameReader, write_frame
from gptoss.errors import EngineProtocolError
from gptoss.messages.sampling import SamplingParams


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, FrameReader]]:
    left, right = socket.socketpair()
    reader = FrameReader(right)
    with left, right:
        yield left, reader
        reader.close()


def test_messages_come_out_as_they_went_in(pair: tuple[socket.socket, FrameReader]) -> None:
    channel, reader = pair
    sampling = SamplingParams(logit_bias={7: -1.5}, stop=("\n", "é"), seed=-(2**63))
    submit = Submit(request_id="r", attempt=2, prompt_token_ids=(1, 2**31), sampling=sampling, priority=-3)
    for command in (submit, Cancel(request_id="r"), Snapshot(nonce=2**40)):
        write_frame(channel, command)
        assert reader.command() == command
    logprob = TokenLogprob(token_id=3, logprob=-0.25, text="\ufffd", raw=b"\xc3", top=((3, -0.25, "\ufffd", b"\xc3"),))
    row = StepRow(request_id="r", attempt=2, token_ids=(3,), text="é", prefilled=1, logprobs=(logprob,))
    step = StepDone(step=1, started_ns=5, duration_ns=6, rows=(row,), waiting=0, running=1, kv_bytes_in_use=9)
    end = Finished(request_id="r", attempt=2, reason="stop", prompt_tokens=1, completion_tokens=1, stop_reason="\n")
    for event in (step, end, Drained()):
        write_frame(channel, event)
        assert reader.event() == event


def test_the_end_of_the_other_side_is_none_even_inside_a_frame(pair: tuple[socket.socket, FrameReader]) -> None:
    channel, reader = pair
    channel.sendall(struct.pack(">I", 100) + b"half")
    channel.close()
    assert reader.event() is None


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack(">I", FRAME_BYTES_MAX + 1),
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        struct.pack(">I", 1 + len(b"Bogus")) + msgspec.msgpack.encode("Bogus"),
    ],
)
def test_what_is_not_of_the_protocol_is_refused(frame: bytes, pair: tuple[socket.socket, FrameReader]) -> None:
    channel, reader = pair
    channel.sendall(frame)
    with pytest.raises(EngineProtocolError):
        reader.event()


def test_a_message_too_long_is_refused_before_it_is_sent(pair: tuple[socket.socket, FrameReader]) -> None:
    with pytest.raises(EngineProtocolError, match="Cancel"):
        write_frame(pair[0], Cancel(request_id="x" * (FRAME_BYTES_MAX + 1)))
