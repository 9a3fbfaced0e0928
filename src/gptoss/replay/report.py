"""What a replay found, for people."""

from collections.abc import Iterator
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gptoss.clock import NS_PER_MS
from gptoss.replay.result import Checked, Divergence, Figures, Link, Result, TokensResult, VerifyResult, WhatIfResult
from gptoss.replay.walk import Moment

KINDS = {
    "differs": "the decider says something else than was recorded",
    "missing": "the decider says something that was not recorded",
    "unexpected": "an event was recorded that no decision leads to",
    "snapshot": "the recorded state is not what the events before it lead to",
    "plan": "the scheduler plans something else",
    "gap": "records of this stream are missing",
    "error": "this cannot be decided again",
}
ENTRIES_MAX = 20


def print_result(result: Result, console: Console) -> None:
    """Write a result to a terminal or file."""
    match result:
        case VerifyResult():
            _verified(result, console)
        case TokensResult():
            _tokens(result, console)
        case WhatIfResult():
            _what_if(result, console)


def print_moment(moment: Moment, console: Console) -> None:
    """Write the state of an actor and its mailbox."""
    console.print(f"[bold]{escape(moment.actor)}[/] at record {moment.record.pos} of {escape(moment.boot)}")
    console.print(f"  [dim]{escape(moment.record.stream)}[/]  {escape(moment.record.summary)}")
    if not moment.is_known:
        console.print("[yellow]the recording begins too late to know this state[/]")
    for line in tree(moment.state):
        console.print(f"  {escape(line)}", highlight=False)
    console.print(f"[bold]mailbox[/]: {len(moment.mailbox) or 'empty'}")
    for waiting in moment.mailbox[:ENTRIES_MAX]:
        console.print(f"  {escape(waiting.command)}  [dim]consumed {waiting.later_ms:.1f} ms later[/]", highlight=False)
    _more(len(moment.mailbox), console)


def print_line(text: str, console: Console) -> None:
    """One line: cut off at a terminal's edge, whole in a file."""
    if console.is_terminal:
        console.print(text, highlight=False, no_wrap=True, overflow="ellipsis")
    else:
        console.print(text, highlight=False, soft_wrap=True)


def tree(value: Any, indent: int = 0) -> Iterator[str]:
    """JSON types as an indented list."""
    pad = "  " * indent
    items: list[tuple[str, Any]]
    if isinstance(value, dict):
        items = [(str(key), inner) for key, inner in value.items()]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    elif isinstance(value, list):
        items = [("-", inner) for inner in value]  # pyright: ignore[reportUnknownVariableType]
    else:
        yield f"{pad}{value}"
        return
    for key, inner in items:
        if isinstance(inner, dict | list) and inner:
            yield f"{pad}{key}"
            yield from tree(inner, indent + 1)
        else:
            yield f"{pad}{key}: {'none' if inner in ({}, [], None, '') else inner}"


# ---------------------------------------------------------------- verify


def _verified(result: VerifyResult, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in Checked.__struct_fields__:
        table.add_column(name.replace("_", " "), justify="left" if name == "decider" else "right")
    for each in result.checked:
        table.add_row(*(str(getattr(each, name)) for name in Checked.__struct_fields__))
    rate = f", {result.records / result.seconds:,.0f} a second" if result.seconds else ""
    boots = "1 boot" if len(result.boots) == 1 else f"{len(result.boots)} boots"
    console.print(f"{escape(result.source)}: {result.records:,} records of {boots}{rate}", highlight=False)
    console.print(table)
    console.print(f"whole lives of requests checked: {result.requests}", highlight=False)
    _notes(result.notes, console)
    if result.first is not None:
        _divergence(result.first, console)
    for problem in result.problems[:ENTRIES_MAX]:
        console.print(f"[red]✗[/] {escape(problem)}", highlight=False)
    _more(len(result.problems), console)
    if result.same:
        console.print("[green]✓ same:[/] every decision is as recorded")
    else:
        console.print(
            f"[red]✗ diverged:[/] differences in decisions: {result.num_diverged}, in lives: {len(result.problems)}"
        )


def _divergence(first: Divergence, console: Console) -> None:
    console.print(f"\n[red bold]first difference[/]: {KINDS[first.kind]}", highlight=False)
    console.print(f"  record {first.pos} of {escape(first.stream)}, boot {escape(first.boot)}", highlight=False)
    console.print(f"  {first.decider} decided [bold]{escape(first.command)}[/] -> {first.type}", highlight=False)
    table = Table("field", "recorded", "replayed", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 2))
    for field in first.fields:
        table.add_row(escape(field.field), escape(_value(field.recorded)), escape(_value(field.replayed)))
    console.print(table)
    if first.chain:
        console.print("  [bold]what led to it[/]")
        for each in first.chain:
            print_line(f"  {_link(each, first.chain[-1])}", console)


