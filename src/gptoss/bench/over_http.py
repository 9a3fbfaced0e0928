"""Load over HTTP: a server that runs somewhere, or one of our own with an engine that pretends.

Rules:
- Our own server is a process of its own, so that the client's work does not slow it down; its processor time is told.
- Loopback only, unless the caller says otherwise: a load test against somebody else's server is an attack.
- With a rate the loop is open, and ``late`` and ``end, since due`` tell how far the client itself fell behind.
"""

import asyncio
import contextlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator
from urllib.parse import urlsplit

import aiohttp
import msgspec

from gptoss.bench.client import ChatClient, Timed, chat_body, words
from gptoss.bench.fake_system import FakeShape
from gptoss.bench.feeder import Feeder
from gptoss.bench.figures import Ended, Quantiles, Spread
from gptoss.bench.fleet import processor_s
from gptoss.bench.load import Arrival, Load
from gptoss.clock import NS_PER_MS, NS_PER_S, SeededRng, SystemClock
from gptoss.errors import ConfigError, GptossError
from gptoss.http.guard import is_loopback

REQUEST_TIMEOUT_S = 600.0
STOP_WAIT_S = 10.0
_MS = 1000


class HttpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is loaded.

    Attributes:
        url: a server's ``/v1``; empty starts one of our own, of this ``shape``.
        fields: further fields of each request's body, such as ``model``.
    """

    url: str = ""
    shape: FakeShape = FakeShape()
    fields: dict[str, object] = {}


class HttpReport(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a load. Times are milliseconds.

    Attributes:
        completed: answers that came whole; ``errors`` counts the others by code, ``unfinished`` those that were given up.
        gap: between two chunks of a stream; ``per_token``: of each answer, the time after its first text over its tokens.
        server_cpu_us_per_token, server_cpu_us_per_request: of our own server without its engine; None for another.
    """

    ended: Ended
    load: Load
    url: str
    model: str
    began: int
    completed: int
    errors: dict[str, int]
    unfinished: int
    tokens: int
    chunks: int
    wall_s: float
    requests_per_s: float
    tokens_per_s: float
    late: Quantiles
    ttft: Quantiles
    gap: Quantiles
    per_token: Quantiles
    end: Quantiles
    end_since_due: Quantiles
    server_cpu_us_per_token: float | None = None
    server_cpu_us_per_request: float | None = None


class HttpProgress(msgspec.Struct, frozen=True):
    """How far a test is."""

    over: int
    errors: int
    tokens_per_s: float


class _Tally:
    """Adds up what came back."""

    def __init__(self) -> None:
        self.late, self.ttft, self.gap, self.per_token, self.end, self.end_since_due = (Spread() for _ in range(6))
        self.completed = 0
        self.tokens = 0
        self.chunks = 0
        self.errors: Counter[str] = Counter()

    def add(self, timed: Timed, late_ns: int) -> None:
        """Count one answer."""
        self.tokens += timed.tokens
        self.chunks += len(timed.gaps_s) + (timed.ttft_s is not None)
        if timed.error:
            self.errors[timed.error] += 1
            return
        self.completed += 1
        if timed.ttft_s is not None:
            self.ttft.add(timed.ttft_s * _MS)
        for gap_s in timed.gaps_s:
            self.gap.add(gap_s * _MS)
        if timed.tpot_s is not None:
            self.per_token.add(timed.tpot_s * _MS)
        self.end.add(timed.total_s * _MS)
        self.end_since_due.add(timed.total_s * _MS + late_ns / NS_PER_MS)


async def load_http(
    load: Load, options: HttpOptions, stop: asyncio.Event, show: Callable[[HttpProgress], None]
) -> HttpReport:
    """Run one load; prompts are random words.

    Args:
        load: what to feed.
        options: what is loaded.
        stop: ends the test when set; what was done until then is reported.
        show: called after each answer.

    Raises:
        ConfigError: the server cannot be reached.
        GptossError: our own did not start.
    """
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    with _server(options) as server:
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            model = str(options.fields.get("model") or await served_model(session, server.url))
            test = _Test(load, ChatClient(session, server.url, SystemClock()), options.fields | {"model": model}, show)
            before_s = processor_s(server.pid)
            ended = await test.run(stop)
            spent_s = processor_s(server.pid) - before_s if server.pid else None
    return _report(load, server.url, model, ended, test, spent_s)


