"""What changes while somebody looks: one look at the queue a second for all viewers, sent as server-sent events.

An event is one element of a page, rendered here, that takes the place of the one with its id (`static/live.js`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from mrcore.errors import MrcoreError
from mrcore.queue.scheduler import Scheduler

MAX_VIEWERS = 20
LOOK_SECONDS = 1.0
WHOLE_LOOK_SECONDS = 10.0  # times in "in 5 min" move also when nothing happens
PING_SECONDS = 15.0  # so that a connection that is gone is noticed
VIEW_SECONDS = 3_600.0  # of one connection; the browser makes the next one by itself

log = logging.getLogger(__name__)


class Look:
    """What all viewers see of the queue at a moment. Jobs are looked at again when something has happened to one."""

    def __init__(self, scheduler: Scheduler, before: Look | None = None) -> None:
        self.time = time.time()
        self.progress = scheduler.progress()
        self.key = _key(scheduler)
        old = before if before and before.key == self.key and self.time < before.whole + WHOLE_LOOK_SECONDS else None
        self.whole: float = old.whole if old else self.time
        self.state: dict[str, Any] = old.state if old else scheduler.state()
        self.jobs: list[dict[str, Any]] = old.jobs if old else scheduler.queue()
        self.fallen: list[dict[str, Any]] = old.fallen if old else scheduler.fallen()


def _key(scheduler: Scheduler) -> tuple[Any, ...]:
    """Return what is another one when jobs, runs, hold, pause or cycle have changed; cheap, whatever waits."""
    store = scheduler.store
    running = store.running()
    phases = (running.job_name, running.run, *running.phases) if running else ()
    return store.last_event(), store.get("paused"), store.get("hold"), store.get("cycle"), store.held_by_drain(), phases


class Live:
    """Looks while there are viewers, and has what changed sent to all of them."""

    def __init__(self, look: Callable[[Look | None], Look], render: Callable[[Look, str], dict[str, str]]) -> None:
        """`look` gets the look before; `render` returns elements by id for viewers of a job's page ("": the queue)."""
        self._look, self._render = look, render
        self.viewers = 0
        self._now: Look | None = None
        self._rendered: dict[str, asyncio.Task[dict[str, str]]] = {}  # of that look
        self._next = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def _watch(self) -> None:
        told = ""  # of an error that stays, once
        try:
            while self.viewers:
                try:
                    self._now, self._rendered = await run_in_threadpool(self._look, self._now), {}
                except MrcoreError as error:
                    if error.message != told:
                        log.warning("%s", error.message)
                    told = error.message
                self._wake()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            self._task = self._now = None
            self._wake()  # whoever came meanwhile connects again

    def _wake(self) -> None:
        waited, self._next = self._next, asyncio.Event()
        waited.set()

    async def _elements(self, job: str) -> dict[str, str]:
        if self._now is None:
            return {}
        if job not in self._rendered:
            self._rendered[job] = asyncio.create_task(run_in_threadpool(self._render, self._now, job))
        try:
            return await asyncio.shield(self._rendered[job])  # others may wait for the same
        except MrcoreError:  # the queue cannot be read; the next look says so
            return {}

    async def events(self, job: str) -> AsyncIterator[bytes]:
        """Give what changes for a viewer of a job's page, or of the queue's, in the form of server-sent events."""
        if self._task is None:
            self._task = asyncio.create_task(self._watch())
        sent: dict[str, str] = {}
        until = time.monotonic() + VIEW_SECONDS
        yield b"retry: 2000\n\n"
        quiet_since = time.monotonic()
        while self._task and time.monotonic() < until:
            await self._next.wait()
            fresh = await self._elements(job)
            changed = [html for name, html in fresh.items() if sent.get(name) != html]
            sent = fresh
            if changed:
                yield b"".join(b"data: " + json.dumps(html).encode() + b"\n\n" for html in changed)
            elif time.monotonic() - quiet_since > PING_SECONDS:
                yield b": nothing new\n\n"
            else:
                continue
            quiet_since = time.monotonic()


class LiveResponse(StreamingResponse):
    """The stream of one viewer, or 503 when there are MAX_VIEWERS already."""

    def __init__(self, live: Live, job: str) -> None:
        self._live = live
        super().__init__(live.events(job), media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the viewer has gone."""
        if self._live.viewers >= MAX_VIEWERS:
            text = f"{MAX_VIEWERS} pages are live already: close one, and reload this\n"
            return await PlainTextResponse(text, 503)(scope, receive, send)
        self._live.viewers += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._live.viewers -= 1
        return None
