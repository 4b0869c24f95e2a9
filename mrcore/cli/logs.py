"""`mrcore logs`: the ends of logs, or what comes: of a daemon, or of a job, whose tasks print on all nodes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mrcore.cli import cluster, common
from mrcore.errors import UsageError
from mrcore.system.follow import Lines, Position, read_on
from mrcore.system.logs import LINE_BYTES, last_lines
from mrcore.system.tags import of_run
from mrcore.text import clean, one_line

if TYPE_CHECKING:
    from mrcore.launchers.launcher import Launcher
    from mrcore.queue.scheduler import Scheduler
    from mrcore.settings.config import Settings
    from mrcore.state.store import RunRow

GROUP = cluster.GROUP
LOOK_SECONDS, LOOK_FAR_SECONDS = 0.3, 2.0  # between two looks at logs of this machine, and of others over SSH
BACK_BYTES = 256 << 10  # of each log, from which the lines before the first look come


@click.command()
@click.argument("name", required=False, metavar="[SERVER|agent@NODE|JOB]")
@click.option("--lines", type=click.IntRange(1), default=100, show_default=True, help="Last lines of each file.")
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes: of a job to the end of its run.")
@click.option("--raw", is_flag=True, help="Print the bytes as they are, control characters included.")
def logs(name: str | None, lines: int, follow: bool, raw: bool) -> None:
    """Print the end of a log: of a server, an agent or a job.

    Of a job it is what its last run printed, on whichever nodes. Without a name, list the logs. What a terminal would
    obey is shown as \\x1b and the like, since anybody's data may be in a log.
    """
    settings = common.settings_in_force()
    launcher = common.launcher_in_force(settings)
    files = [file for folder in launcher.log_folders(settings) for file in sorted(folder.rglob("*")) if file.is_file()]
    if name is None:
        if follow:
            raise UsageError("--follow needs a name: of a server, an agent or a job")
        return _list_logs(settings, launcher, files)
    if daemon := _daemon(settings, name):
        return _of_daemon(settings, launcher, *daemon, lines, follow, raw)
    scheduler = common.scheduler_in_force(settings)
    if job := scheduler.store.job(name):
        shown = _Job(settings, launcher, scheduler, name, job.job_type)
        return shown.follow(lines, raw) if follow else shown.print_last(job.last_run, lines, raw)
    chosen = {str(file): last_lines(file, lines) for file in files if name in (file.stem, file.name)}
    if not chosen or follow:
        names = {file.parent.name if file.stem.isdecimal() else file.stem for file in files if file.suffix == ".log"}
        names |= set() if settings.local else {"agent@NODE", *(server.name for server in settings.servers())}
        known = (
            ", ".join(sorted(names | set(scheduler.store.last_runs()))) or "none yet: `mrcore cluster start` makes them"
        )
        raise UsageError(f"there is no log of {name!r}; known: {known}")
    for title, content in chosen.items():
        if len(chosen) > 1:
            click.echo(f"==> {one_line(title)} <==")
        _print_log(content, raw)
    return None


def _of_daemon(
    settings: Settings, launcher: Launcher, node: str, name: str, lines: int, follow: bool, raw: bool
) -> None:
    if not follow:
        content = launcher.read_log(settings, node, name, lines)
        if content is None:
            raise UsageError(f"there is no log of {name!r} yet: `mrcore cluster start` makes it")
        return _print_log(content, raw)
    at, whole, first = dict[str, Position | None]({name: None}), Lines(), True
    while True:
        grown = launcher.read_on(settings, node, at, min(BACK_BYTES, lines * LINE_BYTES)).get(name)
        if grown:
            at[name] = grown.position
            _print_log(b"".join(_last(whole.of(grown.data), lines if first else None)), raw)
            first = False
        time.sleep(LOOK_SECONDS if settings.local else LOOK_FAR_SECONDS)


class _Job:
    """What a job's tasks, or its script, print."""

    def __init__(self, settings: Settings, launcher: Launcher, scheduler: Scheduler, name: str, kind: str) -> None:
        self._settings, self._launcher, self._scheduler = settings, launcher, scheduler
        self._name, self._script = name, kind == "script"
        self._at: dict[str, dict[str, Position | None]] = {}  # by node, then by log
        self._whole: dict[tuple[str, str], Lines] = {}
        for server in [] if self._script else settings.servers():
            self._at.setdefault(server.node.name, {})[server.name] = None
            self._whole[server.node.name, server.name] = Lines()
        self._of_script: Position | None = None
        self._script_lines = Lines()

    def print_last(self, run: int, lines: int, raw: bool) -> None:
        """Print the last lines of a run."""
        if self._script:
            file = self._file(run)
            content = last_lines(file, lines) if file.is_file() else b""
        else:
            from mrcore.launchers.launcher import lines_of_run

            found, errors = lines_of_run(self._launcher, self._settings, self._name, run, lines)
            for error in errors.values():
                raise error
            content = b"".join(found)
        if not content:
            what = f"run {run} of {self._name} has printed nothing that is still there" if run else "it has not run yet"
            click.echo(f"{what}; `mrcore show {self._name}` tells what is known of it", err=True)
        _print_log(content, raw)

    def follow(self, lines: int, raw: bool) -> None:
        """Print what the run under way, or the next one, prints, until it has ended."""
        store = self._scheduler.store
        job, running = store.job(self._name), store.running()
        assert job
        active = running is not None and running.job_name == self._name
        if not active and job.state == "out":
            self.print_last(job.last_run, lines, raw)
            return click.echo(f"{self._name} neither runs nor waits in the queue", err=True)
        if not active:
            click.echo(f"waiting for run {job.last_run + 1} of {self._name}; Ctrl-C leaves", err=True)
        wanted, first = job.last_run + (not active), True
        while True:
            run, ended = store.run(self._name, wanted), False
            if run is not None:
                ended = run.state != "running"
            elif (now := store.job(self._name)) is None or now.state == "out":
                return click.echo(f"{self._name} has left the queue without a run", err=True)
            if run is not None or not self._script:
                found = list(self._new(wanted))
                _print_log(b"".join(_last(found, lines if first and active else None)), raw)
                first = False
            if run is not None and ended:
                return self._say_end(run)
            time.sleep(LOOK_SECONDS if self._settings.local or self._script else LOOK_FAR_SECONDS)

    def _say_end(self, run: RunRow) -> None:
        why = f": {one_line(run.exception['message'])}" if run.exception else ""
        click.echo(f"{self._name} run {run.run}: {run.state}{why}", err=True)

    def _new(self, run: int) -> list[bytes]:
        """Return the lines of a run that have come since the last look, in order of their times."""
        if self._script:
            grown = read_on(self._file(run), self._of_script, BACK_BYTES)
            if grown is None:
                return []
            self._of_script = grown.position
            return self._script_lines.of(grown.data)
        from mrcore.launchers.launcher import NODES_AT_ONCE
        from mrcore.system.parallel import on_nodes

        def look(node: str) -> Iterable[bytes]:
            found: list[bytes] = []
            for log, grown in self._launcher.read_on(self._settings, node, self._at[node], BACK_BYTES).items():
                self._at[node][log] = grown.position
                found += self._whole[node, log].of(grown.data)
            return found

        looks = on_nodes(list(self._at), look, NODES_AT_ONCE)
        return of_run((line for some in looks for line in some), self._name, run)

    def _file(self, run: int) -> Path:
        from mrcore.queue.scripts import log_of

        return log_of(self._settings, self._name, run)