def _link(each: Link, last: Link) -> str:
    before_ms = (last.mono_ns - each.mono_ns) / NS_PER_MS
    verb = "takes" if each.type == "CommandConsumed" else "says"
    return f"{each.pos:>8} [dim]{-before_ms:>12.3f} ms[/]  {escape(each.stream)} {verb} {escape(each.summary)}"


def _value(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else msgspec.json.encode(value).decode()


# ---------------------------------------------------------------- tokens


def _tokens(result: TokensResult, console: Console) -> None:
    console.print(
        f"{escape(result.source)}: {result.requests} attempts in {result.steps} steps on {escape(result.model)}, "
        f"{result.tokens:,} tokens compared",
        highlight=False,
    )
    if result.left_out:
        console.print(f"{result.left_out} attempts left out: their tokens are not in the recording", highlight=False)
    _notes(result.notes, console)
    for each in result.diverged[:ENTRIES_MAX]:
        tokens = f"recorded {each.recorded}, replayed {each.replayed}"
        logprobs = ""
        if each.logprob_recorded is not None and each.logprob_replayed is not None:
            logprobs = f" (logprobs {each.logprob_recorded:.4f}, {each.logprob_replayed:.4f})"
        console.print(
            f"[red]✗[/] {escape(each.request_id)}: token {each.position} in step {each.step}: {tokens}{logprobs}",
            highlight=False,
        )
    _more(len(result.diverged), console)
    if result.same:
        console.print("[green]✓ same:[/] the engine gives the recorded tokens")
    else:
        console.print(f"[red]✗ diverged:[/] the tokens of {len(result.diverged)} requests")


# ---------------------------------------------------------------- what if


def _what_if(result: WhatIfResult, console: Console) -> None:
    for name, (old, new) in result.changes.items():
        console.print(f"[bold]{name}[/]: {old} -> {new}", highlight=False)
    console.print(f"{result.exact_decisions:,} decisions are the same under both", highlight=False)
    if result.first is None:
        console.print("[green]nothing changes:[/] every decision would have been the same")
    else:
        _divergence(result.first, console)
    columns = {"recorded": result.recorded}
    if result.model is not None and result.estimated is not None:
        columns |= {"recorded policy,\nestimated": result.model, "changed policy,\nestimated": result.estimated}
    table = Table("", *columns, box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for name in Figures.__struct_fields__:
        table.add_row(_figure_name(name), *(_figure(getattr(each, name)) for each in columns.values()))
    console.print(table)
    _notes(result.assumptions, console)
    _notes(result.notes, console)


def _figure_name(name: str) -> str:
    head, _, quantile = name.rpartition("_ms_")
    return (
        f"{head.replace('e2e', 'end to end').replace('ttft', 'first token').replace('queue', 'in the queue')} {quantile} ms"
        if head
        else name
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if isinstance(value, float) else str(value)


def _notes(notes: tuple[str, ...], console: Console) -> None:
    for note in notes:
        console.print(f"[dim]- {escape(note)}[/]", highlight=False)


def _more(count: int, console: Console) -> None:
    if count > ENTRIES_MAX:
        console.print(f"  and {count - ENTRIES_MAX} more")
