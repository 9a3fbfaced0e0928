"""``gptoss replay``."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
import rich_click
from rich.console import Console

from gptoss.config import load_settings
from gptoss.errors import BundleError, ConfigError, JournalError, RequestNotFound

if TYPE_CHECKING:
    from gptoss.replay.result import Result
    from gptoss.telemetry.recording import Recording

EXIT_DIVERGED = 1


@rich_click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--data-dir", metavar="DIR", help="Replay the journal of this data folder; no bundle is needed.")
@click.option("--request", "request_id", metavar="ID", help="Only the run of the server that had this request.")
@click.option("--tokens", is_flag=True, help="Run the engine again on the recorded plans and compare its tokens.")
@click.option("--model", metavar="MODEL", help="With --tokens: the model, as for serve; by default the recorded one.")
@click.option("--force", is_flag=True, help="With --tokens: run a model although it is not the recorded one.")
@click.option("--policy", type=click.Path(path_type=Path), metavar="FILE", help="A TOML file of settings: what if?")
@click.option("--until", metavar="EVENT", help="Stop at this record: a position, or BOOT:POSITION.")
@click.option("--actor", metavar="NAME", help="Show this actor's state and mailbox there, such as admission.")
@click.option("--step", is_flag=True, help="Walk from there record by record.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def replay(  # noqa: PLR0913 - one for each option
    bundle: Path | None,
    data_dir: str | None,
    request_id: str | None,
    *,
    tokens: bool,
    model: str | None,
    force: bool,
    policy: Path | None,
    until: str | None,
    actor: str | None,
    step: bool,
    as_json: bool,
) -> None:
    """Run what was recorded again and compare: every decision and every plan, offline, without a model.

    Exit status: 0 the same, 1 it diverged, 2 the bundle is bad or an option is wrong, 3 a newer program wrote it.

    \b
    [bold]Examples[/]
      gptoss replay incident.gptoss.zip
      gptoss replay incident.gptoss.zip --tokens
      gptoss replay incident.gptoss.zip --policy changed.toml
      gptoss replay incident.gptoss.zip --until 1042 --actor admission
      gptoss replay --data-dir /var/lib/gptoss --request req_5f0c...
    """  # noqa: D301 - as above
    is_walk = bool(until or actor or step)
    if sum([tokens, policy is not None, is_walk]) > 1:
        raise ConfigError("--tokens, --policy and a walk (--until, --actor, --step) exclude each other")
    if (model or force) and not tokens:
        raise ConfigError("--model and --force belong to --tokens")
    with _opened(bundle, data_dir) as (recording, source):
        boot = _boot_of(recording, request_id)
        if is_walk:
            from gptoss.cli.replay_walk import walk  # noqa: PLC0415 - see gptoss.cli.main

            walk(recording, boot, until, actor, step=step, as_json=as_json)
            return
        with Console(stderr=True).status(f"replaying {source}"):
            result = _run(recording, source, boot, request_id, tokens=tokens, model=model, force=force, policy=policy)
    show(result, as_json=as_json)


def show(result: "Result", *, as_json: bool) -> None:
    """Print a result, and end with its exit status."""
    from gptoss.replay.report import print_result  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.replay.result import WhatIfResult, to_json  # noqa: PLC0415 - see gptoss.cli.main

    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(to_json(result))))
    else:
        print_result(result, Console())
    sys.exit(0 if isinstance(result, WhatIfResult) or result.same else EXIT_DIVERGED)


def _run(  # noqa: PLR0913 - the options
    recording: "Recording",
    source: str,
    boot: str | None,
    request_id: str | None,
    *,
    tokens: bool,
    model: str | None,
    force: bool,
    policy: Path | None,
) -> "Result":
    if policy is not None:
        from gptoss.replay.policy import read_policy  # noqa: PLC0415 - see gptoss.cli.main
        from gptoss.replay.what_if import what_if  # noqa: PLC0415 - see gptoss.cli.main

        return what_if(recording, read_policy(policy), source=source, boot=boot)
    if tokens:
        from gptoss.replay.tokens import replay_tokens  # noqa: PLC0415 - see gptoss.cli.main

        return replay_tokens(recording, model=model, force=force, source=source, boot=boot, request_id=request_id)
    from gptoss.replay.verify import verify  # noqa: PLC0415 - see gptoss.cli.main

    return verify(recording, source=source, boot=boot)


@contextmanager
def _opened(bundle: Path | None, data_dir: str | None) -> Generator[tuple["Recording", str]]:
    """The recording and its name. What cannot be read of it is a bad bundle."""
    if (bundle is None) == (data_dir is None):
        raise ConfigError("give a bundle, or a data folder with --data-dir")
    from gptoss.telemetry.bundle_reader import BundleReader  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.telemetry.recording import JournalRecording  # noqa: PLC0415 - see gptoss.cli.main

    try:
        if bundle is not None:
            with BundleReader(bundle) as reader:
                yield reader, str(bundle)
        else:
            folder = load_settings({"data_dir": data_dir}).settings.journal_path
            yield JournalRecording(folder), str(folder)
    except JournalError as error:
        raise BundleError(error.message) from None


def _boot_of(recording: "Recording", request_id: str | None) -> str | None:
    """The newest boot that knows the request; None without one."""
    if request_id is None:
        return None
    from gptoss.actors.directory import request_name  # noqa: PLC0415 - see gptoss.cli.main

    for boot in reversed(recording.boots()):
        if next(iter(recording.records(boot=boot, stream=request_name(request_id))), None) is not None:
            return boot
    raise RequestNotFound(f"the recording knows no request {request_id}")
