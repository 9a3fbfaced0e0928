"""Many seeds in a row, until one breaks an invariant: that one is shrunk and written down.

What is written, in a folder of its own:

    scenario.json   the smallest scenario that fails; ``gptoss simulate --scenario`` runs it again
    journal/        what its run recorded, as segments; ``gptoss events`` and replay read them
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import msgspec

from gptoss.simulation.generate import generate
from gptoss.simulation.run import Verdict, simulate
from gptoss.simulation.scenario import Scenario, write_scenario
from gptoss.simulation.shrink import Shrinker

SEEDS_A_TASK = 8


class Finding(msgspec.Struct, frozen=True):
    """A seed that fails: as it was found, as small as it could be made, and where that is written."""

    found: Verdict
    smallest: Verdict
    runs: int
    folder: Path


def verdict_of(seed: int) -> Verdict:
    """How the scenario of a seed comes out."""
    return simulate(generate(seed))[0]


def verdicts(seeds: Iterable[int], jobs: int = 1) -> Iterator[Verdict]:
    """The verdicts of these seeds, in their order.

    Args:
        seeds: to run.
        jobs: processes to run them in.
    """
    if jobs == 1:
        yield from map(verdict_of, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        try:
            yield from pool.map(verdict_of, seeds, chunksize=SEEDS_A_TASK)
        finally:
            pool.shutdown(cancel_futures=True)


def pursue(found: Verdict, folder: Path, progress: Callable[[Scenario], object] | None = None) -> Finding:
    """Shrink a failing scenario and write it down with its recording.

    Args:
        found: a verdict with a broken invariant.
        folder: is made; it should not exist yet.
        progress: see ``Shrinker``.
    """
    shrinker = Shrinker(found, progress=progress)
    smallest = shrinker.shrink()
    journal_folder = folder / "journal"
    journal_folder.mkdir(parents=True, exist_ok=True)
    write_scenario(smallest.scenario, folder / "scenario.json")
    _, journal = simulate(smallest.scenario)
    journal.write_recording(journal_folder)
    return Finding(found, smallest, shrinker.runs, folder)
