"""The ranks of a tensor-parallel engine: one process for each device, all of them doing the same.

    rank 0 is the engine process: it plans, samples, and speaks for all
    the others get every command that changes the batch, and every plan, and carry them out over their part

Rules:
- All ranks run the same core on the same commands and plans, so that they meet in every collective. Nothing but numbers of
  the model passes through ``torch.distributed``; commands and plans are frames on a socket for each rank.
- Each plan brings what rank 0 drew since the one before. A rank that drew something else ends, and with it all.
- A rank that is lost takes the engine with it: the others wait in a collective that never ends. The executor replaces all.
- The group meets in a private folder and, with gloo, over the loopback interface. No port is opened to other machines.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from datetime import timedelta

import msgspec

from gptoss.config import put_environment
from gptoss.engine.port import (
    CoreCommand,
    EngineEvent,
    EngineStatus,
    Load,
    Shutdown,
    StepDone,
)
from gptoss.engine.wire import FrameReader, Join, RankCommand, RunStep, write_frames
from gptoss.messages.model import DeviceMemory
from gptoss.messages.plan import StepPlan

EXIT_RANK_LOST = 73
END_WAIT_S = 3.0
GROUP_TIMEOUT_S = 600.0


def joined_devices(load: Load) -> tuple[str, ...]:
    """The devices of the ranks; empty unless the engine is tensor-parallel."""
    names = tuple(load.device.split("+"))
    return names if load.mode == "tensor" and len(names) > 1 else ()


def join_group(join: Join) -> None:
    """Meet the other ranks; returns when all are there.

    Raises:
        RuntimeError: they are not within ``GROUP_TIMEOUT_S``.
    """
    device = joined_devices(join.load)[join.rank]
    index = int(device.partition(":")[2] or 0) if device.startswith("cuda") else 0
    put_environment(LOCAL_RANK=str(index), RANK=str(join.rank), WORLD_SIZE=str(join.size))
    if sys.platform == "linux":
        put_environment(GLOO_SOCKET_IFNAME="lo")
    if not device.startswith("cuda"):
        put_environment(CUDA_VISIBLE_DEVICES="")  # else transformers takes the machine's GPUs for the group's devices
    import torch  # noqa: PLC0415 - the environment has to stand before
    from torch import distributed  # noqa: PLC0415 - likewise

    if device.startswith("cuda"):
        torch.cuda.set_device(index)
    distributed.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo",
        init_method=f"file://{join.folder}/group",
        rank=join.rank,
        world_size=join.size,
        timeout=timedelta(seconds=GROUP_TIMEOUT_S),
    )


def drawn(events: Iterable[EngineEvent]) -> tuple[int, ...]:
    """The tokens of a step."""
    rows = [row for event in events if isinstance(event, StepDone) for row in event.rows]
    return tuple(token_id for row in rows for token_id in row.token_ids)


class Ranks:
    """Rank 0's hold on the others. ``start`` before the model is loaded.

    Args:
        load: of the engine.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._folder = tempfile.TemporaryDirectory(prefix="gptoss-ranks-")
        self._channels: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._statuses: dict[int, EngineStatus] = {}
        self._drawn: tuple[int, ...] = ()
        self._is_ending = False

    def start(self) -> None:
        """Start the other ranks, and meet them."""
        devices = joined_devices(self._load)
        for rank in range(1, len(devices)):
            self._spawn(Join(load=self._load, rank=rank, size=len(devices), folder=self._folder.name))
        join_group(Join(load=self._load, rank=0, size=len(devices), folder=self._folder.name))

    def tell(self, command: CoreCommand) -> None:
        """Pass on a command, before rank 0 takes it."""
        self._send(command)

    def run(self, plan: StepPlan) -> None:
        """Pass on a plan, before rank 0 carries it out."""
        self._send(RunStep(plan=plan, drawn=self._drawn))

    def note(self, events: Iterable[EngineEvent]) -> None:
        """Remember what rank 0 drew."""
        self._drawn = drawn(events)

    def with_others(self, status: EngineStatus) -> EngineStatus:
        """Rank 0's status with the memory of those who have answered by now."""
        devices = joined_devices(self._load)
        known = {0: status, **self._statuses}
        readings = tuple(
            DeviceMemory(
                device=devices[rank],
                used_bytes=each.memory_bytes,
                total_bytes=each.device_memory_total_bytes,
                free_bytes=each.free_bytes,
            )
            for rank, each in sorted(known.items())
        )
        totals = [reading.total_bytes for reading in readings]
        return msgspec.structs.replace(
            status,
            memory_bytes=sum(reading.used_bytes for reading in readings),
            device_memory_total_bytes=sum(totals) if devices[0].startswith("cuda") else max(totals),
            devices=readings,
        )

    def end(self) -> None:
        """Let the other ranks end."""
        self._is_ending = True
        with contextlib.suppress(OSError):
            self._send(Shutdown())
        for process in self._processes:
            try:
                process.wait(END_WAIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()

    # ---- parts

    def _spawn(self, join: Join) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            descriptor = theirs.fileno()
            command = [sys.executable, "-m", "gptoss.engine.rank", "--fd", str(descriptor)]
            process = subprocess.Popen(  # noqa: S603 - a fixed command
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(descriptor,)
            )
        self._channels.append(ours)
        self._processes.append(process)
        write_frames(ours, join)
        threading.Thread(target=self._listen, args=(join.rank, ours, process), daemon=True).start()

    def _listen(self, rank: int, channel: socket.socket, process: "subprocess.Popen[bytes]") -> None:
        """Take a rank's readings until it is gone; end with it, unless it was told to end."""
        reader = FrameReader(channel)
        while (event := reader.event()) is not None:
            if isinstance(event, EngineStatus):
                self._statuses[rank] = event
        exit_code = process.wait()
        if not self._is_ending:
            sys.stderr.write(f"engine: rank {rank} ended with status {exit_code}; the engine ends with it\n")
            sys.stderr.flush()
            self._folder.cleanup()
            os._exit(EXIT_RANK_LOST)

    def _send(self, command: RankCommand) -> None:
        for channel in self._channels:
            write_frames(channel, command)