class _Test:
    """A load that is under way."""

    def __init__(
        self, load: Load, client: ChatClient, fields: dict[str, object], show: Callable[[HttpProgress], None]
    ) -> None:
        self.tally = _Tally()
        self.feeder: Feeder
        self._load = load
        self._client = client
        self._fields = fields
        self._show = show
        self._clock = client.clock
        self._rng = SeededRng(f"{load.seed}/words")

    async def run(self, stop: asyncio.Event) -> Ended:
        """Feed the load; what has not ended then is given up."""
        tasks: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as group:

            def begin(arrival: Arrival, due_ns: int) -> None:
                task = group.create_task(self._ask(arrival, due_ns))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

            self.feeder = Feeder(self._load, self._clock, begin, stop)
            ended = await self.feeder.run()
            for task in tuple(tasks):
                task.cancel()
        return ended

    async def _ask(self, arrival: Arrival, due_ns: int) -> None:
        late_ns = self._clock.monotonic_ns() - due_ns
        message = {"role": "user", "content": words(self._rng, arrival.prompt_tokens)}
        fields = self._fields | ({"priority": arrival.priority} if arrival.priority else {})
        self.tally.late.add_ns(late_ns)
        timed = await self._client.ask(chat_body([message], arrival.output_tokens, fields))
        self.tally.add(timed, late_ns)
        if timed.retry_after_s:
            self.feeder.rest(timed.retry_after_s)
        self.feeder.one_ended()
        elapsed_s = (self.feeder.ended_ns - self.feeder.started_ns) / NS_PER_S
        self._show(HttpProgress(self.feeder.over, self.tally.errors.total(), self.tally.tokens / elapsed_s))


def _report(load: Load, url: str, model: str, ended: Ended, test: _Test, spent_s: float | None) -> HttpReport:
    feeder, tally = test.feeder, test.tally
    wall_s = max(1, feeder.ended_ns - feeder.started_ns) / NS_PER_S
    return HttpReport(
        ended=ended,
        load=load,
        url=url,
        model=model,
        began=feeder.began,
        completed=tally.completed,
        errors=dict(tally.errors),
        unfinished=feeder.open,
        tokens=tally.tokens,
        chunks=tally.chunks,
        wall_s=round(wall_s, 3),
        requests_per_s=round(feeder.over / wall_s, 1),
        tokens_per_s=round(tally.tokens / wall_s, 1),
        late=tally.late.quantiles(),
        ttft=tally.ttft.quantiles(),
        gap=tally.gap.quantiles(),
        per_token=tally.per_token.quantiles(),
        end=tally.end.quantiles(),
        end_since_due=tally.end_since_due.quantiles(),
        server_cpu_us_per_token=_each(spent_s, tally.tokens),
        server_cpu_us_per_request=_each(spent_s, feeder.over),
    )


def _each(spent_s: float | None, number: int) -> float | None:
    return None if spent_s is None else round(spent_s / max(1, number) * 1e6, 2)


async def served_model(session: aiohttp.ClientSession, url: str) -> str:
    """The first model of a server.

    Raises:
        ConfigError: nobody answers there as an OpenAI-compatible server would.
    """
    try:
        async with session.get(f"{url.rstrip('/')}/models") as answer:
            return str(msgspec.json.decode(await answer.read())["data"][0]["id"])
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise ConfigError(f"no server answers at {url}: {type(error).__name__}") from None
    except (msgspec.MsgspecError, LookupError, TypeError):
        raise ConfigError(f"{url}/models lists no model; name one with --model") from None


def check_url(url: str, *, allow_remote: bool) -> None:
    """Refuse what is no address, and other machines unless they are allowed.

    Raises:
        ConfigError: says which.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(f"the URL is {url!r}; give one such as http://127.0.0.1:8000/v1")
    if not allow_remote and not is_loopback(parts.hostname):
        raise ConfigError(f"{parts.hostname} is not this machine; pass --allow-remote if you may load that server")


class Server(msgspec.Struct, frozen=True):
    """A server that runs: its ``/v1``, and its process where it is ours, else 0."""

    url: str
    pid: int = 0


@contextlib.contextmanager
def _server(options: HttpOptions) -> Generator[Server]:
    if options.url:
        yield Server(options.url)
        return
    with own_server(options.shape) as server:
        yield server


@contextlib.contextmanager
def own_server(shape: FakeShape) -> Generator[Server]:
    """A server with fake engines on loopback, in a process of its own, until the context ends.

    Raises:
        GptossError: it did not start.
    """
    command = [sys.executable, "-m", "gptoss.bench.fake_server", msgspec.json.encode(shape).decode()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # noqa: S603 - our own
        assert process.stdin is not None
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise GptossError("the server with a fake engine did not start; what it said is above")
        try:
            yield Server(f"http://127.0.0.1:{int(line)}/v1", process.pid)
        finally:
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_WAIT_S)
            process.kill()
