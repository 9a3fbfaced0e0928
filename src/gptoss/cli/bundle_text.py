"""What ``gptoss bundle`` prints for people."""

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gptoss.clock import NS_PER_S
from gptoss.config import Settings
from gptoss.telemetry.bundle_diff import BundleDiff, Difference
from gptoss.telemetry.bundle_format import BootFacts, Gap, Manifest
from gptoss.telemetry.bundle_summary import RequestLine, Summary

ROWS_MAX = 40
HASH_SHOWN = 12


def print_created(console: Console, path: Path, size: int, manifest: Manifest) -> None:
    """What was taken, how much, and what to do with it."""
    records = sum(part.records for part in manifest.parts)
    console.print(f"[bold green]wrote[/] [bold]{escape(str(path))}[/]  {_size(size)}")
    _facts(
        console,
        {
            "about": manifest.reason,
            "holds": f"{records:,} records of {_count(len(manifest.boots), 'boot')}, "
            f"{_count(manifest.num_requests, 'request')} whole",
            "content": _content(manifest),
            "missing": _missing(manifest.missing),
            "look at it": f"gptoss bundle inspect {path}",
            "replay it": f"gptoss replay {path}",
        },
    )


def print_summary(console: Console, path: Path, size: int, manifest: Manifest, summary: Summary) -> None:
    """``inspect``."""
    created = f"{_time(manifest.created_ns)} by {manifest.created_by or 'unknown'}"
    console.print(f"[bold]{escape(path.name)}[/]  {_size(size)}, {_size(sum(p.size for p in manifest.parts))} unpacked")
    _facts(
        console,
        {
            "about": manifest.reason or "unknown",
            "cut": created,
            "format": f"version {manifest.format_version}",
            "content": _content(manifest),
            "missing": _missing(manifest.missing),
        },
    )
    for boot in manifest.boots:
        _print_boot(console, boot)
    _print_requests(console, summary.requests)
    _print_decisions(console, summary)


def print_diff(console: Console, names: tuple[str, str], diff: BundleDiff) -> None:
    """``diff``."""
    sections = {"server": diff.servers, "settings": diff.settings, "models": diff.models, "decisions": diff.decisions}
    for title, differences in sections.items():
        if differences:
            console.print(_differences(title, names, differences))
        else:
            console.print(f"[bold]{title}[/]  the same")
    console.print(_differences("all requests together", names, diff.figures))
    apart = [request for request in diff.requests if not request.is_same]
    console.print(f"[bold]requests[/]  {len(diff.requests) - len(apart)} ended the same, {len(apart)} did not")
    if not apart:
        return
    table = Table("request", names[0], names[1], "", box=None, header_style="dim")
    for request in apart[:ROWS_MAX]:
        at = request.tokens_differ_at
        table.add_row(
            request.request_id, _ended(request.a), _ended(request.b), "" if at is None else f"tokens differ at {at}"
        )
    console.print(table)
    _print_rest(console, len(apart))


def _print_boot(console: Console, boot: BootFacts) -> None:
    console.print(f"\n[bold]boot {escape(boot.boot)}[/]")
    packages = ", ".join(f"{name} {version}" for name, version in boot.packages.items())
    usual = msgspec.structs.asdict(Settings())
    set_ones = {name: value for name, value in boot.settings.items() if value != usual.get(name)}
    _facts(
        console,
        {
            "when": f"{_time(boot.first_ns)} to {_time(boot.last_ns)}",
            "server": f"gptoss {boot.version or 'unknown'} on {boot.node}, {boot.cpu_count} CPUs, {boot.os}",
            "python": f"{boot.python}, {packages}",
            "settings": ", ".join(f"{name}={value}" for name, value in set_ones.items()) or "all as by default",
        },
    )
    for engine in boot.engines:
        model, prints = engine.capabilities, engine.fingerprint
        hashes = {"weights": prints.weights, "tokenizer": prints.tokenizer, "template": prints.chat_template}
        shown = ", ".join(f"{name} {value[:HASH_SHOWN]}" for name, value in hashes.items() if value)
        _facts(
            console,
            {
                engine.executor: f"{model.model_name} ({model.architecture}, {model.dtype}, {model.num_threads} threads), "
                f"KV {_size(model.kv_budget_bytes)}, batch {model.max_batch_size}, context {model.max_model_len}",
                "sha256": shown or "not known",
            },
        )


