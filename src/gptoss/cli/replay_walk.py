"""Walking through a recording in the terminal: ``gptoss replay --until``, ``--actor`` and ``--step``."""

import sys

import click
import msgspec
from rich.console import Console
from rich.markup import escape

from gptoss.errors import ConfigError, ReplayError
from gptoss.messages.codec import by_name
from gptoss.replay.diff import summary
from gptoss.replay.report import print_line, print_moment
from gptoss.replay.walk import Walk
from gptoss.telemetry.recording import Recording

KEYS = "n: next, p: back, q: end, a name: the state of that actor, ?: the names"


def walk(
    recording: Recording, boot: str | None, until: str | None, actor: str | None, *, step: bool, as_json: bool
) -> None:
    """Show where ``until`` is; with ``step``, go on as the lines of standard input say.

    Args:
        recording: what to walk through.
        boot: which boot unless ``until`` names one; None is the newest.
        until: a position, or BOOT:POSITION; None is the first record.
        actor: whose state to show at each place; None shows the record.
        step: read standard input.
        as_json: print moments as JSON, one a line.

    Raises:
        ConfigError: ``until`` names no place of the recording.
        ReplayError: nothing was recorded of the actor by then.
    """
    screen = _Screen(_begin(recording, boot, until), actor, as_json=as_json)
    screen.here()
    if not step:
        if actor is None:
            screen.names()
        return
    click.echo(KEYS, err=True)
    for line in sys.stdin:
        if not screen.obey(line.strip()):
            return


class _Screen:
    """Shows places, and obeys one key at a time."""

    def __init__(self, place: Walk, actor: str | None, *, as_json: bool) -> None:
        self._place = place
        self._actor = actor
        self._as_json = as_json
        self._console = Console()

    def here(self) -> None:
        """Show this place."""
        if self._actor is not None:
            self._show(self._actor)
            return
        record = self._place.record
        print_line(escape(f"{record.meta.pos:>8}  {record.meta.stream}  {summary(record)}"), self._console)

    def names(self) -> None:
        """Show who can be asked for."""
        self._console.print(f"actors: {', '.join(self._place.actors())}", highlight=False, markup=False)

    def obey(self, key: str) -> bool:
        """Do what a line of input says; False at the end."""
        if key == "q":
            return False
        if key == "?":
            self.names()
        elif key in {"", "n", "p"}:
            has_moved = self._place.back() if key == "p" else self._place.next()
            if has_moved:
                self.here()
            else:
                click.echo(f"this is the {'first' if key == 'p' else 'last'} record", err=True)
        else:
            try:
                self._show(key)
            except ReplayError as error:
                click.echo(error.message, err=True)
        return True

    def _show(self, actor: str) -> None:
        moment = self._place.moment(actor)
        if self._as_json:
            click.echo(msgspec.json.encode(by_name(moment)))
        else:
            print_moment(moment, self._console)


def _begin(recording: Recording, boot: str | None, until: str | None) -> Walk:
    named, _, position = (until or "").rpartition(":")
    if position and not position.isdecimal():
        raise ConfigError(f"--until is {until!r}; it must be a position or BOOT:POSITION")
    boots = recording.boots()
    if not boots:
        raise ReplayError("the recording is empty")
    chosen = named or boot or boots[-1]
    if chosen not in boots:
        raise ConfigError(f"--until names the boot {chosen!r}; the recording has {', '.join(boots)}")
    return Walk(recording, chosen, int(position) if position else None)
