"""The options of ``gptoss serve``: one row of the table for each setting, and the table of settings in force.

Every field of ``Settings`` is an option of the same name; a test holds the two together. Values go to
``config.load_settings`` as they were typed, so that flags, environment and file are checked by the same code.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich_click import RichOption

from gptoss.config import Layered, Settings

F = TypeVar("F", bound=Callable[..., Any])

# panel -> setting -> (placeholder, help); a switch needs no placeholder, a choice shows its values
PANELS: dict[str, dict[str, tuple[str, str]]] = {
    "Model": {
        "model": ("MODEL", "The same as the argument."),
        "served_model_name": ("NAME", "The name that clients use; by default derived from the model."),
        "profile": ("NAME", "latency_first or quality_first: defaults for batch size, answer length and temperature."),
        "prompt_version": (
            "",
            "SYS/v2 gives conversations without a system message one; SYS/v1 leaves them as they are.",
        ),
        "dtype": ("", "Number format of the weights."),
        "quantization": (
            "",
            "int8 or int4: packed weights, on a CPU; faster, a half or a third of the memory, less exact.",
        ),
    },
    "Network": {
        "host": ("ADDRESS", "Where HTTP listens."),
        "port": ("PORT", "Where HTTP listens; 0 takes any free port."),
        "auto_port": ("", "Take the next free port when this one is in use."),
        "allow_public": ("", "Permit a host that other machines can reach, although the API has no keys."),
        "body_limit_mb": ("MB", "Largest request body."),
        "client_stall_s": ("S", "Drop a client that reads nothing for so long."),
    },
    "Engine": {
        "devices": ("LIST", "auto, cpu, cpu:2 (two executors), or a list such as cuda:0,cuda:1."),
        "kernels": ("", "Whose kernels run on a CPU; auto: this package's own where they can."),
        "num_threads": ("N", "Threads of each CPU executor; 0: automatic."),
        "max_batch_size": ("N", "Requests that run at once on each executor; 0: by profile."),
        "max_model_len": ("TOKENS", "Prompt plus answer; 0: what the model allows."),
        "kv_budget_mb": ("MB", "KV memory of each executor; 0: by free memory."),
        "kv_layout": ("", "Contiguous slots or pages; auto: slots on a CPU, pages on a GPU."),
        "prefix_cache_mb": ("MB", "How much of it cached prefixes may take; 0: half of it, -1: no cache."),
        "speculation": ("", "ngram: guess what repeats itself; the same tokens, sooner, at few streams."),
        "step_timeout_s": ("S", "Replace an engine that has work and is silent for so long."),
    },
    "Queue and time": {
        "max_queue": ("N", "Requests that may wait; more are refused."),
        "queue_order": (
            "",
            "fair: tenants take turns; priority: the most urgent and the oldest first, whosever they are.",
        ),
        "queue_ageing_s": ("S", "Waiting that a step of priority is worth, and after which a tenant's turn is due."),
        "queue_timeout_s": ("S", "How long one may wait."),
        "request_timeout_s": ("S", "How long a request may take in all."),
        "drain_timeout_s": ("S", "How long running requests may go on after SIGTERM."),
    },
    "Memory": {
        "pressure_evict": ("SHARE", "Give idle sessions up once so much of the KV memory is spoken for; 0: never."),
        "pressure_shrink": ("SHARE", "Halve the answers of newcomers from then on; 0: never."),
        "pressure_queue": ("SHARE", "Let newcomers take their turn in the queue from then on; 0: never."),
        "pressure_refuse": ("SHARE", "Refuse who is forecast to be late, without benefit of the doubt; 0: never."),
        "multi_device_prompt_len": ("TOKENS", "Longer prompts go to an executor of several devices; 0: never."),
        "multi_device_kv_mb": ("MB", "Requests with more KV memory go there too; 0: never."),
        "session_kv_mb": ("MB", "KV that one session may keep between its turns; 0: no sessions."),
        "sessions_kv_mb": ("MB", "KV that all sessions may keep; at most half of the prefix caches."),
        "session_idle_s": ("S", "Give a session up that is not used for so long."),
        "policy_version": ("N", "Rules of admission; 1: as before tenants, pressure and sessions."),
    },
    "Batches": {
        "batch_concurrency": ("N", "Items of batches that run at once, behind everything else."),
        "file_limit_mb": ("MB", "Largest uploaded file."),
        "files_limit_mb": ("MB", "All files together; more are refused."),
    },
    "Storage": {
        "data_dir": ("DIR", "Journal and node key; by default the user's data folder."),
        "cache_dir": ("DIR", "Prepared models; by default the user's cache folder."),
        "journal": ("", "Keep the event log on disk, or only in memory."),
        "content": ("", "What the log keeps of requests: tokens, which a replay of them needs, text too, or none."),
        "journal_segment_mb": ("MB", "Size of one segment file."),
        "journal_retention_mb": ("MB", "Size at which the oldest events are forgotten."),
        "content_retention_mb": ("MB", "The same for token ids."),
    },
    "Logging": {
        "log_format": ("", "Log lines for people or for machines; auto: by terminal."),
        "log_level": ("", "The least severe lines that are written."),
    },
    "Traces": {
        "otlp_endpoint": ("URL", "Send traces to this OpenTelemetry collector; also OTEL_EXPORTER_OTLP_ENDPOINT."),
        "otlp_protocol": ("", "How it is spoken to; grpc needs the extra otlp-grpc."),
        "otlp_service_name": ("NAME", "What it calls this server; also OTEL_SERVICE_NAME."),
        "trace_errors": ("", "Keep every trace of a request that the server failed."),
        "trace_cancelled": ("", "Keep every trace of a request that the server gave up."),
        "trace_slow_s": ("S", "Keep every trace that took longer."),
        "trace_ratio": ("SHARE", "Keep this share of all others, 0 to 1."),
    },
}


def with_settings(command: F) -> F:
    """Give a command one option for every setting; those not typed arrive as None."""
    types = get_type_hints(Settings)
    defaults = Settings()
    # Click lists options in the order of their decorators, the last applied first.
    for panel, rows in reversed(PANELS.items()):
        for name, (placeholder, text) in reversed(rows.items()):
            shown = text + _default(getattr(defaults, name))
            command = _option(name, types[name], placeholder, panel=panel, help=shown)(command)
    return command


def settings_table(layered: Layered) -> Table:
    """The effective settings, each with the layer that it comes from."""
    settings = layered.settings
    automatic = {"data_dir": str(settings.data_path), "cache_dir": str(settings.cache_path)}
    table = Table("setting", "value", "from", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = True
    for name, origin in layered.origins.items():
        value = getattr(settings, name)
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        if origin == "default" and not value and not isinstance(value, bool):
            shown = automatic.get(name, "auto")
        style = "dim" if origin == "default" else "cyan"
        table.add_row(name, Text(shown, overflow="fold"), Text(origin, style, overflow="fold"))
    return table


def print_settings(layered: Layered, console: Console) -> None:
    """Write the effective settings to a terminal or file."""
    console.print(settings_table(layered))


def _option(name: str, kind: Any, placeholder: str, **texts: str) -> Callable[[F], F]:
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        flag = f"{flag}/--no-{name.replace('_', '-')}"
        return click.option(flag, cls=RichOption, default=None, **texts)
    choices = click.Choice(get_args(kind)) if get_origin(kind) is Literal else str
    return click.option(flag, cls=RichOption, type=choices, metavar=placeholder or None, **texts)


def _default(value: Any) -> str:
    """The default as it stands in the help; the square brackets are escaped from rich's markup."""
    if not value or isinstance(value, bool):
        return ""
    return f" \\[{value:g}]" if isinstance(value, float) else f" \\[{value}]"
