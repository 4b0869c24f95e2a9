"""The durable queue: jobs, their runs and what happened to them, as rows of `database`.

States move along `JOB_MOVES` and `RUN_MOVES` and no other way: an illegal move raises with the job's history and
changes nothing. What a move means for other jobs is decided in `queue`.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from mrcore.errors import MrcoreError
from mrcore.messages.kinds import convert, decode
from mrcore.state.database import Database, open_to_read
from mrcore.state.progress import Phase, Progress, RunDetail
from mrcore.system import procfs
from mrcore.text import one_line, plain

T = TypeVar("T")
EVENTS_PER_RUN = 10

# held: its last run was handed back and the queue waits for the cluster; out: in the history, with the reason.
JOB_MOVES = {
    (None, "queued"),  # submitted
    ("queued", "queued"),  # replaced
    ("queued", "held"),
    ("held", "queued"),
    ("queued", "out"),
    ("held", "out"),
    ("out", "queued"),  # submitted again, or requeued
    ("out", "out"),  # deleted after it had left by a failure
}
# Why a job is out of the queue or waits in it, for programs; `reason` explains it to people. In the queue: failed, and
# runs again by itself; group failed, and skipped in this cycle; cluster, and held.
FALLEN = ("failed", "group failed", "cancelled")
CAUSES = (*FALLEN, "succeeded", "deleted", "cluster")
ENDINGS = ("succeeded", "failed", "cancelled", "handed back")
RUN_MOVES = {(None, "running")} | {("running", ending) for ending in ENDINGS}

# What `check` looks for: each query lists jobs that break an invariant.
_BROKEN = (
    "SELECT job_name FROM jobs WHERE state NOT IN ('queued', 'held', 'out')",
    "SELECT r.job_name FROM runs r LEFT JOIN jobs j USING (job_name) WHERE r.run > j.last_run",
    "SELECT job_name FROM runs WHERE (ended IS NULL) != (state = 'running')",
    "SELECT job_name FROM jobs WHERE (retry_at IS NULL) != (tries = 0) OR tries AND state = 'out'",
    f"SELECT job_name FROM jobs WHERE cause NOT IN {CAUSES} OR (left_at IS NULL) = (state = 'out')",
)


class JobRow(NamedTuple):
    """A job in the queue or the history. Times are in seconds since 1970."""

    job_name: str
    state: str
    reason: str | None
    job_type: str
    group_name: str | None
    job_priority: float
    force_run: bool
    every: float | None  # seconds
    not_before: str | None
    submitted: float
    cycle: int  # the last one in which it had its turn
    last_run: int
    last_start: float | None
    number: int  # of its submission: another one replaced it if it differs
    cause: str | None  # one of CAUSES
    tries: int  # retries so far
    retry_at: float | None
    retries: int
    left_at: float | None
    spec_json: str

    @property
    def spec(self) -> dict[str, Any]:
        """The job as it was validated, but for `force_run`, which falls once it has run."""
        spec: dict[str, Any] = json.loads(self.spec_json)
        return spec | {"force_run": self.force_run}


class RunRow(NamedTuple):
    """A run under way or in the history."""

    job_name: str
    run: int
    state: str
    number: int  # the job's, when it began
    cancel: int  # whether the user wants it to end
    started: float
    ended: float | None
    attempts: int
    phases: dict[str, dict[str, Any]]  # "started" and "ended", in order
    counts: dict[str, Any]
    exception: dict[str, Any] | None
    job_type: str
    group_name: str | None

    def plain_phases(self) -> list[Phase]:
        """Return its phases with their times alone: of a run whose detail is not noted, or not yet."""
        return [Phase(name=name, unit="", **times) for name, times in self.phases.items()]


class Hold(msgspec.Struct):
    """Why and until when the queue waits for the cluster."""

    reason: str
    since: float
    tries: int
    until: float
    nodes: bool = False  # scripts, which need none, go on


class Cycle(msgspec.Struct):
    """The cycle of the queue, and when all jobs had had their turn in it."""

    number: int = 0
    drained: float | None = None


_JOB = ", ".join(JobRow._fields).replace("spec_json", "spec AS spec_json")
_JOB = _JOB.replace("retries,", "coalesce(json_extract(spec, '$.retries'), 0) AS retries,")
_RUN = ", ".join(RunRow._fields[:-2]) + ", json_extract(spec, '$.job_type') AS job_type, "
_RUN += "json_extract(spec, '$.group_name') AS group_name"


class Store(Database):
    """The queue file; one object may be shared by the threads of a process."""

    # --- the queue as a whole ---

    def hold(self) -> Hold | None:
        """Return what the queue waits for."""
        plain = self.get("hold")
        return None if plain is None else convert(Hold, plain)

    def set_hold(self, hold: Hold | None) -> None:
        """Have the queue wait, or wait no longer."""
        self.put("hold", msgspec.to_builtins(hold))

    def cycle(self) -> Cycle:
        """Return the cycle; its number is 0 before the first."""
        return convert(Cycle, self.get("cycle", {}))

    def set_cycle(self, cycle: Cycle) -> None:
        """Begin a cycle, or note that it is done."""
        self.put("cycle", msgspec.to_builtins(cycle), "cycle")

    def held_by_drain(self) -> str | None:
        """Return why no run may start because of a drain (`admin.drain`), None when it may.

        One is under way, or was cut off while some files were on two nodes.
        """
        mark = self.get("drain")
        if mark and mark["moves"]:
            node = mark["source"]
            return f"a drain was cut off while it moved files of node {node}: `mrcore drain {node}` completes that"
        if mark and procfs.start_ticks(mark["pid"]) == mark["start_ticks"]:
            return f"node {mark['source']} is being drained by process {mark['pid']}"
        return None

    # --- jobs ---

    def submit(self, job: dict[str, Any], now: float) -> str | None:
        """Queue a validated job, in place of one of its name; return the state that one had, or None."""
        name = job["job_name"]
        with self.change() as db:
            number = db.execute("SELECT coalesce(max(number), 0) + 1 FROM jobs").fetchone()[0]
            before = self._check_job_move(name, "queued")
            columns = {key: job[key] for key in ("job_type", "group_name", "job_priority", "every", "not_before")}
            columns |= {"state": "queued", "reason": None, "number": number, "force_run": int(job["force_run"])}
            columns |= {"spec": json.dumps(job), "submitted": now, "cycle": 0}
            columns |= {"cause": None, "tries": 0, "retry_at": None, "left_at": None}
            updates = ", ".join(f"{key} = excluded.{key}" for key in columns)
            db.execute(
                f"INSERT INTO jobs (job_name, {', '.join(columns)}) VALUES (?{', ?' * len(columns)}) "
                f"ON CONFLICT (job_name) DO UPDATE SET {updates}",
                (name, *columns.values()),
            )
            self.note(name, None, "replaced" if before in ("queued", "held") else "queued", now)
        return before

    def _jobs(self, where: str, *values: Any) -> list[JobRow]:
        rows = self.rows(f"SELECT {_JOB} FROM jobs WHERE {where}", *values)
        return [JobRow(**row | {"force_run": bool(row["force_run"])}) for row in rows]

    def job(self, name: str) -> JobRow | None:
        """Return a job, in the queue or not; None if it is not known."""
        return next(iter(self._jobs("job_name = ?", name)), None)

    def queued(self) -> list[JobRow]:
        """Return the jobs that are in the queue."""
        return self._jobs("state != 'out'")

    def fallen(self) -> list[JobRow]:
        """Return the jobs that left, or wait, because of a failure, in order of submission."""
        return self._jobs(f"cause IN {FALLEN} ORDER BY number")

    def job_counts(self) -> dict[str, int]:
        """Return the number of jobs that are queued, held, and that left because of a failure ("failed")."""
        of = "CASE state WHEN 'out' THEN 'failed' ELSE state END AS state, count(*) AS number FROM jobs"
        rows = self.rows(f"SELECT {of} WHERE state != 'out' OR cause IN ('failed', 'group failed') GROUP BY 1")
        return {"queued": 0, "held": 0, "failed": 0} | {row["state"]: row["number"] for row in rows}

    def group(self, name: str | None) -> list[JobRow]:
        """Return the jobs of a group, also those that have left the queue."""
        return self._jobs("group_name = ?", name)

    def last_runs(self) -> dict[str, int]:
        """Return the numbers of the last runs of all jobs that are known, by name."""
        return {row["job_name"]: row["last_run"] for row in self.rows("SELECT job_name, last_run FROM jobs")}

    def set_job(self, name: str, **columns: Any) -> None:
        """Change some columns of a job; its state is changed by `move_job` only."""
        with self.change() as db:
            db.execute(
                f"UPDATE jobs SET {', '.join(f'{key} = ?' for key in columns)} WHERE job_name = ?",
                (*columns.values(), name),
            )

    def move_job(self, name: str, state: str, reason: str | None, now: float, cause: str | None = None) -> None:
        """Bring a job to another state, with the reason that listings show and its cause, one of CAUSES."""
        reason = reason and one_line(reason)
        with self.change():
            self._check_job_move(name, state)
            left = {"left_at": now, "tries": 0, "retry_at": None} if state == "out" else {"left_at": None}
            self.set_job(name, state=state, reason=reason, cause=cause, **left)
            self.note(name, None, f"{state}: {reason}" if reason else state, now)

    # --- runs ---

    def start_run(self, name: str, now: float) -> int:
        """Begin the next run of a queued job; return its number (1, 2, …), which is never used again."""
        with self.change("start") as db:
            job = self.job(name)
            if not job or job.state != "queued" or self.running():
                raise self._illegal(name, "another run or none queued", "running")
            run = job.last_run + 1
            self.set_job(name, last_run=run, last_start=now)
            db.execute(
                "INSERT INTO runs (job_name, run, state, number, started, spec) VALUES (?, ?, 'running', ?, ?, ?)",
                (name, run, job.number, now, job.spec_json),
            )
            self.note(name, run, "running", now)
        return run

    def enter_phase(self, name: str, run: int, phase: str, now: float) -> None:
        """Note that a run is now in this phase (the one before ends)."""
        with self.change("phase") as db:
            phases = self._phases(name, run, now)
            phases.setdefault(phase, {"started": now})["ended"] = None
            db.execute("UPDATE runs SET phases = ? WHERE job_name = ? AND run = ?", (json.dumps(phases), name, run))

    def end_run(self, name: str, run: int, state: str, now: float, counts: Any = None, exception: Any = None) -> None:
        """Bring a running run to its end, one of ENDINGS, with counts and the error as a dict."""
        with self.change("end") as db:
            row = db.execute("SELECT state FROM runs WHERE job_name = ? AND run = ?", (name, run)).fetchone()
            if ((before := row and row["state"]), state) not in RUN_MOVES:
                raise self._illegal(f"{name} run {run}", before, state, name)
            self._add_to_totals(state)  # while its row says `running`: a first total counts the rows that have ended
            values = (self._phases(name, run, now), plain(counts or {}), plain(exception))
            db.execute(
                "UPDATE runs SET state = ?, ended = ?, phases = ?, counts = ?, exception = ? "
                "WHERE job_name = ? AND run = ?",
                (state, now, *map(json.dumps, values), name, run),
            )
            self.note(name, run, f"{state}: {exception['message']}" if exception else state, now)

    def totals(self) -> dict[str, int]:
        """Return how many runs ended how, and how many tasks died ("deaths"), since the queue's file was made.

        It counts on when the history forgets; one of before counts from what its history had.
        """
        known = convert(dict[str, int], self.get("totals", {}))
        if not known:
            counted = self.rows("SELECT state, count(*) AS number FROM runs WHERE state != 'running' GROUP BY state")
            known = {row["state"]: row["number"] for row in counted}
        return dict.fromkeys((*ENDINGS, "deaths"), 0) | known

    def _add_to_totals(self, name: str, number: int = 1) -> None:
        totals = self.totals()
        self.put("totals", totals | {name: totals[name] + number})

    def _runs(self, where: str, *values: Any) -> list[RunRow]:
        texts = ("phases", "counts", "exception")
        rows = self.rows(f"SELECT {_RUN} FROM runs {where}", *values)
        return [RunRow(**row | {key: json.loads(row[key]) for key in texts}) for row in rows]

    def running(self) -> RunRow | None:
        """Return the run that is under way (or was, when its Runner died), or None."""
        return next(iter(self._runs("WHERE state = 'running'")), None)

    def running_spec(self) -> dict[str, Any]:
        """Return the job of the run that is under way, as it was when the run began."""
        spec: dict[str, Any] = json.loads(self.rows("SELECT spec FROM runs WHERE state = 'running'")[0]["spec"])
        return spec

    def cancel_running(self) -> None:
        """Ask for the end of the run that is under way."""
        with self.change() as db:
            db.execute("UPDATE runs SET cancel = 1 WHERE state = 'running'")

    def run(self, job_name: str, run: int) -> RunRow | None:
        """Return one run, or None when the history does not have it."""
        return next(iter(self._runs("WHERE job_name = ? AND run = ?", job_name, run)), None)

    def runs(self, job_name: str | None, limit: int | None = None, state: str | None = None) -> list[RunRow]:
        """Return the runs of a job, or of all, newest first; with `state` only those."""
        wanted = {"job_name": job_name, "state": state}
        chosen = {key: value for key, value in wanted.items() if value is not None}
        where = f"WHERE {' AND '.join(f'{key} = ?' for key in chosen)}" if chosen else ""
        return self._runs(f"{where} ORDER BY id DESC LIMIT ?", *chosen.values(), -1 if limit is None else limit)

    def last_of_jobs(self, jobs: int, *states: str) -> list[RunRow]:
        """Return the last run in one of these states of each of the `jobs` jobs that began a run last, but for those
        that were deleted.
        """
        last = f"SELECT id FROM runs r WHERE r.job_name = j.job_name AND r.state IN ({', '.join('?' * len(states))})"
        newest = "FROM jobs j WHERE j.cause IS NOT 'deleted' ORDER BY j.last_start DESC LIMIT ?"
        return self._runs(f"WHERE id IN (SELECT ({last} ORDER BY r.run DESC LIMIT 1) {newest})", *states, jobs)

    def page_of_runs(self, text: str, state: str, limit: int, skip: int) -> tuple[list[RunRow], int]:
        """Return runs of jobs whose name holds `text`, in `state` ("": any), newest first, and how many there are.

        Only an index is searched, whatever the runs hold.
        """
        where = "FROM runs INDEXED BY runs_by_name WHERE instr(job_name, ?) AND ? IN (state, '')"
        found = self.rows(f"SELECT id {where} ORDER BY id DESC LIMIT ? OFFSET ?", text, state, limit, skip)
        numbers = ", ".join(str(row["id"]) for row in found)
        count: int = self.rows(f"SELECT count(*) AS count {where}", text, state)[0]["count"]
        return self._runs(f"WHERE id IN ({numbers}) ORDER BY id DESC"), count

    def run_times(self, job_name: str, limit: int) -> list[dict[str, Any]]:
        """Return run, state, started and seconds of a job's newest runs that have ended, newest first."""
        query = "SELECT run, state, started, ended - started AS seconds FROM runs WHERE job_name = ? AND ended NOT NULL"
        return self.rows(f"{query} ORDER BY run DESC LIMIT ?", job_name, limit)

    def run_numbers(self, job_name: str) -> set[int]:
        """Return the numbers of a job's runs that are in the history."""
        return {row["run"] for row in self.rows("SELECT run FROM runs WHERE job_name = ?", job_name)}

    def run_seconds(self, job_name: str | None) -> Iterable[tuple[str, float]]:
        """Return name and seconds of the successful runs of a job, or of all, newest first."""
        where = "WHERE state = 'succeeded' AND ? IN (job_name, '')"
        query = f"SELECT job_name, ended - started AS seconds FROM runs {where} ORDER BY id DESC"
        return ((row["job_name"], row["seconds"]) for row in self.rows(query, job_name or ""))

    # --- how far a run is, and what stays known of it ---

    def progress(self) -> Progress | None:
        """Return how far the run under way is, as its Runner wrote last; None: there is none, or nothing is known."""
        running = self.rows("SELECT job_name, run FROM runs WHERE state = 'running'")
        rows = self.rows("SELECT value FROM progress")
        found = _read(Progress, rows[0]["value"]) if running and rows else None
        return found if found and {"job_name": found.job_name, "run": found.run} == running[0] else None

    def set_progress(self, progress: Progress) -> None:
        """Replace what `progress` returns."""
        value = msgspec.json.encode(progress).decode()
        self.change_lightly("INSERT OR REPLACE INTO progress VALUES (1, ?)", value)

    def detail(self, name: str, run: int) -> RunDetail | None:
        """Return what is known of a run that has ended; None for one of before, or of which nothing was noted."""
        rows = self.rows("SELECT value FROM details WHERE job_name = ? AND run = ?", name, run)
        return _read(RunDetail, rows[0]["value"]) if rows else None

    def set_detail(self, name: str, run: int, detail: RunDetail) -> None:
        """Keep what is known of a run, as long as its row is in the history."""
        with self.change() as db:
            if detail.deaths and self.detail(name, run) is None:
                self._add_to_totals("deaths", len(detail.deaths))
            value = msgspec.json.encode(detail).decode()
            db.execute("INSERT OR REPLACE INTO details VALUES (?, ?, ?)", (name, run, value))

    # --- events ---

    def note(self, name: str, run: int | None, text: str, now: float) -> None:
        """Add a line to a job's story."""
        with self.change() as db:
            db.execute(
                "INSERT INTO events (time, job_name, run, text) VALUES (?, ?, ?, ?)", (now, name, run, one_line(text))
            )

    def events(self, name: str, last: int = -1) -> list[dict[str, Any]]:
        """Return a job's story, or its `last` events: time, run, text."""
        newest = "SELECT id, time, run, text FROM events WHERE job_name = ? ORDER BY id DESC LIMIT ?"
        return self.rows(f"SELECT time, run, text FROM ({newest}) ORDER BY id", name, last)

    def last_event(self) -> int:
        """Return a number that is another one when something has happened to any job."""
        number: int = self.rows("SELECT coalesce(max(id), 0) AS last FROM events")[0]["last"]
        return number

    def prune(self, keep_runs: int) -> list[str]:
        """Forget all but the newest `keep_runs` runs, and their events; return the names of the jobs they were of."""
        old = "id <= (SELECT max(id) - ? FROM runs) AND state != 'running'"
        jobs = self.rows(f"SELECT DISTINCT job_name FROM runs WHERE {old}", keep_runs)
        with self.change() as db:
            db.execute(f"DELETE FROM runs WHERE {old}", (keep_runs,))
            if jobs:
                db.execute("DELETE FROM details WHERE (job_name, run) NOT IN (SELECT job_name, run FROM runs)")
            db.execute("DELETE FROM events WHERE id <= (SELECT max(id) - ? FROM events)", (keep_runs * EVENTS_PER_RUN,))
        return [row["job_name"] for row in jobs]

    def check(self) -> None:
        """Raise MrcoreError if an invariant is broken (tests call it at their end)."""
        integrity = self.rows("PRAGMA integrity_check")[0]["integrity_check"]
        wrong = [row for query in _BROKEN for row in self.rows(query)]
        if integrity != "ok" or wrong:
            raise MrcoreError(f"the queue {self.path} is damaged: {integrity}, {wrong}")

    def _phases(self, name: str, run: int, now: float) -> dict[str, Any]:
        rows = self.rows("SELECT phases FROM runs WHERE job_name = ? AND run = ?", name, run)
        phases: dict[str, Any] = json.loads(rows[0]["phases"]) if rows else {}
        for times in phases.values():
            times["ended"] = times["ended"] or now
        return phases

    def _check_job_move(self, name: str, state: str) -> str | None:
        job = self.job(name)
        before = job.state if job else None
        if (before, state) not in JOB_MOVES:
            raise self._illegal(name, before, state)
        return before

    def _illegal(self, what: str, before: str | None, state: str, name: str | None = None) -> MrcoreError:
        events = self.rows("SELECT run, text FROM events WHERE job_name = ? ORDER BY id DESC LIMIT 20", name or what)
        story = " → ".join(event["text"] for event in reversed(events)) or "none"
        text = f"job {what}: no way from {before or 'nothing'} to {state}; its history: {story}"
        return MrcoreError(text, events=events)


def _read(kind: type[T], text: str) -> T | None:
    """Return what was noted of a run, for showing it alone; None if another release wrote it in another form."""
    with contextlib.suppress(ValueError):
        return decode(kind, text)
    return None


class StoreToRead(Store):
    """A copy in memory of the queue as it is now, for those who look ahead: no byte on a disk is changed."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "queue.sqlite"
        self._lock = threading.RLock()
        self._in_change = False
        self._db = open_to_read(self.path)
        self._db.row_factory = sqlite3.Row
