"""``gptoss`` itself: its commands, and how their errors become an exit status.

Rules:
- Modules of commands import nothing heavy; a command imports what it needs when it runs, so that ``--help`` is instant.
- What can be refused is refused before anything starts: one line on stderr, and the exit status says of which kind.
- Exit status: 0 as asked; 1 failed, or a replay diverged; 2 a setting, an option or a bundle is wrong; 3 a newer
  program wrote the bundle; 78 the data folder cannot be used.
"""

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
import rich_click
from rich.console import Console

from gptoss.cli.bench import bench
from gptoss.cli.bundle import bundle
from gptoss.cli.chat import chat
from gptoss.cli.events import events
from gptoss.cli.journal import journal
from gptoss.cli.replay import replay
from gptoss.cli.report import report
from gptoss.cli.serve import serve
from gptoss.cli.simulate import simulate
from gptoss.config import load_settings
from gptoss.errors import BundleError, ConfigError, GptossError, JournalWriteFailed, UnsupportedSchema

EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_BAD_BUNDLE = 2
EXIT_UNSUPPORTED_SCHEMA = 3
EXIT_DATA_FOLDER = 78  # EX_CONFIG of sysexits.h: a service manager must not restart into the same error

_EXIT_STATUS: tuple[tuple[type[GptossError], int], ...] = (
    (ConfigError, EXIT_CONFIG),
    (BundleError, EXIT_BAD_BUNDLE),
    (UnsupportedSchema, EXIT_UNSUPPORTED_SCHEMA),
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
      gptoss chat                  talk to it
      gptoss events req_5f0c...    what happened to a request, and when
      gptoss bundle create         a debug bundle of the last ten minutes
      gptoss replay FILE           the decisions of a bundle again, and where they differ
      gptoss doctor                what this machine can do, and what it lacks
    """  # noqa: D301 - \b is click's mark of a paragraph that keeps its lines


main.add_command(serve)
main.add_command(chat)
main.add_command(events)
main.add_command(bundle)
main.add_command(replay)
main.add_command(journal)
main.add_command(simulate)
main.add_command(bench)
bundle.add_command(report)


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
