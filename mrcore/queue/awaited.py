"""What has become of submitted jobs: the ending of each one's next run, for those who wait for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mrcore.state.store import JobRow, RunRow, Store

RUNS_LOOKED_AT = 20  # newest of a job: those that were handed back stand between


class Outcome(NamedTuple):
    """How the wait for a job has ended. `state`: an ending of its `run`; "left" without one, for the reason `why`."""

    job_name: str
    run: int | None
    state: str
    why: str | None = None
    job_type: str = "mapreduce"
    seconds: float = 0.0
    stays: bool = False  # in the queue

    @property
    def good(self) -> bool:
        """Return whether the run has succeeded."""
        return self.state == "succeeded"


def outcome(job: JobRow | None, runs: Iterable[RunRow], number: int) -> Outcome | None:
    """Return how the wait for a job has ended that was submitted as `number`; None: it goes on.

    `runs`: its runs, newest first. One that was handed back runs again, one that failed may be tried again: both are
    waited for. A submission that replaced this one is waited for in its place.
    """
    if job is None:
        return None
    in_queue = job.state != "out"
    last = next((run for run in runs if run.number >= number and run.state != "handed back"), None)
    if last and last.state == "running":
        return None
    if last and not (in_queue and job.retry_at and last.state == "failed"):
        why = (last.exception or {}).get("message") if last.state != "succeeded" else None
        seconds = (last.ended or last.started) - last.started
        return Outcome(job.job_name, last.run, last.state, why, job.job_type, seconds, in_queue)
    if not last and (not in_queue or job.cause == "group failed"):
        return Outcome(job.job_name, None, "left", job.reason, job.job_type, stays=in_queue)
    return None


class Awaited:
    """Jobs in the queue, of which the ends are waited for: of runs after `run`."""

    def __init__(self, store: Store, names: Iterable[str], run: int = 0) -> None:
        self._store, self._run = store, run
        jobs = [job for name in names if (job := store.job(name))]
        self.left = {job.job_name: job.number for job in jobs}
        self.ended: list[Outcome] = []

    def look(self) -> list[Outcome]:
        """Return the ends that have come since the last look."""
        news = []
        for name, number in list(self.left.items()):
            runs = (row for row in self._store.runs(name, RUNS_LOOKED_AT) if row.run > self._run)
            if found := outcome(self._store.job(name), runs, number):
                del self.left[name]
                news.append(found)
        self.ended += news
        return news

    @property
    def running(self) -> bool:
        """Return whether one of those that are left runs now."""
        running = self._store.running()
        return running is not None and running.job_name in self.left
