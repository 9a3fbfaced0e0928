"""``gptoss bundle``: create, inspect, verify, redact and diff debug bundles.

Exit status: 0 fine; 1 failed, or differs, or is not complete; 2 a bad bundle or option; 3 a newer program wrote it.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
import rich_click
from rich.console import Console

from gptoss.config import load_settings
from gptoss.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from gptoss.telemetry.bundle_format import Manifest

FILE = click.Path(path_type=Path)
LEVELS = click.Choice(["none", "hash", "tokens", "full"])
EXIT_DIFFERS = 1


@rich_click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bundle() -> None:
    """Make and look at debug bundles: one file that says what happened, and replays it elsewhere.

    \b
    [bold]Examples[/]
      gptoss bundle create --request req_5f0c...      one request and all that decided about it
      gptoss bundle create --errors --window 1h       what went wrong in the last hour
      gptoss bundle create --data-dir /var/lib/gptoss from the journal of a server that is gone
      gptoss bundle inspect gptoss-req_5f0c....zip
      gptoss replay gptoss-req_5f0c....zip
    """  # noqa: D301 - \b is click's mark of a paragraph that keeps its lines


@bundle.command()
@click.option("--request", "requests", multiple=True, metavar="ID", help="This request; may be given again.")
@click.option("--last", metavar="N", help="The newest N requests.")
@click.option("--errors", is_flag=True, help="Requests that failed, were refused, given up or lost in a crash.")
@click.option(
    "--slow", is_flag=False, flag_value="10s", metavar="[DURATION]", help="Requests slower than this, or 10s."
)
@click.option(
    "--window", metavar="DURATION|FROM..TO", help="Of this time only: 10m, or two times such as 2026-03-01T02:50Z."
)
@click.option("--content", type=LEVELS, default="none", show_default=True, help="How much of prompts and answers.")
@click.option("--limit-mb", metavar="MB", help="Refuse to make a larger one, unpacked.  [default: 256]")
@click.option("--url", metavar="URL", help="Of a running server, such as http://127.0.0.1:8000.")
@click.option("--data-dir", metavar="DIR", help="Read the journal of this data folder; no server is needed.")
@click.option("-o", "--output", type=FILE, metavar="FILE", help="Where to write it.  [default: a name of its own]")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def create(
    output: Path | None, *, url: str | None, data_dir: str | None, force: bool, as_json: bool, **choice: Any
) -> None:
    """Make a bundle.

    Without a choice it is of the last ten minutes of the whole system. A bundle of chosen requests hides the ids of all
    others. With --content none, the default, it holds no prompt and no answer, and replays every decision all the same.

    Without --url or --data-dir it asks the server at the default address and, if none answers there, reads the journal
    in the default data folder.
    """
    if url is not None and data_dir is not None:
        raise ConfigError("--url and --data-dir exclude each other: choose a server or a folder")
    from gptoss.cli import bundle_source  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.cli.admin_client import default_server  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.telemetry.bundle_order import parse_order  # noqa: PLC0415 - see gptoss.cli.main

    query = _query(**choice)
    try:
        order = parse_order(query)
    except RequestError as error:
        raise ConfigError(f"--{(error.param or '').replace('_', '-')}: {error.message}") from None
    settings = load_settings({"data_dir": data_dir}).settings
    target = bundle_source.Created(output, force=force)
    if url is None and data_dir is None:
        url = default_server(settings)
    if url is None:
        path, manifest = bundle_source.create_from_folder(settings, order, target)
    else:
        path, manifest = bundle_source.create_from_server(url, query, target)
    _tell_created(path, manifest, as_json=as_json)


@bundle.command()
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print manifest and summary as JSON.")
def inspect(file: Path, *, as_json: bool) -> None:
    """Say what a bundle holds: versions, model, requests and how they ended, decisions, and what is missing."""
    from gptoss.cli import bundle_text  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.telemetry.bundle_reader import BundleReader  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.telemetry.bundle_summary import summarize  # noqa: PLC0415 - see gptoss.cli.main

    with BundleReader(file) as reader:
        summary = summarize(reader)
        if as_json:
            _print_json({"manifest": reader.manifest, "summary": summary})
        else:
            bundle_text.print_summary(Console(highlight=False), file, file.stat().st_size, reader.manifest, summary)


@bundle.command()
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def verify(file: Path, *, as_json: bool) -> None:
    """Check every byte of a bundle, and whether all is there that a replay needs.

    Exits with 1 when the bundle is sound but not complete, with 2 when it is bad.
    """
    from gptoss.telemetry.bundle_facts import facts_of  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.telemetry.bundle_reader import BundleReader  # noqa: PLC0415 - see gptoss.cli.main

    with BundleReader(file) as reader:
        manifest = reader.manifest
        gaps = facts_of(reader).gaps(with_content=manifest.redaction.content != "none")
    records = sum(part.records for part in manifest.parts)
    if as_json:
        _print_json({"ok": True, "records": records, "parts": len(manifest.parts), "missing": gaps})
    else:
        click.echo(f"{file}: {records:,} records in {len(manifest.parts)} parts are as they were written")
        for gap in gaps:
            click.echo(f"missing: {gap.boot} {gap.stream}: {gap.what}")
        if not gaps:
            click.echo("nothing is missing: every decision in it replays")
    sys.exit(EXIT_DIFFERS if gaps else 0)


@bundle.command()
@click.argument("file", type=FILE)
@click.option("-o", "--output", type=FILE, metavar="FILE", required=True, help="Where to write it.")
@click.option("--content", type=LEVELS, help="How much of prompts and answers is left; never more than there is.")
@click.option(
    "--everybody", is_flag=True, help="Put all requests under pseudonyms, those too that the bundle is about."
)
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def redact(file: Path, output: Path, *, content: str | None, everybody: bool, force: bool, as_json: bool) -> None:
    """Make a bundle that shows less out of another one. It replays as the other does."""
    if content is None and not everybody:
        raise ConfigError("say what to take out: --content none, hash or tokens, or --everybody")
    from gptoss.cli import bundle_source  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.telemetry.bundle import redact_bundle  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.telemetry.bundle_order import content_level  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.telemetry.bundle_reader import BundleReader  # noqa: PLC0415 - see gptoss.cli.main

    target = bundle_source.Created(output, force=force)
    with BundleReader(file) as reader, target.file() as written:
        level = content_level(content or reader.manifest.redaction.content)
        redact_bundle(written, reader, content=level, everybody=everybody, maker=bundle_source.maker(target))
        path, manifest = target.keep(written)
    _tell_created(path, manifest, as_json=as_json)


@bundle.command()
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print the differences as JSON.")
def diff(a: Path, b: Path, *, as_json: bool) -> None:
    """Compare two bundles: servers, settings, models, decisions, and how each request fared.

    Exits with 1 when anything but times differs.
    """
    from gptoss.cli import bundle_text  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.telemetry import bundle_diff  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.telemetry.bundle_reader import BundleReader  # noqa: PLC0415 - see gptoss.cli.main

    with BundleReader(a) as reader_a, BundleReader(b) as reader_b:
        found = bundle_diff.diff(reader_a, reader_b)
    if as_json:
        _print_json({"same": found.is_same, **msgspec.to_builtins(found)})
    else:
        bundle_text.print_diff(Console(highlight=False), (a.name, b.name), found)
    sys.exit(0 if found.is_same else EXIT_DIFFERS)


def _query(*, requests: tuple[str, ...], errors: bool, **values: str | None) -> dict[str, str]:
    """The options as the query that a server takes."""
    given = {"request": ",".join(requests) or None, "errors": "true" if errors else None, **values}
    return {name: value for name, value in given.items() if value is not None}


def _tell_created(path: Path, manifest: "Manifest", *, as_json: bool) -> None:
    from gptoss.cli import bundle_text  # noqa: PLC0415 - see gptoss.cli.main

    size = path.stat().st_size
    if as_json:
        _print_json({"file": str(path), "bytes": size, "manifest": manifest})
    else:
        bundle_text.print_created(Console(highlight=False), path, size, manifest)


def _print_json(value: Any) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value)))
