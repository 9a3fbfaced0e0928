"""``gptoss journal``: check, mend and shorten the event log of a server that is not running."""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
import rich_click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gptoss.cli.durations import seconds_of
from gptoss.clock import NS_PER_S, SystemClock
from gptoss.config import load_settings
from gptoss.errors import ConfigError

if TYPE_CHECKING:
    from gptoss.telemetry.journal_care import SegmentReport

EXIT_DAMAGED = 1
_STYLES = {"sealed": "green", "open": "cyan", "torn": "yellow", "corrupt": "red", "quarantined": "red"}
_DATA_DIR = click.option("--data-dir", metavar="DIR", help="Its data folder; by default the one of the settings.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@rich_click.group()
def journal() -> None:
    """Check, mend or shorten the event log in a data folder.

    \b
    [bold]Examples[/]
      gptoss journal verify
      gptoss journal repair --data-dir /var/lib/gptoss
      gptoss journal prune --older-than 30d --dry-run
    """  # noqa: D301 - as in gptoss.cli.main


@journal.command()
@_DATA_DIR
@_JSON
def verify(data_dir: str | None, as_json: bool) -> None:
    """Read every segment and say what state it is in; exit with 1 if anything is damaged.

    A running server does not mind. An open segment is being written, or was when the server was killed.
    """
    from gptoss.telemetry.journal_care import survey  # noqa: PLC0415 - see gptoss.cli.main

    folder = _folder(data_dir)
    reports = survey(folder)
    damaged = [report for report in reports if report.problem]
    if as_json:
        click.echo(msgspec.json.encode(reports))
    else:
        _print_segments(reports)
        records = sum(report.records for report in reports)
        said = f"{len(damaged)} damaged; see gptoss journal repair" if damaged else "nothing is damaged"
        click.echo(f"{folder}: {len(reports)} segments, {records} records, {_size(reports)}: {said}")
    sys.exit(EXIT_DAMAGED if damaged else 0)


@journal.command()
@_DATA_DIR
@_JSON
def repair(data_dir: str | None, as_json: bool) -> None:
    """Copy the segments, then cut torn tails and set damaged files aside.

    A tail is cut only if nothing whole follows it. A damaged file keeps its bytes under a name of its own; whatever is
    whole in it can still be read.
    """
    from gptoss.telemetry import journal_care  # noqa: PLC0415 - see gptoss.cli.main

    folder = _folder(data_dir)
    now = datetime.fromtimestamp(SystemClock().wall_ns() / NS_PER_S, tz=UTC)
    done = journal_care.repair(folder, folder.with_name(f"{folder.name}.backup-{now:%Y%m%d-%H%M%S}"))
    if as_json:
        click.echo(msgspec.json.encode(done, enc_hook=str))
        return
    if not done.backup:
        click.echo(f"{folder}: nothing to repair")
        return
    click.echo(f"copied to {done.backup}")
    for tail in done.torn:
        click.echo(f"cut {tail.num_bytes} bytes at offset {tail.offset} off {tail.path.name}")
    for aside in done.quarantined:
        click.echo(f"set aside {aside.path.name}: {aside.reason}")


@journal.command()
@_DATA_DIR
@click.option("--older-than", metavar="TIME", help="Segments not written to for so long, such as 12h or 30d.")
@click.option("--keep-mb", type=click.IntRange(0), metavar="MB", help="The oldest, until no more than this is left.")
@click.option("--boot", metavar="NAME", help="All segments of one run of the server.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@_JSON
def prune(
    data_dir: str | None, older_than: str | None, keep_mb: int | None, boot: str | None, dry_run: bool, as_json: bool
) -> None:
    """Delete old segments, whole ones only, and say what that frees."""
    from gptoss.telemetry import journal_care  # noqa: PLC0415 - see gptoss.cli.main

    if older_than is None and keep_mb is None and not boot:
        raise ConfigError("nothing says what may go; give --older-than, --keep-mb or --boot")
    now_s = SystemClock().wall_ns() / NS_PER_S
    rule = journal_care.PruneRule(
        written_before_unix_s=None if older_than is None else now_s - seconds_of(older_than, "--older-than"),
        keep_bytes=None if keep_mb is None else keep_mb << 20,
        boot=boot or "",
    )
    going = journal_care.prune(_folder(data_dir), rule, dry_run=dry_run)
    if as_json:
        click.echo(msgspec.json.encode(going))
        return
    _print_segments(going)
    click.echo(f"{'would free' if dry_run else 'freed'} {_size(going)} in {len(going)} segments")


def _folder(data_dir: str | None) -> Path:
    return load_settings({"data_dir": data_dir}).settings.journal_path


def _size(reports: Sequence["SegmentReport"]) -> str:
    from gptoss.telemetry.timeline_phases import size  # noqa: PLC0415 - see gptoss.cli.main

    return size(sum(report.size for report in reports))


def _print_segments(reports: Sequence["SegmentReport"]) -> None:
    from gptoss.telemetry.logs import safe_text  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.telemetry.timeline_phases import size  # noqa: PLC0415 - see gptoss.cli.main

    if not reports:
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title, justify in (("segment", "left"), ("state", "left"), ("records", "right"), ("size", "right")):
        table.add_column(title, justify=justify, no_wrap=True)  # pyright: ignore[reportArgumentType]
    table.add_column("")
    for report in reports:
        state = Text(report.ending or report.state, _STYLES[report.state])
        if report.state in {"corrupt", "quarantined"}:
            state = Text(report.state, _STYLES[report.state])
        note = report.problem or report.boot
        if report.records_after:
            note += f"; {report.records_after} records behind them are whole"
        shown = Text(safe_text(note), no_wrap=not report.problem, overflow="fold" if report.problem else "ellipsis")
        table.add_row(report.name, state, str(report.records), size(report.size), shown)
    Console().print(table)
