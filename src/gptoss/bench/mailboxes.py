"""Load straight against the actors' mailboxes: the whole control plane, without HTTP and with engines that pretend.

Rules:
- The system under load is the live one (``ServingSystem``): gateway, a request's actor, memory guard, admission, router,
  executors, the journal on disk, telemetry, the garbage collector set as a server sets it. Only the engines are fakes, in a
  process of their own.
- What is measured is what was recorded: each stage is the time from a request's submission to the record of an event.
- ``late`` is how long after its due time a request was submitted, because the event loop was busy; ``end, since due`` has
  it in. The other stages leave it out.
"""

import asyncio
import resource
from collections import Counter
from collections.abc import Callable, Iterator

import msgspec

from gptoss.actors.directory import DECIDER_NAMES, EXECUTOR_PREFIX
from gptoss.actors.generation import GenerateRequest
from gptoss.app import ServingSystem
from gptoss.bench.fake_system import FakeShape, fake_system
from gptoss.bench.feeder import Feeder
from gptoss.bench.figures import Depth, Ended, Quantiles, Spread
from gptoss.bench.fleet import FakeFleet
from gptoss.bench.load import Arrival, Load
from gptoss.clock import NS_PER_S
from gptoss.engine.port import ChatMessage
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Record
from gptoss.messages.sampling import SamplingParams
from gptoss.server import calm_collector

SAMPLE_S = 0.02
"""How often mailbox depths are read; also how the event loop's lag is measured."""
STAGES: dict[type[Event], str] = {
    ev.RequestAdmitted: "admission",
    ev.RequestRouted: "route",
    ev.FirstTokenProduced: "first token",
}
LATE, END, END_SINCE_DUE = "late", "end", "end, since due"
_US = 1_000_000


