"""An actor that is asked things, so that a run exercises what the serving actors seldom need of the runtime.

    answer    answers at once
    wait      answers after a while, in an awaiting handler
    refuse    answers with one of this package's errors
    crash     raises, and is restarted by its supervisor
    defer     takes the reply over and answers from elsewhere, later
    forget    takes the reply over and never answers
    catch_up  goes to the telemetry actor instead

Its mailbox is small and sheds, so that a burst of asks makes dead letters.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any

import msgspec

from gptoss.actors.actor import LoopActor
from gptoss.actors.inbox import MailboxSpec
from gptoss.errors import NotReady

NAME = "probe"
MAILBOX = MailboxSpec(capacity=3, policy="shed")
KINDS = ("answer", "wait", "refuse", "crash", "defer", "forget", "catch_up")


class Question(msgspec.Struct, frozen=True):
    """What to do, and how long to take over it."""

    kind: str
    wait_s: float


class ProbeActor(LoopActor):
    """See the module's table."""

    def on_receive(self, message: Question) -> Awaitable[Any] | str:
        """Do what is asked."""
        match message.kind:
            case "wait":
                return asyncio.sleep(message.wait_s, "waited")
            case "refuse":
                raise NotReady("refused, as asked")
            case "crash":
                raise ValueError("crashed, as asked")
            case "defer":
                reply = self.defer()
                if reply is not None:
                    self.context.system.loop.call_later(message.wait_s, reply.resolve, "deferred")
                return ""
            case "forget":
                self.defer()
                return ""
            case _:
                return "answered"
