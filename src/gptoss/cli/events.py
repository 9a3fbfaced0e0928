"""``gptoss events``."""

import click
import msgspec
import rich_click
from rich.console import Console

from gptoss.config import load_settings
from gptoss.errors import ConfigError


@rich_click.command()
@click.argument("request_id")
@click.option("--url", metavar="URL", help="A running server, such as http://127.0.0.1:8000.")
@click.option("--data-dir", metavar="DIR", help="Read the journal of this data folder; no server is needed.")
@click.option("--json", "as_json", is_flag=True, help="Print the events, one JSON object a line.")
def events(request_id: str, url: str | None, data_dir: str | None, as_json: bool) -> None:
    """Show what happened to a request: every phase of its life, on one time axis.

    Without --url or --data-dir it asks the server at the default address and, if none answers there, reads the journal
    in the default data folder.

    \b
    [bold]Examples[/]
      gptoss events req_5f0c2f6d1d8e4b9a77c01a2b
      gptoss events req_5f0c... --url http://gpu1:8000
      gptoss events req_5f0c... --data-dir /var/lib/gptoss --json | jq .type
    """  # noqa: D301 - as above
    if url is not None and data_dir is not None:
        raise ConfigError("--url and --data-dir exclude each other: choose a server or a folder")
    from gptoss.cli.request_events import find_records  # noqa: PLC0415 - see gptoss.cli.main

    settings = load_settings({"data_dir": data_dir}).settings
    records, source = find_records(
        request_id,
        url=url if url or data_dir else f"http://127.0.0.1:{settings.port}",
        folder=None if url else settings.journal_path,
    )
    click.echo(f"from {source}", err=True)
    if as_json:
        from gptoss.messages import codec  # noqa: PLC0415 - see gptoss.cli.main

        for record in records:
            click.echo(msgspec.json.encode(codec.as_json(record)))
        return
    from gptoss.telemetry.timeline import timeline  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.telemetry.timeline_text import render_text  # noqa: PLC0415 - see gptoss.cli.main

    console = Console()
    color = console.is_terminal and not console.no_color
    click.echo(render_text(timeline(records, request_id), width=console.width, color=color), nl=False)
