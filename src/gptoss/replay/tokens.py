"""Runs the engine again on the recorded plans, and compares its tokens with the recorded ones.

Rules:
- An attempt is run if the recording has its prompt and all of its rows. The others of its batch are left out: results
  do not depend on neighbours (``engine.port``).
- Each life of an engine is a fresh engine here. What an earlier attempt delivered is given to the next, as it was.
- A row that came to nothing is not run. A request that fails, or whose tokens differ, is let go: what follows a wrong
  token says nothing.
- The engine is set up as the recorded one was, as far as this machine can; what differs is said.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from gptoss.clock import NS_PER_S, Clock, SystemClock
from gptoss.config import Settings, load_settings
from gptoss.engine.model_folder import no_progress
from gptoss.engine.model_source import prepare_in_child
from gptoss.engine.port import Load, StepRow, Submit
from gptoss.errors import ConfigError, ReplayError
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.messages.model import EngineCapabilities, ModelFingerprint, Summation
from gptoss.messages.plan import plan_of
from gptoss.messages.sampling import MAX_TOP_LOGPROBS, SamplingParams
from gptoss.replay.recorded import settings_of
from gptoss.replay.result import TokenDivergence, TokensResult
from gptoss.telemetry.recording import Recording

if TYPE_CHECKING:
    from gptoss.engine.replayed import ReplayedEngine, ReplayedModel

StepKey = tuple[str, int, int]
"""Executor's stream, its incarnation, the step's number."""


class Content:
    """The tokens of a boot.

    Args:
        records: content records of one boot.
        request_id: only of this request; None is all.

    Attributes:
        prompts: by request.
        rows: what each step produced, by request.
        outputs: all tokens that were delivered, by request.
    """

    def __init__(self, records: Iterator[Record], request_id: str | None) -> None:
        self.prompts: dict[str, ev.PromptTokens] = {}
        self.rows: dict[StepKey, dict[str, ev.ProducedRow]] = {}
        self.outputs: dict[str, list[int]] = {}
        for record in records:
            event = record.event
            if isinstance(event, ev.PromptTokens) and request_id in {None, event.request_id}:
                self.prompts[event.request_id] = event
                self.outputs[event.request_id] = []
            elif isinstance(event, ev.StepTokens):
                rows = {row.request_id: row for row in event.rows if row.request_id in self.prompts}
                self.rows[record.meta.stream, record.meta.incarnation, event.step] = rows
                for row in rows.values():
                    self.outputs[row.request_id][row.position :] = row.token_ids


def replay_tokens(  # noqa: PLR0913 - what to run, and how to call it
    recording: Recording,
    *,
    model: str | None = None,
    force: bool = False,
    source: str = "",
    boot: str | None = None,
    request_id: str | None = None,
    clock: Clock | None = None,
) -> TokensResult:
    """Run a recording's tokens again.

    Args:
        recording: with token ids.
        model: as for ``gptoss serve``; None is the recorded one.
        force: run a model although it is not the recorded one.
        source: its name in the report.
        boot: only this one.
        request_id: only this request.
        clock: for the duration.

    Raises:
        ConfigError: the model is not the recorded one, or is not to be found.
        ModelLoadError: it cannot be loaded here.
        ReplayError: the recording holds no tokens.
    """
    clock = clock or SystemClock()
    begin_ns = clock.monotonic_ns()
    models = _Models(model, force=force)
    count = _Count()
    for name in (boot,) if boot else recording.boots():
        content = Content(recording.content(boot=name), request_id)
        if content.prompts:
            run = _BootRun(content, models, count)
            for record in recording.records(boot=name):
                run.observe(record)
    if not count.requests:
        wanted = f"of {request_id} " if request_id else ""
        raise ReplayError(
            f"{source or 'the recording'} holds no token ids {wanted}to compare: make it with its content"
        )
    return TokensResult(
        source=source,
        model=models.name,
        is_same_model=models.is_same,
        requests=count.requests,
        left_out=count.left_out,
        steps=count.steps,
        tokens=count.tokens,
        seconds=round((clock.monotonic_ns() - begin_ns) / NS_PER_S, 3),
        diverged=tuple(count.diverged),
        notes=tuple(dict.fromkeys((*models.notes, *count.notes))),
    )


class _Count:
    """What was run and found."""

    def __init__(self) -> None:
        self.requests = self.left_out = self.steps = self.tokens = 0
        self.diverged: list[TokenDivergence] = []
        self.notes: list[str] = []


class _BootRun:
    """The executors of one boot, one record at a time."""

    def __init__(self, content: Content, models: "_Models", count: _Count) -> None:
        self._content = content
        self._models = models
        self._count = count
        self._settings = Settings()
        self._bound: dict[str, SamplingParams] = {}
        self._engines: dict[str, ReplayedEngine] = {}
        self._early: dict[str, list[ev.ExecutorAccepted]] = {}

    def observe(self, record: Record) -> None:
        """Take any control record."""
        event, stream = record.event, record.meta.stream
        match event:
            case ev.NodeStarted():
                self._settings, _ = settings_of(event)
            case ev.SamplingBound():
                self._bound[record.meta.correlation] = event.sampling
            case ev.EngineLoaded():
                model = self._models.get(self._settings, event)
                self._engines[stream] = model.engine()
                self._count.notes += _differences(event.capabilities, self._engines[stream].capabilities)
                for accepted in self._early.pop(stream, []):
                    self._submit(stream, accepted)
            case ev.EngineStarted() | ev.EngineExited():
                self._engines.pop(stream, None)
                self._early.pop(stream, None)
            case ev.ExecutorAccepted():
                self._submit(stream, event)
            case ev.CancelApplied() | ev.ExecutorFaulted() if stream in self._engines:
                self._engines[stream].cancel([event.request_id])
            case ev.StepCommitted() if stream in self._engines:
                self._step(record, event, self._engines[stream])
            case _:
                pass

    def _submit(self, stream: str, event: ev.ExecutorAccepted) -> None:
        request_id = event.request_id
        prompt, sampling = self._content.prompts.get(request_id), self._bound.get(request_id)
        delivered = self._content.outputs.get(request_id, [])[: event.resumed_tokens]
        if prompt is None or sampling is None or len(delivered) < event.resumed_tokens:
            self._count.left_out += 1
            return
        if stream not in self._engines:
            self._early.setdefault(stream, []).append(event)
            return
        self._count.requests += 1
        submit = Submit(
            request_id=request_id,
            attempt=event.attempt,
            prompt_token_ids=prompt.token_ids,
            output_token_ids=tuple(delivered),
            sampling=msgspec.structs.replace(sampling, stop=prompt.stop, logprobs=MAX_TOP_LOGPROBS),
            priority=event.priority,
            deadline_ns=event.deadline_ns,
            grammar=prompt.grammar,
        )
        self._engines[stream].submit(submit)

    def _step(self, record: Record, step: ev.StepCommitted, engine: "ReplayedEngine") -> None:
        failed = {row.request_id for row in step.rows if row.failure}
        plan = plan_of(step)
        plan = msgspec.structs.replace(plan, rows=tuple(row for row in plan.rows if row.request_id not in failed))
        rows = engine.step(plan)
        engine.cancel([row.request_id for row in step.rows if row.failure and row.ended])
        if not rows:
            return
        self._count.steps += 1
        recorded = self._content.rows.get((record.meta.stream, record.meta.incarnation, step.step), {})
        made = {row.request_id: row.tokens for row in step.rows}
        for row in rows:
            then = recorded.get(row.request_id)
            if then is None and made.get(row.request_id):
                engine.cancel([row.request_id])  # its tokens of this step were not kept
                self._count.notes.append(f"some tokens of {row.request_id} are not in the recording")
                continue
            self._compare(record, step, row, then, engine)

    def _compare(
        self,
        record: Record,
        step: ev.StepCommitted,
        row: StepRow,
        then: ev.ProducedRow | None,
        engine: "ReplayedEngine",
    ) -> None:
        old, new = then.token_ids if then else (), row.token_ids
        self._count.tokens += len(old)
        if old == new:
            return
        index = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        before, after = (ids[index] if index < len(ids) else None for ids in (old, new))
        found = {each[0]: each[1] for each in row.logprobs[index].top} if index < len(row.logprobs) else {}
        if index < len(row.logprobs):
            found[row.logprobs[index].token_id] = row.logprobs[index].logprob
        self._count.diverged.append(
            TokenDivergence(
                request_id=row.request_id,
                boot=record.meta.boot,
                step=step.step,
                position=(then.position if then else 0) + index,
                recorded=before,
                replayed=after,
                logprob_recorded=None if before is None else found.get(before),
                logprob_replayed=None if after is None else found.get(after),
            )
        )
        engine.cancel([row.request_id])


class _Models:
    """Models that were loaded, and whether they are the recorded ones."""

    def __init__(self, model: str | None, *, force: bool) -> None:
        self.name = ""
        self.is_same = True
        self.notes: list[str] = []
        self._wanted = model
        self._force = force
        self._loaded: dict[Load, ReplayedModel] = {}

    def get(self, settings: Settings, recorded: ev.EngineLoaded) -> "ReplayedModel":
        """The model of an engine that was recorded, loaded as it was. Raises as ``replay_tokens`` does."""
        load = self._load(settings, recorded.capabilities)
        if load not in self._loaded:
            from gptoss.engine.replayed import ReplayedModel  # noqa: PLC0415 - imports torch, which takes its seconds

            model = self._loaded[load] = ReplayedModel(load, no_progress)
            self.name = load.folder
            self._check(model.fingerprint, recorded.fingerprint)
        return self._loaded[load]

    def _load(self, settings: Settings, recorded: EngineCapabilities) -> Load:
        here = load_settings().settings
        dtype = recorded.dtype if recorded.dtype in {"bfloat16", "float32"} else "auto"
        prepared = prepare_in_child(
            self._wanted or settings.model, cache_dir=here.cache_path, dtype=settings.dtype, progress=no_progress
        )
        return Load(
            folder=prepared.folder,
            model_name=recorded.model_name,
            device=recorded.device,
            dtype=msgspec.convert(dtype, Load.__annotations__["dtype"]),
            max_batch_size=recorded.max_batch_size,
            max_model_len=recorded.max_model_len,
            kv_budget_bytes=recorded.kv_budget_bytes,
            prefix_cache_bytes=recorded.prefix_cache_bytes or -1,
            speculation=settings.speculation,
            kernels="torch" if settings.kernels == "torch" else "auto",
            quantization=settings.quantization,
            kv_layout="paged" if recorded.kv_pages else "slots",
            cache_folder=str(here.cache_path),
            num_threads=recorded.num_threads,
            summation=_summation(recorded),
        )

    def _check(self, here: ModelFingerprint, recorded: ModelFingerprint) -> None:
        names = ("weights", "tokenizer", "chat_template")
        other = [name for name in names if getattr(here, name) != getattr(recorded, name)]
        if not other:
            return
        self.is_same = False
        what = " and ".join(name.replace("_", " ") for name in other)
        if not self._force:
            raise ConfigError(
                f"{Path(self.name).name} is not the recorded model: its {what} differ; name the recorded one with "
                "--model, or run this one with --force"
            )
        self.notes.append(f"this is not the recorded model: its {what} differ")


def _summation(engine: EngineCapabilities) -> Summation:
    """Before the order of summing was written down there was one."""
    return "blocks" if engine.summation == "auto" else engine.summation


def _differences(recorded: EngineCapabilities, here: EngineCapabilities) -> Iterator[str]:
    """How this engine is not like the recorded one, in ways that may change bits."""
    ways: dict[str, Callable[[EngineCapabilities], object]] = {
        "device": lambda each: each.device,
        "dtype": lambda each: each.dtype,
        "threads": lambda each: each.num_threads,
        "order of summing": _summation,
        "layout of KV memory": lambda each: each.kv_layout,
        "kernels whose bits do not depend on the cut": lambda each: bool(each.limits and each.limits.is_row_invariant),
    }
    for what, of in ways.items():
        if of(recorded) != of(here):
            yield f"{what}: recorded {of(recorded)}, here {of(here)}"
