"""A job as a Python program has it: wait for it, see how far it is, read what it made."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mrcore.engine.records import as_key, loads
from mrcore.errors import ClusterFault, MrcoreError, UsageError, from_dict
from mrcore.face import tables
from mrcore.face.draining import Draining
from mrcore.face.shown import JobProgress, Why, live
from mrcore.launchers import local
from mrcore.queue.awaited import RUNS_LOOKED_AT, Outcome, outcome
from mrcore.queue.scheduler import Scheduler
from mrcore.state import manifest, outputs
from mrcore.state.store import JobRow, RunRow
from mrcore.wire.tls import master_pki

if TYPE_CHECKING:
    import polars
    import pyarrow

POLL_SECONDS = 0.2  # between two looks at a job that is waited for
LOOK_SECONDS = 1.0  # between two looks whether a Runner and a cluster are there
SPOOL_BYTES = 16 << 20  # of a part that stay in memory while its items are read


class JobHandle:
    """A job by its name, as it was submitted last when the handle was made."""

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        row = scheduler.store.job(name)
        if row is None:
            known = sorted(scheduler.store.last_runs())[:10]
            raise UsageError(f"job {name!r} is not known; known are {', '.join(known) or 'none'}")
        self.name = name
        self._scheduler = scheduler
        self._number = row.number

    def __repr__(self) -> str:
        return f"<mrcore job {self.name}: {self.state}>"

    def _repr_html_(self) -> str:
        return self.progress()._repr_html_()

    # --- how it is ---

    def _row(self) -> JobRow | None:
        row = self._scheduler.store.job(self.name)
        return row if row is not None and row.number == self._number else None

    def _run(self) -> RunRow | None:
        """Return the newest run of this submission; None while it has none, and once another one has run."""
        newest = next(iter(self._scheduler.store.runs(self.name, 1)), None)
        return newest if newest is not None and newest.number == self._number else None

    @property
    def state(self) -> str:
        """Return "queued", "held" (the cluster is not as it must be) or "running"; when it is out of the queue
        "succeeded", "failed", "group failed", "cancelled", "deleted" or "replaced" (by a later submission).
        """
        row, run = self._row(), self._run()
        if run is not None and run.state == "running":
            return "running"
        if row is None:
            return "replaced"
        ended = self._outcome(row)
        if ended is None:
            return row.state
        return ended.state if ended.run is not None else str(row.cause or row.state)

    def _outcome(self, row: JobRow) -> Outcome | None:
        """Return how it has ended; None: it has not, and runs or will run by itself."""
        return outcome(row, self._scheduler.store.runs(self.name, RUNS_LOOKED_AT), self._number)

    @property
    def counts(self) -> dict[str, Any]:
        """Return what was counted in the last run that has ended (input_files, lines, output_items, …)."""
        run = self._run()
        return dict(run.counts or {}) if run is not None else {}

    def progress(self) -> JobProgress:
        """Return how far the job is; a notebook shows it as a bar."""
        state, run, now = self.state, self._run(), self._scheduler.progress()
        facts: dict[str, Any] = {"name": self.name, "state": state}
        if run is not None:
            facts |= {"run": run.run, "phases": run.plain_phases()}
        if (
            state == "running"
            and now is not None
            and run is not None
            and (now.job_name, now.run) == (self.name, run.run)
        ):
            left, phases = now.left_seconds(time.time()), now.phases or facts["phases"]
            facts |= {"phases": phases, "fraction": now.fraction, "eta_seconds": left, "counters": now.counters}
        elif state == "succeeded":
            facts |= {"fraction": 1.0}
        elif state in ("queued", "held"):
            waiting = [row["why"]["text"] for row in self._scheduler.queue() if row["job_name"] == self.name]
            facts["why"] = waiting[0] if waiting and waiting[0] else ""
        elif run is not None and run.exception:
            facts["why"] = str(run.exception.get("message", ""))
        return JobProgress(**facts)

    def why(self) -> Why:
        """Return why the job waits, is slow or failed, as `mrcore why` tells it."""
        explained = self._scheduler.why(self.name)
        return Why(code=explained.code, lines=tuple(explained.lines), next_step=explained.next_step)

    # --- what becomes of it ---

    def wait(self, timeout: float | None = None, progress: bool = True) -> JobHandle:
        """Wait until the job has ended, and return it; of one that recurs, until a run has ended.

        Where no Runner runs the queue, this process does as long as it waits. `timeout` is in seconds; `progress` shows
        a bar in a notebook and a line on a terminal. Raises JobFault with the error of the user's code, TimeoutError,
        ClusterFault when a local cluster is not started.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        view, looked = live(progress), 0.0
        with Draining(self._scheduler.settings, self._is_over) as draining:
            try:
                while not self._is_over():
                    if time.monotonic() - looked > LOOK_SECONDS:
                        self._require_cluster()
                        if not self._scheduler.state()["runner"]:
                            draining.ensure()
                        view.show(self.progress())
                        looked = time.monotonic()
                    if deadline is not None and time.monotonic() >= deadline:
                        raise TimeoutError(f"after {timeout:g} s {self.progress()}")
                    time.sleep(POLL_SECONDS)
                view.show(self.progress())
            finally:
                view.close()
        self._raise_failure()
        return self

    def _is_over(self) -> bool:
        row = self._row()
        return row is None or self._outcome(row) is not None

    def _require_cluster(self) -> None:
        """Raise ClusterFault when this job needs a local cluster and no daemon of it runs."""
        settings, row = self._scheduler.settings, self._row()
        if not settings.local or row is None or row.job_type == "script":
            return
        if not local.is_started(settings):
            raise ClusterFault(
                f"the local cluster of {settings.home} is not started: call start() of the cluster, or "
                "`mrcore cluster start`; the job stays in the queue"
            )

    def _raise_failure(self) -> None:
        state, run = self.state, self._run()
        if state == "succeeded":
            return
        if run is not None and run.exception and state in ("failed", "cancelled"):
            error = from_dict(run.exception)
            if isinstance(text := error.details.get("traceback"), str):
                error.add_note(text)  # Python shows it below the error: the user's own frames
            raise error
        row = self._row()
        reason = f": {row.reason}" if row is not None and row.reason else ""
        raise MrcoreError(
            f"job {self.name} was {state}{reason}" if state != "failed" else f"job {self.name} failed{reason}"
        )

    def cancel(self) -> None:
        """End the run that is under way, or take the job out of the queue."""
        if self.state == "running":
            self._scheduler.cancel(self.name)
        else:
            self._scheduler.delete_job(self.name)

    # --- what it made ---

    def items(self) -> Iterator[tuple[Any, Any]]:
        """Yield key and value of each item of the output, in the order of `mrcore cat`; keys are tuples again.

        A part is read whole, and its checksum compared, before the first of its items comes; on disk if it is large.
        """
        settings = self._scheduler.settings
        pki = master_pki(settings)
        for part in self._parts():
            with tempfile.SpooledTemporaryFile(SPOOL_BYTES, prefix="mrcore-part-") as spool:
                outputs.read_part(settings, pki, self.name, part, spool.write)
                spool.seek(0)
                for line in spool:
                    key, value = loads(line)
                    yield as_key(key), value

    def _parts(self) -> list[Any]:
        return manifest.parts(self._scheduler.settings.state_dir, self.name)

    def head(self, n: int = 10) -> list[tuple[Any, Any]]:
        """Return the first `n` items of the output."""
        settings, out = self._scheduler.settings, io.BytesIO()
        outputs.cat(settings, master_pki(settings), self.name, out, n)
        return [(as_key(key), value) for key, value in map(loads, out.getvalue().splitlines())]

    def to_arrow(self) -> pyarrow.Table:
        """Return the output as an Arrow table with the columns `key` and `value`; tuples of one length as keys become
        `key_0`, `key_1`, … Raises UsageError when a column has values of several types, or without pyarrow.
        """
        table: pyarrow.Table = tables.to_arrow(self.items(), self.name)
        return table

    def to_polars(self) -> polars.DataFrame:
        """Return the output as a Polars data frame, with the columns of `to_arrow`."""
        frame: polars.DataFrame = tables.to_polars(self.items(), self.name)
        return frame
