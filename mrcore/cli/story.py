"""What `mrcore show` prints: a job with its newest runs, or all that is known of one run."""

from __future__ import annotations

import json
from typing import Any

import click

from mrcore.cli import common, live
from mrcore.cli.tables import print_states
from mrcore.text import one_line, size

RUNS = 10  # of a job, newest first
TASKS = 10  # slowest tries of tasks of a run


def print_job(story: dict[str, Any]) -> None:
    """Print a job's keys and its newest runs."""
    reason = (" (", story["reason"], ")") if story["reason"] else ()
    print_states(f"{story['job_name']}: ", story["state"], *reason)
    if story["progress"]:
        click.echo(f"run {story['progress']['run']} is under way: {live.running(None, story['progress'])}")
    for key, value in story["job"].items():
        if value is not None:
            click.echo(f"  {key}: {json.dumps(value, ensure_ascii=False)}")
    for row in story["runs"][:RUNS]:
        _print_head(row)


def print_run(row: dict[str, Any]) -> None:
    """Print a run: its phases, counts and error, and what its tasks and servers did."""
    _print_head(row)
    if detail := row["detail"]:
        _print_detail(detail)
    for path in row["profiles"]:
        click.echo(f"flame graph: {one_line(path)}")


def _print_head(row: dict[str, Any]) -> None:
    print_states(f"run {row['run']}: ", row["state"], f", {row['start_time'][:19]}, {common.duration(row['seconds'])}")
    for phase, times in row["phases"].items():
        click.echo(f"  {phase}: {common.duration(times['seconds'])}")
    for name, count in row["counts"].items():
        by_reason = count.items() if isinstance(count, dict) else ()
        click.echo(f"  {name}: {', '.join(f'{number} {reason}' for reason, number in by_reason) or count}")
    if row["exception"]:
        click.echo(f"  {row['exception']['class']}: {row['exception']['message']}")
        details = dict(row["exception"]["details"])
        kinds = ("traceback", "internal_traceback", "stack")
        frames = next((details.pop(kind) for kind in kinds if details.get(kind)), None)
        for name, value in details.items():
            click.echo(f"  {name}: {one_line(value)}")
        if frames:
            lines = frames if isinstance(frames, str) else "".join(frames)
            click.echo("\n".join(f"    {line}" for line in lines.splitlines()))


def _print_detail(detail: dict[str, Any]) -> None:
    """Print what servers and tasks did in a run; each part only if there is something to say."""
    if detail["counters"]:
        click.echo("counted by its functions:")
        for name, count in sorted(detail["counters"].items()):
            click.echo(f"  {one_line(name, 100)}: {count:,}")
    _table(
        "servers by phase:", detail["servers"],
        {"phase": "PHASE", "server": "SERVER", "node": "NODE", "tasks": "TASKS", "seconds": "AT WORK", "bytes": "BYTES",
         "records": "RECORDS"},
    )  # fmt: skip
    tasks = {"phase": "PHASE", "task": "TASK", "try_": "TRY", "server": "SERVER", "node": "NODE", "seconds": "TOOK"}
    done = {"bytes": "BYTES", "records": "RECORDS", "peak_bytes": "MEMORY", "outcome": "OUTCOME"}
    _table("slowest tasks:", detail["slowest"][:TASKS], tasks | done)
    _table("tasks that died:", detail["deaths"], tasks | {"why": "WHY"})
    _table(
        "keys with the most values:", detail["heavy_keys"], {"values": "VALUES", "partition": "PARTITION", "key": "KEY"}
    )
    if detail["largest_partition_bytes"]:
        largest, median = (size(detail[f"{which}_partition_bytes"]) for which in ("largest", "median"))
        click.echo(f"partitions: the largest has {largest}, the median {median}")


def _table(title: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    if not rows:
        return
    click.echo(title)
    sizes, shown = ("bytes", "peak_bytes"), []
    for row in rows:
        text: dict[str, Any] = {"seconds": common.duration(row.get("seconds"))}
        text |= {key: size(row[key]) for key in sizes if key in row}
        text |= {key: f"{row[key]:,}" for key in ("records", "values") if key in row}
        shown.append(row | text)
    common.print_table(shown, columns)
