"""Whose turn it is: which queued job runs next, when the next cycle begins, and why each job does not run now.

Pure: rows of the queue and a clock go in. A job has one turn in each cycle.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple

from mrcore.state.store import Cycle, Hold, JobRow
from mrcore.text import rough

FAILED_PAUSE_SECONDS = 5.0  # at least, before a cycle in which a job that has just failed and stays runs again


class State(NamedTuple):
    """The queue as a whole."""

    paused: bool
    hold: Hold | None
    drain: str | None  # why the queue waits for a drain
    runner: bool  # whether there is one
    cycle: int
    next_cycle: float | None  # when it begins; None: after the jobs of this one
    running: str | None  # the job


class Why(NamedTuple):
    """Why a job does not start now: a code for programs, a text for people, until when, behind which job."""

    code: str
    text: str
    until: float | None = None
    behind: str | None = None


def order(row: JobRow) -> tuple[bool, float, int]:
    """Return the sort key of queued jobs: forced ones, then the highest priority, then the order of submission."""
    return not row.force_run, -row.job_priority, row.number


def due(row: JobRow) -> float:
    """Return from when a queued job may start (0: at once). `force_run` waits for nothing, a retry for its time."""
    if row.force_run:
        return 0.0
    if row.retry_at:
        return row.retry_at
    return max(_first(row), row.last_start + row.every if row.every and row.last_start else 0.0)


def _first(row: JobRow) -> float:
    return datetime.fromisoformat(row.not_before).timestamp() if row.not_before else 0.0


def its_turn(row: JobRow, cycle: int) -> bool:
    """Return whether a job has not run in this cycle yet, or is to be tried again, in whichever cycle."""
    return bool(row.cycle < cycle or row.retry_at)


def retrying(rows: Iterable[JobRow]) -> dict[str | None, JobRow]:
    """Return the jobs that wait for a retry, by their groups."""
    return {row.group_name: row for row in rows if row.retry_at and row.group_name}


def held_by_retry(row: JobRow, groups: dict[str | None, JobRow]) -> JobRow | None:
    """Return the job for whose retry one of its group waits: a step must not overtake the one before it."""
    return None if row.force_run or row.retry_at else groups.get(row.group_name)


def ready(rows: list[JobRow], cycle: int, now: float) -> list[JobRow]:
    """Return the jobs that could start now, in the order in which they would."""
    groups = retrying(rows)
    return sorted((r for r in rows if its_turn(r, cycle) and due(r) <= now and not held_by_retry(r, groups)), key=order)


def needs_nodes(job_type: str) -> bool:
    """Return whether a job needs the cluster's nodes; scripts run on the master alone."""
    return job_type != "script"


def without_nodes(rows: list[JobRow], cycle: int) -> list[JobRow]:
    """Return those that may run while no node answers: scripts, but none that overtakes a job of its group."""
    waiting: set[str | None] = set()
    free = []
    for row in sorted(rows, key=order):
        if needs_nodes(row.job_type) and its_turn(row, cycle):
            waiting.add(row.group_name)
        elif not needs_nodes(row.job_type) and (row.group_name is None or row.group_name not in waiting):
            free.append(row)
    return free


def until_next_cycle(rows: list[JobRow], cycle: Cycle, interval_seconds: float, now: float) -> tuple[float, bool]:
    """Return the seconds until a job may be due once this cycle is done (inf: none is), and whether the next begins."""
    pause = FAILED_PAUSE_SECONDS if any(row.cause == "failed" for row in rows) else 0.0
    begins = (cycle.drained or now) + max(interval_seconds, pause)
    groups = retrying(rows)
    waiting = (row for row in rows if not held_by_retry(row, groups))
    soonest = min(
        (max(due(row), 0 if its_turn(row, cycle.number) else begins) for row in waiting), default=float("inf")
    )
    return soonest - now, begins <= now and soonest <= now


def until_retry(rows: list[JobRow], now: float) -> float | None:
    """Return the seconds until the next retry of a failed job; None: there is none to wait for."""
    return min((row.retry_at - now for row in rows if row.retry_at), default=None)


def allowed(rows: list[JobRow], state: State) -> list[JobRow]:
    """Return the jobs that a hold lets start: all, without one."""
    return rows if not state.hold else without_nodes(rows, state.cycle) if state.hold.nodes else []


def in_line(rows: list[JobRow], state: State, now: float) -> list[JobRow]:
    """Return the jobs that run one after another once the run under way ends, in that order."""
    return ready([row for row in allowed(rows, state) if row.job_name != state.running], state.cycle, now)


def reasons(rows: list[JobRow], state: State, now: float) -> list[Why]:
    """Return why each queued job does not start now.

    A job's own time comes first, then what holds the whole queue, then the job before it.
    """
    hold, running = state.hold, state.running
    free, groups = {row.job_name for row in allowed(rows, state)}, retrying(rows)
    before, last = dict[str, str | None](), running
    for row in in_line(rows, state, now):
        before[row.job_name], last = last, row.job_name

    def why(row: JobRow) -> Why:
        until, mate = due(row), held_by_retry(row, groups)
        if row.job_name == running and not state.runner:
            return Why("no_runner", "its Runner has ended: the next one sees to its run")
        if row.job_name == running and hold and not hold.nodes and hold.until > now:
            return Why("hold", "its output waits for the cluster", hold.until)
        if row.job_name == running:
            return Why("running", "it runs")
        if until > now and row.retry_at:
            return Why("retry", f"retry {row.tries} of {row.retries} in {rough(until - now)}", until)
        if until > now and until == _first(row):
            return Why("not_before", f"not before {datetime.fromtimestamp(until):%Y-%m-%d %H:%M}", until)
        if until > now:
            return Why("every", f"every {rough(row.every or 0)} at most, so in {rough(until - now)}", until)
        if mate:
            return Why("group", f"behind the retry of {mate.job_name}, of its group", mate.retry_at, mate.job_name)
        if not state.runner:
            return Why("no_runner", "no Runner drains the queue")
        if state.paused:
            return Why("paused", "the queue is paused")
        if state.drain:
            return Why("drain", "the queue waits for a drain")
        if hold and row.job_name not in free:
            return Why("hold", "the queue holds", hold.until)
        if not its_turn(row, state.cycle):
            soon = state.next_cycle
            return Why("cycle", f"its next cycle{f', in {rough(max(0, soon - now))}' if soon else ''}", soon)
        if behind := before[row.job_name]:
            return Why("behind", f"behind {behind}" + (", which runs" if behind == running else ""), behind=behind)
        return Why("next", "it is next")

    after = {"failed": "; its last run failed", "group failed": "; skipped, since a job of its group failed"}
    answers = []
    for row in rows:
        answer = why(row)
        more = "" if answer.code in ("retry", "running") else after.get(row.cause or "", "")
        answers.append(answer._replace(text=answer.text + more))
    return answers
