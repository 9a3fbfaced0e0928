"""What the log keeps of an engine's step: its plan and its outcome, no tokens and no text."""

from gptoss.engine import port
from gptoss.messages import events as ev


def committed_step(executor: str, step: port.StepDone) -> ev.StepCommitted:
    """The record of a step."""
    return ev.StepCommitted(
        executor=executor,
        step=step.step,
        started_ns=step.started_ns,
        duration_ns=step.duration_ns,
        rows=tuple(map(committed_row, step.rows)),
        waiting=step.waiting,
        running=step.running,
        kv_bytes_in_use=step.kv_bytes_in_use,
        prefix_cache_bytes=step.prefix_cache_bytes,
        submits_taken=step.submits_taken,
        preemptions=step.preemptions,
        starts=step.starts,
        refused=step.refused,
        prefill_tokens_max=step.prefill_tokens_max,
        prefill_ms_per_token=step.prefill_ms_per_token,
        kv_budget_bytes=step.kv_budget_bytes,
    )


def committed_row(row: port.StepRow) -> ev.CommittedRow:
    """What the log keeps of a row: no tokens, no text."""
    return ev.CommittedRow(
        row.request_id,
        row.attempt,
        len(row.token_ids),
        row.prefilled,
        row.start,
        row.num_tokens,
        row.num_logits,
        row.num_draft,
        row.failure,
        row.ended,
    )
