"""A further rank of a tensor-parallel engine: ``python -m gptoss.engine.rank --fd N``, started by rank 0 (``ranks``).

It says nothing but its memory. The end of its socket means that rank 0 is gone, and it exits at once, even in the middle of
a collective.
"""

import argparse
import queue
import socket
import sys
import threading

from gptoss.clock import SystemClock
from gptoss.engine.port import EngineEvent, Shutdown
from gptoss.engine.ranks import EXIT_RANK_LOST, drawn, join_group
from gptoss.engine.wire import FrameReader, Join, RankCommand, RunStep, write_frames
from gptoss.engine.worker import EXIT_PROTOCOL, read_on, settle_process
from gptoss.errors import GptossError


def main() -> int:
    """Serve rank 0 on the other end of ``--fd``. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="gptoss.engine.rank")
    parser.add_argument("--fd", type=int, required=True)
    channel = socket.socket(fileno=parser.parse_args().fd)
    settle_process()
    reader = FrameReader(channel)
    join = reader.rank_command()
    if not isinstance(join, Join):
        return EXIT_PROTOCOL if join is not None else 0
    commands: queue.Queue[RankCommand] = queue.Queue()
    threading.Thread(target=read_on, args=(reader.rank_command, commands), name="commands", daemon=True).start()
    join_group(join)
    try:
        return _follow(join, commands, channel)
    except GptossError as error:
        sys.stderr.write(f"engine: rank {join.rank}: {error.message}\n")
        return EXIT_RANK_LOST


def _follow(join: Join, commands: "queue.Queue[RankCommand]", channel: socket.socket) -> int:
    """Load, and do as rank 0 does."""
    import torch  # noqa: PLC0415 - as in ``loop``

    from gptoss.engine.core import EngineCore, core_options  # noqa: PLC0415 - likewise
    from gptoss.engine.load import load_model  # noqa: PLC0415 - likewise
    from gptoss.engine.model_folder import no_progress  # noqa: PLC0415 - likewise

    if join.load.num_threads:
        torch.set_num_threads(join.load.num_threads)
    model = load_model(join.load, no_progress, join.rank)
    core = EngineCore(model.runner, model.capabilities, model.tokenizer, SystemClock(), core_options(join.load, model))
    core.grammars.prepare()
    last: tuple[int, ...] = ()
    while True:
        command = commands.get()
        events: list[EngineEvent] = []
        if isinstance(command, Shutdown):
            return 0
        if isinstance(command, RunStep):
            if command.drawn != last:
                sys.stderr.write(f"engine: rank {join.rank} drew {last} where rank 0 drew {command.drawn}\n")
                return EXIT_RANK_LOST
            last = drawn(core.step(command.plan))
        elif not isinstance(command, Join):
            events = core.handle(command)
        write_frames(channel, *events)


if __name__ == "__main__":
    sys.exit(main())
