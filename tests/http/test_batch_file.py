"""The input of a batch: every line is looked at before one runs, and what is wrong is told with its line."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from gptoss.http import batch_file
from gptoss.http.batch_file import Lines

URL = "/v1/chat/completions"


def line(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "custom_id": "a",
        "method": "POST",
        "url": URL,
        "body": {"model": "demo", "messages": []},
        **changes,
    }
    return msgspec.json.encode({name: value for name, value in fields.items() if value is not None})


def lines_of(tmp_path: Path, *lines: bytes, end: bytes = b"\n", longest: int = 1000) -> Lines:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(lines) + end)
    return Lines(path, longest)


def faults(lines: Lines) -> list[tuple[str, int, str]]:
    return [(fault.code, fault.line, fault.param) for fault in lines.index(URL, "demo")]


@pytest.mark.parametrize("end", [b"\n", b"", b"\r\n", b"\n\n"])
def test_items_are_found_again_by_their_number(tmp_path: Path, end: bytes) -> None:
    lines = lines_of(tmp_path, line(custom_id="a"), b"", line(custom_id="ü"), end=end)
    assert faults(lines) == []
    assert [lines.item(index).custom_id for index in range(len(lines))] == ["a", "ü"]
    again = lines_of(tmp_path, line(custom_id="a"), b"", line(custom_id="ü"), end=end)
    again.locate()
    assert [again.item(index).custom_id for index in range(len(again))] == ["a", "ü"]


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"{", "invalid_json_line", ""),
        (b"\xff", "invalid_json_line", ""),
        (b"[" * 500 + b"]" * 500, "invalid_json_line", ""),
        (b"[]", "invalid_request", "body"),
        (line(custom_id=None), "invalid_request", "custom_id"),
        (line(custom_id=7), "invalid_request", "custom_id"),
        (line(custom_id=""), "invalid_request", "custom_id"),
        (line(method="GET"), "invalid_request", "method"),
        (line(body=None), "invalid_request", "body"),
        (line(body=[]), "invalid_request", "body"),
        (line(url="/v1/completions"), "url_mismatch", "url"),
        (line(body={"model": "other"}), "model_not_found", "model"),
        (line(custom_id="first"), "duplicate_custom_id", "custom_id"),
        (line(custom_id="x" * 990), "line_too_long", ""),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: bytes, code: str, param: str) -> None:
    lines = lines_of(tmp_path, line(custom_id="first"), b"", bad, line(custom_id="last"))
    assert faults(lines) == [(code, 3, param)]


def test_faults_quote_nothing_from_the_file(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, line(url="canary"), line(custom_id="canary", method="canary"), b"canary")
    found = lines.index(URL, "demo")
    assert len(found) == 3
    assert not any("canary" in text for fault in found for text in (fault.code, fault.message, fault.param))


@pytest.mark.parametrize("content", [(), (b"", b"  ")])
def test_a_file_without_requests_is_named(tmp_path: Path, content: tuple[bytes, ...]) -> None:
    assert faults(lines_of(tmp_path, *content)) == [("empty_file", 0, "")]


def test_too_many_requests_are_too_many_before_all_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_file, "ITEMS_MAX", 2)
    assert faults(lines_of(tmp_path, line(), line(custom_id="b"))) == []
    assert faults(lines_of(tmp_path, line(), line(custom_id="b"), b"{")) == [("too_many_tasks", 0, "")]


def test_faults_are_bounded(tmp_path: Path) -> None:
    assert len(faults(lines_of(tmp_path, *[b"{"] * 300))) == batch_file.FAULTS_MAX
