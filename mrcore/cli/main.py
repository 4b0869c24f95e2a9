"""The command line: parse, call, print. Listings take `--json`; an error is one line and a non-zero exit.

Heavy modules are imported inside the commands that need them, so that `mrcore --help` and completion stay quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from mrcore import __version__, text
from mrcore.cli import admin as cli_admin
from mrcore.cli import cluster as cli_cluster
from mrcore.cli import common
from mrcore.cli import files as cli_files
from mrcore.errors import MrcoreError, UsageError
from mrcore.system import terminal
from mrcore.text import escaped, one_line

MAX_JOB_FILE_BYTES = 10 << 20
MAX_FALLEN = 10  # jobs and groups that left by a failure, as `queue` lists them


def main(arguments: list[str] | None = None) -> None:
    """Run one command and leave with its exit status: 0, 1 (it failed), 2 (asked wrongly), 130 (Ctrl-C)."""
    given = sys.argv[1:] if arguments is None else arguments
    sys.exit(terminal.run(lambda: _obey(given)))


def _obey(given: list[str]) -> int | None:
    for argument in given:
        if why := text.unfit(argument):
            raise UsageError(f"the argument {argument!r} {why}")
    try:
        status: int | None = cli.main(given, prog_name="mrcore", standalone_mode=False, obj=given)
    except click.ClickException as error:
        vars(error)["message"] = one_line(error.message)  # it holds what was typed
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    return status


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--config", metavar="FILE", help="Settings; else MRCORE_CONFIG, /etc/mrcore/cluster.yml, local cluster.")
@click.version_option(__version__)
@click.pass_context
def cli(context: click.Context, config: str | None) -> None:
    """A Python MapReduce cluster with a durable job queue."""
    given = list(context.obj)
    while given and given[0].startswith("--config"):
        del given[: 1 if "=" in given[0] else 2]
    context.obj, context.meta[common.ARGUMENTS] = config, given


# --- jobs -------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("kind", type=click.Choice(["mapreduce", "script", "file_transfer"]))
def template(kind: str) -> None:
    """Print a commented YAML job with every key."""
    from mrcore.queue.job import job_template_yaml

    click.echo(job_template_yaml(kind), nl=False)


@cli.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE…", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Set a key of every job; VALUE is YAML.")
@common.JSON
def submit(files: tuple[Path, ...], changes: tuple[str, ...], as_json: bool) -> None:
    """Queue the jobs of YAML or common.JSON files (one job or a list each): all of them, or none if one has a fault.

    `-` reads standard input.
    """
    from mrcore.settings.validation import parse_yaml

    batch = [job for file in files for job in _read_jobs(file)]
    given: dict[str, Any] = {}
    for change in changes:
        key, equals, written = change.partition("=")
        if not equals:
            raise UsageError(f"--set {one_line(change)}: write KEY=VALUE")
        if key in given:
            raise UsageError(f"--set {key} is given twice: leave one of them out")
        given[key] = parse_yaml(written, f"the value of --set {one_line(key)}")
    batch = [job | given for job in batch]
    common.hand_over_jobs(batch, ["--json"] if as_json else [])
    scheduler = common.scheduler_in_force()
    answers = scheduler.submit_jobs(batch)
    if as_json:
        return common.print_json(answers)
    for answer in answers:
        click.echo(f"{answer['job_name']}: {answer['message']}")
    if not scheduler.state()["runner"]:
        click.echo("no Runner drains this queue now: `mrcore run` does", err=True)
    return None


def _read_jobs(file: Path) -> list[Any]:
    from mrcore.settings.validation import parse_yaml

    name = "standard input" if str(file) == "-" else str(file)
    with click.open_file(str(file), "rb") as stream:
        content = stream.read(MAX_JOB_FILE_BYTES + 1)
    if len(content) > MAX_JOB_FILE_BYTES:
        raise UsageError(
            f"{name} has more than {MAX_JOB_FILE_BYTES >> 20} MiB: a job file is small, is it the right one?"
        )
    value = parse_yaml(content, name)
    batch = value if isinstance(value, list) else [value]
    if not batch or not all(isinstance(job, dict) for job in batch):
        raise UsageError(f"{name} holds no job: it must be a mapping of keys to values or a list of them")
    return batch


@cli.command()
@click.option("--once", is_flag=True, help="End after one cycle of the queue.")
def run(once: bool) -> None:
    """Drain the queue: the Runner. Ctrl-C or SIGTERM hand the run under way back; a second one ends it at once.

    When the queue holds because of the cluster, this waits, also with --once; a paused queue it does not wait for.
    """
    from mrcore.queue.runner import Runner
    from mrcore.settings.config import watch_settings

    settings, fresh = common.settings_in_force(), watch_settings(click.get_current_context().find_root().obj)
    with _reporter() as report:
        runner = Runner(settings, report=report, fresh=fresh)
        ended = runner.run(once=once)
    if runner.ended_by == signal.SIGINT:
        raise KeyboardInterrupt
    if once and runner.ended_by:  # without --once to be ended is how it ends
        click.get_current_context().exit(128 + runner.ended_by)
    if once and common.scheduler_in_force().state()["paused"]:
        raise MrcoreError("the queue is paused: `mrcore resume` goes on")
    if once and not ended:
        click.echo("nothing to run: `mrcore submit FILE` queues a job", err=True)
    if ended.get("failed"):
        raise MrcoreError(f"{ended['failed']} of {sum(ended.values())} runs failed: see `mrcore history`")


@contextlib.contextmanager
def _reporter() -> Iterator[Callable[..., None]]:
    """Yield what prints the Runner's events: ends of runs always, progress only on a terminal, a hold once."""
    from rich.console import Console
    from rich.text import Text

    console, shown = Console(file=terminal.raw(sys.stderr)), [""]

    with console.status("waiting for jobs") if console.is_terminal else contextlib.nullcontext() as line:

        def write(text: str, err: bool) -> None:
            if line is not None:  # or the text would stand behind the spinner, and rich would send it to stderr
                line.stop()
            stream = sys.stderr if err else sys.stdout  # now that rich has put ours back
            try:
                click.echo(escaped(text), file=stream)
            except (OSError, ValueError):  # nobody reads it: the queue is drained all the same
                terminal.discard_output(stream, 1 + err)
            if line is not None:
                line.start()

        def report(event: str, **facts: Any) -> None:
            name = f"{facts.get('job_name')} run {facts.get('run')}"
            if event == "ended":
                shown[0] = ""
                error = facts.get("exception")
                failed = f": {one_line(error['message'])}" if error else ""
                write(f"{name}: {facts['state']}{failed}{_then(facts)}", bool(error))
            elif event in ("hold", "paused"):
                reason = facts.get("reason", "it is paused; `mrcore resume` goes on")
                if shown[0] != reason:
                    write(f"the queue holds: {one_line(reason)}", True)
                shown[0] = reason
            if line is not None:
                counts = {
                    key: n for key, n in facts.items() if event == "progress" and isinstance(n, int) and key != "run"
                }
                numbers = "".join(f", {n:,} {key}" for key, n in counts.items())
                what = f"{name}: {facts.get('phase', event)}{numbers}" if "run" in facts else event
                line.update(Text(what))

        yield report


