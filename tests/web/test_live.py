"""What is live on a page: one look a second for all viewers, what changed and no more, and an end with the last one."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from conditions import wait_until
from dashboards import Dashboard, add_runs, dashboard, fill, progress, settings_of

from mrcore.queue.scheduler import Scheduler
from mrcore.state.store import Store
from mrcore.web import live
from mrcore.web.live import Live, Look


class Viewer:
    """A browser's connection that reads events in a thread: `elements` by id, as they came last."""

    def __init__(self, shown: Dashboard, path: str = "/live") -> None:
        place = urllib.parse.urlsplit(shown.url)
        self._connection = http.client.HTTPConnection(place.hostname or "", place.port or 0, timeout=60)
        self._connection.request("GET", path, headers={"authorization": f"Bearer {shown.token}"})
        response = self._connection.getresponse()
        self.status, self.kind = response.status, response.headers["content-type"]
        self.elements: dict[str, str] = {}
        self.events = 0
        self._response = response
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, AttributeError):
            while line := self._response.readline():
                if line.startswith(b"data: "):
                    html = json.loads(line[6:])
                    self.events += 1
                    self.elements[html.split('id="')[1].split('"')[0]] = html

    def close(self) -> None:
        if self._connection.sock:
            self._connection.sock.shutdown(2)
        elif self._response.fp:
            self._response.fp.raw._sock.shutdown(2)  # type: ignore[attr-defined]
        self._thread.join(30)
        self._connection.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[Store]:
    store = fill(settings_of(folder))
    yield store
    store.close()


@pytest.fixture(scope="module")
def shown(folder: Path, store: Store) -> Iterator[Dashboard]:
    with dashboard(folder) as running:
        yield running


def test_what_changes_is_sent_and_nothing_else(shown: Dashboard, store: Store) -> None:
    store.set_progress(progress(1, 0.5))
    with contextlib.closing(Viewer(shown)) as viewer:
        assert (viewer.status, viewer.kind) == (200, "text/event-stream; charset=utf-8")
        wait_until(lambda: len(viewer.elements) == 4, 30, "all four sections came")
        assert "35 %" in viewer.elements["running"] and "sessions" in viewer.elements["waiting"]
        before = viewer.events
        waiting = viewer.elements["waiting"]
        store.set_progress(progress(1, 0.6, status="<i>now</i>"))
        wait_until(lambda: "42 %" in viewer.elements["running"], 30, "the run has moved")
        assert "&lt;i&gt;now" in viewer.elements["running"]
        assert viewer.events == before + 1 and viewer.elements["waiting"] is waiting
        store.put("paused", True)
        wait_until(lambda: "paused" in viewer.elements["status"], 30, "the pause is shown")
        store.put("paused", False)
        wait_until(lambda: "paused" not in viewer.elements["status"], 30, "its end is shown")


def test_a_jobs_page_gets_its_own_run_only(shown: Dashboard, store: Store) -> None:
    store.set_progress(progress(1, 0.5))
    with (
        contextlib.closing(Viewer(shown, "/live?job=clicks_per_user")) as its,
        contextlib.closing(Viewer(shown, "/live?job=sessions")) as anothers,
    ):
        wait_until(lambda: its.elements and anothers.elements, 30, "both got something")
        assert [*its.elements] == [*anothers.elements] == ["running", "runs"]
        assert "35 %" in its.elements["running"] and "clicks_per_user" not in str(anothers.elements)


def test_there_is_room_for_so_many_viewers(shown: Dashboard) -> None:
    """And each that goes makes room for the next."""
    with contextlib.ExitStack() as stack:
        viewers = [stack.enter_context(contextlib.closing(Viewer(shown))) for _ in range(live.MAX_VIEWERS)]
        wait_until(lambda: all(viewer.elements for viewer in viewers), 60, "all get something")
        refused = shown.ask("/live")
        assert refused.status == 503 and "20 pages are live already" in refused.text
        assert shown.ask("/").status == 200, "pages without their stream are still served"
        viewers[0].close()
        stack.enter_context(contextlib.closing(wait_until(lambda: admitted(shown), 60, "another one is let in")))


