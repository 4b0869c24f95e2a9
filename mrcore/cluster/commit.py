"""How a run ends: by a commit and what follows from it, or by leaving nothing of it on the nodes."""

from __future__ import annotations

import contextlib
from typing import Any

from mrcore.cluster.attempt import Attempt
from mrcore.cluster.connections import CLEANUP_SECONDS, Agents
from mrcore.cluster.preflight import Plan
from mrcore.errors import MrcoreError, UsageError
from mrcore.messages.methods import CANCEL, END_RUN, PUBLISH
from mrcore.settings.config import NodeSettings, Settings
from mrcore.state import ledger, manifest
from mrcore.state.manifest import Manifest
from mrcore.state.store import Store
from mrcore.system import failpoints
from mrcore.wire.client import Client
from mrcore.wire.tls import Pki

CONNECT_SECONDS = 2.0  # while cleaning up

Job = dict[str, Any]


def describe(job: Job, run: int, plan: Plan, attempt: Attempt, phases: dict[str, float]) -> Manifest:
    """Return the manifest of a run that is to be committed."""
    results, partitioning = attempt.results, attempt.partitioning
    parts = sorted(results.parts, key=lambda part: part.name)
    shuffled = sorted(results.shuffled.items())
    counts = {
        **results.counters,
        "input_files": plan.files,
        "input_bytes": plan.bytes,
        "files_read_before": plan.increment.known,
        "output_items": sum(part.records for part in parts),
        "output_bytes": sum(part.bytes for part in parts),
        "shuffled_bytes": results.shuffled.total(),
        "remote_bytes": sum(length for (source, target), length in shuffled if source != target),
        "task_deaths": len(results.deaths),
        "peak_task_bytes": results.peak_bytes,
        "skipped": plan.skipped,
        "counters": dict(attempt.board.counters),
    }
    return Manifest(
        job=job["job_name"],
        run=run,
        parts=parts,
        delete_job_data=job["delete_job_data"] or plan.increment.replaces,
        merge_output=job["merge_output"],
        keys_kept=results.keys_kept,
        partitioner=job["partitioner"],
        partitions=partitioning.count,
        cuts=None if partitioning.cuts is None else list(partitioning.cuts),
        ledger=plan.increment.ledger,
        counts={name: count for name, count in counts.items() if count != {}},
        skipped=dict(plan.skipped),
        shuffle=[(source, target, length) for (source, target), length in shuffled],
        task_seconds={name: round(seconds, 3) for name, seconds in results.seconds.items()},
        phases=phases,
        deaths=results.deaths,
    )


def finish(settings: Settings, agents: Agents, job: str, run: int) -> None:
    """Do what follows from a commit: publish the parts, remove what is temporary. May be repeated after a crash."""
    committed = manifest.read(settings.state_dir, job, run)
    if committed is None:
        raise UsageError(f"run {run} of {job} has not committed")

    def publish(node: NodeSettings) -> None:
        parts = [part.name for part in committed.parts if part.node == node.name]
        agent, delete = agents.client(node), committed.delete_job_data
        agent.call(PUBLISH, job=job, run=run, parts=parts, delete_job_data=delete, timeout_seconds=600)
        agent.call(END_RUN, job=job, run=run, timeout_seconds=600)
        failpoints.point("node finished")

    failpoints.point("finish begun")
    agents.on_all(publish)
    failpoints.point("nodes finished")
    if committed.ledger:
        with contextlib.closing(Store(settings.state_dir)) as store:
            ledger.commit(store, committed)


def abandon(settings: Settings, pki: Pki, agents: Agents, job: str, run: int) -> None:
    """End the tasks and remove the files of a run that will not commit, as far as the nodes can be reached.

    Also for what a Runner left that died; what cannot be reached now is swept before the next run.
    """

    def cancel(node: NodeSettings) -> None:
        for server in settings.servers():
            if server.node.name == node.name:
                address = (node.address, server.port, pki, node.name, CONNECT_SECONDS, CLEANUP_SECONDS)
                try:
                    with contextlib.closing(Client(*address)) as client:
                        client.call(CANCEL, job=job, run=run)
                except MrcoreError:
                    agents.end_server(node, server.name)
        with contextlib.suppress(MrcoreError):
            agents.client(node).call(END_RUN, job=job, run=run, timeout_seconds=60)

    agents.on_all(cancel)
