"""Whose turn it is: which queued job runs next, and why each of the others does not run now. Pure: rows and a clock in.

A row is what `QUEUED` selects. `cycle` is the last cycle in which a job had its turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

QUEUED = (
    "SELECT job_name, state, reason, job_type, group_name, job_priority, force_run, every, not_before, "
    "submitted, cycle, last_run, last_start, number, cause, tries, retry_at, "
    "coalesce(json_extract(spec, '$.retries'), 0) AS retries FROM jobs WHERE state != 'out'"
)
Row = dict[str, Any]


def order(row: Row) -> tuple[bool, float, int]:
    """Sort key of queued jobs: forced ones, then the highest priority, then the order of submission."""
    return not row["force_run"], -row["job_priority"], row["number"]


def due(row: Row) -> float:
    """The time from which a queued job may start (0: at once). `force_run` waits for nothing, a retry for its time."""
    if row["force_run"]:
        return 0.0
    if row["retry_at"]:
        return float(row["retry_at"])
    return max(_first(row), row["last_start"] + row["every"] if row["every"] and row["last_start"] else 0.0)


def _first(row: Row) -> float:
    return datetime.fromisoformat(row["not_before"]).timestamp() if row["not_before"] else 0.0


def its_turn(row: Row, cycle: int) -> bool:
    """Whether a job has not run in this cycle yet, or is to be tried again, in whichever cycle."""
    return bool(row["cycle"] < cycle or row["retry_at"])


def retrying(rows: Iterable[Row]) -> dict[str, Row]:
    """The jobs that wait for a retry, by their groups."""
    return {row["group_name"]: row for row in rows if row["retry_at"] and row["group_name"]}


def held_by_retry(row: Row, groups: dict[str, Row]) -> Row | None:
    """The job for whose retry one of its group waits: a step of a workflow must not overtake the one before."""
    return None if row["force_run"] or row["retry_at"] else groups.get(row["group_name"])


def ready(rows: list[Row], cycle: int, now: float) -> list[Row]:
    """The jobs that could start now, in the order in which they would."""
    groups = retrying(rows)
    found = (row for row in rows if its_turn(row, cycle) and due(row) <= now and not held_by_retry(row, groups))
    return sorted(found, key=order)


def pick(rows: list[Row], cycle: int, now: float) -> Row | None:
    """The job to run next: of those that are due, whose turn it is and that nothing holds, the first by `order`."""
    return next(iter(ready(rows, cycle, now)), None)


def needs_nodes(row: Row) -> bool:
    """Whether a job needs the cluster's nodes; scripts run on the master alone."""
    return bool(row["job_type"] != "script")


def without_nodes(rows: list[Row], cycle: int) -> list[Row]:
    """Those that may run while no node answers: scripts, but none that overtakes a job of its group."""
    waiting: set[str] = set()
    found = []
    for row in sorted(rows, key=order):
        if needs_nodes(row) and its_turn(row, cycle):
            waiting.add(row["group_name"])
        elif not needs_nodes(row) and (row["group_name"] is None or row["group_name"] not in waiting):
            found.append(row)
    return found


def reasons(rows: list[Row], state: dict[str, Any], now: float) -> list[dict[str, Any]]:
    """Why each queued job does not start now: {"code", "text", "until", "behind"}; the last two may be None.

    `until` is in seconds since 1970, `behind` a job, `state` what `Scheduler.state` gives. A job's own time comes
    first, then what holds the whole queue, then the job before it.
    """
    running, hold = (state["running"] or {}).get("job_name"), state["hold"]
    allowed = without_nodes(rows, state["cycle"]) if hold and hold.get("nodes") else [] if hold else rows
    unheld, groups = {row["job_name"] for row in allowed}, retrying(rows)
    before, last = dict[str, str | None](), running
    for row in ready([row for row in allowed if row["job_name"] != running], state["cycle"], now):
        before[row["job_name"]], last = last, row["job_name"]

    def why(row: Row) -> tuple[str, str, float | None, str | None]:
        name, until, mate = row["job_name"], due(row), held_by_retry(row, groups)
        if name == running:
            return "running", "it runs", None, None
        if until > now and row["retry_at"]:
            return "retry", f"retry {row['tries']} of {row['retries']} in {told(until - now)}", until, None
        if until > now and until == _first(row):
            return "not_before", f"not before {datetime.fromtimestamp(until):%Y-%m-%d %H:%M}", until, None
        if until > now:
            return "every", f"every {told(row['every'])} at most, so in {told(until - now)}", until, None
        if mate:
            return "group", f"behind the retry of {mate['job_name']}, of its group", mate["retry_at"], mate["job_name"]
        if not state["runner"]:
            return "no_runner", "no Runner drains the queue", None, None
        if state["paused"]:
            return "paused", "the queue is paused", None, None
        if state["drain"]:
            return "drain", "the queue waits for a drain", None, None
        if name not in unheld:
            return "hold", "the queue holds", hold["until"], None
        if not its_turn(row, state["cycle"]):
            soon = state["next_cycle"]
            return "cycle", f"its next cycle{f', in {told(max(0, soon - now))}' if soon else ''}", soon, None
        if behind := before[name]:
            return "behind", f"behind {behind}" + (", which runs" if behind == running else ""), None, behind
        return "next", "it is next", None, None

    found = []
    after = {"failed": "; its last run failed", "group failed": "; skipped, since a job of its group failed"}
    for row in rows:
        code, text, until, behind = why(row)
        text += after.get(row["cause"], "") if code not in ("retry", "running") else ""
        found.append({"code": code, "text": text, "until": until, "behind": behind})
    return found


def told(seconds: float) -> str:
    """A length of time in one word and a unit, for people."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
