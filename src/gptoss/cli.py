"""The command line: ``gptoss serve``, ``events`` and ``doctor``.

Rules:
- This module imports nothing heavy; a command imports what it needs when it runs, so that ``--help`` is instant.
- What can be refused is refused before anything starts: one line on stderr, and the exit status says of which kind.
- Exit status: 0 as asked; 1 failed; 2 a setting or an option is wrong; 78 the data folder cannot be used.
"""

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
import rich_click
from rich.console import Console

from gptoss.config import ENV_PREFIX, load_settings
from gptoss.errors import ConfigError, GptossError, JournalWriteFailed
from gptoss.serve_options import print_settings, with_settings

EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_DATA_FOLDER = 78  # EX_CONFIG of sysexits.h: a service manager must not restart into the same error

JOURNAL_FOLDER = "journal"
"""Where in the data folder the app keeps its events."""

_EXIT_STATUS: tuple[tuple[type[GptossError], int], ...] = (
    (ConfigError, EXIT_CONFIG),
    (JournalWriteFailed, EXIT_DATA_FOLDER),
    (GptossError, EXIT_FAILED),
)


class ErrorReporting(rich_click.RichGroup):
    """A group whose commands may raise this package's errors: each becomes a line on stderr and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """See ``click.Group.invoke``."""
        try:
            return super().invoke(ctx)
        except GptossError as error:
            click.echo(f"gptoss: {' '.join(error.message.split())}", err=True)
            status = next(status for kind, status in _EXIT_STATUS if isinstance(error, kind))
            raise click.exceptions.Exit(status) from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands as they stand in this file, the main one first."""
        del ctx
        return list(self.commands)


@rich_click.group(
    cls=ErrorReporting,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Run `gptoss COMMAND --help` for the options and examples of a command.",
)
@click.version_option(importlib.metadata.version("gptoss"), prog_name="gptoss", message="%(prog)s %(version)s")
@rich_click.rich_config({"text_markup": "rich", "text_paragraph_linebreaks": "\n\n", "max_width": 100})
def main() -> None:
    """Serve gpt-oss and other Hugging Face causal LMs behind an OpenAI-compatible API.

    Every request leaves a complete event log, which can be read while the server runs and after it is gone.

    \b
    [bold]Examples[/]
      gptoss serve                 a small demo model on http://127.0.0.1:8000
      gptoss serve 20b             openai/gpt-oss-20b
      gptoss events req_5f0c...    what happened to a request, and when
      gptoss doctor                what this machine can do, and what it lacks
    """  # noqa: D301 - \b is click's mark of a paragraph that keeps its lines


@main.command(
    epilog=f"Every option can also be set as {ENV_PREFIX}<NAME> in the environment or as a key of a TOML file "
    "(--config). The command line goes before the environment, the environment before the file."
)
@click.argument("model_argument", metavar="[MODEL]", required=False)
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="A TOML file of settings.")
@click.option("--show-config", is_flag=True, help="Print the settings in force and where each comes from, then exit.")
@with_settings
def serve(model_argument: str | None, config: Path | None, show_config: bool, **flags: Any) -> None:
    """Load MODEL and serve it until SIGINT or SIGTERM.

    MODEL is [bold]demo[/] (a 135M model, the default), [bold]20b[/] or [bold]120b[/] (gpt-oss), a Hugging Face hub id,
    a model folder, or a .gguf file.

    \b
    [bold]Examples[/]
      gptoss serve
      gptoss serve 20b --devices cuda:0 --port 8080
      gptoss serve ./my-model --max-batch-size 16 --profile quality_first
      GPTOSS_LOG_FORMAT=json gptoss serve --config gptoss.toml
    """  # noqa: D301 - as above
    if model_argument is not None:
        if flags["model"] not in {None, model_argument}:
            raise ConfigError(f"model is given twice: {model_argument!r} and --model {flags['model']!r}")
        flags["model"] = model_argument
    layered = load_settings(flags, file=config)
    if show_config:
        print_settings(layered, Console())
        return
    from gptoss.preflight import check_settings  # noqa: PLC0415 - see the module's rules

    check_settings(layered.settings)
    from gptoss.server import run_server  # noqa: PLC0415 - see the module's rules

    sys.exit(run_server(layered))


@main.command()
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
    from gptoss.request_events import find_records  # noqa: PLC0415 - see the module's rules

    settings = load_settings({"data_dir": data_dir}).settings
    records, source = find_records(
        request_id,
        url=url if url or data_dir else f"http://127.0.0.1:{settings.port}",
        folder=None if url else settings.data_path / JOURNAL_FOLDER,
    )
    click.echo(f"from {source}", err=True)
    if as_json:
        from gptoss.messages import codec  # noqa: PLC0415 - see the module's rules

        for record in records:
            click.echo(msgspec.json.encode(codec.as_json(record)))
        return
    from gptoss.telemetry.timeline import timeline  # noqa: PLC0415 - see the module's rules
    from gptoss.telemetry.timeline_text import render_text  # noqa: PLC0415 - see the module's rules

    console = Console()
    color = console.is_terminal and not console.no_color
    click.echo(render_text(timeline(records, request_id), width=console.width, color=color), nl=False)


@main.command()
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="A TOML file of settings.")
@click.option("--data-dir", metavar="DIR", help="As for serve.")
@click.option("--cache-dir", metavar="DIR", help="As for serve.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(config: Path | None, data_dir: str | None, cache_dir: str | None, as_json: bool) -> None:
    """Say what this machine can serve, and what to do about what is missing.

    It reads the same settings as serve, changes nothing, and exits with 1 if something must be mended first.
    """
    from gptoss.doctor import examine, render  # noqa: PLC0415 - see the module's rules

    layered = load_settings({"data_dir": data_dir, "cache_dir": cache_dir}, file=config)
    console = Console()
    with Console(stderr=True).status("looking around"):
        findings = examine(layered.settings)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(findings)))
    else:
        render(findings, console)
    sys.exit(EXIT_FAILED if any(finding.status == "fail" for finding in findings) else 0)
