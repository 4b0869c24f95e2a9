"""One run of a job of any kind, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mrcore.errors import MrcoreError
from mrcore.queue import scripts
from mrcore.settings.config import Settings
from mrcore.state.progress import RunDetail
from mrcore.text import one_line, type_name

if TYPE_CHECKING:
    from mrcore.cluster.manage_cluster import ManageCluster

Counts = dict[str, Any]
Progress = Callable[..., None]  # progress(phase, **numbers)


@dataclass
class Execution:
    """A run under way, which leaves `counts` or `error`."""

    job: dict[str, Any]
    run: int
    number: int  # of the job's submission
    stop: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    why_stopped: str | None = None  # the ending that the Runner asked for
    counts: Counts | None = None
    error: BaseException | None = None
    detail: RunDetail | None = None  # what stays known of it

    def start(self, kinds: Kinds, progress: Progress, ring: Callable[[], object]) -> None:
        """Begin, and return at once; `done` is set at the end, then `ring` is called."""

        def work() -> None:
            try:
                self.counts = kinds.run(self, progress)
            except BaseException as error:  # noqa: BLE001  whatever it is, the run must end with it in the history
                self.error = error
            finally:
                self.done.set()
                ring()

        threading.Thread(target=work, name=f"{self.job['job_name']}-{self.run}", daemon=True).start()


class Kinds:
    """How a job of each kind is run. What needs the network is loaded at its first use: an empty queue needs none."""

    def __init__(self, settings: Settings, manage_cluster: ManageCluster | None = None) -> None:
        self._settings, self._manage_cluster = settings, manage_cluster

    def run(self, execution: Execution, progress: Progress) -> Counts:
        """Run a job to its end and return what is counted of it. Raises whatever ended it."""
        job, run, stop = execution.job, execution.run, execution.stop
        if job["job_type"] == "script":
            return scripts.run(job, run, self._settings, progress, stop)
        if job["job_type"] == "file_transfer":
            from mrcore.transfer import file_transfer

            return file_transfer.run(job, self._settings, progress, stop)["counts"]
        return self.cluster().run(job, run=run, progress=progress, stop=stop)["counts"]  # type: ignore[no-any-return]

    def cluster(self) -> ManageCluster:
        """Return what runs mapreduce jobs."""
        if self._manage_cluster is None:
            from mrcore.cluster.manage_cluster import ManageCluster

            self._manage_cluster = ManageCluster(self._settings)
        return self._manage_cluster

    def nodes_missing(self) -> str | None:
        """Return why no job that needs nodes can start; asked before a run gets its number: a wait makes no history."""
        try:
            self.cluster().check_nodes()
        except MrcoreError as error:
            return error.message
        except Exception as error:  # noqa: BLE001  an answer that makes no sense is a node's fault, not the Runner's end
            return f"the nodes' answers cannot be used: {type_name(error)}: {one_line(error)}"
        return None