def _print_requests(console: Console, lines: tuple[RequestLine, ...]) -> None:
    console.print(f"\n[bold]{_count(len(lines), 'request')}[/]")
    if not lines:
        return
    table = Table(box=None, header_style="dim")
    table.add_column("request", no_wrap=True)
    table.add_column("ended")
    for name in ("prompt", "output", "queue ms", "ttft ms", "e2e ms", "retries"):
        table.add_column(name, justify="right")
    for line in lines[:ROWS_MAX]:
        table.add_row(
            line.request_id,
            _ended(line),
            str(line.prompt_tokens),
            str(line.completion_tokens),
            _ms(line.queue_ms),
            _ms(line.ttft_ms),
            _ms(line.e2e_ms),
            str(line.retries),
        )
    console.print(table)
    _print_rest(console, len(lines))


def _print_decisions(console: Console, summary: Summary) -> None:
    console.print("\n[bold]decisions[/]")
    table = Table(box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_column(justify="right")
    for what, reasons in summary.decisions.items():
        for why, count in reasons.items():
            table.add_row(what, escape(why), f"{count:,}")
    steps = summary.records.get("StepCommitted", 0)
    table.add_row("engine", "steps", f"{steps:,}")
    console.print(table)


def _differences(title: str, names: tuple[str, str], differences: Iterable[Difference]) -> Table:
    table = Table(title, *names, box=None, header_style="dim", title_justify="left")
    for each in differences:
        table.add_row(each.name, _value(each.a), _value(each.b))
    return table


def _facts(console: Console, facts: dict[str, str]) -> None:
    for name, value in facts.items():
        if value:
            console.print(f"  [dim]{name:<10}[/] {escape(value)}", soft_wrap=True)


def _print_rest(console: Console, rows: int) -> None:
    if rows > ROWS_MAX:
        console.print(f"  [dim]and {rows - ROWS_MAX} more; --json has them all[/]")


def _ended(line: RequestLine | None) -> str:
    if line is None:
        return "[dim]not in it[/]"
    color = {"completed": "green", "failed": "red", "rejected": "yellow", "cancelled": "yellow"}.get(line.state, "cyan")
    return f"[{color}]{line.state}[/]{f' {escape(line.outcome)}' if line.outcome else ''}"


def _content(manifest: Manifest) -> str:
    redaction = manifest.redaction
    level = {
        "none": "none: no prompts, no answers",
        "hash": "hash: keyed hashes of prompts and answers",
        "tokens": "tokens: token ids of prompts and answers",
        "full": "full: prompts and answers as text",
    }[redaction.content]
    hides = {
        "nobody": "",
        "others": "; other requests under pseudonyms",
        "everybody": "; all requests under pseudonyms",
    }
    return level + hides[redaction.pseudonymised]


def _missing(gaps: tuple[Gap, ...]) -> str:
    if not gaps:
        return "nothing: every decision in it replays"
    first = gaps[0]
    more = f" (and {len(gaps) - 1} more)" if len(gaps) > 1 else ""
    return f"{first.stream}: {first.what}{more}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _time(wall_ns: int) -> str:
    return f"{datetime.fromtimestamp(wall_ns / NS_PER_S, tz=UTC):%Y-%m-%d %H:%M:%S} UTC" if wall_ns else "unknown"


def _size(size: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _value(value: Any) -> str:
    if value is None:
        return "[dim]-[/]"
    return f"{value:,.1f}" if isinstance(value, float) else escape(str(value))[:60]
