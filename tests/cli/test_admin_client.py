import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gptoss.cli.admin_client import record_from_json
from gptoss.cli.event_source import JournalSource, ServerSource, open_source
from gptoss.clock import SystemClock
from gptoss.config import Settings
from gptoss.errors import GptossError, JournalError, NotReady, RequestNotFound
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.codec import as_json, encode_command
from gptoss.messages.envelope import Event, Origin, Record
from gptoss.messages.sampling import SamplingParams
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
                request_id="req_1",
                endpoint="/v1/completions",
                model="demo",
                stream=True,
                num_messages=0,
                priority=0,
                deadline_ns=1,
            )
        ),
        request(ev.RequestValidated(sampling=SamplingParams(logit_bias={7: 1.5}))),
        request(
            ev.CommandConsumed(decider="request", command=encode_command(cmd.CancelRequest(now_ns=3, reason="client")))
        ),
        executor(ev.ExecutorAccepted(request_id="req_1", executor="cpu:0", attempt=1, prompt_tokens=3), "req_1"),
        executor(_step(ROW)),
    ]
    executor(_step(msgspec.structs.replace(ROW, request_id="req_2")))
    kept.append(request(ev.RequestFailed(code="engine_lost", message="gone", completion_tokens=1)))
    return kept


def _step(row: ev.CommittedRow) -> ev.StepCommitted:
    return ev.StepCommitted(
        executor="cpu:0", step=1, started_ns=1, duration_ns=2, rows=(row,), waiting=0, running=1, kv_bytes_in_use=5
    )


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[SegmentJournal]:
    folder = tmp_path / "journal"
    journal = SegmentJournal.open(folder, node="n", boot="b", clock=SystemClock(), options=SegmentOptions())
    yield journal
    journal.close()


Serve = Callable[[int, bytes], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts an HTTP server that answers everything the same way; returns its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                assert self.path == "/admin/requests/req_1/events"
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base names it so
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_records_survive_the_way_through_json(journal: SegmentJournal) -> None:
    for record in _life(journal):
        assert record_from_json(json.loads(json.dumps(as_json(record)))) == record


def test_a_record_of_an_unknown_type_or_version_is_refused(journal: SegmentJournal) -> None:
    fields = as_json(_life(journal)[0])
    with pytest.raises(JournalError, match="RequestDreamt"):
        record_from_json(fields | {"type": "RequestDreamt"})
    with pytest.raises(JournalError, match="version 9"):
        record_from_json(fields | {"version": 9})
    with pytest.raises(JournalError, match="not a record"):
        record_from_json(fields | {"pos": "first"})


def test_a_folder_gives_the_requests_own_records_and_its_steps(journal: SegmentJournal, tmp_path: Path) -> None:
    kept = _life(journal)
    assert journal.flush()
    found = JournalSource(tmp_path / "journal").records("req_1")
    assert found == kept
    decode = timeline(found, "req_1").decode
    assert decode is not None
    assert decode.tokens == 1


def test_a_request_that_the_folder_does_not_know_is_said_so(journal: SegmentJournal, tmp_path: Path) -> None:
    assert journal.flush()
    with pytest.raises(RequestNotFound, match="knows no request req_9"):
        JournalSource(tmp_path / "journal").records("req_9")


def test_a_server_gives_the_same_records(journal: SegmentJournal, serve: Serve) -> None:
    kept = _life(journal)
    body = {"request_id": "req_1", "events": [as_json(record) for record in kept]}
    source = ServerSource(serve(200, json.dumps(body).encode()))
    assert source.records("req_1") == kept
    assert source.name == f"the server at {source.url}"


def test_a_request_that_the_server_does_not_know_is_said_so(serve: Serve) -> None:
    url = serve(404, b'{"error": {"message": "no such request", "code": "request_not_found"}}')
    with pytest.raises(RequestNotFound, match="knows no request req_1"):
        ServerSource(url).records("req_1")


def test_a_servers_refusal_is_passed_on(serve: Serve) -> None:
    url = serve(503, b'{"error": {"message": "too many follow", "code": "overloaded"}}')
    with pytest.raises(GptossError, match="refuses: too many follow"):
        ServerSource(url).records("req_1")


@pytest.mark.parametrize(
    ("status", "body"), [(404, b"<html>Not Found</html>"), (200, b"[]"), (200, b"\xff"), (500, b'{"error": null}')]
)
def test_another_program_on_the_port_is_not_taken_for_a_server(serve: Serve, status: int, body: bytes) -> None:
    with pytest.raises(GptossError, match="is it a gptoss server"):
        ServerSource(serve(status, body)).records("req_1")


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_without_a_server_the_folder_is_read(journal: SegmentJournal, tmp_path: Path) -> None:
    kept = _life(journal)
    assert journal.flush()
    source = open_source(None, None, Settings(port=unused_port(), data_dir=str(tmp_path)))
    assert source.records("req_1") == kept
    assert source.name == f"the journal in {tmp_path}/journal"


def test_with_neither_server_nor_folder_both_are_named(tmp_path: Path) -> None:
    settings = Settings(port=unused_port(), data_dir=str(tmp_path / "none"))
    with pytest.raises(NotReady, match=r"no server answers at http://127\.0\.0\.1:\d+ and there is no journal in"):
        open_source(None, None, settings)


def test_only_http_addresses_are_opened() -> None:
    with pytest.raises(GptossError, match="must begin with http://"):
        ServerSource("file:///etc/passwd").records("req_1")