def admitted(shown: Dashboard) -> Viewer | None:
    viewer = Viewer(shown)
    if viewer.status == 200:
        return viewer
    viewer.close()
    return None


def test_it_is_looked_once_for_all_and_not_without_viewers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost by counts: of looks and of renderings, whatever the number of viewers."""
    monkeypatch.setattr(live, "LOOK_SECONDS", 0.01)
    looks, renderings = [0], [0]

    def look(before: Look | None) -> Look:
        looks[0] += 1
        return object.__new__(Look)

    def render(now: Look, job: str) -> dict[str, str]:
        renderings[0] += 1
        return {"running": f'<p id="running">{looks[0]}</p>'}

    async def view(together: Live, events: int) -> None:
        together.viewers += 1
        stream = together.events("")
        for _ in range(events + 1):
            await anext(stream)
        together.viewers -= 1
        await stream.aclose()  # type: ignore[attr-defined]

    async def watch() -> int:
        together = Live(look, render)
        await asyncio.gather(*(view(together, 20) for _ in range(20)))
        while together._task:
            await asyncio.sleep(0)
        after = looks[0]
        await asyncio.sleep(0.1)
        assert looks[0] == after, "nobody looks any more"
        await view(together, 3)
        return after

    after = asyncio.run(watch())
    assert 20 <= after <= 25
    assert renderings[0] <= looks[0]


def test_jobs_are_looked_at_again_when_something_has_happened(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    fill(settings).close()
    scheduler = Scheduler(settings)
    store = scheduler.store
    first = Look(scheduler)
    second = Look(scheduler, first)
    assert second.jobs is first.jobs and second.whole == first.whole
    for change in (
        lambda: store.put("paused", True),
        lambda: store.move_job("sessions", "out", "deleted", time.time(), "deleted"),
        lambda: store.enter_phase("clicks_per_user", 1, "MAP", time.time()),
        lambda: store.end_run("clicks_per_user", 1, "succeeded", time.time()),
    ):
        before = Look(scheduler, second)
        change()
        second = Look(scheduler, before)
        assert second.jobs is not before.jobs
    assert second.progress is None
    second.whole -= live.WHOLE_LOOK_SECONDS
    assert Look(scheduler, second).jobs is not second.jobs
    store.close()


@pytest.mark.slow
def test_a_viewer_of_96_servers_costs_less_than_a_hundredth_of_a_core(tmp_path: Path) -> None:
    """Three times that, since other tests run beside it; bench/dashboard.py measures."""
    store = fill(settings_of(tmp_path, 32), 10_000)
    with dashboard(tmp_path) as shown, contextlib.closing(Viewer(shown)) as viewer:
        wait_until(lambda: viewer.elements, 30, "it is live")
        before, events, begun = shown.cpu_seconds(), viewer.events, time.monotonic()
        for number in range(1_000):
            store.set_progress(progress(1, 0.2 + number / 1_000, 96))
            here = viewer.events
            wait_until(lambda here=here: viewer.events > here, 30, "it came")
            if time.monotonic() > begun + 20:
                break
        looks = viewer.events - events
        assert (shown.cpu_seconds() - before) / looks < 0.03, "seconds of a core for each look"
        assert "S_95" in viewer.elements["running"]
    store.close()


@pytest.mark.slow
def test_a_long_history_makes_no_look_dearer(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    scheduler = Scheduler(settings)
    add_runs(scheduler.store, 20_000)

    def seconds() -> float:
        begun = time.process_time()
        Look(scheduler)
        return time.process_time() - begun

    assert min(seconds() for _ in range(5)) < 0.02
    scheduler.store.close()
