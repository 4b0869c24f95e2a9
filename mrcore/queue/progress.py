"""Keeps how far the run under way is where every process can read it, and what stays known of it at its end.

A run tells what it does whenever it likes (`Keeper.__call__`, in its own thread). The keeper's thread writes the last
of it once a second, also when nothing new was said: an old row is a sign that its Runner is no more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from mrcore.errors import MrcoreError
from mrcore.queue import forecast
from mrcore.queue.forecast import Forecast, Past
from mrcore.settings.config import Settings
from mrcore.state import profiles
from mrcore.state.progress import Phase, Progress, RunDetail
from mrcore.state.store import Store
from mrcore.text import one_line, type_name

log = logging.getLogger(__name__)
WRITE_SECONDS = 1.0
PAST_RUNS = 20  # of the job, and as many of all jobs, from which the time that is left is estimated
TOLD = ("seen", "detail", "profiles")  # facts that are for the keeper alone


class Keeper:
    """Writes the progress of one run to the store, and tells `report` of it. Use as a context manager."""

    def __init__(self, store: Store, job: Mapping[str, Any], run: int, report: Callable[..., None]) -> None:
        self._store, self._job, self._run, self._report = store, job, run, report
        self._started = time.time()
        self._lock, self._wake, self._ended = threading.Lock(), threading.Event(), False
        self._phase, self._own = "", dict[str, Phase]()
        self._facts: dict[str, Any] = {}
        self._seen: Progress | None = None
        self._detail: RunDetail | None = None
        self._profiles: Mapping[str, Mapping[str, int]] = {}
        self._forecast = Forecast()
        self._thread = threading.Thread(target=self._write_on, name="progress", daemon=True)

    def __call__(self, phase: str, **facts: Any) -> None:
        """The run is in this phase; `facts`: what is counted, for reports, and what `ManageCluster.run` tells."""
        now = time.time()
        if phase != self._phase:
            self._store.enter_phase(self._job["job_name"], self._run, phase, now)
        with self._lock:
            if phase != self._phase:
                for own in self._own.values():
                    own.ended = own.ended or now
                self._own[phase] = Phase(name=phase, started=now, unit="")
                self._wake.set()
            self._phase = phase
            self._seen = facts.get("seen", self._seen)
            self._detail = facts.get("detail", self._detail)
            self._profiles = facts.get("profiles", self._profiles)
            self._facts = {key: value for key, value in facts.items() if key not in TOLD}
            if phase == "TRANSFER":
                own, total = self._own[phase], facts["total_bytes"]
                own.done, own.total, own.unit = min(facts["sent_bytes"], total), total, "bytes"
                own.records = facts["files"]

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended = True
        self._wake.set()
        self._thread.join()

    def progress(self, now: float) -> Progress:
        """Return how far the run is, without an estimate."""
        with self._lock:
            phases = {name: replace(phase) for name, phase in self._own.items()}
            name, kind = self._job["job_name"], self._job["job_type"]
            seen = self._seen or Progress(job_name=name, run=self._run, job_type=kind, started=0, updated=0)
        last = phases.pop("COMMIT", None)
        phases |= {phase.name: phase for phase in seen.phases}
        phases |= {"COMMIT": last} if last else {}
        return replace(seen, started=self._started, updated=now, phases=list(phases.values()))

    def detail(self, now: float, settings: Settings) -> RunDetail:
        """Return what stays known of the run, which has ended, and write what its tasks sampled."""
        name, profile = self._job["job_name"], False
        try:
            profile = profiles.write(settings.state_dir, name, self._run, self._profiles)
        except Exception as error:  # noqa: BLE001  a full disk, odd frames: no reason to fail what may be committed
            log.warning("no profile of run %d of %s: %s: %s", self._run, name, type_name(error), one_line(error, 300))
        phases = ended(self.progress(now), now).phases
        return replace(self._detail or RunDetail(), phases=phases, profile=profile)

    # --- the keeper's thread ---

    def _write_on(self) -> None:
        runs, usual_after_map = self._learn()
        failed = known = False
        while not self._ended:
            now = time.time()
            seen = self.progress(now)
            left = forecast.seconds_left(seen, runs, usual_after_map)
            known, before = any(phase.total for phase in seen.phases), known
            fraction, eta_seconds = self._forecast.show(left, now - self._started, now, anew=known > before)
            seen = replace(seen, fraction=fraction, eta_seconds=eta_seconds)
            try:
                self._store.set_progress(seen)
                failed = False
            except MrcoreError as error:  # the run goes on: what it writes itself decides
                if not failed:
                    log.warning("the progress is not written: %s", error.message)
                failed = True
            with self._lock:
                phase, facts = self._phase, dict(self._facts)
            if phase:
                self._report("progress", job_name=seen.job_name, run=seen.run, phase=phase, **facts, progress=seen)
            self._wake.wait(WRITE_SECONDS)
            self._wake.clear()

    def _learn(self) -> tuple[list[Past], float]:
        """Return what earlier runs of the job took, and how SORT and REDUCE usually relate to MAP."""
        name = self._job["job_name"]
        try:
            rows = self._store.runs(name, PAST_RUNS)
            mine = [forecast.past(row, self._store.detail(name, row.run)) for row in rows]
            all_ = [forecast.past(row) for row in self._store.runs(None, PAST_RUNS)]
        except Exception as error:  # noqa: BLE001  without a past there is less to tell, and no more
            log.warning("nothing is learnt from earlier runs: %s: %s", type_name(error), one_line(error, 300))
            mine = all_ = []
        runs = [run for run in mine if run]
        if self._job["job_type"] == "mapreduce" and self._job["reduce_function_name"] is None:
            return runs, 0.0
        return runs, forecast.after_map([run for run in all_ if run])


def ended(seen: Progress, now: float) -> RunDetail:
    """Return what stays known of a run of which no more is known than what was seen last."""
    return RunDetail(phases=[replace(phase, ended=phase.ended or now) for phase in seen.phases], counters=seen.counters)
