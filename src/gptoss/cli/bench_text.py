"""The figures of load tests for people."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from gptoss.bench.figures import Quantiles
from gptoss.bench.load import Load, Span
from gptoss.bench.mailboxes import MailboxReport
from gptoss.bench.over_http import HttpReport


def mailbox_text(report: MailboxReport, console: Console) -> None:
    """Print what came of a load on the mailboxes."""
    shape = report.shape
    console.print(
        f"{_how(report.load)}; {_count(shape.executors, 'executor')} of {_count(shape.slots, 'slot')}, "
        f"steps of {shape.step_ms:g} ms, journal: {shape.journal}"
    )
    table = _totals(report, console)
    _add_counts(table, "refused", report.refused)
    _add_counts(table, "failed", report.failed)
    _add_counts(table, "", {"cancelled": report.cancelled, "unfinished": report.unfinished})
    table.add_row("records a request", f"{report.records_per_request:,.1f}")
    table.add_row("processor time a request", f"{report.cpu_us_per_request:,.0f} us")
    table.add_row("of the fake engines", f"{report.engines_cpu_us_per_request:,.0f} us")
    console.print(table)
    console.print()
    console.print(_quantile_table("ms since submission", {**report.stages, "event loop's lag": report.loop_lag}))
    console.print()
    depths = _table("letters that waited", "mean", "max")
    for name, depth in report.depths.items():
        depths.add_row(name, f"{depth.mean:,.1f}", f"{depth.max:,}")
    console.print(depths)


def http_text(report: HttpReport, console: Console) -> None:
    """Print what came of a load over HTTP."""
    console.print(f"{_how(report.load)}; {report.model} at {report.url}")
    table = _totals(report, console)
    _add_counts(table, "error", report.errors)
    _add_counts(table, "", {"unfinished": report.unfinished})
    table.add_row("tokens a chunk", f"{report.tokens / max(1, report.chunks):.2f}")
    if report.server_cpu_us_per_token is not None and report.server_cpu_us_per_request is not None:
        table.add_row("server's processor time a token", f"{report.server_cpu_us_per_token:,.1f} us")
        table.add_row("server's processor time a request", f"{report.server_cpu_us_per_request:,.0f} us")
    console.print(table)
    console.print()
    rows = {
        "first token": report.ttft,
        "between chunks": report.gap,
        "per token after the first": report.per_token,
        "end": report.end,
    }
    if report.load.rate:
        rows |= {"late": report.late, "end, since due": report.end_since_due}
    console.print(_quantile_table("ms", rows))


def _how(load: Load) -> str:
    pace = f"{load.rate:g} requests/s" if load.rate else f"{load.in_flight:,} requests at once"
    burst = f" in bursts of {load.burst:,}" if load.rate and load.burst > 1 else ""
    return f"{pace}{burst}, {_span(load.prompt)} tokens in, {_span(load.output)} out"


def _span(span: Span) -> str:
    return str(span.low) if span.low == span.high else f"{span.low} to {span.high}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _totals(report: MailboxReport | HttpReport, console: Console) -> Table:
    """Print how it ended; a table that begins with what both kinds of test have, to be gone on with."""
    console.print(f"{report.began:,} requests in {report.wall_s:,.2f} s; ended by: {report.ended}")
    console.print()
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_row("requests/s", f"{report.requests_per_s:,.1f}")
    table.add_row("tokens/s", f"{report.tokens_per_s:,.1f}")
    table.add_row("completed", f"{report.completed:,}")
    return table


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index == 0 else "right")
    return table


def _add_counts(table: Table, kind: str, counts: Mapping[str, int]) -> None:
    for name, count in sorted(counts.items()):
        if count:
            table.add_row(f"{kind}: {name}" if kind else name, f"{count:,}")


def _quantile_table(what: str, rows: Mapping[str, Quantiles]) -> Table:
    table = _table(what, "mean", "p50", "p90", "p99", "max", "count")
    for name, found in rows.items():
        if found.count:
            figures = (found.mean, found.p50, found.p90, found.p99, found.max)
            table.add_row(name, *(f"{figure:,.2f}" for figure in figures), f"{found.count:,}")
    return table
