"""The master's SQLite file: opened by any number of processes, upgraded, changed in transactions that survive kill -9.

A change is one `BEGIN IMMEDIATE` transaction, flushed to disk before it returns (WAL, `synchronous=FULL`); nested
changes join the outer one.
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

from mrcore.errors import ClusterFault, UsageError
from mrcore.system import failpoints
from mrcore.system.paths import make_private

SCHEMA_VERSION = 4
BUSY_SECONDS = 60.0
PEEK_SECONDS = 0.1  # for another's change

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
CREATE INDEX IF NOT EXISTS runs_by_name ON runs (job_name, state);
CREATE UNIQUE INDEX IF NOT EXISTS one_running_run ON runs (state) WHERE state = 'running';
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, job_name TEXT NOT NULL, run INTEGER, text TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS events_by_job ON events (job_name);
CREATE TABLE IF NOT EXISTS ledgers (job_name TEXT PRIMARY KEY, run INTEGER NOT NULL, held INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS ledger (
    job_name TEXT, holder TEXT, path TEXT, read INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
    checksum INTEGER NOT NULL, PRIMARY KEY (job_name, holder, path)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS progress (id INTEGER PRIMARY KEY CHECK (id = 1), value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS details (
    job_name TEXT, run INTEGER, value TEXT NOT NULL, PRIMARY KEY (job_name, run)) WITHOUT ROWID;
"""
# Version 4 adds tables and an index only.
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
    row = db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() if tables else None
    version = int(row[0]) if row else 0
    if version < SCHEMA_VERSION:
        steps = _SCHEMA + (_TO_3 if 0 < version < 3 else "")
        db.executescript(
            f"BEGIN IMMEDIATE; {steps} INSERT OR REPLACE INTO meta VALUES ('schema', {SCHEMA_VERSION}); COMMIT;"
        )
    return max(version, SCHEMA_VERSION)


def peek(state_dir: Path, query: str, *values: Any) -> list[tuple[Any, ...]]:
    """Return the rows of a SELECT without making, changing or waiting for a file: for completion, which may miss some.

    Raises sqlite3.Error when there is no queue, or none that the caller may read. SQLite would make the files of a WAL
    even to read: without them, nobody has the queue open, and it is read as what does not change.
    """
    file = state_dir / "queue.sqlite"
    how = "mode=ro" if file.with_name(f"{file.name}-shm").exists() else "immutable=1"
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?{how}", uri=True, timeout=PEEK_SECONDS)) as db:
        return db.execute(query, values).fetchall()


@contextlib.contextmanager
def sole_runner(state_dir: Path) -> Iterator[None]:
    """Be the one process that runs the queue of this folder; UsageError naming it if another does."""
    with (state_dir / "runner.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise UsageError(
                f"a Runner (process {holder}) already drains the queue of {state_dir}: "
                f"one is enough; stop it with `kill {holder}`",
                runner=holder,
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def open_to_read(path: Path) -> sqlite3.Connection:
    """Return the queue of a file as it is now, of this version, without a byte of the file changed.

    Where there is no file it is an empty one, and one of an earlier version is upgraded in memory.
    """
    memory = sqlite3.connect(":memory:", check_same_thread=False)
    if not path.exists():
        upgrade(memory)
        return memory
    # What is in use has a write-ahead log, in which the newest is; its readers share memory that is theirs to write.
    modes = ["mode=ro&readonly_shm=1"] if Path(f"{path}-wal").exists() else []
    for mode in [*modes, "immutable=1"]:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True)) as file:
            try:
                file.backup(memory)
                upgrade(memory)
                break
            except sqlite3.Error as error:
                if mode == "immutable=1":
                    raise ClusterFault(f"cannot read the queue {path}: {error}; check the file and the disk") from None
    return memory


class Database:
    """The file `state_dir/queue.sqlite`; one object may be shared by the threads of a process."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "queue.sqlite"
        self._lock = threading.RLock()
        self._in_change = False
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
        """Copy the whole file as it is at one moment into another, empty database."""
        with self._lock:
            self._db.backup(target)

    def close(self) -> None:
        """Close the file; what was changed is already on disk."""
        self._db.close()

    @contextlib.contextmanager
    def change(self, what: str = "queue") -> Iterator[sqlite3.Connection]:
        """Run one transaction: all of what is done inside, durable when it ends, or nothing if it raises.

        `what` it is for, one of `failpoints.CHANGES`, only names the points where tests have it interrupted.
        """
        with self._lock:
            if self._in_change:
                yield self._db
                return
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._in_change = True
                yield self._db
                failpoints.point(f"before {what}")
                self._db.execute("COMMIT")
                failpoints.point(f"after {what}")
            except sqlite3.Error as error:
                raise ClusterFault(f"cannot write the queue {self.path}: {error}; free the disk and go on") from error
            finally:
                self._in_change = False
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """Return the rows of a SELECT as dicts."""
        try:
            with self._lock:
                return [dict(row) for row in self._db.execute(query, values)]
        except sqlite3.Error as error:
            raise ClusterFault(f"cannot read the queue {self.path}: {error}; check the folder and the disk") from error

    def get(self, key: str, default: Any = None) -> Any:
        """Return a JSON value of the queue as a whole (`cycle`, `hold`, `paused`, …)."""
        rows = self.rows("SELECT value FROM meta WHERE key = ?", key)
        return json.loads(rows[0]["value"]) if rows else default

    def change_lightly(self, statement: str, *values: Any) -> None:
        """Make one change that may be lost with the machine, and so is not flushed to disk: what is soon replaced."""
        with self._lock:
            if self._in_change:
                raise AssertionError("a light change inside of a durable one would be neither")
            try:
                self._db.execute("PRAGMA synchronous=OFF")
                self._db.execute(statement, values)
            except sqlite3.Error as error:
                raise ClusterFault(f"cannot write the queue {self.path}: {error}; free the disk and go on") from error
            finally:
                self._db.execute("PRAGMA synchronous=FULL")

    def put(self, key: str, value: Any, what: str = "queue") -> None:
        """Set what `get` returns (`what`: see `change`)."""
        with self.change(what) as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))
