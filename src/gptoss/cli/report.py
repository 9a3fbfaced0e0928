"""``gptoss bundle report``."""

import importlib.metadata
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
import rich_click

from gptoss.clock import NS_PER_S
from gptoss.errors import ConfigError, GptossError

if TYPE_CHECKING:
    from gptoss.report.page import About
    from gptoss.telemetry.bundle_reader import BundleReader

RESULT_BYTES_MAX = 64 * 2**20


@rich_click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="By default beside the bundle.")
@click.option(
    "--replay",
    "results",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="A result of gptoss replay --json to show; may be repeated.",
)
@click.option("--no-replay", is_flag=True, help="Do not run the decisions again.")
def report(bundle: Path, output: Path | None, results: tuple[Path, ...], no_replay: bool) -> None:
    """Write a bundle as one HTML file: what happened, why, and whether it happens again.

    The file needs nothing else, loads nothing and can be attached to a ticket. The decisions are run again for it.

    \b
    [bold]Examples[/]
      gptoss bundle report incident.gptoss.zip -o incident.html
      gptoss replay incident.gptoss.zip --policy changed.toml --json > what-if.json
      gptoss bundle report incident.gptoss.zip --replay what-if.json
    """  # noqa: D301 - as in gptoss.cli.main
    from gptoss.replay.result import to_json  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.replay.verify import verify  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.report.facts import gather  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.report.page import render  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.telemetry.bundle_reader import BundleReader  # noqa: PLC0415 - see gptoss.cli.main

    shown = [_read_result(path) for path in results]
    with BundleReader(bundle) as reader:
        about = _about(reader)
        facts = gather(reader, about.focus)
        if not no_replay:
            shown.insert(0, to_json(verify(reader, source=bundle.name)))
        page = render(facts, about, shown)
    target = output or bundle.with_name(f"{bundle.name.removesuffix('.gptoss.zip').removesuffix('.zip')}.html")
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise GptossError(f"cannot write {target}: {error.strerror or error}") from None
    click.echo(f"{target}: {len(page) >> 10} KiB")


def _about(reader: "BundleReader") -> "About":
    from gptoss.report.page import About  # noqa: PLC0415 - see gptoss.cli.main

    manifest = reader.manifest
    facts = [("content", manifest.redaction.content)]
    if manifest.redaction.pseudonymised != "nobody":
        facts.append(("pseudonyms for", manifest.redaction.pseudonymised))
    if manifest.created_ns:
        moment = datetime.fromtimestamp(manifest.created_ns / NS_PER_S, tz=UTC)
        facts.append(("bundle made", f"{moment:%Y-%m-%d %H:%M:%S} UTC by {manifest.created_by or 'somebody'}"))
    names = ", ".join(manifest.requests[:3]) + (", ..." if len(manifest.requests) > 3 else "")  # noqa: PLR2004 - a line
    return About(
        title=f"Incident report: {names}" if names else "Incident report",
        subtitle=f"{reader.path.name}: {manifest.reason or 'no reason given'}",
        facts=tuple(facts),
        focus=manifest.requests,
        missing=tuple(f"{gap.stream}: {gap.what}" for gap in manifest.missing),
        version=importlib.metadata.version("gptoss"),
    )


def _read_result(path: Path) -> dict[str, Any]:
    """A result that ``gptoss replay --json`` printed."""
    try:
        with path.open("rb") as file:
            data = file.read(RESULT_BYTES_MAX + 1)
        if len(data) > RESULT_BYTES_MAX:
            raise ConfigError(f"{path} is larger than {RESULT_BYTES_MAX >> 20} MiB; is it a result of gptoss replay?")
        return msgspec.json.decode(data, type=dict[str, Any])
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ConfigError(f"{path} is no result of gptoss replay --json") from None
