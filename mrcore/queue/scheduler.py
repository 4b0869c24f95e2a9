"""Everything that can be asked of the queue, from any process, also while its Runner runs (`runner`)."""

from __future__ import annotations

import contextlib
import os
import pwd
import statistics
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from mrcore.errors import UsageError
from mrcore.queue import cycle
from mrcore.queue import job as jobs
from mrcore.queue.printed import with_printed
from mrcore.queue.runner import Runner
from mrcore.queue.why import Explanation, Known, explain
from mrcore.settings import sudo
from mrcore.settings.config import Settings, load_settings
from mrcore.settings.validation import nearest
from mrcore.state import ledger, manifest
from mrcore.state.doorbell import Doorbell
from mrcore.state.progress import Progress
from mrcore.state.store import FALLEN, JobRow, RunRow, Store
from mrcore.system.paths import close_home
from mrcore.text import listed, one_line

__all__ = ["Runner", "Scheduler"]

ESTIMATE_RUNS = 20
STALE_SECONDS = 5.0  # a Runner writes the progress each second: an older one without a Runner is a dead one's
EXPLAINED_RUNS = 20  # newest runs of a job that `why` looks at


class Scheduler:
    """Puts jobs into the queue, takes them out, and shows them."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = sudo.require_owner(settings or load_settings())
        if self.settings.local:
            close_home(self.settings.home)
        self.store = Store(self.settings.state_dir)
        self._doorbell = Doorbell(self.settings.state_dir)

    def get_mapreduce_job_template(self) -> dict[str, Any]:
        """Return a mapreduce job with every key."""
        return jobs.template("mapreduce")

    def get_script_template(self) -> dict[str, Any]:
        """Return a script job with every key."""
        return jobs.template("script")

    def get_file_transfer_template(self) -> dict[str, Any]:
        """Return a file_transfer job with every key."""
        return jobs.template("file_transfer")

    def submit_job(self, job: dict[str, Any]) -> dict[str, Any]:
        """Validate and queue one job; it is on disk when this returns. See `submit_jobs`."""
        return self.submit_jobs([job])[0]

    def submit_jobs(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Queue all of these jobs or, if one of them has an error, none (UsageError naming every error).

        Return for each `{"job_name", "replaced", "recurs", "message"}`.
        """
        valid: list[dict[str, Any]] = []
        refusals: list[UsageError] = []
        for job in batch:
            try:
                valid.append(jobs.validate(job, self.settings.projects_dir))
            except UsageError as error:
                refusals.append(error)
        names = [job["job_name"] for job in valid]
        for name in sorted({name for name in names if names.count(name) > 1}):
            refusals.append(UsageError(f"job {name!r} stands in the list more than once", faults=[name]))
        if refusals:
            errors = [text for error in refusals for text in error.details.get("faults", [error.message])]
            raise UsageError(listed(error.message for error in refusals), faults=errors)
        now, answers, caller = time.time(), [], sudo.submitter(self.settings)
        with self.store.change("submit"):
            running = self.store.running()
            for job in valid:
                job["projects_dir"] = str(self.settings.projects_dir)
                job["job_submitter"] = caller or job["job_submitter"] or _user()
                before = self.store.submit(job, now)
                active = running is not None and running.job_name == job["job_name"]
                answers.append(_answer(job, before in ("queued", "held"), active))
        self._doorbell.ring()
        return answers

    def delete_job(self, job_name: str) -> dict[str, Any]:
        """Take a job out of the queue; a run under way goes on to its end (`cancel` ends that)."""
        with self.store.change():
            job = self.store.job(job_name)
            if not job or not _requeueable(job, "queued", "held"):
                raise _unknown(job_name, "is not in the queue", self._names_in_the_queue())
            self.store.move_job(job_name, "out", "deleted", time.time(), "deleted")
        return {"job_name": job_name}

    def queue(self) -> list[dict[str, Any]]:
        """Return the jobs in the queue in the order in which they will run, the running one with its `phase` and its
        `progress`, the others with `why` they do not start now: {"code", "text", "until", "behind"}; the last two may
        be None.
        """
        running, state, now = self.store.running(), self._state(), time.time()
        progress = msgspec.to_builtins(self.progress())
        rows = sorted(self.store.queued(), key=cycle.order)
        answers = []
        for row, why in zip(rows, cycle.reasons(rows, state, now), strict=True):
            active = running is not None and running.job_name == row.job_name
            phase = next(reversed(running.phases), None) if running and active else None
            shown = {key: value for key, value in row._asdict().items() if key not in ("spec_json", "left_at")}
            more = {"running": active, "phase": phase, "progress": progress if active else None}
            answers.append(shown | {"why": why._asdict(), **more})
        return sorted(answers, key=lambda answer: not answer["running"])

    def _state(self) -> cycle.State:
        now, running = self.store.cycle(), self.store.running()
        return cycle.State(
            paused=bool(self.store.get("paused")),
            hold=self.store.hold(),
            drain=self.store.held_by_drain(),
            runner=self._doorbell.ring(),
            cycle=now.number,
            next_cycle=now.drained and now.drained + self.settings.cycle_interval_seconds,
            running=running.job_name if running else None,
        )

    def state(self) -> dict[str, Any]:
        """Return the queue as a whole: `paused`, `hold` (reason, since, until, tries), `drain` (why it waits for one),
        `runner` (is there one), `running`, `next_cycle` (when it begins; None: after the jobs of this one).
        """
        state, running = self._state(), self.store.running()
        facts = {"job_name": running.job_name, "run": running.run, "started": running.started} if running else None
        return state._asdict() | {"hold": msgspec.to_builtins(state.hold), "running": facts}

    def progress(self) -> Progress | None:
        """Return how far the run under way is, about a second old; None: there is none, it has just begun, or its
        Runner is no more.
        """
        seen = self.store.progress()
        stale = seen is not None and time.time() - seen.updated > STALE_SECONDS and not self.has_runner()
        return None if stale else seen

    def has_runner(self) -> bool:
        """Return whether a Runner drains the queue."""
        return self._doorbell.is_heard()

    def fallen(self) -> list[dict[str, Any]]:
        """Return the jobs that left by a failure and were not brought back, replaced or deleted since, newest first.

        Of each: job_name, group_name, cause ("failed", "group failed"), reason, left, and `requeue`: the name that
        brings it back with its group.
        """
        rows = [row for row in self.store.fallen() if row.state == "out" and row.cause != "cancelled"]
        rows.sort(key=lambda row: (-(row.left_at or 0), row.cause, row.number))
        keys = ("job_name", "group_name", "cause", "reason")
        return [
            {key: getattr(row, key) for key in keys}
            | {"left": _moment(row.left_at), "requeue": row.group_name or row.job_name}
            for row in rows
        ]

    def history(
        self, job_name: str | None = None, limit: int | None = None, failed: bool = False
    ) -> list[dict[str, Any]]:
        """Return runs, newest first: state, start_time, end_time, seconds, phases, counts, attempts, exception.

        With `failed` only those that failed.
        """
        return [_shown(run) for run in self.store.runs(job_name, limit, "failed" if failed else None)]

    def run(self, job_name: str, run: int) -> dict[str, Any]:
        """Return one run as `history` does, with its `detail` (see `state.progress`; None: nothing was noted)."""
        row = self.store.run(job_name, run)
        if row is None:
            known = sorted(self.store.run_numbers(job_name))
            kept = f"those in the history: {known[0]} to {known[-1]}" if known else "it has none in the history"
            raise UsageError(f"job {job_name!r} has no run {run}; {kept}")
        return _shown(row) | {"detail": msgspec.to_builtins(self.store.detail(job_name, run))}

    def show(self, job_name: str) -> dict[str, Any]:
        """Return a job's whole story: `job`, `state`, `reason`, `runs` (newest first), `events`, `estimate`,
        `progress` of the run under way.
        """
        progress = self.progress()
        row = self.store.job(job_name)
        if row is None:
            raise _unknown(job_name, "is not known", self.store.last_runs(), self.settings.state_dir)
        return {
            "job_name": job_name,
            "state": row.state,
            "reason": row.reason,
            "job": row.spec,
            "runs": self.history(job_name),
            "estimate": self.estimate_next_runtime(job_name),
            "progress": msgspec.to_builtins(progress) if progress and progress.job_name == job_name else None,
            "events": [event | {"time": _moment(event["time"])} for event in self.store.events(job_name)],
        }

    def why(self, job_name: str, printed: bool = False) -> Explanation:
        """Return why a job waits, is slow, failed, or what its last run left out: see `queue.why`.

        With `printed` also what the task, or the script, printed last, which may take `printed.LOG_SECONDS`.
        """
        store, now, progress = self.store, time.time(), self.progress()
        job, running = store.job(job_name), store.running()
        if job is None:
            raise _unknown(job_name, "is not known", store.last_runs())
        # The Runner goes on meanwhile: what is told is to be of one moment.
        state = self._state()._replace(running=running and running.job_name)
        others = [row for row in store.queued() if row.job_name != job_name]
        rows = sorted([*others, *([job] if job.state != "out" else [])], key=cycle.order)
        is_of_it = progress and running and (progress.job_name, progress.run) == (running.job_name, running.run)
        reasons = zip(rows, cycle.reasons(rows, state, now), strict=True)
        in_line = cycle.in_line(rows, state, now)
        place = next((place for place, row in enumerate(in_line) if row.job_name == job_name), None)
        runs, state_dir, drain = store.runs(job_name, EXPLAINED_RUNS), self.settings.state_dir, store.get("drain")
        details = ((run.run, store.detail(job_name, run.run)) for run in runs)
        detailed, detail = next((pair for pair in details if pair[1]), (None, None))
        group = [mate for mate in store.group(job.group_name) if mate.job_name != job_name]
        explanation = explain(
            Known(
                job=job,
                why=next((reason for row, reason in reasons if row.job_name == job_name), None),
                state=state,
                ahead=in_line[:place],
                running=running,
                progress=progress if is_of_it else None,
                committed=bool(running and manifest.path_of(state_dir, running.job_name, running.run).exists()),
                runs=runs,
                detail=detail,
                detailed=detailed,
                usual=self.estimates(),
                group=group,
                culprit=self._culprit(job, group),
                cut_off_drain=drain["source"] if drain and drain["moves"] else None,
                settings=self.settings,
                now=now,
            )
        )
        return with_printed(explanation, self.settings) if printed else explanation

    def _culprit(self, job: JobRow, group: list[JobRow]) -> RunRow | None:
        """Return the failed run for which a job left the queue, or was skipped, with its group."""
        if job.cause != "group failed":
            return None
        failed = [
            run for mate in group for run in self.store.runs(mate.job_name, EXPLAINED_RUNS) if run.state == "failed"
        ]
        # It left in the transaction that ended that run.
        failed.sort(key=lambda run: (run.ended == job.left_at, run.ended or 0), reverse=True)
        return failed[0] if failed else None

    def requeue(self, group: str) -> list[str]:
        """Bring back the jobs of a group that left because of a failure (or one job by its name); return the names.

        One that failed and stayed, or waits for a retry, is to run at once, with all its retries again.
        """
        with self.store.change():
            fallen = self.store.fallen()
            names = [row.job_name for row in fallen if row.group_name == group]
            if not names and (job := self.store.job(group)) and _requeueable(job, "out"):
                names = [group]
            if not names:
                groups = {row.group_name or row.job_name for row in fallen}
                hint = f"; to be had: {', '.join(sorted(groups)[:10])}" if groups else "; nothing waits to be requeued"
                raise UsageError(f"no job of the group {group!r} left the queue by a failure{hint}")
            for name in names:
                self.store.set_job(name, cycle=0, tries=0, retry_at=None)
                self.store.move_job(name, "queued", None, time.time())
        self._doorbell.ring()
        return names

    def cancel(self, job_name: str) -> int:
        """End the run of this job that is under way; return its number. `run_once` jobs leave the queue by it."""
        with self.store.change():
            running = self.store.running()
            if not running or running.job_name != job_name:
                raise UsageError(f"job {job_name!r} is not running; `mrcore delete {job_name}` takes it from the queue")
            self.store.cancel_running()
        self._doorbell.ring()
        return running.run

    def ledger(self, job_name: str) -> list[dict[str, Any]]:
        """Return what a `hold_state` job has read: path, holder (a node; None: whichever), bytes, modified, run."""
        run, _, entries = ledger.read(self.store, job_name)
        if run is None:
            raise _unknown(job_name, "has no ledger", ledger.job_names(self.store), self.settings.state_dir)
        return [
            {
                "path": path,
                "holder": holder or None,
                "bytes": entry.read,
                "modified": _moment(entry.mtime_ns / 1e9),
                "run": run,
            }
            for (holder, path), entry in sorted(entries.items())
        ]

    def forget_ledger(self, job_name: str) -> int:
        """Have a `hold_state` job's next run read all inputs and replace the output; return the number of files."""
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
            if hold := self.store.hold():
                self.store.set_hold(msgspec.structs.replace(hold, until=time.time()))
        self._doorbell.ring()

    def estimate_next_runtime(self, job_name: str) -> dict[str, float] | None:
        """Return median and range in seconds of the last successful runs, and their number; None: fewer than two."""
        return self.estimates(job_name).get(job_name)

    def estimates(self, job_name: str | None = None) -> dict[str, dict[str, float]]:
        """`estimate_next_runtime` of one job or of all, by name; jobs without enough data are missing."""
        times: dict[str, list[float]] = {}
        for name, seconds in self.store.run_seconds(job_name):
            times.setdefault(name, []).append(seconds)
        newest = {name: some[:ESTIMATE_RUNS] for name, some in times.items() if len(some) > 1}
        keys = ("median_seconds", "min_seconds", "max_seconds", "runs")
        return {
            name: dict(zip(keys, (statistics.median(some), min(some), max(some), len(some)), strict=True))
            for name, some in newest.items()
        }

    def _names_in_the_queue(self) -> list[str]:
        return [row.job_name for row in (*self.store.queued(), *self.store.fallen())]


def _requeueable(job: JobRow, *states: str) -> bool:
    """Return whether a job is in one of these states, or what a failure left of it may still be acted on."""
    return job.state in states or job.cause in FALLEN


def _unknown(name: str, problem: str, known: Iterable[str], where: Path | None = None) -> UsageError:
    names = list(known)
    more = f": nothing is in {where}" if where and not names else nearest(name, names)
    return UsageError(f"job {name!r} {problem}{more}")


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


def _shown(run: RunRow) -> dict[str, Any]:
    """Return a run as listings show it."""
    phases = {
        phase: times | {"seconds": round((times["ended"] or time.time()) - times["started"], 3)}
        for phase, times in run.phases.items()
    }
    keys = ("job_name", "run", "state", "job_type", "group_name", "counts", "attempts", "exception")
    return {key: getattr(run, key) for key in keys} | {
        "phases": phases,
        "start_time": _moment(run.started),
        "end_time": _moment(run.ended),
        "seconds": round((run.ended or time.time()) - run.started, 3),
    }
