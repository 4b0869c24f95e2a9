"""The durable queue: jobs, their runs and what happened to them, in one SQLite file that survives kill -9.

Any number of processes may open it at once. A change is one `BEGIN IMMEDIATE` transaction, flushed to disk before
it returns (WAL, `synchronous=FULL`); nested changes join the outer one. States move along `JOB_MOVES` and
`RUN_MOVES` and no other way: an illegal move raises with the job's history and changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mrcore.errors import ClusterFault, MrcoreError, UsageError
from mrcore.system import failpoints, procfs
from mrcore.system.paths import make_private
from mrcore.text import one_line, plain

SCHEMA_VERSION = 3
BUSY_SECONDS = 60.0
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
# Why a job is out of the queue or waits in it, for programs; `reason` tells people. In the queue: failed, and runs
# again by itself; group failed, and skipped in this cycle; cluster, and held.
FALLEN = ("failed", "group failed", "cancelled")
CAUSES = (*FALLEN, "succeeded", "deleted", "cluster")
ENDINGS = ("succeeded", "failed", "cancelled", "handed back")
RUN_MOVES = {(None, "running")} | {("running", ending) for ending in ENDINGS}

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
    job_name TEXT PRIMARY KEY, state TEXT NOT NULL, reason TEXT, number INTEGER NOT NULL UNIQUE,
    job_type TEXT NOT NULL, group_name TEXT, job_priority REAL NOT NULL, force_run INTEGER NOT NULL,
    every REAL, not_before TEXT, spec TEXT NOT NULL, submitted REAL NOT NULL,
    cycle INTEGER NOT NULL DEFAULT 0, last_run INTEGER NOT NULL DEFAULT 0, last_start REAL,
    cause TEXT, tries INTEGER NOT NULL DEFAULT 0, retry_at REAL, left_at REAL);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state);
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, job_name TEXT NOT NULL, run INTEGER NOT NULL, state TEXT NOT NULL,
    number INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 1, cancel INTEGER NOT NULL DEFAULT 0,
    started REAL NOT NULL, ended REAL, phases TEXT NOT NULL DEFAULT '{}', counts TEXT NOT NULL DEFAULT '{}',
    exception TEXT NOT NULL DEFAULT 'null', spec TEXT NOT NULL, UNIQUE (job_name, run));
CREATE UNIQUE INDEX IF NOT EXISTS one_running_run ON runs (state) WHERE state = 'running';
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, job_name TEXT NOT NULL, run INTEGER, text TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS events_by_job ON events (job_name);
CREATE TABLE IF NOT EXISTS ledgers (job_name TEXT PRIMARY KEY, run INTEGER NOT NULL, held INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS ledger (
    job_name TEXT, holder TEXT, path TEXT, read INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
    checksum INTEGER NOT NULL, PRIMARY KEY (job_name, holder, path)) WITHOUT ROWID;
"""
# Version 3 has columns for what was read out of our own sentences before: here they are read for the last time.
_TO_3 = """
ALTER TABLE jobs ADD COLUMN cause TEXT;
ALTER TABLE jobs ADD COLUMN tries INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN retry_at REAL;
ALTER TABLE jobs ADD COLUMN left_at REAL;
UPDATE jobs SET cause = 'cluster' WHERE state = 'held';
UPDATE jobs SET left_at = coalesce((SELECT max(time) FROM events e WHERE e.job_name = jobs.job_name), submitted),
    cause = CASE WHEN reason LIKE 'failed:%' THEN 'failed' WHEN reason LIKE 'group failed:%' THEN 'group failed'
                 ELSE reason END
    WHERE state = 'out';
"""


def upgrade(db: sqlite3.Connection) -> int:
    """Bring a queue of this or an earlier version, or an empty file, to SCHEMA_VERSION; in one transaction.

    Return the version it has then: a later one is left alone.
    """
    tables = db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'meta'").fetchone()[0]
    found = db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() if tables else None
    version = int(found[0]) if found else 0
    if version < SCHEMA_VERSION:
        steps = _SCHEMA + (_TO_3 if version else "")
        db.executescript(
            f"BEGIN IMMEDIATE; {steps} INSERT OR REPLACE INTO meta VALUES ('schema', {SCHEMA_VERSION}); COMMIT;"
        )
    return max(version, SCHEMA_VERSION)


