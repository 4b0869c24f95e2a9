"""The cluster as the master sees it: start and stop it, run one attempt of a mapreduce job, read its output.

`run` is: preflight (nodes answer, same version, project pushed, inputs listed) → the attempt's phases (`attempt`
decides, `coordinator` carries out) → commit (the manifest) → publish on the nodes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, BinaryIO

from mrcore.cluster import commit
from mrcore.cluster.connections import Agents
from mrcore.cluster.coordinator import Coordinator, PhaseClock, Progress
from mrcore.cluster.preflight import Preflight, check_versions
from mrcore.errors import ClusterFault, Unreachable
from mrcore.launchers import launcher_of
from mrcore.launchers.launcher import NODES_AT_ONCE, DaemonStatus, try_nodes
from mrcore.messages.methods import END_RUN, HEALTH
from mrcore.settings.config import NodeSettings, Settings, load_settings
from mrcore.state import manifest, outputs
from mrcore.wire.tls import master_pki

Json = dict[str, Any]


class ManageCluster:
    """All that can be done with the cluster as a whole. Agents' connections are kept between runs."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or load_settings()
        self._pki = master_pki(self.settings)
        self._agents = Agents(self.settings.nodes, self._pki)

    # --- life of the cluster ---

    def start_cluster(self) -> list[DaemonStatus]:
        """Start what does not run yet; return `status()`."""
        return launcher_of(self.settings).start_cluster(self.settings)

    def stop_cluster(self) -> int:
        """Stop gracefully, then make certain; return how many daemons ran."""
        return launcher_of(self.settings).stop_cluster(self.settings)

    def kill_cluster(self) -> int:
        """End everything at once; return how many daemons ran."""
        return launcher_of(self.settings).kill_cluster(self.settings)

    def status(self) -> list[DaemonStatus]:
        """Return one row per daemon: name, node, address, port, pid, state."""
        return launcher_of(self.settings).status(self.settings)

    def check_nodes(self) -> None:
        """Raise ClusterFault, saying what starts those that do not run, unless all agents answer in this version."""
        require_answers(self.settings, lambda node: check_versions(node, self._agents.client(node).call(HEALTH)))

    # --- one attempt of a job ---

    def run(
        self, job: Json, run: int, progress: Progress | None = None, stop: threading.Event | None = None
    ) -> dict[str, Any]:
        """Execute a validated mapreduce job and return the manifest of what it committed.

        `progress(phase, **facts)` is called for every phase, and about once a second with `seen` (a `Progress`: how far
        it is); at the attempt's end with its `detail` and `profiles`. Setting `stop` ends the attempt. Raises JobFault
        (the job's fault), ClusterFault (hand the run back, hold the queue); nothing of the attempt then is left on the
        nodes. When a `hold_state` job has nothing new to read, nothing is committed: the result has "nothing_new" and
        counts only.
        """
        clock, stop, name = (
            PhaseClock(progress or (lambda phase, **facts: None)),
            stop or threading.Event(),
            job["job_name"],
        )
        clock.enter("PREFLIGHT")
        try:
            plan = Preflight(self.settings, self._pki, self._agents, job, run, stop).unless_stopped()
            if plan.increment.nothing_new:
                self._agents.on_all(lambda node: self._agents.client(node).call(END_RUN, job=name, run=run))
                counts: Json = {
                    "input_files": 0,
                    "input_bytes": 0,
                    "bytes": 0,
                    "files_read_before": plan.increment.known,
                }
                counts |= {"skipped": plan.skipped} if plan.skipped else {}
                return {"job": name, "run": run, "nothing_new": True, "counts": counts}
            attempt = Coordinator(self.settings, self._pki, self._agents, job, run, plan).run(clock, stop)
        except BaseException:
            self.abandon(name, run)
            raise
        clock.enter("COMMIT")
        committed = commit.describe(job, run, plan, attempt, clock.seconds())
        manifest.write(self.settings.state_dir, committed)
        self.finish(job, run)
        return manifest.to_dict(committed)

    def finish(self, job: Json, run: int) -> None:
        """Do what follows from a commit: publish the parts, remove what is temporary. May be repeated after a crash."""
        commit.finish(self.settings, self._agents, job["job_name"], run)

    def abandon(self, job: str, run: int) -> None:
        """End the tasks and remove the files of a run that will not commit, as far as the nodes can be reached."""
        commit.abandon(self.settings, self._pki, self._agents, job, run)

    # --- output ---

    def cat(self, job_name: str, out: BinaryIO, head: int | None = None, run: int | None = None) -> int:
        """Write a job's output to `out` in part order, one JSON item a line, at most `head` lines; return their number.

        With `run` only what that run added to it. Parts are fetched from the nodes and checked. Raises UsageError when
        there is no such output.
        """
        return outputs.cat(self.settings, self._pki, job_name, out, head, run)


def require_answers(settings: Settings, ask: Callable[[NodeSettings], object]) -> None:
    """Raise ClusterFault unless `ask` succeeds for every node; it names those that fail, and what starts them."""
    _, errors = try_nodes(settings.nodes, ask, NODES_AT_ONCE)
    if not errors:
        return
    if settings.local:
        rows = launcher_of(settings).status(settings)
        if all(row["state"] == "absent" for row in rows):
            raise Unreachable(f"the local cluster of {settings.home} is not started: `mrcore cluster start`")
        absent = [row["node"] for row in rows if (row["name"], row["state"]) == ("agent", "absent")]
        if absent:
            raise Unreachable(
                f"the agent of {', '.join(absent)} does not run: `mrcore cluster start` starts what is missing"
            )
    for name, error in errors.items():
        if not isinstance(error, Unreachable) or settings.local:
            raise ClusterFault(f"node {name}: {error.message}")
    first = next(iter(errors.values())).message
    raise Unreachable(
        f"no answer from {', '.join(errors)} ({first}): `mrcore cluster start`, or `make start INVENTORY=…` on the "
        "controller, starts what does not run"
    )