def _then(facts: dict[str, Any]) -> str:
    """Return what becomes of a job after a run that failed; nothing for one that leaves."""
    if facts.get("retry_at"):
        return (
            f" (retry {facts['tries'] + 1} of {facts['retries']} in {common.duration(facts['retry_at'] - time.time())})"
        )
    return " (the job stays in the queue)" if facts.get("stays") else ""


@cli.command()
@common.JSON
def queue(as_json: bool) -> None:
    """List the queue in the order in which it will run, why each job waits, and what left by a failure."""
    scheduler = common.scheduler_in_force()
    state, rows, fallen = scheduler.state(), scheduler.queue(), scheduler.fallen()
    estimates = scheduler.estimates()
    rows = [row | {"estimate": estimates.get(row["job_name"])} for row in rows]
    where = str(scheduler.settings.state_dir)
    if as_json:
        return common.print_json(state | {"state_dir": where, "jobs": rows, "left_by_a_failure": fallen})
    for row in rows:
        estimate = row["estimate"]
        row["state"] = f"running {row['phase'] or ''}".strip() if row["running"] else row["state"]
        priority = f"{row['job_priority']:g}" if row["job_priority"] else None
        row["job_priority"] = "force_run" if row["force_run"] else priority
        row["estimate"] = common.duration(estimate["median_seconds"]) if estimate else None
        row["why"] = row["why"]["text"]
    columns = {"job_name": "JOB", "state": "STATE", "group_name": "GROUP", "job_priority": "PRIORITY"}
    columns |= {"last_run": "RUNS", "estimate": "USUALLY", "why": "WHY"}
    if rows:
        common.print_table(
            rows, {key: title for key, title in columns.items() if any(row[key] is not None for row in rows)}
        )
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


@cli.command()
@click.argument("job", required=False)
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Newest runs to list.")
@common.JSON
def history(job: str | None, limit: int, as_json: bool) -> None:
    """List the runs of all jobs or of one, newest first."""
    rows = common.scheduler_in_force().history(job, limit)
    if as_json:
        return common.print_json(rows)
    for row in rows:
        row["start"] = row["start_time"][:19].replace("T", " ")
        row["took"] = common.duration(row["seconds"])
        row["error"] = (row["exception"] or {}).get("message")
    columns = {"job_name": "JOB", "run": "RUN", "state": "STATE", "start": "START", "took": "TOOK", "error": "WHY"}
    common.print_table(rows, columns)
    return None


