"""``gptoss serve``."""

import sys
from pathlib import Path
from typing import Any

import click
import rich_click
from rich.console import Console

from gptoss.cli.serve_options import print_settings, with_settings
from gptoss.config import ENV_PREFIX, load_settings
from gptoss.errors import ConfigError


@rich_click.command(
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
    from gptoss.preflight import check_settings  # noqa: PLC0415 - see gptoss.cli.main

    check_settings(layered.settings)
    from gptoss.server import run_server  # noqa: PLC0415 - see gptoss.cli.main

    sys.exit(run_server(layered))
