"""Actors: on the event loop (``LoopActor``) or on a thread of their own (``ThreadedActor``).

Rules:
- One message at a time. While a loop actor's handler awaits, its mailbox waits.
- Nothing a handler raises leaves the actor: not ``CancelledError``, nor any other ``BaseException``, which stock Pykka
  answers by stopping every actor of the process. Only ``KeyboardInterrupt`` goes on to the loop, after the failure is
  recorded.
- An exception while handling an ask reaches the asker *and* supervision; a ``GptossError`` answers an ask as a normal
  refusal and is no failure. While handling a tell every exception is a failure.
- ``on_stop`` runs at the end of every incarnation that started, also after a failure (through ``on_failure``).
- Actors are started by ``System.spawn``, never by Pykka's ``start``. Pykka's own references (``actor_ref``, the
  registry) can tell, ask and stop; its proxies are refused.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

import pykka
from pykka import messages

from gptoss.actors.cell import Cell
from gptoss.actors.cell import Terminated as Terminated
from gptoss.actors.future import ReplyFuture, without_frames
from gptoss.actors.inbox import Letter
from gptoss.actors.runtime import Runtime, describe
from gptoss.actors.system import Context as Context
from gptoss.clock import Clock
from gptoss.errors import ActorDead, ActorError, GptossError
from gptoss.messages.envelope import Event, Origin, Record

BATCH = 64
"""Messages that a loop actor handles before others get their turn."""


class PykkaDoor:
    """What Pykka's own ``ActorRef`` sees as the inbox of an incarnation: envelopes in, letters out."""

    cell: Cell | None = None

    def __init__(self) -> None:
        self.actor_stopped ...
