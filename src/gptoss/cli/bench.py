"""``gptoss bench``: load tests, straight against the actors' mailboxes or over HTTP."""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec
import rich_click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gptoss.errors import ConfigError

if TYPE_CHECKING:
    from gptoss.bench.fake_system import FakeShape
    from gptoss.bench.load import Load

REQUESTS_MAX = 1_000_000
DURATION_MAX_S = 3600
TOKENS_MAX = 100_000
RATE_MAX = 100_000.0
EXIT_INTERRUPTED = 128 + signal.SIGINT

T = TypeVar("T")


@rich_click.group()
def bench() -> None:
    """Load tests: how much the server takes, and how long everything in it takes.

    [bold]mailbox[/] drives the actors themselves, [bold]http[/] a server as its clients see it. Without a model both run an
    engine that only pretends, so that what is measured is the server and not the model. See docs/load-testing.md.
    """


def with_load(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what is sent; the command gets them as one ``load`` and has ``stop`` for Ctrl-C."""
    options = (
        click.option(
            "--rate",
            type=click.FloatRange(0, RATE_MAX, min_open=True),
            metavar="N",
            help="Requests a second, due whether or not others were answered (open loop).",
        ),
        click.option(
            "--in-flight",
            type=click.IntRange(1, REQUESTS_MAX),
            metavar="N",
            help="Instead of a rate: so many requests at once, the next as soon as one ends. Default 64.",
        ),
        click.option(
            "-n",
            "--requests",
            type=click.IntRange(1, REQUESTS_MAX),
            default=10_000,
            show_default=True,
            help="End after so many requests.",
        ),
        click.option(
            "-t",
            "--duration",
            type=click.FloatRange(0, DURATION_MAX_S, min_open=True),
            default=30.0,
            show_default=True,
            metavar="SECONDS",
            help="Begin no request later than that.",
        ),
        click.option("--prompt", default="32", show_default=True, metavar="N|A-B", help="Tokens of a prompt."),
        click.option("--output", default="16", show_default=True, metavar="N|A-B", help="Tokens of an answer."),
        click.option(
            "--priority",
            default="0",
            show_default=True,
            metavar="P[:SHARE],...",
            help="Priorities and their shares, such as 0:9,10:1; lower runs first.",
        ),
        click.option(
            "--burst",
            type=click.IntRange(1, 100_000),
            default=1,
            show_default=True,
            help="So many requests come together, at the same rate.",
        ),
        click.option("--seed", type=int, default=1, show_default=True, help="The same seed sends the same requests."),
        click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def with_fake_engine(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a system whose engines pretend."""
    options = (
        click.option("--executors", type=click.IntRange(1, 64), default=1, show_default=True, help="Fake engines."),
        click.option("--slots", type=click.IntRange(1, 4096), default=64, show_default=True, help="Of each executor."),
        click.option(
            "--step-ms",
            type=click.FloatRange(0, 10_000),
            default=0.0,
            show_default=True,
            help="What a step takes; 0 is as fast as it can be planned.",
        ),
        click.option(
            "--kv-tokens", type=click.IntRange(0), default=0, help="KV memory of each executor, in tokens; 0 is plenty."
        ),
        click.option(
            "--max-queue",
            type=click.IntRange(1, REQUESTS_MAX),
            default=512,
            show_default=True,
            help="Requests that may wait for admission.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@bench.command()
@with_load
@with_fake_engine
@click.option(
    "--journal",
    type=click.Choice(["segments", "memory"]),
    default="segments",
    show_default=True,
    help="On disk, as a server's, or in memory.",
)
@click.option("--data-dir", default="", metavar="DIR", help="Keep the journal there, for gptoss events and replay.")
def mailbox(*, as_json: bool, **options: Any) -> None:
    """Drive the mailboxes of the control plane: no HTTP, no model, everything else as in a server.

    Requests pass the memory guard, admission, the router and an executor, with the journal on. The table tells how long
    after its submission a request reached each stage, who was refused and why, and how many letters waited in the
    mailboxes. Ctrl-C ends the test and tells what was done.

    \b
    [bold]Examples[/]
      gptoss bench mailbox                            64 requests at once, as fast as they go
      gptoss bench mailbox --rate 200 -t 60           200 requests a second
      gptoss bench mailbox --rate 500 --burst 100 --priority 0:9,10:1 --output 1-64
      gptoss bench mailbox --executors 16 --in-flight 2000 --max-queue 2000
    """  # noqa: D301 - \b is click's mark of a paragraph that keeps its lines
    from gptoss.bench.mailboxes import load_mailboxes  # noqa: PLC0415 - heavy, as for all commands
    from gptoss.cli.bench_text import mailbox_text  # noqa: PLC0415

    load, shape = _load(options), _shape(options)
    with _progress(load) as show:
        report = _run(lambda stop: load_mailboxes(load, shape, stop, lambda at: show(at.over, "")))
    _tell(report, mailbox_text, as_json=as_json)


@bench.command()
@click.option("--url", metavar="URL", help="The server's /v1; without one a server with a fake engine is started.")
@click.option("--model", default="", help="Its model; the default is the first that it lists.")
@click.option("--allow-remote", is_flag=True, help="Permit a server that is not on this machine.")
@click.option("--extra", default="{}", metavar="JSON", help='Further fields of each request, such as {"top_p": 0.9}.')
@with_load
@with_fake_engine
def http(*, url: str | None, model: str, allow_remote: bool, extra: str, as_json: bool, **options: Any) -> None:
    """Load a server over HTTP with streamed chat completions and time what comes back.

    With --url any OpenAI-compatible server, on this machine unless --allow-remote. Without it a server of our own, in a process
    of its own, whose engine pretends; --executors to --max-queue are for that one. Ctrl-C ends the test and tells what was
    done.

    \b
    [bold]Examples[/]
      gptoss bench http                                          what the server itself can take
      gptoss bench http --in-flight 64 --output 512 -n 640       64 streams at full speed
      gptoss bench http --url http://127.0.0.1:8000/v1 --rate 2 --prompt 100-800 --output 64
    """  # noqa: D301 - as above
    from gptoss.bench.over_http import HttpOptions, HttpProgress, check_url, load_http  # noqa: PLC0415 - as above
    from gptoss.cli.bench_text import http_text  # noqa: PLC0415

    load = _load(options)
    if url is not None:
        check_url(url, allow_remote=allow_remote)
    loaded = HttpOptions(url=url or "", fields=_fields(extra, model), shape=_shape(options))
    with _progress(load) as show:

        def tell(at: HttpProgress) -> None:
            show(at.over, f"{at.tokens_per_s:,.0f} tokens/s, {at.errors:,} errors")

        report = _run(lambda stop: load_http(load, loaded, stop, tell))
    _tell(report, http_text, as_json=as_json)


def _load(options: dict[str, Any]) -> "Load":
    """Raises ``ConfigError`` for options that do not go together."""
    from gptoss.bench.load import Load, read_priorities, read_span  # noqa: PLC0415

    rate, in_flight = options["rate"], options["in_flight"]
    if rate is not None and in_flight is not None:
        raise ConfigError("--rate opens the loop and --in-flight closes it; give one of them")
    return Load(
        requests=options["requests"],
        duration_s=options["duration"],
        rate=rate or 0.0,
        in_flight=in_flight or Load().in_flight,
        burst=options["burst"],
        prompt=read_span(options["prompt"], "--prompt", TOKENS_MAX),
        output=read_span(options["output"], "--output", TOKENS_MAX),
        priorities=read_priorities(options["priority"]),
        seed=options["seed"],
    )


def _shape(options: dict[str, Any]) -> "FakeShape":
    from gptoss.bench.fake_system import FakeShape  # noqa: PLC0415

    return FakeShape(**{name: value for name, value in options.items() if name in FakeShape.__struct_fields__})


def _fields(extra: str, model: str) -> dict[str, object]:
    try:
        fields = msgspec.json.decode(extra, type=dict[str, object])
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--extra is {extra!r}, which is no JSON object: {error}") from None
    return fields | ({"model": model} if model else {})


def _run(test: Callable[[asyncio.Event], Coroutine[Any, Any, T]]) -> T:
    """Run a test; the first Ctrl-C stops it in order, the second at once."""

    async def run() -> T:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            stop.set()
            loop.remove_signal_handler(signal.SIGINT)

        loop.add_signal_handler(signal.SIGINT, interrupt)
        return await test(stop)

    return asyncio.run(run())


@contextmanager
def _progress(load: "Load") -> Generator[Callable[[int, str], None]]:
    """Shows how far a test is, where somebody looks: called with how many requests are over, and a few words."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=load.requests, words="")

        def show(over: int, text: str) -> None:
            progress.update(task, completed=over, description=f"{over:,} of {load.requests:,} requests", words=text)

        yield show


def _tell(report: Any, as_text: Callable[[Any, Console], None], *, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report)))
    else:
        as_text(report, Console(highlight=False))
    if report.ended == "interrupted":
        raise click.exceptions.Exit(EXIT_INTERRUPTED)
