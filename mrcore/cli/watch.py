"""`mrcore watch`: the queue and the run under way, refreshed in place; elsewhere than on a terminal one snapshot."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec

from mrcore.cli import common
from mrcore.errors import UsageError
from mrcore.text import one_line

if TYPE_CHECKING:
    from mrcore.cli.live import Line
    from mrcore.queue.awaited import Outcome
    from mrcore.queue.scheduler import Scheduler
    from mrcore.state.progress import Progress

GROUP = "Queue"
REFRESH_SECONDS = 1.0
MAX_NEXT = 5  # jobs that come next, as they are shown
PIPE_LINES, PIPE_COLUMNS = 10_000, 1_000  # of a snapshot in a pipe


class View(NamedTuple):
    """What is shown: the queue as a whole, its jobs in their order, the run under way."""

    state: dict[str, Any]
    jobs: list[dict[str, Any]]
    progress: Progress | None


@click.command()
@click.argument("job", required=False)
@click.option("--once", is_flag=True, help="Print one snapshot and end.")
@common.JSON
def watch(job: str | None, once: bool, as_json: bool) -> None:
    """Show the queue and the run under way, in place.

    `q` or Ctrl-C leaves. With JOB this ends with its run under way, or its next one, and the status is 0 only if that
    has succeeded. When standard output is no terminal, one snapshot is printed.
    """
    from mrcore.cli.wait import line_of

    scheduler = common.scheduler_in_force()
    ended = _Ending(scheduler, job) if job else None
    if as_json:
        view = _look(scheduler)
        progress = msgspec.to_builtins(view.progress)
        return common.print_json(view.state | {"jobs": view.jobs, "progress": progress})
    if once or not sys.stdout.isatty():
        return _print(_look(scheduler))
    outcome = _in_place(scheduler, ended)
    if outcome:
        click.echo(line_of(outcome), err=not outcome.good)
        click.get_current_context().exit(0 if outcome.good else 1)
    return None


class _Ending:
    """The end of a job's run under way, or of its next one; of one that has left the queue, of its last one."""

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        from mrcore.queue.awaited import Awaited

        row, running = scheduler.store.job(name), scheduler.store.running()
        if row is None:
            scheduler.show(name)  # raises, and names what was meant
            raise UsageError(f"job {name!r} is not known")
        before = row.last_run if row.state != "out" and not (running and running.job_name == name) else row.last_run - 1
        self._awaited = Awaited(scheduler.store, [name], before)

    def look(self) -> Outcome | None:
        """Return how it has ended, if it has."""
        return next(iter(self._awaited.look()), None)


def _look(scheduler: Scheduler) -> View:
    from mrcore.cli import live

    return View(scheduler.state(), scheduler.queue(), live.now_of(scheduler))


def _print(view: View) -> None:
    for line in view_lines(view, time.time(), PIPE_LINES):
        click.echo(one_line(line.text, PIPE_COLUMNS))


def _in_place(scheduler: Scheduler, ending: _Ending | None) -> Outcome | None:
    """Show the queue until a key is pressed, or what is waited for has ended: then return how."""
    from rich.console import Console, Group
    from rich.live import Live

    from mrcore.cli import live
    from mrcore.system import terminal

    console = Console(file=terminal.raw(sys.stdout))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # leaves the screen as it was
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as shown:
        while True:
            outcome = ending.look() if ending else None
            if outcome:
                return outcome
            lines = view_lines(_look(scheduler), time.time(), console.height - 1)
            lines.append(live.Line("q leaves", "dim"))
            shown.update(Group(*live.fitted(lines, console.width)), refresh=True)
            if pressed(REFRESH_SECONDS) in ("q", "Q"):
                return None


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """Yield what waits for a key, for so many seconds at most, and returns it or an empty text."""
    if not sys.stdin.isatty():

        def sleep(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield sleep
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def wait(seconds: float) -> str:
        ready = select.select([descriptor], [], [], seconds)[0]
        return os.read(descriptor, 1).decode(errors="replace") if ready else ""

    try:
        tty.setcbreak(descriptor)
        yield wait
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def view_lines(view: View, now: float, room: int) -> list[Line]:
    """Return what is shown, in at most `room` lines: the servers get what the other parts leave."""
    from mrcore.cli.live import Line, run_lines, server_lines

    head = [Line(_head(view), "bold"), *(Line(text, "yellow") for text in _notes(view, now)), Line("")]
    run = [*run_lines(view.progress, now), Line("")] if view.progress else []
    waiting = [row for row in view.jobs if not row["running"]]
    following = [Line("NEXT", "bold")] if waiting else []
    following += [Line(f"  {one_line(row['job_name'], 30):30} {row['why']['text']}") for row in waiting[:MAX_NEXT]]
    if len(waiting) > MAX_NEXT:
        following.append(Line(f"  … and {len(waiting) - MAX_NEXT} more", "dim"))
    left = room - len(head) - len(run) - len(following) - 1
    servers = server_lines(view.progress.servers, now, left) if view.progress else []
    return [*head, *run, *servers, *([Line("")] if servers else []), *following][:room]


def _head(view: View) -> str:
    waiting = sum(not row["running"] for row in view.jobs)
    running = view.state["running"]
    what = f"{running['job_name']} runs" if running else "nothing runs"
    return f"{time.strftime('%H:%M:%S')}  {what}, {waiting} {'job waits' if waiting == 1 else 'jobs wait'}"


def _notes(view: View, now: float) -> list[str]:
    """Return what holds the queue as a whole."""
    state, notes = view.state, []
    if state["paused"]:
        notes.append("the queue is paused: `mrcore resume` goes on")
    if state["drain"]:
        notes.append(f"the queue waits: {state['drain']}")
    if hold := state["hold"]:
        wait = hold["until"] - now
        notes.append(f"the queue holds: {hold['reason']} (" + (f"next try in {wait:.0f} s)" if wait > 0 else "trying)"))
    if not state["runner"]:
        notes.append("no Runner drains this queue now: `mrcore run` does")
    return notes


COMMANDS = (watch,)
