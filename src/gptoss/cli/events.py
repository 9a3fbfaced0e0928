"""``gptoss events``: the newest requests, the newest events, both as they come, and the life of one request."""

import difflib
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
import rich_click
from rich.console import Console

from gptoss.cli.durations import seconds_of
from gptoss.clock import NS_PER_S, SystemClock
from gptoss.config import load_settings
from gptoss.errors import ConfigError

if TYPE_CHECKING:
    from gptoss.cli.event_source import EventSource
    from gptoss.telemetry.newest import Dated, RequestFilter
    from gptoss.telemetry.request_view import RequestRow

LIMIT_MAX = 10_000
FOLLOW_EVERY_S = 0.5


@rich_click.command()
@click.argument("request_id", required=False)
@click.option("--url", metavar="URL", help="A running server, such as http://127.0.0.1:8000.")
@click.option("--data-dir", metavar="DIR", help="Read the journal of this data folder; no server is needed.")
@click.option("--bundle", type=click.Path(path_type=Path), metavar="FILE", help="Read a debug bundle.")
@click.option("-n", "--limit", default=20, type=click.IntRange(1, LIMIT_MAX), help="How many lines. \\[20]")
@click.option("--since", metavar="TIME", help="Only what came in the last 30s, 10m, 2h or 7d.")
@click.option("--errors", is_flag=True, help="Only requests that failed or were refused.")
@click.option("--slow", type=float, metavar="S", help="Only requests that took this many seconds.")
@click.option(
    "--outcome", metavar="NAME", help="Only requests in this state, or with this finish reason or error code."
)
@click.option("--type", "types", multiple=True, metavar="EVENT", help="Show events of this type; may be repeated.")
@click.option("--stream", metavar="NAME", help="Show the events of one stream, such as admission or executor/cpu:0.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until interrupted.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def events(
    request_id: str | None, url: str | None, data_dir: str | None, bundle: Path | None, **options: object
) -> None:
    """Show what happened: the newest requests, or with REQUEST_ID the life of one and what delayed it.

    Without --url, --data-dir or --bundle it asks the server at the default address and, if none answers there, reads
    the journal in the default data folder.

    \b
    [bold]Examples[/]
      gptoss events                                   the newest requests
      gptoss events --errors --since 1h
      gptoss events req_5f0c2f6d1d8e4b9a77c01a2b      one of them, phase by phase
      gptoss events --follow                          everything of interest, as it happens
      gptoss events --type Preempted --type EngineExited
      gptoss events --data-dir /var/lib/gptoss --json | jq .request_id
    """  # noqa: D301 - as above
    given = [name for name, value in (("--url", url), ("--data-dir", data_dir), ("--bundle", bundle)) if value]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} exclude each other: choose a server, a folder or a bundle")
    from gptoss.cli.event_source import open_bundle, open_source  # noqa: PLC0415 - see gptoss.cli.main

    view = _View(**options)  # pyright: ignore[reportArgumentType]
    if bundle is not None:
        with open_bundle(bundle) as source:
            view.show(source, request_id)
        return
    view.show(open_source(url, data_dir, load_settings({"data_dir": data_dir}).settings), request_id)


