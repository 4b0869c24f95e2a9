"""The Runner drains the queue, one job at a time: cycles, priorities, groups, holds, recovery.

A state folder has one Runner (a lock that dies with it). It sleeps on a doorbell, a FIFO that every change rings,
so it neither polls nor lets a submitter wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mrcore.errors import ClusterFault, InternalError, JobFault, MrcoreError, unforeseen
from mrcore.queue import job as jobs
from mrcore.queue import scripts, turns
from mrcore.queue.hooks import Hooks
from mrcore.queue.turns import QUEUED, due, held_by_retry, its_turn
from mrcore.settings import sudo
from mrcore.settings.config import Settings, load_settings
from mrcore.state import backup, manifest
from mrcore.state.doorbell import Doorbell
from mrcore.state.store import Store, sole_runner
from mrcore.system.paths import close_home
from mrcore.text import one_line, type_name

log = logging.getLogger(__name__)
WAKE_SECONDS = 5.0  # the doorbell's fallback: a ring that came before the FIFO was there
FAILED_PAUSE_SECONDS = 5.0  # at least, before a cycle in which a job that has just failed and stays runs again


@dataclass
class Execution:
    """One attempt under way: what an executor gets, and what it leaves (`manifest` or `error`)."""

    job: dict[str, Any]
    run: int
    progress: Callable[..., None]
    number: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    why_stopped: str | None = None
    manifest: dict[str, Any] | None = None
    error: BaseException | None = None


class Runner:
    """Drains the queue: cycles, priorities, groups, holds, recovery. `report(event, **facts)` hears what happens:
    `started`, `progress`, `ended`, `hold`, `idle`, `paused`, `recovered`. `fresh` gives the settings between runs.

    A report comes after what it tells is durable, and touches nothing: once `report` raises (a closed pipe, a full
    disk), nothing more is reported, and the queue is drained all the same.
    """

    def __init__(
        self, settings: Settings | None = None, manage_cluster: Any = None, report: Callable[..., None] | None = None,
        fresh: Callable[[], Settings] | None = None,
    ) -> None:  # fmt: skip
        self.settings = sudo.insist(settings or load_settings())
        self._fresh, self._unfit = fresh or (lambda: self.settings), self.settings
        if self.settings.local:
            close_home(self.settings.home)
        self.store = Store(self.settings.state_dir)
        self._listener = report
        self.executors: dict[str, Callable[[Execution], dict[str, Any]]] = {
            "mapreduce": self._mapreduce,
            "file_transfer": self._file_transfer,
            "script": lambda e: scripts.run(e.job, e.run, self.settings, e.progress, e.stop),
        }
        self._hooks = Hooks(self.settings, lambda name, run, text: self.store.note(name, run, text, time.time()))
        self._manager = manage_cluster
        self._doorbell = Doorbell(self.settings.state_dir)
        self._stopping = False
        self.ended_by: int | None = None  # the signal that ended it
        self.ended: dict[str, int] = {}

    def run(self, once: bool = False) -> dict[str, int]:
        """Drain the queue until `stop()`, SIGTERM or SIGINT (a run under way is handed back), with `once` to the end
        of one cycle: a hold is waited for, a pause is not. Gives how many runs ended how. UsageError if another Runner
        has the state folder."""
        with sole_runner(self.settings.state_dir), self._signals():
            backup.complete(self.settings.state_dir)
            self._forget(path.name for path in self.settings.state_dir.glob("manifests/*"))
            self._forget(path.name for path in self.settings.logs_dir.glob("scripts/*"))
            self._doorbell.wait(0)
            self._begin_cycle()
            while not self._stopping:
                now = time.time()
                try:
                    wait = self.step(now)
                    if wait is None:
                        wait = self._until_retry(now) if once else self._until_next_cycle(now)
                    if once and (wait is None or self.store.get("paused")):
                        break
                except ClusterFault as error:  # the queue itself cannot be written: what was running is recovered
                    self._report("hold", reason=error.message, seconds=WAKE_SECONDS)
                    wait = WAKE_SECONDS
                self._doorbell.wait(min(WAKE_SECONDS, wait or 0.0))
            self._hooks.close()
            self._doorbell.close()
        return self.ended

    def _report(self, event: str, **facts: Any) -> None:
        if self._listener is not None:
            try:
                self._listener(event, **facts)
            except Exception as error:  # noqa: BLE001  whoever listens must not end what he listens to
                self._listener = None
                log.warning("nothing more is reported: %s: %s", type_name(error), one_line(error))

    def stop(self) -> None:
        """Make `run` return soon, from another thread or a signal handler."""
        self._stopping = True
        self._doorbell.ring()

    def step(self, now: float) -> float | None:
        """One iteration: recover, or run the next job. Gives the seconds to wait, None when the cycle is over."""
        self._take_up_settings()
        hold = self.store.get("hold")
        holds = hold is not None and now < hold["until"]
        if holds and not hold.get("nodes"):
            return float(hold["until"] - now)
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
            for row in self.store.rows("SELECT job_name FROM jobs WHERE state = 'held'"):
                self.store.move_job(row["job_name"], "queued", None, now)
        cycle, rows = self.store.get("cycle"), self.store.rows(QUEUED)
        asks = not holds and any(map(turns.needs_nodes, turns.ready(rows, cycle["number"], now)))
        if asks and (reason := self._nodes_missing()):
            self._hold(reason, now, nodes=True)
            holds, hold = True, self.store.get("hold")
        if holds:
            rows = turns.without_nodes(rows, cycle["number"])
        elif hold and hold.get("nodes"):
            self.store.put("hold", None)
        job = turns.pick(rows, cycle["number"], now)
        if job is None and holds:
            return float(hold["until"] - now)
        if job is None:
            if not cycle["drained"]:
                self.store.put("cycle", cycle | {"drained": now}, "cycle")
                self._report("idle")
            return None
        self._execute(job["job_name"], now)
        return 0.0

    def _take_up_settings(self) -> None:
        """Nodes come and go while a Runner runs; only the folder of its queue cannot be another one."""
        fresh, before = self._fresh(), self.settings
        if fresh == before or fresh is self._unfit:
            return
        if fresh.state_dir != before.state_dir:
            self._unfit = fresh
            log.error("the settings name another state_dir, %s: start this Runner again", fresh.state_dir)
        else:
            self.settings, self._manager = fresh, None
            self._hooks.configure(fresh)

    def _mapreduce(self, execution: Execution) -> dict[str, Any]:
        facts = {key: getattr(execution, key) for key in ("run", "progress", "stop")}
        result: dict[str, Any] = self._manage_cluster().run(execution.job, **facts)
        return result

    def _file_transfer(self, execution: Execution) -> dict[str, Any]:
        from mrcore.transfer import file_transfer  # late: who only asks the queue needs no network

        return file_transfer.run(execution.job, self.settings, execution.progress, execution.stop)

    def _manage_cluster(self) -> Any:
        if self._manager is None:
            from mrcore.cluster.manage_cluster import ManageCluster  # late: an empty queue needs no cluster

            self._manager = ManageCluster(self.settings)
        return self._manager

    def _nodes_missing(self) -> str | None:
        """Why no job that needs nodes can start; asked before a run gets its number: a wait makes no history."""
        try:
            self._manage_cluster().check_nodes()
        except MrcoreError as error:
            return error.message
        except Exception as error:  # noqa: BLE001  an answer that makes no sense is a node's fault, not the Runner's end
            return f"the nodes' answers cannot be used: {type_name(error)}: {one_line(error)}"
        return None

    def _execute(self, name: str, now: float) -> None:
        """Run one attempt in a thread of its own; meanwhile watch for cancel, timeout and the end of our own time."""
        with self.store.change("start"):
            job = self.store.job(name)
            if not job or job["state"] != "queued" or self.store.held_by_drain():
                return  # deleted since it was picked, or a drain has begun
            run = self.store.start_run(name, now)
        execution = Execution(job["spec"], run, self._progress(name, run), number=job["number"])
        self._report("started", job_name=name, run=run)
        threading.Thread(target=self._work, args=(execution,), name=f"{name}-{run}", daemon=True).start()
        try:
            self._watch(execution, now + (job["spec"]["timeout_seconds"] or float("inf")))
        finally:
            execution.stop.set()  # nothing may go on that nobody watches
        try:
            self._conclude(execution, time.time())
        except ClusterFault:
            raise
        except Exception as error:
            log.exception("run %d of %s could not be concluded", run, name)
            fault = unforeseen(error, "the end of the run could not be recorded")
            self._end(execution, "failed", time.time(), exception=fault.to_dict())

    def _watch(self, execution: Execution, deadline: float) -> None:
        while not execution.done.is_set():
            self._doorbell.wait(min(WAKE_SECONDS, deadline - time.time()) if not execution.stop.is_set() else 1.0)
            if execution.why_stopped is None and not execution.done.is_set():
                running = self.store.running()
                if running and running["cancel"]:
                    execution.why_stopped = "cancelled"
                elif time.time() >= deadline:
                    execution.why_stopped = "failed"
                elif self._stopping:
                    execution.why_stopped = "handed back"
                if execution.why_stopped:
                    execution.stop.set()

    def _work(self, execution: Execution) -> None:
        try:
            kind = execution.job["job_type"]
            if kind not in self.executors:
                raise JobFault(f"this version of mrcore cannot run {kind} jobs yet: update it, then `mrcore requeue`")
            execution.manifest = self.executors[kind](execution)
        except BaseException as error:  # noqa: BLE001  whatever it is, the run must end with it in the history
            execution.error = error
        finally:
            execution.done.set()
            self._doorbell.ring()

    def _progress(self, name: str, run: int) -> Callable[..., None]:
        last: list[str] = []

        def progress(phase: str, **facts: Any) -> None:
            if last != [phase]:
                last[:] = [phase]
                self.store.enter_phase(name, run, phase, time.time())
            self._report("progress", job_name=name, run=run, phase=phase, **facts)

        return progress

    def _conclude(self, execution: Execution, now: float) -> None:
        name, run, error = execution.job["job_name"], execution.run, execution.error
        if execution.manifest is not None:
            self._end(execution, "succeeded", now, counts=execution.manifest.get("counts"))
        elif self._committed(name, run):  # but not all followed from it yet: `_recover` goes on
            if execution.why_stopped != "handed back":
                self._hold(f"run {run} of {name} is committed, its output not yet in place: {one_line(error)}", now)
        else:
            why = {
                "failed": JobFault(f"timeout: ran longer than its timeout_seconds {execution.job['timeout_seconds']}"),
                "cancelled": MrcoreError("cancelled by the user"),
                "handed back": MrcoreError("the Runner was stopped; the job runs again when one is started"),
            }.get(execution.why_stopped or "")
            fault = unforeseen(error) if error is not None else MrcoreError("it ended without a result")
            if why:
                why.details.update(fault.details)
                fault = why
            # SIGTERM to a whole service reaches what it runs as well, perhaps before us.
            again = isinstance(fault, ClusterFault) or self._worth_another_try(execution, fault)
            ending = execution.why_stopped or ("handed back" if again or self._stopping else "failed")
            hold = fault.message if isinstance(fault, ClusterFault) and ending == "handed back" else None
            self._end(execution, ending, now, hold, exception=fault.to_dict())

    def _worth_another_try(self, execution: Execution, fault: MrcoreError) -> bool:
        """Whether a run that met what nobody foresaw runs again: unless the last `max_attempts` runs all did so."""
        if not isinstance(fault, InternalError):
            return False
        before, name = self.settings.max_attempts - 1, execution.job["job_name"]
        query = "SELECT json_extract(exception, '$.class') AS class FROM runs WHERE job_name = ? AND number = ?"
        rows = self.store.rows(
            f"{query} AND run < ? ORDER BY run DESC LIMIT ?", name, execution.number, execution.run, before
        )
        return len(rows) < before or any(row["class"] != InternalError.__name__ for row in rows)

    def _end(self, execution: Execution, ending: str, now: float, hold: str | None = None, **facts: Any) -> None:
        """End a run, and let follow what it means for the job and its group, in one change; then tell of it.

        With `hold` the queue as a whole stops for that reason.
        """
        spec, run, number = execution.job, execution.run, execution.number
        name, left, then = spec["job_name"], list[str](), dict[str, Any]()
        with self.store.change("end") as db:
            self.store.end_run(name, run, ending, now, **facts)
            job = self.store.job(name) or {}
            mine = job["state"] != "out" and job["number"] == number  # else replaced or deleted in the meantime
            if ending != "handed back":
                if turns.needs_nodes(spec) or not (self.store.get("hold") or {}).get("nodes"):
                    self.store.put("hold", None)
                cycle = self.store.get("cycle", {"number": 0})["number"]
                values = (cycle, name, number)
                db.execute("UPDATE jobs SET cycle = ?, force_run = 0 WHERE job_name = ? AND number = ?", values)
                if mine:
                    again = "tries = 0, retry_at = NULL, cause = NULL, reason = NULL"
                    db.execute(f"UPDATE jobs SET {again} WHERE job_name = ?", (name,))
                if mine and job["retry_at"]:  # what of its group had its turn before it has had it in this cycle, too
                    had = "UPDATE jobs SET cycle = ? WHERE group_name = ? AND cycle >= ?"
                    db.execute(had, (cycle, spec["group_name"], job["cycle"]))
            if mine and spec["run_once"] and ending in ("succeeded", "cancelled"):
                self.store.move_job(name, "out", ending, now, ending)
            if ending == "failed":
                left, then = self._failed(spec, run, job if mine else None, facts["exception"]["message"], now)
            pruned = self.store.prune(self.settings.history_keep_runs)
            seconds = self._put_hold(hold, now, name) if hold else 0.0
        counted = "retried" if then.get("retry_at") else ending
        self.ended[counted] = self.ended.get(counted, 0) + 1
        self._report("ended", job_name=name, run=run, state=ending, **facts, **then)
        if hold:
            self._report("hold", reason=hold, seconds=seconds)
        told = {"job_name": name, "run": run, "state": ending, "group_name": spec["group_name"], "left_the_queue": left}
        try:
            self._forget(pruned)
            self._hooks.call(**told, job_type=spec["job_type"], ended=now, **facts, **then)
        except Exception as error:  # noqa: BLE001  the run has ended, whatever becomes of what follows
            log.warning("after run %d of %s: %s: %s", run, name, type_name(error), error)

    def _failed(
        self, spec: dict[str, Any], run: int, job: dict[str, Any] | None, why: str, now: float
    ) -> tuple[list[str], dict[str, Any]]:
        """Let follow what a failed run means for its job (`job`: its row, if it is still the one that ran) and group.

        Gives who else left the queue, and {"retry_at", "stays", "tries", "retries"}.
        """
        name, group, tries = spec["job_name"], spec["group_name"], (job or {"tries": 0})["tries"]
        wait = jobs.retry_seconds(spec, tries) if job else None
        stays = job is not None and (wait is not None or jobs.keeps(spec))
        then = {"retry_at": wait and now + wait, "stays": stays, "tries": tries, "retries": spec.get("retries", 0)}
        with self.store.change("end") as db:
            if stays:
                values = (one_line(why), tries + 1 if wait else 0, then["retry_at"], name)
                db.execute(
                    "UPDATE jobs SET cause = 'failed', reason = ?, tries = ?, retry_at = ? WHERE job_name = ?", values
                )
            elif job:
                self.store.move_job(name, "out", f"failed: {why}", now, "failed")
            if wait is not None:
                self.store.note(name, run, f"retry {tries + 1} of {then['retries']} in {wait:g} s", now)
                return [], then
            others = "SELECT job_name, cycle FROM jobs WHERE state != 'out' AND group_name = ? AND job_name != ?"
            rows, told = self.store.rows(others, group, name), one_line(f"group failed: {name} run {run}: {why}")
            if jobs.keeps(spec):  # what follows from a step that failed is not done in this cycle
                cycle = self.store.get("cycle", {"number": 0})["number"]
                skipped = "UPDATE jobs SET cycle = ?, cause = 'group failed', reason = ?, tries = 0, retry_at = NULL "
                for row in [row for row in rows if row["cycle"] < cycle]:
                    db.execute(f"{skipped} WHERE job_name = ?", (cycle, told, row["job_name"]))
                    self.store.note(row["job_name"], None, f"skipped in this cycle: {told}", now)
                return [], then
            for row in rows:
                self.store.move_job(row["job_name"], "out", told, now, "group failed")
        return [row["job_name"] for row in rows], then

    def _forget(self, names: Iterable[str]) -> None:
        """Remove what was kept of runs that the history has forgotten: manifests, what scripts printed."""
        for name in names:
            rows = self.store.rows("SELECT run FROM runs WHERE job_name = ?", name)
            kept = {row["run"] for row in rows}
            manifest.prune(self.settings.state_dir, name, kept)
            scripts.prune(self.settings, name, kept)

    def _hold(self, reason: str, now: float, nodes: bool = False) -> None:
        self._report("hold", reason=reason, seconds=self._put_hold(reason, now, nodes=nodes))

    def _put_hold(self, reason: str, now: float, name: str | None = None, nodes: bool = False) -> float:
        """Stop the queue because of the cluster, with `nodes` all but scripts; each time in a row for twice as long.

        Returns the seconds.
        """
        with self.store.change("hold"):
            before = self.store.get("hold") or {"since": now, "tries": 0}
            first, most = self.settings.hold_backoff_first_seconds, self.settings.hold_backoff_max_seconds
            seconds: float = min(first * 2 ** min(before["tries"], 30), most)
            times = {"since": before["since"], "tries": before["tries"] + 1, "until": now + seconds, "nodes": nodes}
            self.store.put("hold", {"reason": one_line(reason), **times})
            if name and (self.store.job(name) or {}).get("state") == "queued":
                self.store.move_job(name, "held", reason, now, "cluster")
        return seconds

    def _committed(self, name: str, run: int) -> bool:
        return manifest.path_of(self.settings.state_dir, name, run).exists()

    def _recover(self, now: float) -> None:
        """A run that a dead Runner left: completed if it had committed, else handed back; never repeated after."""
        running = self.store.running() or {}
        name, run = running["job_name"], running["run"]
        execution = Execution(running["spec"], run, self._report, number=running["number"])
        if self._committed(name, run):
            try:
                counts = (manifest.read(self.settings.state_dir, name, run) or {}).get("counts")
                self._manage_cluster().finish(running["spec"], run)
            except Exception as error:  # noqa: BLE001  what is committed may wait, but must not be lost
                self._hold(f"run {run} of {name} is committed, its output not yet in place: {one_line(error)}", now)
                return
            self._end(execution, "succeeded", now, counts=counts)
        else:
            if running["spec"]["job_type"] == "mapreduce":
                with contextlib.suppress(Exception):  # what is away now is swept before the next run there
                    self._manage_cluster().abandon(name, run)
            scripts.end_leftovers(self.settings)
            ending = "cancelled" if running["cancel"] else "handed back"
            gone = MrcoreError("its Runner ended before the run was committed").to_dict()
            self._end(execution, ending, now, exception=gone)
        self._report("recovered", job_name=name, run=run)

    def _begin_cycle(self) -> None:
        """Begin the next cycle, unless a dead Runner left the last one unfinished."""
        cycle = self.store.get("cycle")
        if cycle is None or cycle["drained"]:
            number = (cycle or {"number": 0})["number"] + 1
            self.store.put("cycle", {"number": number, "drained": None}, "cycle")

    def _until_next_cycle(self, now: float) -> float:
        """Seconds until something may be due; begins the next cycle when its time has come."""
        rows, cycle = self.store.rows(QUEUED), self.store.get("cycle")
        pause = FAILED_PAUSE_SECONDS if any(row["cause"] == "failed" for row in rows) else 0.0
        begins = float(cycle["drained"] + max(self.settings.cycle_interval_seconds, pause))
        groups = turns.retrying(rows)
        rows = [row for row in rows if not held_by_retry(row, groups)]
        times = [max(due(row), 0 if its_turn(row, cycle["number"]) else begins) for row in rows]
        soonest = min(times, default=now + WAKE_SECONDS)
        if begins <= now and soonest <= now:
            self._begin_cycle()
        return soonest - now

    def _until_retry(self, now: float) -> float | None:
        """Seconds until the next retry of a failed job; None: there is none to wait for."""
        times = [row["retry_at"] for row in self.store.rows(QUEUED) if row["retry_at"]]
        return min(times) - now if times else None

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def obey(number: int, _: object) -> None:
            if self._stopping:  # asked again: at once; the next Runner recovers, a script's guard ends the script
                show_cursor = b"\r\x1b[K\x1b[?25h" if os.isatty(2) else b""  # a spinner had it hidden
                os.write(
                    2,
                    show_cursor + b"mrcore: ended at once; the run under way is handed back when a Runner is started\n",
                )
                os._exit(128 + number)
            self.ended_by = number
            self.stop()

        handlers = {each: signal.signal(each, obey) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for each, handler in handlers.items():
                signal.signal(each, handler)
