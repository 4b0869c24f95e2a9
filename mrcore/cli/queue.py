"""The commands that show and change the queue: what waits, what ran, what becomes of it."""

from __future__ import annotations

import shlex
import time
from typing import Any

import click

from mrcore.cli import common
from mrcore.text import one_line

GROUP = "Queue"
MAX_FALLEN = 10  # jobs and groups that left by a failure, as `queue` lists them


@click.command()
@common.JSON
def queue(as_json: bool) -> None:
    """List what waits in the queue, and what left by a failure.

    The order is that in which it will run; WHY says what each job waits for.
    """
    from mrcore.cli import live

    scheduler = common.scheduler_in_force()
    state, rows, fallen = scheduler.state(), scheduler.queue(), scheduler.fallen()
    estimates = scheduler.estimates()
    rows = [row | {"estimate": estimates.get(row["job_name"])} for row in rows]
    where = str(scheduler.settings.state_dir)
    if as_json:
        return common.print_json(state | {"state_dir": where, "jobs": rows, "left_by_a_failure": fallen})
    for row in rows:
        estimate = row["estimate"]
        row["state"] = live.running(row["phase"], row["progress"]) if row["running"] else row["state"]
        priority = f"{row['job_priority']:g}" if row["job_priority"] else None
        row["job_priority"] = "force_run" if row["force_run"] else priority
        row["estimate"] = common.duration(estimate["median_seconds"]) if estimate else None
        row["why"] = row["why"]["text"]
    columns = {"job_name": "JOB", "state": "STATE", "group_name": "GROUP", "job_priority": "PRIORITY"}
    columns |= {"last_run": "RUNS", "estimate": "USUALLY", "why": "WHY"}
    if rows:
        spare = (("job_priority", None), ("estimate", None), ("last_run", None), ("group_name", None))
        columns = {key: title for key, title in columns.items() if any(row[key] is not None for row in rows)}
        common.print_table(rows, columns, spare)
    else:
        click.echo(f"the queue of {one_line(where)} is empty: `mrcore submit FILE` queues a job")
    _print_fallen(fallen)
    if state["paused"]:
        click.echo("the queue is paused: `mrcore resume` goes on")
    if state["drain"]:
        click.echo(f"the queue waits: {state['drain']}")
    if state["hold"]:
        wait = state["hold"]["until"] - time.time()
        what = f"next try in {wait:.0f} s, or `mrcore resume`" if wait > 0 else "trying again now"
        click.echo(f"the queue holds: {one_line(state['hold']['reason'])} ({what})")
    if rows and not state["runner"]:
        click.echo("no Runner drains this queue now: `mrcore run` does")
    return None


def _print_fallen(rows: list[dict[str, Any]]) -> None:
    """Print what left by a failure, each group once, and how to bring it back."""
    together: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        together.setdefault(row["requeue"], []).append(row)
    for name, jobs in list(together.items())[:MAX_FALLEN]:
        first = min(jobs, key=lambda row: row["cause"] != "failed")
        others = f", and {len(jobs) - 1} of its group with it" if len(jobs) > 1 else ""
        click.echo(f"{first['job_name']} left the queue at {first['left'][:16].replace('T', ' ')}{others}: ", nl=False)
        click.echo(f"{one_line(first['reason'], 300)}; `mrcore requeue {shlex.quote(name)}` brings back what left")
    if len(together) > MAX_FALLEN:
        click.echo(f"and {len(together) - MAX_FALLEN} others left by a failure: `mrcore queue --json` has them all")


@click.command()
@click.argument("job", required=False)
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Newest runs to list.")
@click.option("--failed", is_flag=True, help="Only runs that failed.")
@common.JSON
def history(job: str | None, limit: int, failed: bool, as_json: bool) -> None:
    """List the runs of all jobs or of one, newest first."""
    scheduler = common.scheduler_in_force()
    rows = scheduler.history(job, limit, failed)
    if as_json:
        return common.print_json(rows)
    if not rows:
        whose = (f"{one_line(job)} has no run" if job else "there is no run") + (" that failed" if failed else "")
        click.echo(
            f"{whose} in the history of {one_line(scheduler.settings.state_dir)}: `mrcore run` runs what is queued"
        )
        return None
    for row in rows:
        row["start"] = row["start_time"][:19].replace("T", " ")
        row["day"] = row["start"][5:16]
        row["took"] = common.duration(row["seconds"])
        row["error"] = (row["exception"] or {}).get("message")
    columns = {"job_name": "JOB", "run": "RUN", "state": "STATE", "start": "START", "took": "TOOK", "error": "WHY"}
    common.print_table(rows, columns, (("start", "day"), ("took", None), ("start", None)))
    return None


@click.command()
@click.argument("job")
@click.option("--run", type=click.IntRange(1), metavar="N", help="All that is known of that run.")
@common.JSON
def show(job: str, run: int | None, as_json: bool) -> None:
    """Tell a job's story: its keys, runs, counts and errors.

    With --run N it is that run's: also what its servers and tasks did.
    """
    from mrcore.cli import story
    from mrcore.state import profiles

    scheduler = common.scheduler_in_force()
    told = scheduler.show(job) if run is None else scheduler.run(job, run)
    if run is not None:
        told["profiles"] = sorted(map(str, profiles.paths(scheduler.settings.state_dir, job, run)))
    if as_json:
        return common.print_json(told)
    if run is None:
        return story.print_job(told)
    return story.print_run(told)


@click.command()
@click.argument("job")
def delete(job: str) -> None:
    """Take a job out of the queue; a run under way goes on.

    Also off the list of those that left by a failure.
    """
    common.scheduler_in_force().delete_job(job)
    click.echo(f"{job} is out of the queue; its output stays where it is")


@click.command()
@click.argument("group")
def requeue(group: str) -> None:
    """Bring back a job, or a group, that left by a failure.

    What waits for a retry runs at once.
    """
    click.echo(f"queued again: {', '.join(common.scheduler_in_force().requeue(group))}")


@click.command()
@click.argument("job")
def cancel(job: str) -> None:
    """End the run of a job that is under way."""
    click.echo(f"run {common.scheduler_in_force().cancel(job)} of {job} is told to end")


@click.command()
def pause() -> None:
    """Start no further run until `mrcore resume`."""
    common.scheduler_in_force().pause()
    click.echo("paused; a run under way goes on")


@click.command()
def resume() -> None:
    """End a pause, or a hold's waiting."""
    common.scheduler_in_force().resume()
    click.echo("the queue goes on")


COMMANDS = (queue, history, show, delete, requeue, cancel, pause, resume)
