"""The front door of the actor system: HTTP handlers and embedding programs submit, watch and cancel requests here.

No business lives here: it names the request, starts its actor and keeps the address until the actor has stopped.
"""

import re
from collections.abc import Callable

from gptoss.actors.actor import LoopActor, Terminated
from gptoss.actors.directory import REQUEST_PREFIX, request_name
from gptoss.actors.generation import GenerateRequest, Generation, Notice
from gptoss.actors.inbox import MailboxSpec
from gptoss.actors.rendering import Rendering
from gptoss.actors.request import RequestActor, RequestServices
from gptoss.actors.system import System
from gptoss.clock import NS_PER_S
from gptoss.errors import GptossError, Overloaded, RequestError
from gptoss.messages.commands import CancelReason, CancelRequest, FirstByteWritten
from gptoss.messages.envelope import Origin
from gptoss.messages.events import ClientDisconnected, ClientSlow, RequestReceived, RequestRejected
from gptoss.messages.trace_context import TraceContext

REQUEST_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
REQUEST_MAILBOX = MailboxSpec(capacity=100_000)


class _Undertaker(LoopActor):
    """Watches request actors and strikes off those that have ended."""

    def __init__(self, ended: Callable[[str], None]) -> None:
        super().__init__()
        self._ended = ended

    def on_receive(self, message: Terminated) -> None:
        self._ended(message.name)


class Gateway:
    """Submits requests to the actor system. Use it from the event loop only."""

    def __init__(self, system: System, services: RequestServices) -> None:
        self._system = system
        self._services = services
        self._directory = services.directory
        self._choices: dict[str, set[str]] = {}  # name of a call's first choice -> its further ones that run
        self._first_choice: dict[str, str] = {}
        self._traces: dict[str, TraceContext] = {}
        self._num_traces = 0
        self._undertaker = system.spawn(
            lambda: _Undertaker(self._forget), name="undertaker", mailbox=REQUEST_MAILBOX, supervisor=system.root
        )

    @property
    def served_model(self) -> str:
        """The name under which the model is served."""
        return self._services.served_model

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and output may have together; 0 until a model is loaded."""
        return self._services.max_model_len()

    @property
    def rendering(self) -> Rendering:
        """Prompts and texts without a request."""
        return self._services.rendering

    @property
    def running(self) -> int:
        """Requests that have not ended."""
        return len(self._directory.names(REQUEST_PREFIX))

    def name_request(self, wanted: str) -> str:
        """``wanted`` where it is a valid id that no running request uses, else a fresh one."""
        name = request_name(wanted)
        if REQUEST_ID.fullmatch(wanted) and self._directory.get(name) is None and name not in self._choices:
            return wanted
        return self._system.ids.new_id("req")

    def submit(self, request: GenerateRequest) -> Generation:
        """Start a request. Every refusal and failure comes through the returned ``Generation``."""
        request_id = self.name_request(request.request_id)
        name = request_name(request_id)
        trace = self._traces[name] = self._begin_trace(request_id, request.traceparent, request.parent_id)
        generation = Generation(
            request_id=request_id,
            model=self.served_model,
            created_s=self._system.clock.wall_ns() // NS_PER_S,
            on_cancel=lambda reason: self._cancel(name, reason),
            on_notice=lambda notice, stalled_ms: self._notice(name, notice, stalled_ms),
            trace=trace,
        )
        ref = self._system.spawn(
            lambda: RequestActor(request_id, request, generation, self._services),
            name=name,
            mailbox=REQUEST_MAILBOX,
            quiet=True,
        )
        self._directory.add(name, ref)
        self._system.watch(ref, self._undertaker)
        if request.parent_id:
            first = self._first_choice[name] = request_name(request.parent_id)
            self._choices.setdefault(first, set()).add(name)
        return generation

    def reject(self, error: GptossError, *, endpoint: str, request_id: str = "", traceparent: str = "") -> str:
        """Record a request that was refused before it could be submitted, such as malformed JSON.

        Returns:
            The id under which the refusal stands in the journal.
        """
        name = self.name_request(request_id)
        trace = self._begin_trace(name, traceparent)
        origin = Origin(
            stream=request_name(name),
            correlation=name,
            trace_id=trace.trace_id,
            span_id=trace.span_id,
            actor="gateway",
        )
        received = RequestReceived(
            request_id=name,
            endpoint=endpoint,
            model="",
            stream=False,
            num_messages=0,
            priority=0,
            deadline_ns=0,
            traceparent=traceparent,
        )
        self._system.journal.append(received, origin)
        rejected = RequestRejected(
            code=error.code,
            status=error.status,
            message=error.message,
            param=(error.param or "") if isinstance(error, RequestError) else "",
            retry_after_s=error.retry_after_s if isinstance(error, Overloaded) else 0.0,
        )
        self._system.journal.append(rejected, origin)
        return name

    def _begin_trace(self, request_id: str, traceparent: str, parent_id: str = "") -> TraceContext:
        """A call is one trace: its further choices stand under the same span as the first."""
        first = self._traces.get(request_name(parent_id)) if parent_id else None
        if first is not None:
            return first
        self._num_traces += 1  # clients may use an id again
        journal = self._system.journal
        return TraceContext.begin(traceparent, f"{journal.node} {journal.boot} {request_id} {self._num_traces}")

    def cancel(self, request_id: str, reason: CancelReason = "client") -> bool:
        """Stop a running request and the further choices of its call; False when no such request runs."""
        name = request_name(request_id)
        told = [self._cancel(each, reason) for each in (name, *self._choices.get(name, ()))]
        return any(told)

    def cancel_all(self, reason: CancelReason) -> None:
        """Stop every running request."""
        for name in self._directory.names(REQUEST_PREFIX):
            self._cancel(name, reason)

    def _cancel(self, name: str, reason: CancelReason) -> bool:
        ref = self._directory.get(name)
        if ref is None:
            return False
        ref.tell(CancelRequest(now_ns=self._system.now_ns(), reason=reason), control=True)
        return True

    def _notice(self, name: str, notice: Notice, stalled_ms: float) -> None:
        ref = self._directory.get(name)
        if ref is None:
            return
        now_ns = self._system.now_ns()
        if notice == "first_byte":
            ref.tell(FirstByteWritten(now_ns=now_ns), control=True)
            return
        event = ClientSlow(stalled_ms=stalled_ms) if notice == "slow" else ClientDisconnected()
        correlation = name.removeprefix(REQUEST_PREFIX)
        self._system.journal.append(event, Origin(stream=name, correlation=correlation, actor="gateway"))
        reason: CancelReason = "slow_client" if notice == "slow" else "disconnect"
        ref.tell(CancelRequest(now_ns=now_ns, reason=reason), control=True)

    def _forget(self, name: str) -> None:
        self._directory.remove(name)
        self._traces.pop(name, None)
        first = self._first_choice.pop(name, None)
        if first is not None:
            self._choices[first].discard(name)
            if not self._choices[first]:
                del self._choices[first]
