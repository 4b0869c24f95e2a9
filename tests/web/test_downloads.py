"""Output as a download: all of it, at the browser's pace, bounded, and ended with its reader."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from conditions import wait_until
from dashboards import settings_of
from starlette.exceptions import HTTPException
from starlette.requests import Request

from mrcore.errors import Refused
from mrcore.messages.tasks import PlacedPart
from mrcore.web import downloads
from mrcore.web.downloads import Downloads

PARTS = [
    PlacedPart(
        name=f"part-000001-00000-{number:05}.data.gz", partition=0, records=1, bytes=1, text_bytes=1, batch_bytes=1,
        max_decoded=1, crc32=0, node="node-0",
    )
    for number in range(3)
]  # fmt: skip
Write = Callable[[bytes], object]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str, Write], None]], Downloads]:
    """Makes downloads of a job whose parts `read` writes."""
    settings = settings_of(tmp_path)

    def make(read: Callable[[str, Write], None]) -> Downloads:
        monkeypatch.setattr(downloads.manifest, "parts", lambda *_: PARTS)
        monkeypatch.setattr(downloads.outputs, "read_part", lambda *given: read(given[3].name, given[4]))
        return Downloads(lambda: settings)

    return make


async def body(of: Downloads, part: str | None = None) -> AsyncIterator[bytes]:
    path_params = {"job": "a"} | ({} if part is None else {"part": part})
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "path_params": path_params}
    response: Any = await of.output(Request(scope))
    iterator: AsyncIterator[bytes] = response.body_iterator
    return iterator


def readers() -> int:
    return sum(thread.name == "download" for thread in threading.enumerate())


@pytest.mark.parametrize("part", [None, PARTS[1].name])
def test_every_byte_arrives_in_order_however_slow_the_browser_is(served: Any, part: str | None) -> None:
    rng = random.Random(7)
    texts = {each.name: rng.randbytes(3 << 20) for each in PARTS}

    def read(name: str, write: Write) -> None:
        for start in range(0, 3 << 20, 100_000):
            write(texts[name][start : start + 100_000])

    async def collect() -> bytes:
        found = b""
        async for chunk in await body(served(read), part):
            found += chunk
            await asyncio.sleep(0.001)
        return found

    wanted = b"".join(text for name, text in texts.items() if part in (None, name))
    assert asyncio.run(collect()) == wanted


def test_no_more_is_read_than_the_browser_takes(served: Any) -> None:
    written = [0]

    def read(name: str, write: Write) -> None:
        for _ in range(1_000):
            write(b"x" * downloads.CHUNK_BYTES)
            written[0] += 1

    async def take_two() -> None:
        stream = await body(served(read))
        await anext(stream)
        await anext(stream)
        await asyncio.to_thread(wait_until, lambda: written[0] >= downloads.QUEUED_CHUNKS + 2, 10)
        await asyncio.sleep(0.05)
        assert written[0] <= downloads.QUEUED_CHUNKS + 3
        await stream.aclose()  # type: ignore[attr-defined]
        await asyncio.to_thread(wait_until, lambda: not readers(), 10, "the reader ends with the browser")

    asyncio.run(take_two())


def test_what_is_damaged_ends_the_download_before_its_end(served: Any) -> None:
    def read(name: str, write: Write) -> None:
        write(b"good")
        raise Refused("part is damaged")

    async def collect() -> None:
        async for _ in await body(served(read)):
            pass

    with pytest.raises(Refused, match="damaged"):
        asyncio.run(collect())


def test_there_are_so_many_at_a_time(served: Any) -> None:
    async def many() -> None:
        shared = served(lambda name, write: [write(b"x" * downloads.CHUNK_BYTES) for _ in range(100)] and None)
        streams = [await body(shared) for _ in range(downloads.MAX_DOWNLOADS)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(HTTPException, match="503"):
            await body(shared)
        await streams[0].aclose()  # type: ignore[attr-defined]
        await anext(await body(shared))
        for stream in streams[1:]:
            await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(many())


def test_a_part_of_another_job_is_none(served: Any) -> None:
    with pytest.raises(HTTPException, match="404"):
        asyncio.run(body(served(lambda name, write: None), "part-000009-00000-00000.data"))
