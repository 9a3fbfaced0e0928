"""How Pykka's own references reach an actor of a system.

Rules:
- Pykka's tell, ask and stop become letters and stop orders; its proxies are refused.
- The door belongs to one incarnation: once that has ended, Pykka's ``ActorDeadError`` answers.
"""

from typing import Any, NoReturn

import pykka
from pykka import messages

from gptoss.actors.cell import Cell
from gptoss.actors.future import ReplyFuture
from gptoss.actors.inbox import Letter
from gptoss.errors import ActorDead, ActorError

_PROXY_MESSAGES = (messages.ProxyCall, messages.ProxyGetAttr, messages.ProxySetAttr)


class PykkaDoor:
    """What Pykka's own ``ActorRef`` sees as the inbox of one incarnation: envelopes in, letters out."""

    def __init__(self) -> None:
        self._cell: Cell | None = None

    def connect(self, cell: Cell | None) -> None:
        """Deliver to ``cell`` from now on; None means that the incarnation has ended."""
        self._cell = cell

    def put(self, envelope: Any, /) -> None:
        """Deliver Pykka's tell, ask or stop; a failure goes to the asker, or is raised when there is none."""
        try:
            self._deliver(envelope.message, envelope.reply_to)
        except (ActorError, pykka.ActorDeadError) as error:
            if envelope.reply_to is None:
                raise
            envelope.reply_to.set_exception((type(error), error, None))

    def get(self) -> NoReturn:
        """Refused: the actor takes its letters from its own inbox."""
        raise ActorError("an actor of a System has no Pykka inbox to get from")

    def empty(self) -> bool:
        """Whether no letter waits."""
        return self._cell is None or self._cell.inbox.empty()

    def _deliver(self, message: Any, reply: ReplyFuture[Any] | None) -> None:
        cell = self._cell
        if cell is None or not cell.is_alive:
            raise pykka.ActorDeadError("the actor has stopped or was restarted")
        if isinstance(message, _PROXY_MESSAGES):
            raise ActorError(f"{cell.name} has no proxy; tell or ask it")
        if not isinstance(message, messages._ActorStop):  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
            try:
                shed = cell.inbox.put(Letter(message, reply))
            except ActorDead:
                raise pykka.ActorDeadError(f"{cell.name} has stopped") from None
            if shed is not None:
                cell.kernel.bury(shed, cell.name, "shed")
            return
        if reply is not None:
            cell.when_stopped(lambda: reply.resolve(None))
        try:
            cell.kernel.post(cell.begin_stop)
        except RuntimeError:
            raise pykka.ActorDeadError(f"the event loop of {cell.name} is closed") from None
