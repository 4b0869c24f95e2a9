"""Everything that can be asked of the queue, from any process, also while its Runner runs (`mrcore.runner`)."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import statistics
import time
from datetime import datetime
from typing import Any

from mrcore.errors import UsageError
from mrcore.queue import job as jobs
from mrcore.queue import turns
from mrcore.queue.runner import Runner
from mrcore.queue.turns import QUEUED, order
from mrcore.settings import sudo
from mrcore.settings.config import Settings, load_settings
from mrcore.settings.validation import nearest
from mrcore.state import ledger
from mrcore.state.doorbell import Doorbell
from mrcore.state.store import FALLEN, Store
from mrcore.system.paths import close_home
from mrcore.text import listed, one_line

__all__ = ["Runner", "Scheduler"]

ESTIMATE_RUNS = 20
_HISTORY = (
    "SELECT job_name, run, state, json_extract(spec, '$.job_type') AS job_type, "
    "json_extract(spec, '$.group_name') AS group_name, started, ended, phases, counts, attempts, exception FROM runs"
)


class Scheduler:
    """Puts jobs into the queue, takes them out, and tells about them."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = sudo.insist(settings or load_settings())
        if self.settings.local:
            close_home(self.settings.home)
        self.store = Store(self.settings.state_dir)
        self._doorbell = Doorbell(self.settings.state_dir)

    def get_mapreduce_job_template(self) -> dict[str, Any]:
        """A mapreduce job with every key."""
        return jobs.template("mapreduce")

    def get_script_template(self) -> dict[str, Any]:
        """A script job with every key."""
        return jobs.template("script")

    def get_file_transfer_template(self) -> dict[str, Any]:
        """A file_transfer job with every key."""
        return jobs.template("file_transfer")

    def submit_job(self, job: dict[str, Any]) -> dict[str, Any]:
        """Validate and queue one job; it is on disk when this returns. See `submit_jobs`."""
        return self.submit_jobs([job])[0]

    def submit_jobs(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Queue all of these jobs or, if one of them has a fault, none (UsageError naming every fault).

        Gives for each `{"job_name", "replaced", "recurs", "message"}`.
        """
        valid: list[dict[str, Any]] = []
        refusals: list[UsageError] = []
        for each in batch:
            try:
                valid.append(jobs.validate(each, self.settings.projects_dir))
            except UsageError as error:
                refusals.append(error)
        names = [each["job_name"] for each in valid]
        for name in sorted({name for name in names if names.count(name) > 1}):
            refusals.append(UsageError(f"job {name!r} stands in the list more than once", faults=[name]))
        if refusals:
            faults = [fault for error in refusals for fault in error.details.get("faults", [error.message])]
            raise UsageError(listed(error.message for error in refusals), faults=faults)
        now, answers, caller = time.time(), [], sudo.submitter(self.settings)
        with self.store.change("submit"):
            running = self.store.running()
            for each in valid:
                each["projects_dir"] = str(self.settings.projects_dir)
                each["job_submitter"] = caller or each["job_submitter"] or _user()
                before = self.store.submit(each, now)
                active = running is not None and running["job_name"] == each["job_name"]
                answers.append(_answer(each, before in ("queued", "held"), active))
        self._doorbell.ring()
        return answers

    def delete_job(self, job_name: str) -> dict[str, Any]:
        """Take a job out of the queue; a run under way goes on to its end (`cancel` ends that)."""
        with self.store.change():
            there = f"state != 'out' OR cause IN {FALLEN}"
            job = self._known(job_name, f"SELECT job_name FROM jobs WHERE {there}", "is not in the queue")
            self.store.move_job(job_name, "out", "deleted", time.time(), "deleted")
        return job

    def queue(self) -> list[dict[str, Any]]:
        """The jobs in the queue in the order in which they will run, the running one with its `phase`, the others with
        `why` they do not start now (`turns.reasons`).
        """
        running, state, now = self.store.running(), self.state(), time.time()
        rows = sorted(self.store.rows(QUEUED), key=order)
        for row, why in zip(rows, turns.reasons(rows, state, now), strict=True):
            row["why"] = why
            active = running is not None and running["job_name"] == row["job_name"]
            row["force_run"] = bool(row["force_run"])
            row["running"] = active
            row["phase"] = next(reversed(json.loads(running["phases"])), None) if running and active else None
        return sorted(rows, key=lambda row: not row["running"])

    def state(self) -> dict[str, Any]:
        """The queue as a whole: `paused`, `hold` (reason, since, until, tries), `drain` (why it waits for one),
        `runner` (is there one), `running`, `next_cycle` (when it begins; None: after the jobs of this one).
        """
        running, cycle = self.store.running(), self.store.get("cycle", {"number": 0, "drained": None})
        begins = cycle["drained"] and cycle["drained"] + self.settings.cycle_interval_seconds
        return {
            "paused": bool(self.store.get("paused")),
            "hold": self.store.get("hold"),
            "drain": self.store.held_by_drain(),
            "runner": self._doorbell.ring(),
            "cycle": cycle["number"],
            "next_cycle": begins,
            "running": {key: running[key] for key in ("job_name", "run", "started")} if running else None,
        }

    def fallen(self) -> list[dict[str, Any]]:
        """The jobs that left by a failure and were not brought back, replaced or deleted since, newest first.

        Of each: job_name, group_name, cause ("failed", "group failed"), reason, left, and `requeue`: the name that
        brings it back with its group.
        """
        columns = "job_name, group_name, cause, reason, left_at AS left, coalesce(group_name, job_name) AS requeue"
        query = f"SELECT {columns} FROM jobs WHERE state = 'out' AND cause IN ('failed', 'group failed')"
        rows = self.store.rows(f"{query} ORDER BY left_at DESC, cause, number")
        return [row | {"left": _moment(row["left"])} for row in rows]

    def history(self, job_name: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """Runs, newest first: state, start_time, end_time, seconds, phases, counts, attempts, exception."""
        where = " WHERE job_name = ?" if job_name else ""
        values = [job_name] if job_name else []
        rows = self.store.rows(f"{_HISTORY}{where} ORDER BY id DESC LIMIT ?", *values, -1 if limit is None else limit)
        return [_told(row) for row in rows]

    def show(self, job_name: str) -> dict[str, Any]:
        """A job's whole story: `job`, `state`, `reason`, `runs` (newest first), `events`, `estimate`."""
        self._known(job_name, "SELECT job_name FROM jobs", "is not known")
        row = self.store.job(job_name) or {}
        events = self.store.rows("SELECT time, run, text FROM events WHERE job_name = ? ORDER BY id", job_name)
        return {
            **{key: row[key] for key in ("job_name", "state", "reason")},
            "job": row["spec"],
            "runs": self.history(job_name),
            "estimate": self.estimate_next_runtime(job_name),
            "events": [each | {"time": _moment(each["time"])} for each in events],
        }

    def requeue(self, group: str) -> list[str]:
        """Bring back the jobs of a group that left because of a failure (or one job by its name); gives the names.

        One that failed and stayed, or waits for a retry, is to run at once, with all its retries again.
        """
        now = time.time()
        with self.store.change() as db:
            wanted = f"state = 'out' OR cause IN {FALLEN}"
            rows = self.store.rows(f"SELECT job_name, cause, group_name FROM jobs WHERE {wanted} ORDER BY number")
            fallen = [row for row in rows if row["cause"] in FALLEN]
            names = [row["job_name"] for row in fallen if row["group_name"] == group]
            names = names or [row["job_name"] for row in rows if row["job_name"] == group]
            if not names:
                groups = {row["group_name"] or row["job_name"] for row in fallen}
                hint = f"; to be had: {', '.join(sorted(groups)[:10])}" if groups else "; nothing waits to be requeued"
                raise UsageError(f"no job of the group {group!r} left the queue by a failure{hint}")
            for name in names:
                db.execute("UPDATE jobs SET cycle = 0, tries = 0, retry_at = NULL WHERE job_name = ?", (name,))
                self.store.move_job(name, "queued", None, now)
        self._doorbell.ring()
        return names

    def cancel(self, job_name: str) -> int:
        """End the run of this job that is under way; gives its number. `run_once` jobs leave the queue by it."""
        with self.store.change() as db:
            running = self.store.running()
            if not running or running["job_name"] != job_name:
                raise UsageError(f"job {job_name!r} is not running; `mrcore delete {job_name}` takes it from the queue")
            db.execute("UPDATE runs SET cancel = 1 WHERE state = 'running'")
        self._doorbell.ring()
        return int(running["run"])

    def ledger(self, job_name: str) -> list[dict[str, Any]]:
        """What a `hold_state` job has read: path, holder (a node; None: whichever), bytes, modified, run."""
        run, _, entries = ledger.read(self.store, job_name)
        if run is None:
            self._known(job_name, "SELECT job_name FROM ledgers WHERE held", "has no ledger")
        return [
            {"path": path, "holder": holder or None, "bytes": entry[0], "modified": _moment(entry[1] / 1e9), "run": run}
            for (holder, path), entry in sorted(entries.items())
        ]

    def forget_ledger(self, job_name: str) -> int:
        """Have a `hold_state` job's next run read all inputs and replace the output; gives the number of files."""
        return ledger.forget(self.store, job_name)

    def pause(self) -> None:
        """Start no further run until `resume`; the one under way goes on."""
        self.store.put("paused", True)

    def resume(self) -> None:
        """End a pause, and end a hold's waiting: the queue tries again at once."""
        self.store.put("paused", False)
        self.end_hold()

    def end_hold(self) -> None:
        """End a hold's waiting, not a pause: what it waited for may be there now."""
        with self.store.change():
            if hold := self.store.get("hold"):
                self.store.put("hold", hold | {"until": time.time()})
        self._doorbell.ring()

    def estimate_next_runtime(self, job_name: str) -> dict[str, float] | None:
        """Median and range in seconds of the last successful runs, and their number; None with fewer than two."""
        return self.estimates(job_name).get(job_name)

    def estimates(self, job_name: str | None = None) -> dict[str, dict[str, float]]:
        """`estimate_next_runtime` of one job or of all, by name; jobs without enough data are missing."""
        times: dict[str, list[float]] = {}
        where = "WHERE state = 'succeeded' AND ? IN (job_name, '')"
        query = f"SELECT job_name, ended - started AS seconds FROM runs {where} ORDER BY id DESC"
        for row in self.store.rows(query, job_name or ""):
            times.setdefault(row["job_name"], []).append(row["seconds"])
        newest = {name: each[:ESTIMATE_RUNS] for name, each in times.items() if len(each) > 1}
        keys = ("median_seconds", "min_seconds", "max_seconds", "runs")
        return {
            name: dict(zip(keys, (statistics.median(each), min(each), max(each), len(each)), strict=True))
            for name, each in newest.items()
        }

    def _known(self, name: str, query: str, problem: str) -> dict[str, Any]:
        rows = self.store.rows(query)
        found = [row for row in rows if row["job_name"] == name]
        if not found:
            raise UsageError(f"job {name!r} {problem}{nearest(name, [row['job_name'] for row in rows])}")
        return found[0]


def _answer(job: dict[str, Any], replaced: bool, active: bool) -> dict[str, Any]:
    recurs = not job["run_once"]
    text = "replaces the one in the queue" if replaced else "queued"
    text += "; the run under way goes on, this is for the next" if active else ""
    often = f"every {job['every']:g} s at most" if job["every"] else "each cycle"
    text += f"; it recurs {often} (run_once: true runs it once)" if recurs else "; it runs once"
    return {"job_name": job["job_name"], "replaced": replaced, "recurs": recurs, "message": text}


def _user() -> str:
    """Return who submits: by the process's number, not by LOGNAME and USER, which anyone may set and sudo -E keeps."""
    with contextlib.suppress(KeyError):  # a number that no user has
        return one_line(pwd.getpwuid(os.getuid()).pw_name, 100)
    return str(os.getuid())


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="milliseconds")


def _told(row: dict[str, Any]) -> dict[str, Any]:
    """A run's row as listings show it."""
    started, ended = row.pop("started"), row.pop("ended")
    row |= {key: json.loads(row[key]) for key in ("phases", "counts", "exception")}
    times = {"start_time": _moment(started), "end_time": _moment(ended)}
    for phase in row["phases"].values():
        phase["seconds"] = round((phase["ended"] or time.time()) - phase["started"], 3)
    return row | times | {"seconds": round((ended or time.time()) - started, 3)}
