"""How a run under way is shown: its phases with bars, its servers, its counters.

`Display` shows it in place on a terminal, below the lines of what has ended; in a pipe each phase is a line, when it
ends. What it shows is what the Runner writes into the queue's file, so whoever waits sees what the Runner itself shows.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from mrcore.cli import common
from mrcore.errors import MrcoreError
from mrcore.messages.kinds import convert
from mrcore.state.progress import Phase, Progress, ServerNow
from mrcore.system import terminal
from mrcore.text import duration, escaped, one_line, percent, rough, size

if TYPE_CHECKING:
    from mrcore.queue.scheduler import Scheduler

LOOK_SECONDS = 0.5  # between two looks at the queue's file
REFRESHES_PER_SECOND = 4
BAR = 16  # characters
MARGIN = 4  # columns left free: a terminal writes ^C behind what stands there
MAX_COUNTERS = 6  # on the line of counters
RECORDS = {"MAP": "lines", "SORT": "groups", "REDUCE": "values", "COMMIT": "items"}


# --- Words and numbers -----------------------------------------------------------------------------------------------


def time_left(progress: Progress, now: float) -> str | None:
    """Return "about 2 min left"; None where it cannot be estimated."""
    left = progress.left_seconds(now)
    return None if left is None else f"about {rough(left)} left"


def how_far(progress: Progress, now: float) -> str:
    """Return what a running job does, in short: "MAP 43 %, about 2 min left"."""
    phase = current(progress)
    share = _fraction(phase) if phase else None
    name = one_line(phase.name, 20) if phase else ""
    first = f"{name} {percent(share)}" if share is not None else name
    return ", ".join(filter(None, (first, time_left(progress, now))))


def running(phase: str | None, progress: dict[str, Any] | None) -> str:
    """Return what a running job does, by its `progress` as listings have it: "running MAP 43 %, about 2 min left"."""
    far = how_far(convert(Progress, progress), time.time()) if progress else phase or ""
    return f"running {far}".strip()


def current(progress: Progress) -> Phase | None:
    """Return the phase under way, the last one if none is."""
    under_way = [phase for phase in progress.phases if phase.ended is None]
    return next(iter((under_way or progress.phases)[-1:]), None)


def phase_line(phase: Phase, now: float) -> str:
    """Return what a phase did: "MAP 12.3 s, 134 MB, 1,800,000 lines"."""
    parts = [f"{one_line(phase.name, 20)} {duration((phase.ended or now) - phase.started)}"]
    if phase.done and phase.unit:
        parts.append(size(phase.done) if phase.unit == "bytes" else f"{phase.done:,} {one_line(phase.unit, 20)}")
    if phase.records:
        parts.append(f"{phase.records:,} {RECORDS.get(phase.name, 'records')}")
    return ", ".join(parts)


def _fraction(phase: Phase) -> float | None:
    if phase.ended is not None:
        return 1.0
    return min(1.0, phase.done / phase.total) if phase.total else None


def now_of(scheduler: Scheduler) -> Progress | None:
    """Return how far the run under way is; of one that has told nothing yet, its phases as the history has them.

    None also for a run whose Runner is no more.
    """
    if found := scheduler.progress():
        return found
    if (row := scheduler.store.running()) is None or not scheduler.has_runner():
        return None
    return Progress(
        job_name=row.job_name,
        run=row.run,
        job_type=row.job_type,
        started=row.started,
        updated=time.time(),
        phases=row.plain_phases(),
    )


# --- Lines of a run under way ----------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of a display, and its style."""

    text: str
    style: str = ""


def fitted(lines: Iterable[Line], width: int) -> list[Text]:
    """Return lines for `rich`, none wider than there is room for."""
    shown = []
    for line in lines:
        text = Text(one_line(line.text), style=line.style, no_wrap=True, overflow="ellipsis")
        text.truncate(max(1, width - MARGIN), overflow="ellipsis")
        shown.append(text)
    return shown


def run_lines(progress: Progress, now: float) -> list[Line]:
    """Return the run under way: a head, its phases with bars, its servers' count, its counters."""
    more = [duration(now - progress.started)]
    if progress.fraction is not None:
        more.insert(0, percent(progress.fraction))
    if left := time_left(progress, now):
        more.append(left)
    lines = [Line(f"{progress.job_name} run {progress.run}: {', '.join(more)}", "bold")]
    lines += [Line(_bar_line(phase, now), "" if phase.ended is None else "dim") for phase in progress.phases]
    if progress.servers:
        up = [server for server in progress.servers if server.up]
        busy = sum(server.task is not None for server in up)
        text = f"  {busy} of {len(up)} servers at work" if up else "  no server has answered yet"
        text += f", {len(progress.servers) - len(up)} away" if 0 < len(up) < len(progress.servers) else ""
        text += f", {progress.deaths} died and tried again" if progress.deaths else ""
        text += f", {progress.spills:,} spills" if progress.spills else ""
        lines.append(Line(text))
    if progress.counters:
        counted = [f"{one_line(name, 40)} {count:,}" for name, count in list(progress.counters.items())[:MAX_COUNTERS]]
        counted += ["…"] if len(progress.counters) > MAX_COUNTERS else []
        lines.append(Line("  counted: " + ", ".join(counted)))
    return lines


