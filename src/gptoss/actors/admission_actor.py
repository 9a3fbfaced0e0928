"""Admission's actor: its decisions, and a clock for the deadlines of those who wait."""

from gptoss.actors.admission_state import AdmissionState
from gptoss.actors.decider import DeciderActor
from gptoss.messages import commands as cmd
from gptoss.messages.commands import Command

DEADLINE_PERIOD_S = 0.25
"""How often admission looks for passed deadlines."""


class AdmissionActor(DeciderActor[AdmissionState]):
    """Admission with a clock for the deadlines of those who wait."""

    def on_start(self) -> None:
        """Look for passed deadlines a few times a second."""
        super().on_start()
        system = self.context.system
        self._deadlines = system.send_every(
            DEADLINE_PERIOD_S, self.context.ref, lambda: cmd.CheckDeadlines(now_ns=system.now_ns())
        )

    def on_receive(self, message: Command) -> None:
        """Consume a command; a deadline check with nobody waiting is no decision and leaves no trace."""
        if isinstance(message, cmd.CheckDeadlines) and not self.state.waiting:
            return
        super().on_receive(message)

    def on_stop(self) -> None:
        """Stop the clock."""
        self._deadlines.cancel()