@cli.command()
@click.argument("job")
@common.JSON
def show(job: str, as_json: bool) -> None:
    """Tell a job's whole story: its keys, its runs, their phases, counts and errors."""
    story = common.scheduler_in_force().show(job)
    if as_json:
        return common.print_json(story)
    click.echo(f"{job}: {story['state']}" + (f" ({story['reason']})" if story["reason"] else ""))
    for key, value in story["job"].items():
        if value is not None:
            click.echo(f"  {key}: {json.dumps(value, ensure_ascii=False)}")
    for row in story["runs"][:10]:
        click.echo(f"run {row['run']}: {row['state']}, {row['start_time'][:19]}, {common.duration(row['seconds'])}")
        for phase, times in row["phases"].items():
            click.echo(f"  {phase}: {common.duration(times['seconds'])}")
        for name, count in row["counts"].items():
            by_reason = count.items() if isinstance(count, dict) else ()
            click.echo(f"  {name}: {', '.join(f'{number} {reason}' for reason, number in by_reason) or count}")
        if row["exception"]:
            click.echo(f"  {row['exception']['class']}: {row['exception']['message']}")
            details = dict(row["exception"]["details"])
            frames = details.pop("traceback", None) or details.pop("internal_traceback", None)
            for name, detail in details.items():
                click.echo(f"  {name}: {one_line(detail)}")
            if frames:
                lines = frames if isinstance(frames, str) else "".join(frames)
                click.echo("\n".join(f"    {line}" for line in lines.splitlines()))
    return None


@cli.command()
@click.argument("job")
def delete(job: str) -> None:
    """Take a job out of the queue, or off the list of those that left by a failure; a run under way goes on."""
    common.scheduler_in_force().delete_job(job)
    click.echo(f"{job} is out of the queue; its output stays where it is")


@cli.command()
@click.argument("group")
def requeue(group: str) -> None:
    """Bring back the jobs of a group that left the queue by a failure, or one job by its name; a retry runs at once."""
    click.echo(f"queued again: {', '.join(common.scheduler_in_force().requeue(group))}")


@cli.command()
@click.argument("job")
def cancel(job: str) -> None:
    """End the run of a job that is under way."""
    click.echo(f"run {common.scheduler_in_force().cancel(job)} of {job} is told to end")


@cli.command()
def pause() -> None:
    """Start no further run until `mrcore resume`."""
    common.scheduler_in_force().pause()
    click.echo("paused; a run under way goes on")


@cli.command()
def resume() -> None:
    """End a pause, or a hold's waiting."""
    common.scheduler_in_force().resume()
    click.echo("the queue goes on")


# --- what came of it --------------------------------------------------------------------------------------------


@cli.command()
@click.argument("job")
@click.option("--head", type=click.IntRange(1), metavar="N", help="Only the first N items.")
def cat(job: str, head: int | None) -> None:
    """Print a job's output, one common.JSON item per line, in the order of its parts."""
    sys.stdout.flush()
    out: Any = terminal.JsonOutput() if sys.stdout.isatty() else sys.stdout.buffer
    common.cluster_in_force().cat(job, out, head=head)


@cli.command(name="try")
@click.argument("project")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT…")
@click.option("--map", "map_name", required=True, metavar="NAME", help="The map function.")
@click.option("--reduce", "reduce_name", metavar="NAME", help="The reduce function; without it, what map gives.")
@click.option("--combine", metavar="NAME", help="A reduce function applied before the sort.")
@click.option("--aux", "auxiliary", type=click.Path(path_type=Path), help="JSON for auxiliary_data.")
@click.option("--as-root", is_flag=True, help="As root, run also code that others may change.")
def try_project(
    project: str,
    inputs: tuple[str, ...],
    map_name: str,
    reduce_name: str | None,
    combine: str | None,
    auxiliary: Path | None,
    as_root: bool,
) -> None:
    """Run a project's functions over files in this one process, without a cluster: to develop them."""
    from mrcore.engine import trial
    from mrcore.project.packages import install_for_trial

    folder = common.settings_of_caller().projects_dir / project
    if not folder.is_dir():
        folder = Path(project).absolute()
    if not folder.is_dir():
        raise UsageError(f"there is no project {project!r}: no folder of projects_dir, no folder here")
    _say_whose_code(folder, as_root)
    packages, auxiliary_file = install_for_trial(folder), str(auxiliary) if auxiliary else None
    request = trial.Request(
        str(folder), map_name, reduce_name, inputs, combine, auxiliary_file, str(packages) if packages else None
    )
    if packages:
        # A process of its own: this one has loaded click and others, of which the project may want other versions.
        text = json.dumps(dataclasses.asdict(request))
        os.execv(sys.executable, [sys.executable, "-P", "-m", "mrcore.engine.trial", text])
    trial.print_trial(request)


def _say_whose_code(folder: Path, as_root: bool) -> None:
    """Say so when others decide what a trial does with the caller's rights. Raises UsageError when these are root's."""
    from mrcore.system import permissions

    if (found := permissions.foreign_code(folder)) is None:
        return
    path, who = found
    if os.geteuid() == 0 and not as_root:
        raise UsageError(
            f"{who} may change {path}, and `mrcore try` would run that code as root: try it as another user "
            "(`runuser -u USER -- mrcore try …`), or say --as-root"
        )
    click.echo(f"mrcore: runs code of {one_line(folder)} with your rights; {who} may change {one_line(path)}", err=True)


for command in (*cli_cluster.COMMANDS, *cli_admin.COMMANDS, *cli_files.COMMANDS):
    cli.add_command(command)
