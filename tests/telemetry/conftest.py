"""A scripted server: records as the actors would journal them, with a clock that moves only when told."""

from collections.abc import Callable

import msgspec
import pytest

from gptoss.clock import NS_PER_MS
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Meta, Record
from gptoss.messages.model import EngineCapabilities, KvLayout, ModelFingerprint
from gptoss.messages.sampling import SamplingParams
from gptoss.messages.trace_context import NO_TRACE, TraceContext

WALL_START_NS = 1_700_000_000_000_000_000
MB = 1 << 20

CAPABILITIES = EngineCapabilities(
    model_name="demo-20b",
    architecture="LlamaForCausalLM",
    vocab_size=1000,
    max_model_len=4096,
    max_batch_size=8,
    kv_budget_bytes=100 * MB,
    kv_layout=KvLayout(full_layers=2, sliding_layers=0, sliding_window=0, kv_heads=2, head_dim=64, dtype_bytes=2),
    weights_bytes=10 * MB,
    device="cpu",
    dtype="bfloat16",
    num_threads=2,
    eos_token_ids=(2,),
)

ASK = ev.Ask(max_tokens=32, kv_bytes=2 * MB, priority=0, deadline_ns=0, shrunk=False)


class Script:
    """Appends events in order and keeps the records; ``at_ms`` is the clock."""

    ask = ASK

    def __init__(self, boot: str = "boot1") -> None:
        self.boot = boot
        self.at_ms = 1_000_000.0
        self.records: list[Record] = []
        self._seqs: dict[str, int] = {}
        self._steps = 0

    @property
    def now_ns(self) -> int:
        return int(self.at_ms * NS_PER_MS)

    def add(
        self, stream: str, event: Event, *, after_ms: float = 1.0, correlation: str = "", incarnation: int = 0
    ) -> Record:
        self.at_ms += after_ms
        seq = self._seqs.get(stream, -1) + 1
        self._seqs[stream] = seq
        trace = TraceContext.begin("", f"{self.boot} {correlation}") if correlation else NO_TRACE
        meta = Meta(
            node="node",
            boot=self.boot,
            pos=len(self.records),
            stream=stream,
            seq=seq,
            type=type(event).__name__,
            version=type(event).VERSION,
            cause=-1,
            correlation=correlation,
            trace_id=trace.trace_id,
            span_id=trace.span_id,
            actor=stream,
            incarnation=incarnation,
            mono_ns=self.now_ns,
        )
        record = Record(meta=meta, event=event)
        self.records.append(record)
        return record

    def request(self, request_id: str, event: Event, *, after_ms: float = 1.0) -> Record:
        return self.add(f"request/{request_id}", event, after_ms=after_ms, correlation=request_id)

    # ------------------------------------------------------------ chapters

    def start(self, executor: str = "cpu") -> None:
        """The node starts and loads one executor."""
        self.add(
            "node",
            ev.NodeStarted(
                version="0.1.0",
                settings='{"model": "demo", "profile": "latency_first"}',
                python="3.11.0",
                packages={"torch": "2.13"},
                os="Linux",
                cpu_count=2,
                wall_ns=WALL_START_NS,
            ),
        )
        self.load(executor)

    def load(self, executor: str = "cpu", *, incarnation: int = 0) -> None:
        stream = f"executor/{executor}"
        started = ev.EngineStarted(executor=executor, device="cpu", model="demo-20b", folder="/models/demo")
        self.add(stream, started, incarnation=incarnation)
        progressed = ev.EngineLoadProgressed(executor=executor, stage="weights", done=50, total=100)
        self.add(stream, progressed, incarnation=incarnation)
        loaded = ev.EngineLoaded(
            executor=executor,
            capabilities=CAPABILITIES,
            fingerprint=ModelFingerprint(weights="aa", tokenizer="bb", chat_template="cc", config="dd"),
            load_ms=1234.0,
            pid=42,
        )
        self.add(stream, loaded, incarnation=incarnation)
        self.add("memory", ev.MemoryPoolSet(executor=executor, capabilities=CAPABILITIES))

    def receive(self, request_id: str, *, model: str = "demo-20b", prompt_tokens: int = 12) -> None:
        """Arrival up to the estimate."""
        received = ev.RequestReceived(
            request_id=request_id,
            endpoint="/v1/chat/completions",
            model=model,
            stream=True,
            num_messages=2,
            priority=0,
            deadline_ns=0,
        )
        self.request(request_id, received)
        self.request(request_id, ev.RequestValidated(sampling=SamplingParams(max_tokens=32, seed=7)))
        rendered = ev.PromptRendered(
            prompt_tokens=prompt_tokens, prompt_hmac="h", template="t", date="2026-01-01", max_tokens=32
        )
        self.request(request_id, rendered, after_ms=3)
        estimated = ev.MemoryEstimated(
            request_id=request_id, prompt_tokens=prompt_tokens, max_tokens=32, kv_bytes=2 * MB, kv_bytes_prompt=MB
        )
        self.add("memory", estimated, correlation=request_id)
        self.request(request_id, ev.RequestEstimated(kv_bytes=2 * MB, kv_bytes_prompt=MB))

    def decide(self, request_id: str, action: str = "accept", reason: str = "fits") -> None:
        decided = ev.AdmissionDecided(
            request_id=request_id,
            action=msgspec.convert(action, ev.AdmissionAction),
            reason=reason,
            max_tokens=32,
            kv_bytes=2 * MB,
            running=1,
            queued=0,
            slots=8,
            policy="p",
        )
        self.add("admission", decided, correlation=request_id)

    def enqueue(self, request_id: str, reason: str = "slots") -> None:
        enqueued = ev.Enqueued(request_id=request_id, position=0, queued=1, reason=reason, ask=ASK)
        self.add("admission", enqueued, correlation=request_id)

    def queue(self, request_id: str, *, waits_ms: float = 40.0, reason: str = "tried") -> None:
        self.enqueue(request_id)
        dequeued = ev.Dequeued(request_id=request_id, waited_ns=int(waits_ms * NS_PER_MS), queued=0, reason=reason)
        self.add("admission", dequeued, after_ms=waits_ms, correlation=request_id)

    def admit(self, request_id: str) -> None:
        """Memory and a slot are the request's."""
        self.add("admission", ev.MemoryRequested(request_id=request_id, ask=ASK), correlation=request_id)
        granted = ev.ReservationGranted(
            request_id=request_id, kv_bytes=2 * MB, kv_bytes_free_max=50 * MB, unbound_bytes=2 * MB
        )
        self.add("memory", granted, correlation=request_id)
        self.decide(request_id)
        self.request(request_id, ev.RequestAdmitted(action="accept", max_tokens=32, kv_bytes=2 * MB))

    def route(self, request_id: str, executor: str = "cpu", *, attempt: int = 1, resumed: int = 0) -> None:
        """Routed, bound and handed to the engine."""
        candidate = ev.RouteCandidate(
            executor=executor, running=0, slots=8, kv_bytes_bound=0, kv_bytes_free=50 * MB, score=0.0
        )
        decided = ev.RouteDecided(
            request_id=request_id, executor=executor, reason="least_loaded", candidates=(candidate,)
        )
        self.add("router", decided, correlation=request_id)
        bound = ev.ReservationBound(request_id=request_id, executor=executor)
        self.add("memory", bound, correlation=request_id)
        self.request(request_id, ev.RequestRouted(executor=executor, attempt=attempt))
        sampling = SamplingParams(max_tokens=32, seed=7)
        self.request(request_id, ev.SamplingBound(attempt=attempt, sampling=sampling, resumed_tokens=resumed))
        accepted = ev.ExecutorAccepted(request_id=request_id, executor=executor, attempt=attempt, prompt_tokens=12)
        self.add(f"executor/{executor}", accepted, correlation=request_id)

    def step(
        self, rows: dict[str, tuple[int, int]], *, executor: str = "cpu", after_ms: float = 20.0, attempt: int = 1
    ) -> None:
        """One step; ``rows`` maps a request to (tokens produced, prompt tokens computed)."""
        self._steps += 1
        committed = ev.StepCommitted(
            executor=executor,
            step=self._steps,
            started_ns=self.now_ns,
            duration_ns=int((after_ms - 1) * NS_PER_MS),
            rows=tuple(ev.CommittedRow(name, attempt, *counts) for name, counts in rows.items()),
            waiting=0,
            running=len(rows),
            kv_bytes_in_use=len(rows) * MB,
            prefix_cache_bytes=3 * MB,
        )
        self.add(f"executor/{executor}", committed, after_ms=after_ms)

    def generate(self, request_id: str, tokens: int, *, first: bool = True, attempt: int = 1) -> None:
        """Prefill and ``tokens`` tokens, 20 ms a step."""
        self.step({request_id: (0, 12)}, attempt=attempt)
        for index in range(tokens):
            self.step({request_id: (1, 0)}, attempt=attempt)
            if index == 0 and first:
                self.request(request_id, ev.FirstTokenProduced(attempt=attempt), after_ms=0)
                self.request(request_id, ev.FirstByteSent(), after_ms=0.5)

    def release(self, request_id: str, executor: str = "cpu") -> None:
        """Everything is given back."""
        forgotten = ev.RouteForgotten(request_id=request_id, executor=executor)
        self.add("router", forgotten, correlation=request_id)
        released = ev.ReservationReleased(request_id=request_id, kv_bytes=2 * MB, executor=executor)
        self.add("memory", released, correlation=request_id)
        slot = ev.SlotReleased(request_id=request_id, running=0, ran_ns=1)
        self.add("admission", slot, correlation=request_id)

    # ------------------------------------------------------------ whole lives

    def completed(self, request_id: str, *, tokens: int = 5, queued: bool = True, cached: int = 0) -> None:
        self.receive(request_id)
        if queued:
            self.decide(request_id, "queue", "slots")
            self.queue(request_id)
        self.admit(request_id)
        self.route(request_id)
        self.generate(request_id, tokens)
        self.request(request_id, self.completion(tokens, cached=cached))
        self.release(request_id)

    def rejected(self, request_id: str, *, model: str = "demo-20b") -> None:
        self.receive(request_id, model=model)
        self.decide(request_id, "reject", "queue_full")
        self.request(
            request_id, ev.RequestRejected(code="queue_full", status=429, message="the queue is full", retry_after_s=2)
        )

    def cancelled(self, request_id: str, *, steps_after: int = 1) -> None:
        self.receive(request_id)
        self.admit(request_id)
        self.route(request_id)
        self.generate(request_id, 2)
        self.request(request_id, ev.ClientDisconnected())
        self.request(request_id, ev.CancelRequested(reason="disconnect"))
        for _ in range(steps_after):
            self.step({request_id: (1, 0)})
        applied = ev.CancelApplied(request_id=request_id, executor="cpu", completion_tokens=2 + steps_after)
        self.add("executor/cpu", applied, correlation=request_id)
        self.request(request_id, ev.RequestCancelled(reason="disconnect", completion_tokens=2 + steps_after))
        self.release(request_id)

    def retried(self, request_id: str) -> None:
        """Two tokens, then the engine dies; three more from the next attempt."""
        self.receive(request_id)
        self.admit(request_id)
        self.route(request_id)
        self.generate(request_id, 2)
        faulted = ev.ExecutorFaulted(
            request_id=request_id, executor="cpu", attempt=1, code="engine_lost", message="it died", lost=True
        )
        self.add("executor/cpu", faulted, correlation=request_id)
        self.add("executor/cpu", ev.EngineExited(executor="cpu", exit_code=-9, reason="killed", in_flight=1))
        self.request(request_id, ev.AttemptRetried(attempt=1, code="engine_lost", tokens_out=2))
        self.load(incarnation=1)
        self.route(request_id, attempt=2, resumed=2)
        self.generate(request_id, 3, first=False, attempt=2)
        self.request(request_id, self.completion(5))
        self.release(request_id)

    @staticmethod
    def completion(tokens: int, *, cached: int = 0) -> ev.RequestCompleted:
        return ev.RequestCompleted(
            finish_reason="stop", prompt_tokens=12, completion_tokens=tokens, cached_tokens=cached, stop_reason=2
        )


@pytest.fixture
def script() -> Script:
    """A started server with one ready executor."""
    script = Script()
    script.start()
    return script


@pytest.fixture
def new_script() -> Callable[[str], Script]:
    """A server in another boot, not started."""
    return Script


@pytest.fixture
def busy(script: Script) -> Script:
    """A server on which every kind of life has happened and one request is still running."""
    script.completed("req_done", cached=4)
    script.rejected("req_refused")
    script.cancelled("req_left")
    script.retried("req_again")
    script.add("node", ev.DeadLettered(to="request/req_left", message_type="FirstTokenSeen", reason="dead"))
    script.receive("req_open")
    script.admit("req_open")
    script.route("req_open")
    script.generate("req_open", 2)
    return script
