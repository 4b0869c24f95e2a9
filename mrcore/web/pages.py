"""The pages: what each asks of the queue, its files and the nodes, and which template shows it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from mrcore.admin import doctor, findings
from mrcore.errors import MrcoreError
from mrcore.launchers import launcher_of, local
from mrcore.launchers.launcher import lines_of_run
from mrcore.queue.job import template
from mrcore.queue.scheduler import Scheduler
from mrcore.queue.scripts import log_of
from mrcore.settings.config import Settings
from mrcore.state import manifest, profiles
from mrcore.state.progress import RunDetail
from mrcore.state.store import ENDINGS, RunRow
from mrcore.system.logs import last_lines
from mrcore.web import downloads, views
from mrcore.web.health import NodeWatch
from mrcore.web.live import Look

PAGE_RUNS = 100
MAX_PAGE = 1_000
JOB_RUNS, JOB_EVENTS, CHART_RUNS = 20, 50, 100
MAX_JOBS_SHOWN, MAX_FALLEN_SHOWN = 500, 50
LOG_LINES = 200
ASK_SECONDS = 2.0  # of a daemon, for the page of nodes: each of: to connect, to answer
TURN_SECONDS = 5.0  # for others' questions to nodes to be answered: who waits keeps a thread from other pages
DOCTOR_SECONDS = 30.0  # how old what he found may be
PROFILE_HEADERS = {
    # What a profile's SVG holds runs nothing, and loads nothing.
    "content-security-policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'",
}

T = TypeVar("T")


@contextlib.contextmanager
def _turn(lock: threading.Lock) -> Iterator[None]:
    """Hold a lock that others hold while nodes are asked for them. Raises HTTPException after TURN_SECONDS."""
    if not lock.acquire(timeout=TURN_SECONDS):
        raise HTTPException(503, "this is being asked for another page, and some node is slow: load it again later")
    try:
        yield
    finally:
        lock.release()


class Kept:
    """Answers that cost something, kept for some seconds; who asks meanwhile waits for the same one, in `_turn`."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._lock = seconds, threading.Lock()
        self._made: tuple[float, Any] | None = None

    def get(self, make: Callable[[], T]) -> tuple[float, T]:
        """Return when the answer was made, and the answer."""
        with _turn(self._lock):
            if self._made is None or time.time() - self._made[0] > self._seconds:
                self._made = (time.time(), make())
            return self._made


