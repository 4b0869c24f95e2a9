"""The commands that bring jobs into the queue and run it."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from mrcore.cli import common
from mrcore.errors import MrcoreError, UsageError
from mrcore.system import terminal
from mrcore.text import escaped, one_line

GROUP = "Jobs"
MAX_JOB_FILE_BYTES = 10 << 20


@click.command()
@click.argument("kind", type=click.Choice(["mapreduce", "script", "file_transfer"]))
def template(kind: str) -> None:
    """Print a commented YAML job with every key."""
    from mrcore.queue.job import job_template_yaml

    click.echo(job_template_yaml(kind), nl=False)


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE…", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Set a key of every job; VALUE is YAML.")
@common.JSON
def submit(files: tuple[Path, ...], changes: tuple[str, ...], as_json: bool) -> None:
    """Queue the jobs of YAML or JSON files.

    A file holds one job or a list. All jobs are queued, or none if one has a fault. `-` reads standard input.
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


@click.command()
@click.option("--once", is_flag=True, help="End after one cycle of the queue.")
def run(once: bool) -> None:
    """Run the jobs of the queue: the Runner.

    Ctrl-C or SIGTERM hand the run under way back; a second one ends it at once.

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


COMMANDS = (template, submit, run)
