"""Jobs as the queue's file keeps them, and a queue's file of the release before."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from mrcore.queue.job import validate


def job(name: str = "a", **keys: Any) -> dict[str, Any]:
    """Return a validated job."""
    return validate({"job_name": name, "project_name": "p", "input_dirs": ["x"], "map_function_name": "m"} | keys)


V2 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE jobs (
    job_name TEXT PRIMARY KEY, state TEXT NOT NULL, reason TEXT, number INTEGER NOT NULL UNIQUE,
    job_type TEXT NOT NULL, group_name TEXT, job_priority REAL NOT NULL, force_run INTEGER NOT NULL,
    every REAL, not_before TEXT, spec TEXT NOT NULL, submitted REAL NOT NULL,
    cycle INTEGER NOT NULL DEFAULT 0, last_run INTEGER NOT NULL DEFAULT 0, last_start REAL);
CREATE INDEX jobs_by_state ON jobs (state);
CREATE TABLE runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, job_name TEXT NOT NULL, run INTEGER NOT NULL, state TEXT NOT NULL,
    number INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 1, cancel INTEGER NOT NULL DEFAULT 0,
    started REAL NOT NULL, ended REAL, phases TEXT NOT NULL DEFAULT '{}', counts TEXT NOT NULL DEFAULT '{}',
    exception TEXT NOT NULL DEFAULT 'null', spec TEXT NOT NULL, UNIQUE (job_name, run));
CREATE UNIQUE INDEX one_running_run ON runs (state) WHERE state = 'running';
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, job_name TEXT NOT NULL, run INTEGER, text TEXT NOT NULL);
CREATE INDEX events_by_job ON events (job_name);
INSERT INTO meta VALUES ('schema', '2'), ('paused', 'true'), ('cycle', '{"number": 4, "drained": 5.0}');
"""
NEW_KEYS = ("on_failure", "retries", "retry_delay", "projects_dir")
V2_JOBS = {  # state, reason, and the cause that follows from it
    "waits": ("queued", None, None),
    "held": ("held", "node-0 does not answer", "cluster"),
    "done": ("out", "succeeded", "succeeded"),
    "gone": ("out", "deleted", "deleted"),
    "ended": ("out", "cancelled", "cancelled"),
    "bad": ("out", "failed: map failed: x", "failed"),
    "with_it": ("out", "group failed: bad run 1: map failed: x", "group failed"),
    "old": ("out", "failed: long ago", "failed"),  # the history has forgotten its events
}


def make_v2(path: Path) -> None:
    """Write a queue's file as the release before this one left it."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(V2)
        for number, (name, (state, reason, _)) in enumerate(V2_JOBS.items(), 1):
            group = "g" if name in ("bad", "with_it") else None
            spec = {key: value for key, value in job(name, group_name=group).items() if key not in NEW_KEYS}
            columns = (
                name,
                state,
                reason,
                number,
                "mapreduce",
                group,
                0,
                0,
                None,
                None,
                json.dumps(spec),
                100.0,
                3,
                1,
                90.0,
            )
            db.execute(f"INSERT INTO jobs VALUES (?{', ?' * 14})", columns)
            if name != "old":
                db.execute("INSERT INTO events (time, job_name, text) VALUES (?, ?, 'moved')", (200.0 + number, name))
        run = "('bad', 1, 'failed', 6, 1, 2, '{}')"
        db.execute(f"INSERT INTO runs (job_name, run, state, number, started, ended, spec) VALUES {run}")
        db.commit()
