"""Waiting for submitted jobs: `run FILE`, which runs the queue itself where nobody does, and `submit --wait`."""

from __future__ import annotations

import contextlib
import shlex
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import click

from mrcore.cli import live
from mrcore.errors import MrcoreError, UsageError
from mrcore.queue.awaited import Awaited, Outcome
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings
from mrcore.text import duration, one_line

WAITS = ("not_before", "every", "retry", "drain", "cycle", "group")  # reasons to wait that are told, each once


class Wait:
    """The wait for some jobs of a queue, and what it shows meanwhile."""

    def __init__(self, scheduler: Scheduler, names: list[str], quiet: bool = False) -> None:
        self._scheduler, self._store = scheduler, scheduler.store
        self.awaited = Awaited(scheduler.store, names)
        self._names, self._quiet = names, quiet
        self._told: set[str] = set()
        self._lock = threading.Lock()
        idle = f"waiting for {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        self.display = live.Display(lambda: live.now_of(scheduler), idle, phases=lambda name: name in names)

    # --- the wait itself ---

    def for_others(self, take_over: bool) -> None:
        """Wait until all have ended; with `take_over` only while another process runs the queue."""
        while not self._look():
            if take_over and not self._scheduler.state()["runner"]:
                return
            self._tell_reasons()
            time.sleep(live.LOOK_SECONDS)

    def here(self, settings: Settings, fresh: Callable[[], Settings]) -> None:
        """Run the queue until all have ended. Returns early when another process runs it already."""
        over = threading.Event()

        def report(event: str, **facts: Any) -> None:
            name = facts.get("job_name")
            if event == "started" and name not in self._names:
                self._tell(f"{name} run {facts['run']} is due before, and runs first")
            elif event == "ended" and name not in self.awaited.left:
                self.display.write(*live.ended_line(facts))
            elif event == "ended" and (facts.get("retry_at") or facts["state"] == "handed back"):
                self._tell_phases(str(name), facts["run"])
                self.display.write(*live.ended_line(facts))
            elif event == "hold":
                self._tell(f"the queue holds: {one_line(facts['reason'])}")
            if event in ("ended", "paused") and (self._look() or event == "paused"):
                runner.stop()

        def follow() -> None:  # jobs may be deleted, too, or wait for long
            while not over.wait(live.LOOK_SECONDS):
                with contextlib.suppress(MrcoreError):
                    self._tell_reasons(here=True)
                    if self._look() and not self._store.running():
                        runner.stop()

        runner = Runner(settings, report=report, fresh=fresh)
        thread = threading.Thread(target=follow, name="follow", daemon=True)
        thread.start()
        try:
            runner.run()
        except UsageError as error:
            if "runner" not in error.details:
                raise
        finally:
            over.set()
            thread.join()
        if runner.ended_by == signal.SIGINT:
            raise KeyboardInterrupt
        if runner.ended_by:
            click.get_current_context().exit(128 + runner.ended_by)
        if self.awaited.left and self._store.get("paused"):
            self._refuse_pause()

    def _look(self) -> bool:
        """Tell what is new; return whether all have ended."""
        self.display.tick()
        with self._lock:
            for outcome in self.awaited.look():
                if outcome.run is not None:
                    self._tell_phases(outcome.job_name, outcome.run)
                if not self._quiet or not outcome.good:
                    self.display.write(line_of(outcome), not outcome.good)
            return not self.awaited.left

    def _tell_phases(self, name: str, run: int) -> None:
        detail, row = self._store.detail(name, run), self._store.run(name, run)
        plain = row.plain_phases() if row else []
        self.display.tell_phases(name, run, detail.phases if detail and detail.phases else plain)

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.display.write(text, True)

    def _tell_reasons(self, here: bool = False) -> None:
        """Say, once each, why jobs wait that do so for longer than those before them."""
        rows = [row for row in self._scheduler.queue() if row["job_name"] in self.awaited.left]
        told = WAITS if here else (*WAITS, "behind")  # as the Runner it names what it runs before
        for row in rows:
            if row["why"]["code"] in told and row["why"]["code"] + row["job_name"] not in self._told:
                self._told.add(row["why"]["code"] + row["job_name"])
                self._tell(f"{row['job_name']} waits: {row['why']['text']}; Ctrl-C leaves it in the queue")
        if rows and self._store.get("paused") and not self.awaited.running:
            self._refuse_pause()
        codes = {row["why"]["code"] for row in rows}
        if "no_runner" in codes and not here:
            self._tell("no Runner drains this queue now: `mrcore run` does; this waits for one")
        if "hold" in codes and (hold := self._store.hold()):
            self._tell(f"the queue holds: {one_line(hold.reason)}")

    def _refuse_pause(self) -> None:
        names = ", ".join(self.awaited.left)
        raise MrcoreError(f"the queue is paused: `mrcore resume` goes on; queued, and not waited for: {names}")


def line_of(outcome: Outcome) -> str:
    """Return how the wait for a job has ended, and what to type next."""
    name, quoted = outcome.job_name, shlex.quote(outcome.job_name)
    if outcome.run is None:
        return (
            f"{name} has not run: {one_line(outcome.why or 'it is no longer in the queue')}; see `mrcore show {quoted}`"
        )
    if not outcome.good:
        why = f": {one_line(outcome.why)}" if outcome.why else ""
        stays = " (it stays in the queue)" if outcome.stays else ""
        return f"{name} run {outcome.run}: {outcome.state}{why}{stays}; see `mrcore show {quoted} --run {outcome.run}`"
    following = {"mapreduce": f"cat {quoted} --head 5", "script": f"logs {quoted}"}
    again = "; it is still in the queue: `mrcore run` goes on with it" if outcome.stays else ""
    see = following.get(outcome.job_type, f"show {quoted} --run {outcome.run}")
    return f"{name} run {outcome.run}: succeeded in {duration(outcome.seconds)}; next: `mrcore {see}`{again}"


def wait_for(
    scheduler: Scheduler, names: list[str], settings: Settings | None = None,
    fresh: Callable[[], Settings] | None = None, quiet: bool = False,
) -> list[Outcome]:  # fmt: skip
    """Wait for these jobs, just submitted, and return how each has ended.

    With `settings` this process runs the queue while no other does. What another Runner runs outlives Ctrl-C.
    """
    wait = Wait(scheduler, names, quiet)
    with wait.display:
        try:
            while wait.awaited.left:
                if settings and fresh and not scheduler.state()["runner"]:
                    wait.here(settings, fresh)
                    time.sleep(live.LOOK_SECONDS if wait.awaited.left else 0)  # another one began just now
                else:
                    wait.for_others(take_over=settings is not None)
        except KeyboardInterrupt:
            left = next(iter(wait.awaited.left), names[0])
            goes_on = f"the Runner goes on: `mrcore watch {shlex.quote(left)}`"
            if not settings or scheduler.state()["runner"]:
                what = goes_on if scheduler.state()["runner"] else "the jobs stay queued: `mrcore run` runs them"
                wait.display.write(f"no longer waited for; {what}", True)
            raise
    return wait.awaited.ended
