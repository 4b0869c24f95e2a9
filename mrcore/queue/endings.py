"""What the end of a run means: for its job (retries, leaving the queue), its group, the whole queue (holds), and for
those who watch (reports, hooks).

All of it is one transaction; reports and hooks follow when it is durable.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from mrcore.errors import ClusterFault, InternalError, JobFault, MrcoreError, UsageError, unforeseen
from mrcore.queue import job as jobs
from mrcore.queue import scripts
from mrcore.queue.cycle import needs_nodes
from mrcore.queue.execution import Execution
from mrcore.queue.hooks import Hooks
from mrcore.settings.config import Settings
from mrcore.state import manifest, profiles
from mrcore.state.store import Hold, JobRow, Store
from mrcore.text import one_line, type_name

log = logging.getLogger(__name__)


class AfterFailure(NamedTuple):
    """What follows from a failed run, as reports and hooks have it."""

    retry_at: float | None
    stays: bool
    tries: int  # before this run
    retries: int


class Endings:
    """Ends runs in the store; `report(event, **facts)` is called with "ended" and "hold"."""

    def __init__(self, store: Store, settings: Settings, report: Callable[..., None]) -> None:
        self._store, self._settings, self._report = store, settings, report
        self._hooks = Hooks(settings, self._note)

    def configure(self, settings: Settings) -> None:
        """End runs by these settings from now on."""
        self._settings = settings
        self._hooks.configure(settings)

    def close(self) -> None:
        """Wait for hooks that are under way."""
        self._hooks.close()

    def _note(self, name: str | None, run: int | None, text: str) -> None:
        if name is None:
            log.warning("%s", text)
        else:
            self._store.note(name, run, text, time.time())

    def committed(self, name: str, run: int) -> bool:
        """Return whether a run has happened: all that follows from it may be repeated, the run must not."""
        return manifest.path_of(self._settings.state_dir, name, run).exists()

    def conclude(self, execution: Execution, stopping: bool, now: float) -> str | None:
        """End a run by what it left; `stopping`: the Runner itself ends. Return what `end` does; None: it goes on.

        What is committed, but does not have all its output in place, is held for `Runner.step` to recover.
        """
        name, run, error = execution.job["job_name"], execution.run, execution.error
        if execution.counts is not None:
            return self.end(execution, "succeeded", now, counts=execution.counts)
        if self.committed(name, run):
            if execution.why_stopped != "handed back":
                self.hold_for_output(name, run, error, now)
            return None
        fault = unforeseen(error) if error is not None else MrcoreError("it ended without a result")
        why = {
            "failed": JobFault(
                f"timeout: ran longer than its timeout_seconds {execution.job['timeout_seconds']}", code="timeout"
            ),
            "cancelled": MrcoreError("cancelled by the user"),
            "handed back": MrcoreError("the Runner was stopped; the job runs again when one is started"),
        }.get(execution.why_stopped or "")
        if why:
            why.details = fault.details | why.details
            fault = why
        # SIGTERM to a whole service reaches what it runs as well, perhaps before us.
        again = stopping or isinstance(fault, ClusterFault) or self._worth_another_try(execution, fault)
        ending = execution.why_stopped or ("handed back" if again else "failed")
        hold = fault.message if isinstance(fault, ClusterFault) and ending == "handed back" else None
        return self.end(execution, ending, now, hold, exception=fault.to_dict())

    def _worth_another_try(self, execution: Execution, fault: MrcoreError) -> bool:
        """Return whether a run that met what nobody foresaw runs again: unless the last `max_attempts` all did so."""
        if not isinstance(fault, InternalError):
            return False
        runs, count = self._store.runs(execution.job["job_name"]), self._settings.max_attempts - 1
        before = [run for run in runs if run.number == execution.number and run.run < execution.run][:count]
        classes = [run.exception["class"] if run.exception else None for run in before]
        return len(classes) < count or any(name != InternalError.__name__ for name in classes)

    def end(self, execution: Execution, ending: str, now: float, hold: str | None = None, **facts: Any) -> str:
        """End a run, with its `counts` or `exception`; with `hold` the queue as a whole stops for that reason.

        Return the ending, "retried" for a failure that is tried again.
        """
        spec, run, store = execution.job, execution.run, self._store
        name, left, after, before = spec["job_name"], list[str](), None, store.hold()
        with store.change("end"):
            store.end_run(name, run, ending, now, **facts)
            if execution.detail:
                store.set_detail(name, run, execution.detail)
            job = store.job(name)
            same = job if job and job.number == execution.number else None
            mine = same if same and same.state != "out" else None  # else replaced or deleted in the meantime
            if ending != "handed back":
                self._had_its_turn(spec, same, mine)
            if mine and spec["run_once"] and ending in ("succeeded", "cancelled"):
                store.move_job(name, "out", ending, now, ending)
            if ending == "failed":
                left, after = self._failed(spec, run, mine, facts["exception"]["message"], now)
            pruned = store.prune(self._settings.history_keep_runs)
            seconds = self._put_hold(hold, now, name) if hold else 0.0
        what = {"job_name": name, "run": run, "state": ending, **facts, **(after._asdict() if after else {})}
        self._report("ended", **what)
        if hold:
            self._report("hold", reason=hold, seconds=seconds)
        try:
            self.forget(pruned)
            more = {
                "group_name": spec["group_name"],
                "left_the_queue": left,
                "job_type": spec["job_type"],
                "ended": now,
            }
            self._hooks.call(**what, **more)
            self._tell_hold(before, now, name, run)
        except Exception as error:  # noqa: BLE001  the run has ended, whatever becomes of what follows
            log.warning("after run %d of %s: %s: %s", run, name, type_name(error), error)
        return "retried" if after and after.retry_at else ending

    def _had_its_turn(self, spec: dict[str, Any], same: JobRow | None, mine: JobRow | None) -> None:
        """Note that a job, and with a retry what came before it in its group, had its turn; a hold is over."""
        store, name = self._store, spec["job_name"]
        hold, cycle = store.hold(), store.cycle().number
        if hold and (needs_nodes(spec["job_type"]) or not hold.nodes):
            store.set_hold(None)
        if same:
            store.set_job(name, cycle=cycle, force_run=0)
        if mine:
            store.set_job(name, tries=0, retry_at=None, cause=None, reason=None)
        for mate in store.group(spec["group_name"]) if mine and mine.retry_at else ():
            if mate.cycle >= mine.cycle:  # type: ignore[union-attr]
                store.set_job(mate.job_name, cycle=cycle)

    def _failed(
        self, spec: dict[str, Any], run: int, job: JobRow | None, why: str, now: float
    ) -> tuple[list[str], AfterFailure]:
        """Do what a failed run means for its job (`job`: if it is still the one that ran) and its group.

        Return who else left the queue, and what follows.
        """
        store, name, tries = self._store, spec["job_name"], job.tries if job else 0
        wait = jobs.retry_seconds(spec, tries) if job else None
        stays = job is not None and (wait is not None or jobs.keeps(spec))
        after = AfterFailure(wait and now + wait, stays, tries, spec.get("retries", 0))
        if stays:
            retry = {"tries": tries + 1 if wait else 0, "retry_at": after.retry_at}
            store.set_job(name, cause="failed", reason=one_line(why), **retry)
        elif job:
            store.move_job(name, "out", f"failed: {why}", now, "failed")
        if wait is not None:
            store.note(name, run, f"retry {tries + 1} of {after.retries} in {wait:g} s", now)
            return [], after
        reason, cycle = one_line(f"group failed: {name} run {run}: {why}"), store.cycle().number
        mates = [mate for mate in store.group(spec["group_name"]) if mate.state != "out" and mate.job_name != name]
        if jobs.keeps(spec):  # what follows from a step that failed is not done in this cycle
            for mate in mates:
                if mate.cycle < cycle:
                    skipped = {"cycle": cycle, "cause": "group failed", "reason": reason}
                    store.set_job(mate.job_name, **skipped, tries=0, retry_at=None)
                    store.note(mate.job_name, None, f"skipped in this cycle: {reason}", now)
            return [], after
        for mate in mates:
            store.move_job(mate.job_name, "out", reason, now, "group failed")
        return [mate.job_name for mate in mates], after

    def hold(self, reason: str, now: float, nodes: bool = False) -> None:
        """Stop the queue because of the cluster, with `nodes` all but scripts, and report it."""
        before = self._store.hold()
        self._report("hold", reason=reason, seconds=self._put_hold(reason, now, nodes=nodes))
        self._tell_hold(before, now)

    def release(self, now: float) -> None:
        """End a hold: what it waited for is there."""
        before = self._store.hold()
        self._store.set_hold(None)
        self._tell_hold(before, now)

    def _tell_hold(self, before: Hold | None, now: float, name: str | None = None, run: int | None = None) -> None:
        """Call the hook if the queue holds since `before`, or no longer: not again at each try."""
        hold = self._store.hold()
        if (told := hold or before) and not (hold and before):
            facts = {"reason": told.reason, "since": told.since, "nodes": told.nodes, "job_name": name, "run": run}
            try:
                self._hooks.call(state="held" if hold else "released", time=now, **facts)
            except Exception as error:  # noqa: BLE001  the queue holds, or goes on, whoever is told
                log.warning("the hook of a hold: %s: %s", type_name(error), error)

    def hold_for_output(self, name: str, run: int, error: BaseException | None, now: float) -> None:
        """Stop the queue until what a committed run produced is in place."""
        self.hold(f"run {run} of {name} is committed, its output not yet in place: {one_line(error)}", now)

    def _put_hold(self, reason: str, now: float, name: str | None = None, nodes: bool = False) -> float:
        """Hold the queue, each time in a row for twice as long; return the seconds. The job `name` is held, too."""
        store, settings = self._store, self._settings
        with store.change("hold"):
            before = store.hold()
            since, tries = (before.since, before.tries) if before else (now, 0)
            first, most = settings.hold_backoff_first_seconds, settings.hold_backoff_max_seconds
            seconds = min(first * 2.0 ** min(tries, 30), most)
            store.set_hold(Hold(one_line(reason), since, tries + 1, now + seconds, nodes))
            if name and (job := store.job(name)) and job.state == "queued":
                store.move_job(name, "held", reason, now, "cluster")
        return seconds

    def forget(self, names: Iterable[str]) -> None:
        """Remove what was kept of runs that the history has forgotten: manifests, profiles, what scripts printed."""
        for name in names:
            kept = self._store.run_numbers(name)
            scripts.prune(self._settings, name, kept)
            profiles.prune(self._settings.state_dir, name, kept)
            try:
                manifest.prune(self._settings.state_dir, name, kept)
            except UsageError as error:  # a damaged one: all of the job's stay until it is fixed
                log.warning("the manifests of %s are not pruned: %s", name, error)
