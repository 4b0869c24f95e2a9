"""The Runner runs the queue, one job at a time: the loop, its signals, its lock, holds and recovery.

A state folder has one Runner (a lock that dies with it). It sleeps on a doorbell, a FIFO that every change rings,
so it neither polls nor lets a submitter wait. `cycle` decides what runs next, `execution` runs it, `endings` decides
what follows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from mrcore.errors import ClusterFault, MrcoreError, unforeseen
from mrcore.queue import cycle, scripts
from mrcore.queue.endings import Endings
from mrcore.queue.execution import Execution, Kinds
from mrcore.queue.progress import Keeper, ended
from mrcore.settings import sudo
from mrcore.settings.config import Settings, load_settings
from mrcore.state import backup, manifest
from mrcore.state.database import sole_runner
from mrcore.state.doorbell import Doorbell
from mrcore.state.progress import RunDetail
from mrcore.state.store import Cycle, Store
from mrcore.system.paths import close_home
from mrcore.text import one_line, type_name

log = logging.getLogger(__name__)
WAKE_SECONDS = 5.0  # the doorbell's fallback: a ring that came before the FIFO was there
STOPPING_SECONDS = 1.0  # between two looks at a run that has been asked to stop


class Runner:
    """Runs the queue: cycles, priorities, groups, holds, recovery. `report(event, **facts)` is called with `started`,
    `progress`, `ended`, `hold`, `idle`, `paused`, `recovered`; `fresh` returns the settings between runs.

    A report comes after what it names is durable, and changes nothing: once `report` raises (a closed pipe, a full
    disk), nothing more is reported, and the queue is run all the same.
    """

    def __init__(
        self, settings: Settings | None = None, manage_cluster: Any = None, report: Callable[..., None] | None = None,
        fresh: Callable[[], Settings] | None = None,
    ) -> None:  # fmt: skip
        self.settings = sudo.require_owner(settings or load_settings())
        self._fresh, self._unfit = fresh or (lambda: self.settings), self.settings
        if self.settings.local:
            close_home(self.settings.home)
        self.store = Store(self.settings.state_dir)
        self._listener = report
        self._kinds = Kinds(self.settings, manage_cluster)
        self._endings = Endings(self.store, self.settings, self._report)
        self._doorbell = Doorbell(self.settings.state_dir)
        self._stopping = False
        self._unfinished: dict[tuple[str, int], RunDetail] = {}  # of the run that is committed and not yet in place
        self.ended_by: int | None = None  # the signal that ended it
        self.ended: dict[str, int] = {}  # how many runs ended how

    def run(self, once: bool = False) -> dict[str, int]:
        """Run the queue until `stop()`, SIGTERM or SIGINT (a run under way is handed back), with `once` to the end
        of one cycle: a hold is waited for, a pause is not. Return how many runs ended how. UsageError if another
        Runner has the state folder."""
        with sole_runner(self.settings.state_dir), self._signals():
            backup.complete(self.settings.state_dir)
            self._endings.forget(path.name for path in self.settings.state_dir.glob("manifests/*"))
            self._endings.forget(path.name for path in self.settings.logs_dir.glob("scripts/*"))
            self._endings.forget(path.name for path in self.settings.state_dir.glob("profiles/*"))
            self._doorbell.wait(0)
            self._begin_cycle()
            while not self._stopping:
                now = time.time()
                try:
                    wait = self.step(now)
                    if wait is None:
                        wait = cycle.until_retry(self.store.queued(), now) if once else self._until_next_cycle(now)
                    if once and (wait is None or self.store.get("paused")):
                        break
                except ClusterFault as error:  # the queue itself cannot be written: what was running is recovered
                    self._report("hold", reason=error.message, seconds=WAKE_SECONDS)
                    wait = WAKE_SECONDS
                self._doorbell.wait(min(WAKE_SECONDS, wait or 0.0))
            self._endings.close()
            self._doorbell.close()
        return self.ended

    def stop(self) -> None:
        """Make `run` return soon, from another thread or a signal handler."""
        self._stopping = True
        self._doorbell.ring()

    def step(self, now: float) -> float | None:
        """Do one iteration: recover, or run the next job. Return the seconds to wait, None when the cycle is over."""
        self._take_settings()
        hold = self.store.hold()
        if hold and now >= hold.until:
            hold = None  # it is tried again; what it was is kept until that succeeds, for the next pause to double
        if hold and not hold.nodes:
            return hold.until - now
        if self.store.running():
            self._recover(now)
            return 0.0
        if self.store.get("paused"):
            self._report("paused")
            return WAKE_SECONDS
        if reason := self.store.held_by_drain():
            self._report("hold", reason=reason, seconds=WAKE_SECONDS)
            return WAKE_SECONDS
        with self.store.change("wake"):
            for row in self.store.queued():
                if row.state == "held":
                    self.store.move_job(row.job_name, "queued", None, now)
        rows, number = self.store.queued(), self.store.cycle().number
        asks = not hold and any(cycle.needs_nodes(row.job_type) for row in cycle.ready(rows, number, now))
        if asks and (reason := self._kinds.nodes_missing()):
            self._endings.hold(reason, now, nodes=True)
            hold = self.store.hold()
        elif not hold and (before := self.store.hold()) and before.nodes:
            self._endings.release(now)
        ready = cycle.ready(cycle.without_nodes(rows, number) if hold else rows, number, now)
        if ready:
            self._execute(ready[0].job_name, now)
            return 0.0
        if hold:
            return hold.until - now
        if not self.store.cycle().drained:
            self.store.set_cycle(Cycle(number, now))
            self._report("idle")
        return None

    def _take_settings(self) -> None:
        """Nodes come and go while a Runner runs; only the folder of its queue cannot be another one."""
        fresh, before = self._fresh(), self.settings
        if fresh == before or fresh is self._unfit:
            return
        if fresh.state_dir != before.state_dir:
            self._unfit = fresh
            log.error("the settings name another state_dir, %s: start this Runner again", fresh.state_dir)
        else:
            self.settings = fresh
            self._kinds = Kinds(fresh)
            self._endings.configure(fresh)

    def _begin_cycle(self) -> None:
        """Begin the next cycle, unless a dead Runner left the last one unfinished."""
        last = self.store.cycle()
        if not last.number or last.drained:
            self.store.set_cycle(Cycle(last.number + 1))

    def _until_next_cycle(self, now: float) -> float:
        """Return the seconds until something may be due; begin the next cycle when its time has come."""
        interval_seconds = self.settings.cycle_interval_seconds
        seconds, begins = cycle.until_next_cycle(self.store.queued(), self.store.cycle(), interval_seconds, now)
        if begins:
            self._begin_cycle()
        return seconds

    # --- one run ---

    def _execute(self, name: str, now: float) -> None:
        """Run a job in a thread of its own; meanwhile watch for cancel, timeout and the end of our own time."""
        with self.store.change("start"):
            job = self.store.job(name)
            if not job or job.state != "queued" or self.store.held_by_drain():
                return  # deleted since it was picked, or a drain has begun
            run = self.store.start_run(name, now)
        execution = Execution(job.spec, run, job.number)
        self._report("started", job_name=name, run=run)
        try:
            with Keeper(self.store, execution.job, run, self._report) as keeper:
                execution.start(self._kinds, keeper, self._doorbell.ring)
                self._watch(execution, now + (execution.job["timeout_seconds"] or float("inf")))
        finally:
            execution.stop.set()  # nothing may go on that nobody watches
        execution.detail = keeper.detail(time.time(), self.settings)
        self._unfinished = {(name, run): execution.detail}
        try:
            self._conclude(execution, time.time())
        except ClusterFault:
            raise
        except Exception as error:
            log.exception("run %d of %s could not be concluded", run, name)
            fault = unforeseen(error, "the end of the run could not be recorded")
            self._count(self._endings.end(execution, "failed", time.time(), exception=fault.to_dict()))

    def _watch(self, execution: Execution, deadline: float) -> None:
        while not execution.done.is_set():
            stopped = execution.stop.is_set()
            self._doorbell.wait(STOPPING_SECONDS if stopped else min(WAKE_SECONDS, deadline - time.time()))
            if execution.why_stopped is None and not execution.done.is_set():
                running = self.store.running()
                if running and running.cancel:
                    execution.why_stopped = "cancelled"
                elif time.time() >= deadline:
                    execution.why_stopped = "failed"
                elif self._stopping:
                    execution.why_stopped = "handed back"
                if execution.why_stopped:
                    execution.stop.set()

    def _conclude(self, execution: Execution, now: float) -> None:
        self._count(self._endings.conclude(execution, self._stopping, now))

    def _count(self, ending: str | None) -> None:
        if ending:
            self.ended[ending] = self.ended.get(ending, 0) + 1

    def _recover(self, now: float) -> None:
        """End a run that a dead Runner left: complete it if it had committed, else hand it back; never repeat it."""
        running = self.store.running()
        assert running
        name, run = running.job_name, running.run
        execution = Execution(self.store.running_spec(), run, running.number)
        seen = self.store.progress()
        execution.detail = self._unfinished.get((name, run)) or (ended(seen, now) if seen else None)
        if self._endings.committed(name, run):
            try:
                made = manifest.read(self.settings.state_dir, name, run)
                self._kinds.cluster().finish(execution.job, run)
            except Exception as error:  # noqa: BLE001  what is committed may wait, but must not be lost
                self._endings.hold_for_output(name, run, error, now)
                return
            self._count(self._endings.end(execution, "succeeded", now, counts=made.counts if made else {}))
        else:
            if running.job_type == "mapreduce":
                with contextlib.suppress(Exception):  # what is away now is swept before the next run there
                    self._kinds.cluster().abandon(name, run)
            scripts.end_leftovers(self.settings)
            ending = "cancelled" if running.cancel else "handed back"
            gone = MrcoreError("its Runner ended before the run was committed").to_dict()
            self._count(self._endings.end(execution, ending, now, exception=gone))
        self._report("recovered", job_name=name, run=run)

    # --- those outside ---

    def _report(self, event: str, **facts: Any) -> None:
        if self._listener is not None:
            try:
                self._listener(event, **facts)
            except Exception as error:  # noqa: BLE001  a listener must not end what it listens to
                self._listener = None
                log.warning("nothing more is reported: %s: %s", type_name(error), one_line(error))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def obey(number: int, _: object) -> None:
            if self._stopping:  # asked again: at once; the next Runner recovers, a script's guard ends the script
                show_cursor = b"\r\x1b[K\x1b[?25h" if os.isatty(2) else b""  # a spinner had it hidden
                text = b"mrcore: ended at once; the run under way is handed back when a Runner is started\n"
                os.write(2, show_cursor + text)
                os._exit(128 + number)
            self.ended_by = number
            self.stop()

        handlers = {number: signal.signal(number, obey) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
