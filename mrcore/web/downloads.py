"""Output of jobs as downloads: fetched from the nodes part by part and checked, as fast as the browser takes it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import TimeoutError as Late
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from mrcore.settings.config import Settings
from mrcore.state import manifest, outputs
from mrcore.wire.tls import master_pki

MAX_DOWNLOADS = 4  # at a time
QUEUED_CHUNKS = 8  # between the node's connection and the browser's
STALL_SECONDS = 60.0  # for the browser to take a chunk
CHUNK_BYTES = 1 << 18


class _Gone(Exception):
    """The browser takes no more."""


class _Chunks(io.RawIOBase):
    """What a thread writes is read by the event loop, which sets the pace."""

    def __init__(self) -> None:
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[bytes | Exception | None](QUEUED_CHUNKS)
        self.gone = threading.Event()

    def write(self, data: Any) -> int:
        """Hand over some bytes."""
        for start in range(0, len(data), CHUNK_BYTES):
            self.put(bytes(data[start : start + CHUNK_BYTES]))
        return len(data)

    def put(self, chunk: bytes | Exception | None) -> None:
        """Hand over some bytes, None at their end, or why there are no more. Raises _Gone."""
        if self.gone.is_set():
            raise _Gone
        waiting = asyncio.run_coroutine_threadsafe(self._queue.put(chunk), self._loop)
        try:
            waiting.result(STALL_SECONDS)
        except Late:
            waiting.cancel()
            raise _Gone from None

    async def get(self) -> bytes | Exception | None:
        """Return what `put` was given."""
        return await self._queue.get()

    def drop(self) -> None:
        """Have the writer end."""
        self.gone.set()
        while not self._queue.empty():  # it may wait for room
            self._queue.get_nowait()


class Downloads:
    """Streams output of jobs."""

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._settings, self._under_way = settings, 0

    async def output(self, request: Request) -> Response:
        """Give a job's whole output as JSON lines, or one part of it."""
        job, part = request.path_params["job"], request.path_params.get("part")
        settings = self._settings()
        parts = await run_in_threadpool(manifest.parts, settings.state_dir, job)
        chosen = [each for each in parts if part in (None, each.name)]
        if not chosen:
            raise HTTPException(404, "this part is none of the job's output; the job's page lists them")
        if self._under_way >= MAX_DOWNLOADS:
            raise HTTPException(503, f"{MAX_DOWNLOADS} downloads are under way: wait for the end of one")
        name = f"{job}.jsonl" if part is None else f"{job}-{part.removesuffix('.gz')}.jsonl"
        keys, chunks = master_pki(settings), _Chunks()

        def read() -> None:
            try:
                for each in chosen:
                    outputs.read_part(settings, keys, job, each, chunks.write)
                chunks.put(None)
            except _Gone:
                pass
            except Exception as error:  # noqa: BLE001  for who waits
                with contextlib.suppress(_Gone):
                    chunks.put(error)

        headers = {"content-disposition": f'attachment; filename="{name}"'}
        return StreamingResponse(self._stream(read, chunks), media_type="application/jsonl", headers=headers)

    async def _stream(self, read: Callable[[], None], chunks: _Chunks) -> AsyncIterator[bytes]:
        self._under_way += 1
        reader = threading.Thread(target=read, name="download", daemon=True)
        reader.start()
        try:
            while (chunk := await chunks.get()) is not None:
                if isinstance(chunk, Exception):
                    raise chunk  # the connection ends before the end of the file, which shows
                yield chunk
        finally:
            self._under_way -= 1
            chunks.drop()
