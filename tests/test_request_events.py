import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from gptoss.clock import SystemClock
from gptoss.errors import GptossError, JournalError, NotReady, RequestNotFound
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.codec import as_json, encode_command
from gptoss.messages.envelope import Event, Origin, Record
from gptoss.messages.sampling import SamplingParams
from gptoss.request_events import find_records, read_folder, read_server, record_from_json
from gptoss.telemetry.segments import SegmentJournal, SegmentOptions
from gptoss.telemetry.timeline import timeline

ROW = ev.CommittedRow(request_id="req_1", attempt=1, tokens=1, prefilled=0)


def _life(journal: SegmentJournal) -> list[Record]:
    """A request's records and its step; another request's step lies between."""

    def request(event: Event) -> Record:
        return journal.append(event, Origin(stream="request/req_1", correlation="req_1", actor="request/req_1"))

    def executor(event: Event, correlation: str = "") -> Record:
        return journal.append(event, Origin(stream="executor/cpu:0", correlation=correlation, actor="executor/cpu:0"))

    kept = [
        request(
            ev.RequestReceived(
                request_id="req_1", endpoint="/v1/completions", model="demo", stream=True, num_messages=0, priority=0,
                deadline_ns=1,
            )
        ),
        request(ev.RequestValidated(sampling=SamplingParams(logit_bias={7: 1.5}))),
        request(ev.CommandConsumed(decider="request", command=encode_command(cmd.CancelRequest(now_ns=3, reason="client")))),
        executor(ev.ExecutorAccepted(request_id="req_1", executor="cpu:0", attempt=1, prompt_tokens=3), "req_1"),
        executor(_step(ROW)),
    ]
    executor(_step(msgspec.structs.replace(ROW, request_id="req_2")))
    kept.append(
        request(ev.RequestFailed(code="engine_lost", message="gone", completion_tokens=1))
        if "completion_tokens" in ev.RequestFailed.__struct_fields__
        else request(msgspec.convert([None] * 0, ev.RequestFailed))
    )
    return kept


def _step(row: ev.CommittedRow) -> ev.StepCommitted:
    return ev.StepCommitted(
        executor="cpu:0", step=1, started_ns=1, duration_ns=2, rows=(row,), waiting=0, running=1, kv_bytes_in_use=5
    )
