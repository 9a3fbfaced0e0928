"""Frames between the engine process and its driver."""

import asyncio
import socket
import struct
from collections.abc import Iterator

import msgspec
import pytest

from gptoss.engine.channel import BACKLOG_BYTES_MAX, EngineChannel
from gptoss.engine.port import (
    Cancel,
    Drained,
    EngineEvent,
    Finished,
    LoadProgressed,
    Snapshot,
    StepDone,
    StepRow,
    Submit,
    TokenLogprob,
)
from gptoss.engine.wire import FRAME_BYTES_MAX, FrameReader, frame, write_frames
from gptoss.errors import EngineProtocolError
from gptoss.messages.sampling import SamplingParams

WAIT_S = 20.0


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
        write_frames(channel, command)
        assert reader.command() == command
    logprob = TokenLogprob(token_id=3, logprob=-0.25, text="\ufffd", raw=b"\xc3", top=((3, -0.25, "\ufffd", b"\xc3"),))
    row = StepRow(request_id="r", attempt=2, token_ids=(3,), text="é", prefilled=1, logprobs=(logprob,))
    step = StepDone(step=1, started_ns=5, duration_ns=6, rows=(row,), waiting=0, running=1, kv_bytes_in_use=9)
    end = Finished(request_id="r", attempt=2, reason="stop", prompt_tokens=1, completion_tokens=1, stop_reason="\n")
    for event in (step, end, Drained()):
        write_frames(channel, event)
        assert reader.event() == event


def test_the_end_of_the_other_side_is_none_even_inside_a_frame(pair: tuple[socket.socket, FrameReader]) -> None:
    channel, reader = pair
    channel.sendall(struct.pack(">I", 100) + b"half")
    channel.close()
    assert reader.event() is None


@pytest.mark.parametrize(
    "said",
    [
        struct.pack(">I", FRAME_BYTES_MAX + 1),
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        struct.pack(">I", 1 + len(b"Bogus")) + msgspec.msgpack.encode("Bogus"),
    ],
)
def test_what_is_not_of_the_protocol_is_refused(said: bytes, pair: tuple[socket.socket, FrameReader]) -> None:
    channel, reader = pair
    channel.sendall(said)
    with pytest.raises(EngineProtocolError):
        reader.event()


def test_a_message_too_long_is_refused_before_it_is_sent(pair: tuple[socket.socket, FrameReader]) -> None:
    with pytest.raises(EngineProtocolError, match="Cancel"):
        write_frames(pair[0], Cancel(request_id="x" * (FRAME_BYTES_MAX + 1)))


# ---------------------------------------------------------------- the loop's side


class Heard:
    """What a channel says."""

    def __init__(self) -> None:
        self.events: list[EngineEvent] = []
        self.ends: list[str] = []
        self.at_end = asyncio.Event()
        self.fails = False

    def event(self, event: EngineEvent) -> None:
        self.events.append(event)
        if self.fails:
            raise ValueError(event)

    def end(self, fault: str) -> None:
        self.ends.append(fault)
        self.at_end.set()

    async def until_end(self) -> None:
        async with asyncio.timeout(WAIT_S):
            await self.at_end.wait()


def opened() -> tuple[EngineChannel, socket.socket, Heard]:
    ours, theirs = socket.socketpair()
    heard = Heard()
    return EngineChannel(ours, heard.event, heard.end), theirs, heard


async def test_events_that_come_in_pieces_are_heard_whole_and_in_order() -> None:
    _, theirs, heard = opened()
    said = [LoadProgressed(stage="weights", done=number, total=300) for number in range(300)]
    stream = b"".join(map(frame, said))
    with theirs:
        for at in range(0, len(stream), 7):
            theirs.sendall(stream[at : at + 7])
            if at % 70 == 0:
                await asyncio.sleep(0)
    await heard.until_end()
    assert heard.events == said
    assert heard.ends == [""]


async def test_commands_go_out_in_order_however_slowly_they_are_read() -> None:
    channel, theirs, heard = opened()
    commands = [Cancel(request_id=f"{number}" * 5000) for number in range(200)]  # far more than a socket holds
    for command in commands[:150]:
        channel.send(command)
    reader = FrameReader(theirs)
    with theirs:
        taken = [await asyncio.to_thread(reader.command) for _ in range(50)]
        await asyncio.to_thread(lambda: [channel.send(command) for command in commands[150:]])
        taken += [await asyncio.to_thread(reader.command) for _ in range(150)]
        reader.close()
    assert taken == commands
    await heard.until_end()
    channel.send(commands[0])  # to nobody
    assert heard.ends == [""]


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (struct.pack(">I", FRAME_BYTES_MAX + 1), "above"),
        (struct.pack(">I", 3) + b"\xc1\xc1\xc1", "protocol"),
        (struct.pack(">I", 100) + b"half", ""),
    ],
)
async def test_what_is_no_event_ends_the_channel_with_its_fault(said: bytes, fault: str) -> None:
    _, theirs, heard = opened()
    with theirs:
        theirs.sendall(frame(Drained()) + said)
    await heard.until_end()
    assert heard.events == [Drained()]
    assert fault in heard.ends[0]
    assert len(heard.ends) == 1


async def test_a_sink_that_raises_ends_the_channel(capsys: pytest.CaptureFixture[str]) -> None:
    _, theirs, heard = opened()
    heard.fails = True
    with theirs:
        theirs.sendall(frame(Drained()) * 3)
        await heard.until_end()
    assert heard.events == [Drained()]
    assert heard.ends == ["the event sink raised ValueError"]
    assert "ValueError" in capsys.readouterr().err


async def test_an_engine_that_leaves_its_commands_unread_is_given_up() -> None:
    channel, theirs, heard = opened()
    with theirs:
        for _ in range(BACKLOG_BYTES_MAX // (8 << 20) + 1):
            channel.send(Cancel(request_id="x" * (8 << 20)))
        await heard.until_end()
    assert "unread" in heard.ends[0]