@contextlib.contextmanager
def sole_runner(state_dir: Path) -> Iterator[None]:
    """Be the one process that drains the queue of this folder; UsageError naming it if another does."""
    with (state_dir / "runner.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise UsageError(
                f"a Runner (process {holder}) already drains the queue of {state_dir}: "
                f"one is enough; stop it with `kill {holder}`"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


class Store:
    """The queue file `state_dir/queue.sqlite`; one object may be shared by the threads of a process."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "queue.sqlite"
        self._lock = threading.RLock()
        self._depth = 0
        try:
            make_private(state_dir)
            # The switch to WAL does not wait for other openers as everything else does: hence a lock of our own.
            with (state_dir / "queue.lock").open("w") as gate:
                fcntl.flock(gate, fcntl.LOCK_EX)
                self._db = sqlite3.connect(
                    self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
                )
                self._open()
        except (OSError, ValueError, sqlite3.Error) as error:
            raise ClusterFault(f"cannot open the queue {self.path}: {error}; check the folder and the disk") from None

    def _open(self) -> None:
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        if (version := upgrade(self._db)) != SCHEMA_VERSION:
            raise UsageError(f"the queue {self.path} has schema {version}, this mrcore {SCHEMA_VERSION}: update mrcore")

    def copy_to(self, target: sqlite3.Connection) -> None:
        """Copy the whole queue as it is at one moment into another, empty database."""
        with self._lock:
            self._db.backup(target)

    def close(self) -> None:
        """Close the file; what was changed is already on disk."""
        self._db.close()

    @contextlib.contextmanager
    def change(self, what: str = "queue") -> Iterator[sqlite3.Connection]:
        """One transaction: all of what is done inside, durable when it ends, or nothing if it raises.

        `what` it is for, one of `failpoints.CHANGES`, only names the points where tests have it interrupted.
        """
        with self._lock:
            if self._depth:
                yield self._db
                return
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._depth = 1
                yield self._db
                failpoints.point(f"before {what}")
                self._db.execute("COMMIT")
                failpoints.point(f"after {what}")
            except sqlite3.Error as error:
                raise ClusterFault(f"cannot write the queue {self.path}: {error}; free the disk and go on") from error
            finally:
                self._depth = 0
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """The rows of a SELECT as dicts."""
        try:
            with self._lock:
                return [dict(row) for row in self._db.execute(query, values)]
        except sqlite3.Error as error:
            raise ClusterFault(f"cannot read the queue {self.path}: {error}; check the folder and the disk") from error

    def get(self, key: str, default: Any = None) -> Any:
        """A JSON value of the queue as a whole (`cycle`, `hold`, `paused`, …)."""
        found = self.rows("SELECT value FROM meta WHERE key = ?", key)
        return json.loads(found[0]["value"]) if found else default

    def put(self, key: str, value: Any, what: str = "queue") -> None:
        """Set what `get` gives (`what`: see `change`)."""
        with self.change(what) as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def held_by_drain(self) -> str | None:
        """Why no run may start because of a drain (`mrcore.drain`), None when it may.

        One is under way, or was cut off while some files were on two nodes.
        """
        found = self.get("drain")
        if found and found["moves"]:
            node = found["source"]
            return f"a drain was cut off while it moved files of node {node}: `mrcore drain {node}` completes that"
        if found and procfs.start_ticks(found["pid"]) == found["start_ticks"]:
            return f"node {found['source']} is being drained by process {found['pid']}"
        return None

    def submit(self, job: dict[str, Any], now: float) -> str | None:
        """Queue a validated job, in place of one of its name; gives the state that one had, or None."""
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

    def job(self, name: str) -> dict[str, Any] | None:
        """A job's row with `spec` decoded, or None."""
        found = self.rows("SELECT * FROM jobs WHERE job_name = ?", name)
        if not found:
            return None
        spec = json.loads(found[0]["spec"]) | {"force_run": bool(found[0]["force_run"])}  # the flag falls, once run
        return found[0] | {"spec": spec}

    def move_job(self, name: str, state: str, reason: str | None, now: float, cause: str | None = None) -> None:
        """Bring a job to another state, with the reason that listings show and its cause, one of CAUSES."""
        reason = reason and one_line(reason)
        with self.change() as db:
            self._check_job_move(name, state)
            left_at = now if state == "out" else None
            values = (state, reason, cause, left_at, name)
            db.execute("UPDATE jobs SET state = ?, reason = ?, cause = ?, left_at = ? WHERE job_name = ?", values)
            if left_at:
                db.execute("UPDATE jobs SET tries = 0, retry_at = NULL WHERE job_name = ?", (name,))
            self.note(name, None, f"{state}: {reason}" if reason else state, now)

    def start_run(self, name: str, now: float) -> int:
        """Begin the next run of a queued job; gives its number (1, 2, …), which is never used again."""
        with self.change("start") as db:
            job = db.execute("SELECT * FROM jobs WHERE job_name = ?", (name,)).fetchone()
            if not job or job["state"] != "queued" or self.running():
                raise self._illegal(name, "another run or none queued", "running")
            run = int(job["last_run"]) + 1
            db.execute("UPDATE jobs SET last_run = ?, last_start = ? WHERE job_name = ?", (run, now, name))
            db.execute(
                "INSERT INTO runs (job_name, run, state, number, started, spec) VALUES (?, ?, 'running', ?, ?, ?)",
                (name, run, job["number"], now, job["spec"]),
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
            found = db.execute("SELECT state FROM runs WHERE job_name = ? AND run = ?", (name, run)).fetchone()
            if ((found and found["state"]), state) not in RUN_MOVES:
                raise self._illegal(f"{name} run {run}", found and found["state"], state, name)
            values = (
                json.dumps(self._phases(name, run, now)),
                json.dumps(plain(counts or {})),
                json.dumps(plain(exception)),
            )
            db.execute(
                "UPDATE runs SET state = ?, ended = ?, phases = ?, counts = ?, exception = ? "
                "WHERE job_name = ? AND run = ?",
                (state, now, *values, name, run),
            )
            self.note(name, run, f"{state}: {exception['message']}" if exception else state, now)

    def running(self) -> dict[str, Any] | None:
        """The run that is under way (or was, when its Runner died), or None."""
        columns = "job_name, run, number, cancel, started, phases, spec"
        found = self.rows(f"SELECT {columns} FROM runs WHERE state = 'running'")
        return found[0] | {"spec": json.loads(found[0]["spec"])} if found else None

    def note(self, name: str, run: int | None, text: str, now: float) -> None:
        """Add a line to a job's story."""
        with self.change() as db:
            db.execute(
                "INSERT INTO events (time, job_name, run, text) VALUES (?, ?, ?, ?)", (now, name, run, one_line(text))
            )

    def prune(self, keep_runs: int) -> list[str]:
        """Forget all but the newest `keep_runs` runs, and their events; gives the names of the jobs they were of."""
        old = "id <= (SELECT max(id) - ? FROM runs) AND state != 'running'"
        jobs = self.rows(f"SELECT DISTINCT job_name FROM runs WHERE {old}", keep_runs)
        with self.change() as db:
            for table, keep in (("runs", keep_runs), ("events", keep_runs * EVENTS_PER_RUN)):
                running = "AND state != 'running'" if table == "runs" else ""
                db.execute(f"DELETE FROM {table} WHERE id <= (SELECT max(id) - ? FROM {table}) {running}", (keep,))
        return [row["job_name"] for row in jobs]

    def check(self) -> None:
        """Raise MrcoreError if an invariant is broken (tests call it at their end)."""
        broken = self.rows("PRAGMA integrity_check")[0]["integrity_check"]
        wrong = self.rows("SELECT job_name FROM jobs WHERE state NOT IN ('queued', 'held', 'out')")
        wrong += self.rows("SELECT r.job_name FROM runs r LEFT JOIN jobs j USING (job_name) WHERE r.run > j.last_run")
        wrong += self.rows("SELECT job_name FROM runs WHERE (ended IS NULL) != (state = 'running')")
        wrong += self.rows(
            "SELECT job_name FROM jobs WHERE (retry_at IS NULL) != (tries = 0) OR tries AND state = 'out'"
        )
        wrong += self.rows(
            f"SELECT job_name FROM jobs WHERE cause NOT IN {CAUSES} OR (left_at IS NULL) = (state = 'out')"
        )
        if broken != "ok" or wrong:
            raise MrcoreError(f"the queue {self.path} is damaged: {broken}, {wrong}")

    def _phases(self, name: str, run: int, now: float) -> dict[str, Any]:
        found = self.rows("SELECT phases FROM runs WHERE job_name = ? AND run = ?", name, run)
        phases: dict[str, Any] = json.loads(found[0]["phases"]) if found else {}
        for times in phases.values():
            times["ended"] = times["ended"] or now
        return phases

    def _check_job_move(self, name: str, state: str) -> str | None:
        found = self.rows("SELECT state FROM jobs WHERE job_name = ?", name)
        before = found[0]["state"] if found else None
        if (before, state) not in JOB_MOVES:
            raise self._illegal(name, before, state)
        return before

    def _illegal(self, what: str, before: str | None, state: str, name: str | None = None) -> MrcoreError:
        events = self.rows("SELECT run, text FROM events WHERE job_name = ? ORDER BY id DESC LIMIT 20", name or what)
        story = " → ".join(each["text"] for each in reversed(events)) or "none"
        text = f"job {what}: no way from {before or 'nothing'} to {state}; its history: {story}"
        return MrcoreError(text, events=events)
