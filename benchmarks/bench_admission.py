"""Decisions a second of admission and the memory guard, by how many requests wait: both must not slow down with the line.

    python benchmarks/bench_admission.py [--queued 10 1000 100000] [--decisions 2000] [--json]

For each length of the line a state with so many waiting requests of a hundred tenants is built by the deciders
themselves, unmeasured. Then requests end and new ones come in, one after the other, as they do under load: each round is
seven commands (withdraw, release, freed, reserve, granted, estimate, admit) with their events evolved as the actors do.
Times are processor time; journal and mailboxes are left out.
"""

import argparse
import json
import time
from typing import Any

import msgspec

from gptoss.actors.deciders import Deciders, deciders_of
from gptoss.config import Settings
from gptoss.fake_engine import FAKE_LAYOUT
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.commands import Command
from gptoss.messages.model import EngineCapabilities

SLOTS = 32
TENANTS = 100
DEADLINE_NS = 10**15
STREAMS = ("memory", "admission")


class Plane:
    """Admission and the guard with what they tell each other delivered at once, in order."""

    def __init__(self, deciders: Deciders) -> None:
        self._deciders = {"memory": deciders.memory, "admission": deciders.admission}
        self.states: dict[str, Any] = {name: each.initial() for name, each in self._deciders.items()}
        self.decisions = 0
        self.running: list[str] = []

    def consume(self, stream: str, command: Command) -> None:
        """Deliver a command and all that follows from it."""
        letters = [(stream, command)]
        for name, letter in letters:
            decider: Any = self._deciders[name]
            events = decider.decide(self.states[name], letter)
            self.decisions += 1
            for event in events:
                self.states[name] = decider.evolve(self.states[name], event)
            for event in events:
                if isinstance(event, ev.AdmissionDecided) and event.action in {"accept", "shrink"}:
                    self.running.append(event.request_id)
                told = decider.tells(self.states[name], event, letter.now_ns)
                letters += [each for each in told if each[0] in STREAMS]

    def arrive(self, number: int) -> None:
        """A request comes in."""
        estimate = cmd.EstimateMemory(now_ns=number, request_id=f"r{number}", prompt_tokens=100, max_tokens=100)
        guard: Any = self._deciders["memory"]
        (estimated,) = guard.decide(self.states["memory"], estimate)
        self.decisions += 1
        admit = cmd.AdmitRequest(
            now_ns=number,
            request_id=f"r{number}",
            prompt_tokens=100,
            max_tokens=100,
            kv_bytes=estimated.kv_bytes,
            kv_bytes_prompt=estimated.kv_bytes_prompt,
            priority=number % 3,
            deadline_ns=DEADLINE_NS + number,
            advice=estimated.advice,
            tenant=f"t{number * number % TENANTS}",
        )
        self.consume("admission", admit)

    def end(self, now_ns: int) -> None:
        """The request that runs longest ends."""
        self.consume("admission", cmd.WithdrawRequest(now_ns=now_ns, request_id=self.running.pop(0)))


def plane(queued: int) -> Plane:
    """One that runs ``SLOTS`` requests while ``queued`` others wait."""
    found = Plane(deciders_of(Settings(max_queue=1_000_000)))
    capabilities = EngineCapabilities(
        model_name="m",
        architecture="a",
        vocab_size=10,
        max_model_len=4096,
        max_batch_size=SLOTS,
        kv_budget_bytes=10**9,
        kv_layout=FAKE_LAYOUT,
        weights_bytes=0,
        device="cpu",
        dtype="float32",
        num_threads=1,
        eos_token_ids=(0,),
    )
    found.consume("memory", cmd.SetMemoryPool(now_ns=0, executor="cpu", capabilities=capabilities))
    found.consume("admission", cmd.SetCapacity(now_ns=0, executor="cpu", slots=SLOTS, kv_budget_bytes=10**9))
    for number in range(SLOTS + queued):
        found.arrive(number)
    return found


def measure(queued: int, decisions: int) -> dict[str, float]:
    """Decisions a second, and the cost of a snapshot, with so many waiting."""
    found = plane(queued)
    waiting = len(found.states["admission"].waiting)
    found.decisions, number = 0, SLOTS + queued
    begin_s = time.process_time()
    while found.decisions < decisions:
        found.end(number)
        found.arrive(number)
        number += 1
    spent_s = time.process_time() - begin_s
    deciders = deciders_of(Settings())
    begin_s = time.process_time()
    record = deciders.admission.recorded(found.states["admission"])
    size = len(msgspec.msgpack.encode(record))
    return {
        "queued": waiting,
        "decisions_per_s": round(found.decisions / spent_s),
        "us_per_decision": round(spent_s / found.decisions * 1e6, 1),
        "snapshot_ms": round((time.process_time() - begin_s) * 1e3, 1),
        "snapshot_mb": round(size / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--queued", type=int, nargs="+", default=[10, 1000, 100_000])
    parser.add_argument("--decisions", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [measure(queued, options.decisions) for queued in options.queued]
    if options.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print("  ".join(f"{name} {value:>10,}" for name, value in row.items()))


if __name__ == "__main__":
    main()