def _last(lines: list[bytes], count: int | None) -> list[bytes]:
    return lines if count is None else lines[-count:]


def _print_log(content: bytes, raw: bool) -> None:
    """Print the end of a log as it is, or so that no terminal obeys it; long lines are shortened then."""
    if not raw:
        lines = content.decode(errors="backslashreplace").replace("\r\n", "\n").split("\n")
        click.echo("\n".join(clean(line) for line in lines), nl=False)
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


def _daemon(settings: Settings, name: str) -> tuple[str, str] | None:
    """Return node and daemon that `S_3` or `agent@NODE` names; None when it names neither."""
    kind, _, place = name.partition("@")
    if kind == "agent" and place in [node.name for node in settings.nodes]:
        return place, kind
    return next(((server.node.name, name) for server in settings.servers() if server.name == name), None)


def _list_logs(settings: Settings, launcher: Launcher, files: list[Path]) -> None:
    """Print sizes and paths, also of the files on the nodes of a deployed cluster."""
    if settings.local and not files:
        home = one_line(settings.home)
        click.echo(f"there is no log of the cluster of {home} yet: `mrcore cluster start` starts it")
    for file in files:
        click.echo(f"{file.stat().st_size:>12} {one_line(file)}")
    of_nodes, errors = launcher.list_logs(settings)
    for log in of_nodes:
        click.echo(f"{log.size_bytes:>12} {log.node}:{one_line(log.path)}")
    cluster.require_answers(errors, len(settings.nodes))


COMMANDS = (logs,)