class Pages:
    """Every page of one dashboard."""

    def __init__(self, settings: Callable[[], Settings], scheduler: Scheduler, shown: views.Templates) -> None:
        self._settings, self._scheduler, self._shown = settings, scheduler, shown
        self._store = scheduler.store
        self._reading = threading.Lock()
        self._watch, self._examined = NodeWatch(ASK_SECONDS), Kept(DOCTOR_SECONDS)
        self.output = downloads.Downloads(settings).output

    # --- the queue, live ---

    def elements(self, look: Look, job: str) -> dict[str, str]:
        """Return what is live on a job's page (""; of the queue): elements by their id."""
        values = self._values(look, job) | (self._runs(job) if job else {})
        names = ("running", "runs") if job else ("status", "running", "waiting", "fallen")
        return {name: self._shown.part(f"{name}.html", **values) for name in names}

    def queue(self, request: Request) -> Response:
        """Show what runs, what waits and why, and what left by a failure."""
        return self._shown.page("queue.html", here="queue", **self._values(Look(self._scheduler)))

    def _values(self, look: Look, only: str = "") -> dict[str, Any]:
        """Return what sections of the queue show; `only`: of all runs that of this job."""
        progress, running = look.progress, look.state["running"]
        if only:
            progress = progress if progress and progress.job_name == only else None
            running = running if running and running["job_name"] == only else None
        return {
            "only": only,
            "state": look.state | {"running": running},
            "jobs": look.jobs[:MAX_JOBS_SHOWN],
            "more_jobs": max(0, len(look.jobs) - MAX_JOBS_SHOWN),
            "fallen": look.fallen[:MAX_FALLEN_SHOWN],
            "more_fallen": max(0, len(look.fallen) - MAX_FALLEN_SHOWN),
            "progress": progress,
            "spans": views.spans(progress.phases, progress.updated) if progress else [],
            "spoken": views.spoken(progress),
            "now": look.time,
        }

    def _runs(self, job: str) -> dict[str, Any]:
        rows = self._store.runs(job, JOB_RUNS)
        return {"name": job, "runs": rows, "count": len(self._store.run_numbers(job))} | self._chart(job)

    # --- what has been ---

    def history(self, request: Request) -> Response:
        """Show a page of the runs, filtered by a part of the job's name and by state."""
        text, state = request.query_params.get("job", "")[:100], request.query_params.get("state", "")
        state = state if state in (*ENDINGS, "running") else ""
        page = _number(request.query_params.get("page", "1"), MAX_PAGE)
        rows, count = self._store.page_of_runs(text, state, PAGE_RUNS, PAGE_RUNS * (page - 1))
        exact = bool(rows) and all(row.job_name == rows[0].job_name for row in rows)
        name = rows[0].job_name if exact else ""
        return self._shown.page(
            "history.html", here="history", rows=rows, count=count, page=page, pages=-(-count // PAGE_RUNS),
            text=text, state=state, states=ENDINGS, name=name, **self._chart(name),
        )  # fmt: skip

    def _chart(self, job: str) -> dict[str, Any]:
        """Return a chart of a job's last runs, None for fewer than two, and the seconds of the longest."""
        bars = views.run_times(self._store.run_times(job, CHART_RUNS)) if job else []
        if len(bars) < 2:
            return {"chart": None, "longest": 0}
        label = f"seconds of the last {len(bars)} runs of {job}"
        return {"chart": views.columns(bars, label), "longest": max(bar.height for bar in bars)}

    def job(self, request: Request) -> Response:
        """Show a job: its keys, where it is, its runs and its output."""
        name = request.path_params["job"]
        row = self._store.job(name)
        runs = self._runs(name)
        if row is None and not runs["runs"]:
            raise HTTPException(404, f"no job {views.line(name)} is known")
        spec = row.spec if row else {}
        defaults = template(row.job_type) if row else {}
        given = {key: value for key, value in spec.items() if value != defaults.get(key, "")}
        return self._shown.page(
            "job.html", here="", row=row, spec=spec, given=given,
            usual={key: value for key, value in spec.items() if key not in given},
            why=self._scheduler.why(name) if row else None, estimate=self._scheduler.estimate_next_runtime(name),
            events=self._store.events(name, JOB_EVENTS), **runs, **self._values(Look(self._scheduler), name),
            **self._output(name),
        )  # fmt: skip

    def _output(self, job: str) -> dict[str, Any]:
        """Return the parts of a job's output as a page has them, and why there are none."""
        with contextlib.suppress(MrcoreError):
            parts = manifest.parts(self._settings().state_dir, job)
            return {"parts": parts[:PAGE_RUNS], "more_parts": max(0, len(parts) - PAGE_RUNS),
                    "output_bytes": sum(part.text_bytes for part in parts)}  # fmt: skip
        return {"parts": [], "more_parts": 0, "output_bytes": 0}

    def run(self, request: Request) -> Response:
        """Show a run: phases, servers, slowest tasks, counters, skew, its error and its log."""
        name, run = request.path_params["job"], int(request.path_params["run"])
        row = self._store.run(name, run)
        if row is None:
            raise HTTPException(404, f"the history has no run {run} of {views.line(name)}")
        detail = self._store.detail(name, run) or RunDetail()
        phases = detail.phases or row.plain_phases()
        return self._shown.page(
            "run.html", here="", row=row, detail=detail, spans=views.spans(phases, row.ended),
            servers=views.by_phase(detail.servers), traceback=_traceback(row.exception), now=time.time(),
            log=self._log(row) if self._settings().local or "log" in request.query_params else None,
            profile=self._profile(name, run).is_file(),
        )  # fmt: skip

    def _log(self, row: RunRow) -> str:
        """Return the last lines that a run printed: its script, or its tasks on all nodes, in order of their times."""
        settings = self._settings()
        if row.job_type != "mapreduce":
            file = log_of(settings, row.job_name, row.run)
            return last_lines(file, LOG_LINES).decode(errors="backslashreplace") if file.is_file() else ""
        with _turn(self._reading):  # each look may open a connection to every node
            found, errors = lines_of_run(launcher_of(settings), settings, row.job_name, row.run, LOG_LINES)
        untold = "".join(f"{node}: {error.message}\n" for node, error in errors.items())
        return untold + b"".join(found).decode(errors="backslashreplace").rstrip("\n")

    def _profile(self, job: str, run: int) -> Path:
        """Return where the flame graph of a run is, if it has one."""
        return profiles.path(self._settings().state_dir, job, run, profiles.FLAME_GRAPH)

    def profile(self, request: Request) -> Response:
        """Give the flame graph of a run."""
        try:
            content = self._profile(request.path_params["job"], int(request.path_params["run"])).read_bytes()
        except OSError:
            raise HTTPException(404, "this run has no flame graph: `profile: true` in the job makes one") from None
        return Response(content, media_type="image/svg+xml", headers=PROFILE_HEADERS)

    # --- the machines ---

    def nodes(self, request: Request) -> Response:
        """Show nodes and cluster servers."""
        settings, progress = self._settings(), self._scheduler.progress()
        seen, answers = None, dict[tuple[str, str], dict[str, Any]]()
        if not settings.local or local.is_started(settings):  # else it is not started
            seen = self._watch.look(settings, TURN_SECONDS)
            if not seen.time:
                raise HTTPException(503, "nodes are being asked, and some are slow: load this page again later")
            answers = {who: _plain(answer) for who, answer in seen.answers.items()}
        busy = {server.server: server for server in progress.servers} if progress else {}
        return self._shown.page(
            "nodes.html", here="nodes", at=seen.time if seen else time.time(), answers=answers, busy=busy,
            nodes=settings.nodes, servers=settings.servers(), progress=progress,
        )  # fmt: skip

    def doctor(self, request: Request) -> Response:
        """Show what the doctor found last, or finds when somebody asks for it."""
        at: float | None = None
        found: Sequence[Any] | None = None
        if "run" in request.query_params:
            at, found = self._examined.get(lambda: doctor.judge(doctor.gather(self._settings())))
        elif kept := findings.last(self._settings()):
            at, found = kept.time, kept.findings
        return self._shown.page("doctor.html", here="doctor", findings=found, at=at)


def _plain(answer: Any) -> dict[str, Any]:
    """Return a daemon's answer for a template, or its "error"."""
    plain: dict[str, Any] = (
        {"error": answer.message} if isinstance(answer, MrcoreError) else msgspec.to_builtins(answer)
    )
    return plain


def _number(text: str, most: int) -> int:
    return min(most, max(1, int(text))) if text.isascii() and text.isdecimal() and len(text) < 10 else 1


def _traceback(exception: dict[str, Any] | None) -> str:
    details = (exception or {}).get("details") or {}
    frames = details.get("traceback") or details.get("internal_traceback") or ""
    return frames if isinstance(frames, str) else "".join(map(str, frames))
