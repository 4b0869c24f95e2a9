"""The commands that bring jobs into the queue and run it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mrcore.cli import common
from mrcore.errors import MrcoreError, UsageError
from mrcore.text import one_line

if TYPE_CHECKING:
    from mrcore.queue.scheduler import Scheduler

GROUP = "Jobs"
MAX_JOB_FILE_BYTES = 10 << 20


@click.command()
@click.argument("kind", type=click.Choice(["mapreduce", "script", "file_transfer"]))
def template(kind: str) -> None:
    """Print a commented YAML job with every key."""
    from mrcore.queue.job import job_template_yaml

    click.echo(job_template_yaml(kind), nl=False)


FILES = click.argument(
    "files", nargs=-1, required=True, metavar="FILE…", type=click.Path(path_type=Path, allow_dash=True)
)
SET = click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Set a key of every job; VALUE is YAML."
)


@click.command()
@FILES
@SET
@click.option("--wait", is_flag=True, help="Wait for the end of their next runs; status 1 when one does not succeed.")
@common.JSON
def submit(files: tuple[Path, ...], changes: tuple[str, ...], wait: bool, as_json: bool) -> None:
    """Queue the jobs of YAML or JSON files.

    A file holds one job or a list. All jobs are queued, or none if one has a fault. `-` reads standard input.
    """
    batch = read_batch(files, changes)
    common.hand_over_jobs(batch, "submit", ["--json"] * as_json + ["--wait"] * wait)
    scheduler = common.scheduler_in_force()
    answers = scheduler.submit_jobs(batch)
    if not as_json:
        _print_answers(answers)
    if wait:
        _await(scheduler, answers, as_json)
    elif as_json:
        common.print_json(answers)
    elif not scheduler.state()["runner"]:
        click.echo("no Runner drains this queue now: `mrcore run` does", err=True)


def _print_answers(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        click.echo(f"{answer['job_name']}: {answer['message']}")


def _await(scheduler: Scheduler, answers: list[dict[str, Any]], as_json: bool = False, **runner: Any) -> None:
    """Wait for jobs just submitted; leave with status 1 unless all of their runs have succeeded."""
    from mrcore.cli.wait import wait_for

    outcomes = wait_for(scheduler, [answer["job_name"] for answer in answers], quiet=as_json, **runner)
    if as_json:
        by_name = {each.job_name: {key: getattr(each, key) for key in ("run", "state", "why")} for each in outcomes}
        common.print_json([answer | by_name[answer["job_name"]] for answer in answers])
    if not all(each.good for each in outcomes):
        click.get_current_context().exit(1)


def read_batch(files: tuple[Path, ...], changes: tuple[str, ...]) -> list[Any]:
    """Return the jobs of these files, each with the keys that `--set` gives. Raises UsageError."""
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
    return [job | given for job in batch]


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
@click.argument("files", nargs=-1, metavar="[FILE…]", type=click.Path(path_type=Path, allow_dash=True))
@SET
@click.option("--once", is_flag=True, help="Without FILE: end after one cycle of the queue.")
def run(files: tuple[Path, ...], changes: tuple[str, ...], once: bool) -> None:
    """Run jobs, or the queue: the Runner.

    With FILE: queues these jobs and waits for the ends of their runs; status 1 if one does not succeed. If there is no
    Runner, the queue is run here meanwhile.

    Ctrl-C or SIGTERM hand a run that is under way here back; a second one ends it at once. When the queue holds because
    of the cluster, this waits, also with --once; a paused queue it does not wait for.
    """
    if files and once:
        raise UsageError("--once is for the Runner: `mrcore run FILE` ends with the runs of its jobs anyhow")
    if changes and not files:
        raise UsageError("--set is for the jobs of FILE: name one")
    if files:
        _run_files(read_batch(files, changes))
    else:
        _drain(once)


def _run_files(batch: list[Any]) -> None:
    from mrcore.settings.config import watch_settings

    common.hand_over_jobs(batch, "run", [])
    settings, fresh = common.settings_in_force(), watch_settings(click.get_current_context().find_root().obj)
    scheduler = common.scheduler_in_force(settings)
    answers = scheduler.submit_jobs(batch)
    _print_answers(answers)
    _await(scheduler, answers, settings=settings, fresh=fresh)


def _drain(once: bool) -> None:
    """Be the Runner."""
    from mrcore.queue.runner import Runner
    from mrcore.settings.config import watch_settings

    settings, fresh = common.settings_in_force(), watch_settings(click.get_current_context().find_root().obj)
    with _reporter(common.scheduler_in_force(settings)) as report:
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
def _reporter(scheduler: Scheduler) -> Iterator[Callable[..., None]]:
    """Yield what prints the Runner's events: ends of runs always, what is under way only on a terminal, a hold once."""
    from mrcore.cli import live

    shown = ""
    with live.Display(lambda: live.now_of(scheduler), "waiting for jobs") as display:

        def report(event: str, **facts: Any) -> None:
            nonlocal shown
            if event == "ended":
                shown = ""
                display.write(*live.ended_line(facts))
            elif event in ("hold", "paused"):
                reason = facts.get("reason", "it is paused; `mrcore resume` goes on")
                if shown != reason:
                    display.write(f"the queue holds: {one_line(reason)}", True)
                shown = reason

        yield report


COMMANDS = (template, submit, run)