class _View:
    """What is to be shown, and how."""

    def __init__(  # noqa: PLR0913 - one for each option
        self,
        *,
        limit: int,
        since: str | None,
        errors: bool,
        slow: float | None,
        outcome: str | None,
        types: tuple[str, ...],
        stream: str | None,
        follow: bool,
        as_json: bool,
    ) -> None:
        from gptoss.telemetry.event_tail import EventQuery  # noqa: PLC0415 - see gptoss.cli.main
        from gptoss.telemetry.newest import RequestFilter  # noqa: PLC0415 - see gptoss.cli.main

        _check_types(types)
        self._limit = limit
        self._since_unix_s = (
            None if since is None else SystemClock().wall_ns() / NS_PER_S - seconds_of(since, "--since")
        )
        self._query: EventQuery = EventQuery(types=frozenset(types), stream=stream or "")
        self._wanted: RequestFilter = RequestFilter(
            errors=errors, slow_s=slow, outcome=outcome or "", since_unix_s=self._since_unix_s
        )
        wants_requests = bool(errors or slow is not None or outcome)
        wants_events = bool(types or stream)
        if wants_requests and wants_events:
            raise ConfigError("--type and --stream choose events; --errors, --slow and --outcome choose requests")
        self._shows_events = wants_events or (follow and not wants_requests)
        self._follow = follow
        self._as_json = as_json
        console = Console()
        self._width = console.width
        self._color = console.is_terminal and not console.no_color

    def show(self, source: "EventSource", request_id: str | None) -> None:
        """Write it all to standard output."""
        try:
            if request_id is not None:
                self._one(source, request_id)
            elif self._shows_events:
                self._events(source)
            else:
                self._requests(source)
        except BrokenPipeError:
            sys.stderr.close()  # The reader, such as head, has seen enough.
        except KeyboardInterrupt:
            if not self._follow:
                raise

    def _one(self, source: "EventSource", request_id: str) -> None:
        if self._as_json:
            from gptoss.messages import codec  # noqa: PLC0415 - see gptoss.cli.main

            records = source.records(request_id)
            _say_where(source)
            for record in records:
                click.echo(msgspec.json.encode(codec.as_json(record)))
            return
        from gptoss.telemetry.timeline_text import render_story  # noqa: PLC0415 - see gptoss.cli.main

        story = source.story(request_id)
        _say_where(source)
        click.echo(render_story(story, width=self._width, color=self._color), nl=False)

    # ---- lists

    def _requests(self, source: "EventSource") -> None:
        rows = source.requests(self._wanted, self._limit)
        _say_where(source)
        self._print_requests(rows if not self._follow else rows[::-1], title=True)
        if not rows and not self._follow:
            click.echo("no such request", err=True)
        if self._follow:
            for newer in _ended(source, self._wanted):
                self._print_requests(newer, title=not rows)
                rows = rows or newer

    def _print_requests(self, rows: list["RequestRow"], *, title: bool) -> None:
        if self._as_json:
            for row in rows:
                click.echo(msgspec.json.encode(row))
            return
        from gptoss.cli.event_text import render_requests  # noqa: PLC0415 - see gptoss.cli.main

        if rows:
            click.echo(render_requests(rows, width=self._width, color=self._color, title=title), nl=False)

    def _events(self, source: "EventSource") -> None:
        found = source.events(self._query, self._limit)
        _say_where(source)
        self._print_events(found)
        if not found and not self._follow:
            click.echo("no such event", err=True)
        if self._follow:
            for newer in source.follow(self._query):
                self._print_events(newer)
                if not newer:
                    time.sleep(FOLLOW_EVERY_S)

    def _print_events(self, found: Iterable["Dated"]) -> None:
        since = self._since_unix_s
        kept = [dated for dated in found if since is None or dated.unix_s is None or dated.unix_s >= since]
        if self._as_json:
            from gptoss.messages import codec  # noqa: PLC0415 - see gptoss.cli.main

            for record, unix_s in kept:
                click.echo(msgspec.json.encode({"unix_s": unix_s, **codec.as_json(record)}))
            return
        from gptoss.cli.event_text import render_events  # noqa: PLC0415 - see gptoss.cli.main

        click.echo(render_events(kept, width=self._width, color=self._color), nl=False)


def _say_where(source: "EventSource") -> None:
    click.echo(f"from {source.name}", err=True)


def _ended(source: "EventSource", wanted: "RequestFilter") -> Iterator[list["RequestRow"]]:
    """Wanted requests as they end from now on, for ever."""
    seen: set[str] | None = None
    while True:
        rows = [row for row in source.requests(wanted, LIMIT_MAX) if row.e2e_ms is not None]
        if seen is not None:
            yield [row for row in reversed(rows) if row.request_id not in seen]
        seen = {row.request_id for row in rows}
        time.sleep(FOLLOW_EVERY_S)


def _check_types(types: tuple[str, ...]) -> None:
    from gptoss.messages.codec import EVENT_TYPES  # noqa: PLC0415 - see gptoss.cli.main

    for name in types:
        if name not in EVENT_TYPES:
            near = difflib.get_close_matches(name, EVENT_TYPES, 1)
            hint = f"; did you mean {near[0]}?" if near else "; docs/events.md lists them"
            raise ConfigError(f"--type {name!r} is no event{hint}")
