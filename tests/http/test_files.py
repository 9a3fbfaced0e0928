"""``/v1/files`` as OpenAI's client sees it, and forms that are none."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import FormData

from gptoss.config import Settings
from gptoss.errors import BodyTooLarge, FileUnknown
from gptoss.http.file_store import FileNote, FileStore

MIB = 2**20


@pytest.fixture
def settings() -> Settings:
    return Settings(file_limit_mb=1, files_limit_mb=2)


@pytest.fixture
async def client(house: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


async def test_a_file_comes_and_goes(client: openai.AsyncOpenAI) -> None:
    made = await client.files.create(file=("in.jsonl", b"{}\n\xff"), purpose="batch")
    assert (made.filename, made.purpose, made.bytes, made.object) == ("in.jsonl", "batch", 4, "file")
    assert await client.files.retrieve(made.id) == made
    assert [each.id async for each in client.files.list()] == [made.id]
    assert [each.id async for each in client.files.list(purpose="batch_output")] == []
    assert (await client.files.content(made.id)).content == b"{}\n\xff"
    assert (await client.files.delete(made.id)).deleted
    for call in (client.files.retrieve(made.id), client.files.delete(made.id), client.files.content(made.id)):
        with pytest.raises(openai.NotFoundError) as missing:
            await call
        assert missing.value.code == "file_not_found"


async def test_lists_come_in_pages_newest_first(client: openai.AsyncOpenAI) -> None:
    made = [(await client.files.create(file=(f"{n}", b"x"), purpose="batch")).id for n in range(3)]
    page = await client.files.list(limit=2)
    assert ([each.id for each in page.data], page.has_more) == ([made[2], made[1]], True)
    rest = await client.files.list(limit=2, after=page.data[-1].id)
    assert ([each.id for each in rest.data], rest.has_more) == ([made[0]], False)
    assert [each.id for each in (await client.files.list(order="asc")).data] == made


async def test_what_is_too_large_is_refused_and_leaves_nothing(house: Any, client: openai.AsyncOpenAI) -> None:
    async def fails(size: int) -> int:
        with pytest.raises(openai.APIStatusError) as refused:
            await client.files.create(file=("in", b"x" * size), purpose="batch")
        return refused.value.status_code

    assert await fails(MIB + 1) == 413
    assert await fails(5 * MIB) == 413
    for _ in range(2):
        await client.files.create(file=("in", b"x" * MIB), purpose="batch")
    assert await fails(1) == 413
    await house.canary()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "batch"}, "file"),
        ({"file": b"x"}, "purpose"),
        ({"file": b"x", "purpose": "fine-tune"}, "purpose"),
        ({"file": b"x", "purpose": "p" * 2000}, "purpose"),
        ({"file": b"x", "purpose": b"\xff"}, "body"),
        ({"file": b"x", "purpose": "batch", "expires_after[seconds]": "9"}, "expires_after[seconds]"),
    ],
)
async def test_a_form_that_cannot_be_honoured(house: Any, fields: dict[str, Any], param: str) -> None:
    form = FormData()
    for name, value in fields.items():
        form.add_field(
            name, value, filename="in" if isinstance(value, bytes) else None, content_type="application/octet-stream"
        )
    async with house.session.post("/v1/files", data=form) as response:
        body = await response.json()
        assert (response.status, body["error"]["param"]) == (400, param), body


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("application/json", b"{}", 415),
        ("multipart/form-data", b"", 400),
        ("multipart/form-data; boundary=x", b"", 400),
        ("multipart/form-data; boundary=x", b"--x\r\n", 400),
        ("multipart/form-data; boundary=x", b"--x\r\n\xff\xff: y\r\n\r\n", 400),
        ("multipart/form-data; boundary=x", b"--y\r\n\r\nz", 400),
        ("multipart/form-data; boundary=" + "x" * 200, b"--x", 400),
        (
            "multipart/form-data; boundary=x",
            b"--x\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n--y\r\n\r\n--y--\r\n--x--\r\n",
            400,
        ),
    ],
)
async def test_bytes_that_are_no_form(house: Any, kind: str, body: bytes, status: int) -> None:
    async with house.session.post("/v1/files", data=body, headers={"Content-Type": kind}) as response:
        assert response.status == status, await response.text()
        assert "error" in await response.json()
    await house.canary()


async def test_an_upload_that_stops_is_not_waited_for(house: Any) -> None:
    head = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc'
    reader, writer = await house.raw(head + b"Content-Length: 1000\r\n\r\n" + part)
    async with asyncio.timeout(5):
        assert b" 408 " in await reader.readline()
    writer.close()


def test_files_survive_a_restart_and_half_of_one_does_not(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "files", file_bytes_max=100, total_bytes_max=100)
    store.load()
    note = FileNote(id="file-00000001", bytes=3, created_at=1, filename="../../x", purpose="batch")
    with store.part(note.id) as part:
        part.write(b"abc")
        store.keep(note, part)
    (tmp_path / "files" / "file-00000002.part").write_bytes(b"half")
    again = FileStore(tmp_path / "files", file_bytes_max=100, total_bytes_max=100)
    again.load()
    assert again.notes == [note]
    assert again.path(note.id).read_bytes() == b"abc"
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["file-00000001", "file-00000001.json"]
    with pytest.raises(BodyTooLarge):
        again.check_room(98)
    with pytest.raises(FileUnknown):
        again.path("../node.key")


def test_what_stands_behind_the_truth_is_cut_and_written_over(tmp_path: Path) -> None:
    store = FileStore(tmp_path, file_bytes_max=100, total_bytes_max=100)
    name = "file-00000001"
    assert store.extend(name, 0, b"one\n") == 4
    assert store.extend(name, 4, b"two\n") == 8
    store.cut(name, 4)
    assert store.path(name).read_bytes() == b"one\n"
    assert store.extend(name, 4, b"x\n") == 6
    assert store.path(name).read_bytes() == b"one\nx\n"
    with pytest.raises(OSError, match="shorter"):
        store.extend(name, 7, b"y")