def _bar_line(phase: Phase, now: float) -> str:
    seconds, share = (phase.ended or now) - phase.started, _fraction(phase)
    filled = round(BAR * share) if share is not None else 0
    full, empty = ("━", "─") if terminal.speaks_unicode(sys.stderr) else ("#", "-")
    done = percent(share) if share is not None else ""
    bar = full * filled + empty * (BAR - filled) if share is not None else " " * BAR
    line = f"  {one_line(phase.name, 9):9} {bar} {done:>6} {seconds:6.1f} s"
    if phase.done and phase.unit == "bytes":
        total = f" of {size(phase.total)}" if phase.total else ""
        rate = f"  {size(phase.done / seconds)}/s" if seconds > 0.1 else ""
        return f"{line}  {size(phase.done)}{total}{rate}"
    if phase.done and phase.unit:
        return f"{line}  {phase.done:,}{f' of {phase.total:,}' if phase.total else ''} {one_line(phase.unit, 20)}"
    return f"{line}  {phase.records:,} records" if phase.records else line


def server_lines(servers: list[ServerNow], now: float, room: int) -> list[Line]:
    """Return a table of the servers in at most `room` lines: those at work first, and how many more there are."""
    if not servers or room < 2:
        return []
    ranked = sorted(servers, key=lambda server: (server.up, server.task is None, -(now - (server.since or now))))
    shown = ranked if len(ranked) < room else ranked[: room - 2]
    lines = [Line(f"  {'NODE':14} {'SERVER':7} {'PHASE':7} {'TASK':>5} {'FOR':>7} {'DONE':>9}  STATUS", "bold")]
    for server in shown:
        task = "" if server.task is None else str(server.task)
        since = "" if server.since is None or server.task is None else duration(now - server.since)
        done = size(server.bytes) if server.task is not None else ""
        phase = (one_line(server.phase, 7) if server.task is not None else "idle") if server.up else "away"
        lines.append(
            Line(
                f"  {one_line(server.node, 14):14} {one_line(server.server, 7):7} {phase:7} {task:>5} {since:>7} "
                f"{done:>9}  {one_line(server.status, 60)}",
                "" if server.up else "red",
            )
        )
    if len(shown) < len(servers):
        lines.append(Line(f"  … and {len(servers) - len(shown)} more", "dim"))
    return lines


# --- In place, or line by line ---------------------------------------------------------------------------------------


class Display:
    """Writes lines of what has ended, and shows the run under way below them if both streams are a terminal.

    `phases`: in a pipe each phase of these jobs is a line on standard error. For any thread.
    """

    def __init__(self, look: Callable[[], Progress | None], idle: str, phases: Callable[[str], bool] | None = None):
        self._look, self.idle, self._phases = look, idle, phases
        self._last: Progress | None = None
        self._looked, self._told = 0.0, set[tuple[str, int, str]]()
        self._lock = threading.RLock()
        self._console = Console(file=terminal.raw(sys.stderr))
        # Where they differ, what one of them shows would come between the lines of the other.
        self._in_place = sys.stdout.isatty() and sys.stderr.isatty()
        self._live: Live | None = None

    def __enter__(self) -> Display:
        self._start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def _start(self) -> None:
        if self._in_place:  # a new one each time: one that is started again goes up over lines that are not its own
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
                vertical_overflow="crop",
            )
            self._live.start(refresh=True)

    def _stop(self) -> None:
        if self._live:
            self._live.stop()

    def write(self, text: str, err: bool) -> None:
        """Write a line of its own."""
        with self._lock:
            self._stop()  # what is in place is gone from the screen before anything else is written
            stream = sys.stderr if err else sys.stdout  # now that rich has put ours back
            try:
                click.echo(escaped(text), file=stream)
            except (OSError, ValueError):  # nobody reads it: the queue is drained all the same
                terminal.discard_output(stream, 1 + err)
            self._start()

    def tick(self) -> None:
        """Tell, where nothing is shown in place, which phases of the run under way have ended."""
        if not self._in_place and self._phases and (progress := self._progress()):
            self.tell_phases(progress.job_name, progress.run, [each for each in progress.phases if each.ended])

    def tell_phases(self, job_name: str, run: int, ended: list[Phase]) -> None:
        """Write a line for each of these phases of a run that was not told before."""
        if self._in_place or not self._phases or not self._phases(job_name):
            return
        with self._lock:
            for phase in ended:
                if (job_name, run, phase.name) in self._told:
                    continue
                self._told.add((job_name, run, phase.name))
                self.write(f"{job_name} run {run}: {phase_line(phase, time.time())}", True)

    def _progress(self) -> Progress | None:
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            with contextlib.suppress(MrcoreError):  # shown is what was seen last
                self._last = self._look()
            self._looked = time.monotonic()
        return self._last

    def _render(self) -> Any:
        width = self._console.width
        if progress := self._progress():
            return Group(*fitted(run_lines(progress, time.time()), width))
        return Group(*fitted([Line(self.idle, "dim")], width))


def ended_line(facts: dict[str, Any]) -> tuple[str, bool]:
    """Return what a Runner's "ended" says in a line, and whether it is an error's."""
    error = facts.get("exception")
    failed = f": {one_line(error['message'])}" if error else ""
    return f"{facts['job_name']} run {facts['run']}: {facts['state']}{failed}{_then(facts)}", bool(error)


def _then(facts: dict[str, Any]) -> str:
    """Return what becomes of a job after a run that failed; nothing for one that leaves."""
    if facts.get("retry_at"):
        left = common.duration(facts["retry_at"] - time.time())
        return f" (retry {facts['tries'] + 1} of {facts['retries']} in {left})"
    return " (the job stays in the queue)" if facts.get("stays") else ""
