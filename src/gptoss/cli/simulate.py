"""``gptoss simulate``: run the whole system under seeded schedules and faults, and pursue the first seed that fails."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
import rich_click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from gptoss.simulation.campaign import Finding
    from gptoss.simulation.run import Verdict
    from gptoss.simulation.scenario import Scenario

EXIT_BROKEN = 1


@rich_click.command()
@click.option("--seeds", type=click.IntRange(1), default=1000, show_default=True, help="How many seeds to run.")
@click.option("--start", type=click.IntRange(0), default=0, show_default=True, help="The first seed.")
@click.option("--seed", type=click.IntRange(0), help="Run this seed alone.")
@click.option("--scenario", type=click.Path(path_type=Path), metavar="FILE", help="Run a scenario that was written.")
@click.option("--jobs", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes to run them in.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where a failing scenario and its recording go; by default simulation-SEED here.",
)
def simulate(seeds: int, start: int, seed: int | None, scenario: Path | None, jobs: int, output: Path | None) -> None:
    """Simulate the whole system in virtual time, under schedules and faults drawn from seeds.

    Each seed decides a workload, the faults that happen in it and whose turn is next. Whatever the seed, every request
    must end once, nothing may be held or lost, and the log must tell the truth. The first seed that breaks such an
    invariant is shrunk to the fewest faults and requests that still break it. Exit status 1 then, else 0.

    \b
    [bold]Examples[/]
      gptoss simulate --seeds 5000 --jobs 4
      gptoss simulate --seed 42
      gptoss simulate --scenario simulation-42/scenario.json
    """  # noqa: D301 - \b is click's mark of a paragraph that keeps its lines
    from gptoss.simulation.campaign import pursue, verdict_of  # noqa: PLC0415 - heavy, as for all commands

    console = Console(stderr=True, highlight=False)
    if scenario is not None:
        found = _run_again(scenario)
    elif seed is not None:
        found = verdict_of(seed)
    else:
        found = _search(start, seeds, jobs, console)
    if not found.broken:
        click.echo(f"{_what(seeds, start, seed, scenario)}: every invariant holds")
        return
    name = f"seed {found.scenario.seed}"
    console.print(f"[bold red]{name} breaks {found.broken}[/]: {found.message}", markup=True)
    with console.status("shrinking") as status:

        def show(smallest: "Scenario") -> None:
            status.update(f"shrinking: {len(smallest.faults)} faults, {len(smallest.arrivals)} requests")

        finding = pursue(found, output or Path(f"simulation-{found.scenario.seed}"), show)
    click.echo(_report(finding))
    raise click.exceptions.Exit(EXIT_BROKEN)


def _run_again(file: Path) -> "Verdict":
    from gptoss.simulation.run import simulate as run  # noqa: PLC0415
    from gptoss.simulation.scenario import read_scenario  # noqa: PLC0415

    return run(read_scenario(file))[0]


def _search(start: int, seeds: int, jobs: int, console: Console) -> "Verdict":
    """The first verdict with a broken invariant, or else the last."""
    from gptoss.simulation.campaign import verdicts  # noqa: PLC0415

    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TextColumn("seeds"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("seeds", total=seeds)
        last: Verdict | None = None
        for last in verdicts(range(start, start + seeds), jobs):
            progress.advance(task)
            if last.broken:
                break
    assert last is not None
    return last


def _what(seeds: int, start: int, seed: int | None, scenario: Path | None) -> str:
    if scenario is not None:
        return str(scenario)
    return f"seed {seed}" if seed is not None else f"seeds {start} to {start + seeds - 1}"


def _report(finding: "Finding") -> str:
    scenario = finding.smallest.scenario
    lines = [
        f"seed {finding.found.scenario.seed} breaks {finding.smallest.broken}: {finding.smallest.message}",
        f"shrunk in {finding.runs} runs to {len(scenario.faults)} faults and {len(scenario.arrivals)} requests:",
    ]
    lines += [f"  {fault.at_ms:10.3f} ms  {fault.kind} {fault.target} {fault.on}".rstrip() for fault in scenario.faults]
    lines += [
        f"  {arrival.at_ms:10.3f} ms  request {arrival.name}: {arrival.prompt_tokens} tokens in, "
        f"at most {arrival.max_tokens or 'the default'} out"
        for arrival in scenario.arrivals
    ]
    lines += [
        f"run it again:  gptoss simulate --scenario {finding.folder / 'scenario.json'}",
        f"as found:      gptoss simulate --seed {finding.found.scenario.seed}",
        f"its recording: {finding.folder / 'journal'}",
    ]
    return "\n".join(lines)