class MailboxReport(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a load. Times are milliseconds, processor times microseconds.

    Attributes:
        began: requests that were submitted; each was ``completed``, ``refused``, ``failed`` (both by code), cancelled or is
            ``unfinished``.
        wall_s: from the first submission to the last end.
        stages: since submission, but for ``late`` and ``end, since due``.
        cpu_us_per_request: of this process, which is the control plane and the load's own client.
        engines_cpu_us_per_request: of the process that plays the engines.
        loop_lag: how late the event loop was, sampled.
    """

    ended: Ended
    load: Load
    shape: FakeShape
    began: int
    completed: int
    refused: dict[str, int]
    failed: dict[str, int]
    cancelled: int
    unfinished: int
    tokens: int
    wall_s: float
    requests_per_s: float
    tokens_per_s: float
    records_per_request: float
    cpu_us_per_request: float
    engines_cpu_us_per_request: float
    stages: dict[str, Quantiles]
    depths: dict[str, Depth]
    loop_lag: Quantiles


class Progress(msgspec.Struct, frozen=True):
    """How far a test is."""

    over: int


class _Log:
    """Watches the journal: when each request of the load reached a stage, and how it ended."""

    def __init__(self, one_ended: Callable[[], None]) -> None:
        self.spreads = {name: Spread() for name in (LATE, *STAGES.values(), END, END_SINCE_DUE)}
        self.completed = 0
        self.cancelled = 0
        self.tokens = 0
        self.refused: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.open: dict[str, tuple[int, int]] = {}
        """Request id -> when it was due and when it was submitted."""
        self._one_ended = one_ended
        self._handlers: dict[type[Event], Callable[[Record], None]] = {
            **dict.fromkeys(STAGES, self._staged),
            **dict.fromkeys(ev.TERMINAL_EVENTS, self._over),
        }

    def begin(self, request_id: str, due_ns: int, now_ns: int) -> None:
        """A request is about to be submitted."""
        self.open[request_id] = (due_ns, now_ns)
        self.spreads[LATE].add_ns(now_ns - due_ns)

    def watch(self, record: Record) -> None:
        """See ``Journal.subscribe``. All of these are recorded on the event loop."""
        handler = self._handlers.get(type(record.event))
        if handler is not None and record.meta.correlation in self.open:
            handler(record)

    def _staged(self, record: Record) -> None:
        _, submitted_ns = self.open[record.meta.correlation]
        self.spreads[STAGES[type(record.event)]].add_ns(record.meta.mono_ns - submitted_ns)

    def _over(self, record: Record) -> None:
        due_ns, submitted_ns = self.open.pop(record.meta.correlation)
        match record.event:
            case ev.RequestCompleted(completion_tokens=tokens):
                self.completed += 1
                self.tokens += tokens
                self.spreads[END].add_ns(record.meta.mono_ns - submitted_ns)
                self.spreads[END_SINCE_DUE].add_ns(record.meta.mono_ns - due_ns)
            case ev.RequestRejected(code=code):
                self.refused[code] += 1
            case ev.RequestFailed(code=code):
                self.failed[code] += 1
            case _:
                self.cancelled += 1
        self._one_ended()


class _Sampler:
    """Reads the mailboxes now and then."""

    def __init__(self, serving: ServingSystem, show: Callable[[], None]) -> None:
        self.lag = Spread()
        self._serving = serving
        self._show = show
        self._samples = 0
        self._sums: Counter[str] = Counter()
        self._maxima: Counter[str] = Counter()

    async def run(self) -> None:
        """Sample until cancelled."""
        clock = self._serving.clock
        while True:
            self._samples += 1
            for name, letters in self._letters():
                self._sums[name] += letters
                self._maxima[name] = max(self._maxima[name], letters)
            self._show()
            before_ns = clock.monotonic_ns()
            await asyncio.sleep(SAMPLE_S)
            self.lag.add_ns(clock.monotonic_ns() - before_ns - int(SAMPLE_S * NS_PER_S))

    def depths(self) -> dict[str, Depth]:
        """Of each decider, of the executors together, and of telemetry."""
        return {name: Depth(round(self._sums[name] / self._samples, 2), most) for name, most in self._maxima.items()}

    def _letters(self) -> Iterator[tuple[str, int]]:
        directory = self._serving.directory
        for name in (*DECIDER_NAMES, "telemetry"):
            ref = directory.get(name)
            yield name, len(ref.inbox) if ref else 0
        refs = (directory.get(name) for name in directory.names(EXECUTOR_PREFIX))
        yield "executors", sum(len(ref.inbox) for ref in refs if ref)


async def load_mailboxes(
    load: Load, shape: FakeShape, stop: asyncio.Event, show: Callable[[Progress], None]
) -> MailboxReport:
    """Run one load.

    Args:
        load: what to feed.
        shape: the system under load.
        stop: ends the test when set; what was done until then is reported.
        show: called some times a second.

    Raises:
        GptossError: the system cannot start.
    """
    async with fake_system(shape) as (serving, fleet):
        with calm_collector():
            return await _Test(serving, fleet, load, shape).run(stop, show)


class _Test:
    """A load that is under way."""

    def __init__(self, serving: ServingSystem, fleet: FakeFleet, load: Load, shape: FakeShape) -> None:
        self._serving = serving
        self._fleet = fleet
        self._load = load
        self._shape = shape
        self._log = _Log(self._one_ended)
        self._feeder: Feeder

    async def run(self, stop: asyncio.Event, show: Callable[[Progress], None]) -> MailboxReport:
        """Feed the load; what has not ended then is given up."""
        serving, fleet = self._serving, self._fleet
        self._feeder = feeder = Feeder(self._load, serving.clock, self._begin, stop)
        sampler = _Sampler(serving, lambda: show(Progress(feeder.over)))
        unsubscribe = serving.journal.subscribe(self._log.watch, (*STAGES, *ev.TERMINAL_EVENTS))
        sampling = serving.system.run_task(sampler.run(), name="bench/sampler")
        before = (serving.journal.health.last_pos, own_processor_s(), fleet.processor_s)
        try:
            ended = await feeder.run()
        finally:
            sampling.cancel()
            unsubscribe()
        after = (serving.journal.health.last_pos, own_processor_s(), fleet.processor_s)
        return self._report(ended, sampler, *(b - a for a, b in zip(before, after, strict=True)))

    def _begin(self, arrival: Arrival, due_ns: int) -> None:
        request = _request(arrival)
        self._log.begin(request.request_id, due_ns, self._serving.clock.monotonic_ns())
        self._serving.submit(request)

    def _one_ended(self) -> None:
        self._feeder.one_ended()

    def _report(
        self, ended: Ended, sampler: "_Sampler", records: float, spent_s: float, engines_s: float
    ) -> MailboxReport:
        feeder, log = self._feeder, self._log
        wall_s = max(1, feeder.ended_ns - feeder.started_ns) / NS_PER_S
        number = max(1, feeder.over)
        return MailboxReport(
            ended=ended,
            load=self._load,
            shape=self._shape,
            began=feeder.began,
            completed=log.completed,
            refused=dict(log.refused),
            failed=dict(log.failed),
            cancelled=log.cancelled,
            unfinished=len(log.open),
            tokens=log.tokens,
            wall_s=round(wall_s, 3),
            requests_per_s=round(feeder.over / wall_s, 1),
            tokens_per_s=round(log.tokens / wall_s, 1),
            records_per_request=round(records / number, 1),
            cpu_us_per_request=round(spent_s / number * _US, 1),
            engines_cpu_us_per_request=round(engines_s / number * _US, 1),
            stages={name: spread.quantiles() for name, spread in log.spreads.items()},
            depths=sampler.depths(),
            loop_lag=sampler.lag.quantiles(),
        )


def _request(arrival: Arrival) -> GenerateRequest:
    words = " ".join(["word"] * arrival.prompt_tokens)
    return GenerateRequest(
        messages=(ChatMessage(role="user", content=words),),
        sampling=SamplingParams(max_tokens=arrival.output_tokens, seed=arrival.number, ignore_eos=True),
        priority=arrival.priority,
        request_id=f"bench-{arrival.number}",
        endpoint="bench",
    )


def own_processor_s() -> float:
    """Processor time of this process so far, in seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
