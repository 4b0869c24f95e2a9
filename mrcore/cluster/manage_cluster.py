"""The cluster as the master sees it: start and stop it, run one attempt of a mapreduce job, read its output.

`run` is: preflight (nodes answer, same version, project pushed, inputs listed) → the attempt's phases (`phases`
decides, `links` carries out) → commit (the manifest) → publish on the nodes. An order is
`{"identity", "job", "project", "environment", "partitions", "sample_by_lines", "node", …}` and, for MAP, "bundles" and
"no_more", for REDUCE, "partition", "low", "high" and "sources".
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import msgspec

from mrcore.cluster.attempt import Attempt, EndServer, Give, Start, default_partitions
from mrcore.cluster.connections import Links
from mrcore.cluster.preflight import Preflight, Stopped, check_versions
from mrcore.engine.inputs import SAMPLE_BLOCK_BYTES, THIN_BY_LINES_BELOW
from mrcore.errors import JobFault, MrcoreError, UsageError
from mrcore.launchers import health
from mrcore.messages.tasks import PlacedPart
from mrcore.settings.config import NodeSettings, Settings, load_settings
from mrcore.state import ledger, manifest, outputs
from mrcore.state.manifest import Manifest
from mrcore.state.store import Store
from mrcore.system import failpoints
from mrcore.wire.client import Client
from mrcore.wire.tls import master_pki

TICK_SECONDS = 0.5
CLEANUP_SECONDS = 5.0
NODES_AT_ONCE = 16

Json = dict[str, Any]
Progress = Callable[..., None]


class ManageCluster:
    """All that can be done with the cluster as a whole. Agents' connections are kept between runs."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or load_settings()
        self._pki = master_pki(self.settings)
        self._agents: dict[str, Client] = {}

    # --- life of the cluster ---

    def start_cluster(self) -> list[Json]:
        """Start what does not run yet; gives `status()`."""
        return self._launcher().start_cluster(self.settings)  # type: ignore[no-any-return]

    def stop_cluster(self) -> int:
        """Stop gracefully, then make certain; gives how many daemons ran."""
        return self._launcher().stop_cluster(self.settings)  # type: ignore[no-any-return]

    def kill_cluster(self) -> int:
        """End everything at once; gives how many daemons ran."""
        return self._launcher().kill_cluster(self.settings)  # type: ignore[no-any-return]

    def status(self) -> list[Json]:
        """One dict per daemon: name, node, address, port, pid, state."""
        return self._launcher().status(self.settings)  # type: ignore[no-any-return]

    def check_nodes(self) -> None:
        """Raise ClusterFault, saying what starts those that do not run, unless all agents answer in this version."""
        health.insist(self.settings, lambda node: check_versions(node, self._agent(node).call("health")))

    def _launcher(self) -> Any:
        if self.settings.local:
            from mrcore.launchers import local

            return local
        from mrcore.launchers import ssh

        return ssh

    # --- one attempt of a job ---

    def run(
        self,
        job: Json,
        run: int,
        attempt: int = 1,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> Json:
        """Execute a validated mapreduce job and give the manifest of what it committed.

        `progress(phase, **facts)` is told of every phase; setting `stop` ends the attempt. Raises JobFault (the job's
        fault), ClusterFault (hand the run back, hold the queue); nothing of the attempt then is left on the nodes. When
        a `hold_state` job has nothing new to read, nothing is committed: the answer has "nothing_new" and counts only.
        """
        clock = _PhaseClock(progress or (lambda phase, **facts: None))
        stop = stop or threading.Event()
        clock.enter("PREFLIGHT")
        try:
            plan = Preflight(self.settings, self._pki, self._agent, self._on_all_nodes, stop).unless_stopped(
                job, run, self._hang_up
            )
            if plan["nothing_new"]:
                self._on_all_nodes(lambda node: self._agent(node).call("end_run", job=job["job_name"], run=run))
                counts: Json = {"input_files": 0, "input_bytes": 0, "bytes": 0, "files_read_before": plan["known"]}
                counts |= {"skipped": skipped} if (skipped := plan["input"]["skipped"]) else {}
                return {"job": job["job_name"], "run": run, "nothing_new": True, "counts": counts}
            machine = self._drive(job, run, attempt, plan, clock, stop)
        except BaseException:
            self.abandon(job["job_name"], run)
            raise
        clock.enter("COMMIT")
        found = self._manifest(job, run, plan, machine, clock)
        manifest.write(self.settings.state_dir, found)
        self.finish(job, run)
        return manifest.to_dict(found)

    def finish(self, job: Json, run: int) -> None:
        """Do what follows from a commit: publish the parts, remove what is temporary. May be repeated after a crash."""
        name = job["job_name"]
        found = manifest.read(self.settings.state_dir, name, run)
        if found is None:
            raise UsageError(f"run {run} of {name} has not committed")

        def publish(node: NodeSettings) -> None:
            parts = [part.name for part in found.parts if part.node == node.name]
            agent = self._agent(node)
            facts = {"attempt": 1, "parts": parts, "delete_job_data": found.delete_job_data}
            agent.call("publish", job=name, run=run, **facts, timeout_seconds=600)
            agent.call("end_run", job=name, run=run, timeout_seconds=600)
            failpoints.point("node finished")

        failpoints.point("finish begun")
        self._on_all_nodes(publish)
        failpoints.point("nodes finished")
        if found.ledger:
            with contextlib.closing(Store(self.settings.state_dir)) as store:
                ledger.commit(store, found)

    def _drive(
        self, job: Json, run: int, attempt: int, plan: Json, clock: _PhaseClock, stop: threading.Event
    ) -> Attempt:
        """Take the attempt through its phases. Raises the fault that ended it, Stopped when asked to stop."""
        servers = self.settings.servers()
        timeout_seconds = self.settings.node_timeout_seconds
        total_bytes = plan["input"]["bytes"]
        # Those of a job with merge_output are for good, so they are not counted by what the first run happens to read.
        partitions = default_partitions((1 << 62) if job["merge_output"] else total_bytes, len(servers))
        base = plan.get("base") or Manifest("", 0, partitions=job["number_of_partitions"] or partitions)
        earlier: dict[int, list[Json]] = {}
        for part in base.parts:
            earlier.setdefault(part.partition, []).append(msgspec.to_builtins(part))
        machine = Attempt(
            {"job": job["job_name"], "run": run, "attempt": attempt},
            {each.name: each.node.name for each in servers},
            plan["bundles"],
            partitions=base.partitions,
            earlier=earlier,
            cuts=base.cuts,
            by_range=job["partitioner"] == "range",
            map_only=job["reduce_function_name"] is None,
            max_attempts=job["max_attempts"] or self.settings.max_attempts,
            node_timeout_seconds=timeout_seconds,
            now=time.monotonic(),
        )
        bundle_count = sum(map(len, plan["bundles"].values()))
        common = {
            "job": job,
            "project": plan["project"],
            "environment": plan["environment"],
            "partitions": machine.partitions,
            "sample_by_lines": total_bytes < THIN_BY_LINES_BELOW,
        }
        with Links(list(self.settings.nodes), servers, self._pki, timeout_seconds) as links:
            while not machine.finished and not machine.fault:
                for instruction in machine.instructions():
                    self._carry_out(instruction, machine, links, common)
                clock.enter(machine.phase, bundles_done=machine.bundles_done, bundles=bundle_count)
                if machine.finished or machine.fault:
                    break
                for event in links.next_events(TICK_SECONDS):
                    self._tell(machine, event)
                machine.tick(time.monotonic())
                if stop.is_set():
                    raise Stopped("stopped by the Runner")
        if machine.fault:
            raise machine.fault
        self._check_sample(job, total_bytes, machine)
        return machine

    def _tell(self, machine: Attempt, event: tuple[Any, ...]) -> None:
        match event:
            case ("up", server):
                machine.server_up(server)
            case ("down", server):
                machine.server_down(server, time.monotonic())
            case ("event", server, told):
                machine.task_event(server, told)
            case ("refused", server, identity, error):
                machine.refused(server, identity, error)
            case ("lost", node, reason):
                machine.node_lost(node, reason)

    def _carry_out(self, instruction: Any, machine: Attempt, links: Links, common: Json) -> None:
        link = links.servers[instruction.server]
        match instruction:
            case Start():
                order = {"identity": instruction.identity, **common, **instruction.extra}
                if instruction.identity["phase"] == "REDUCE":
                    partition = instruction.extra["partition"]
                    order["sources"] = [self._at(source) for source in machine.sources(partition)]
                    if parts := machine.earlier.get(partition):
                        holders = sorted({part["node"] for part in parts})  # more than one, after a drain
                        order["earlier"] = {"parts": parts, "sources": [self._at({"node": each}) for each in holders]}
                link.put("order", order=order)
            case Give():
                link.put(
                    "give", identity=instruction.identity, bundles=instruction.bundles, no_more=instruction.no_more
                )
            case EndServer():
                self._end_server(link.server.node, instruction.server)

    def _at(self, source: Json) -> Json:
        node = outputs.node_of(self.settings, source["node"])
        return source | {"address": node.address, "port": node.agent_port}

    def _end_server(self, node: NodeSettings, server: str) -> None:
        with contextlib.suppress(MrcoreError):  # its agent may be gone as well: then the node counts as lost
            self._agent(node).call("end_server", name=server, timeout_seconds=CLEANUP_SECONDS)

    def _check_sample(self, job: Json, total_bytes: int, machine: Attempt) -> None:
        if job["downsample"] < 1 and total_bytes and not machine.counters.get("lines"):
            least = min(1.0, (3 * SAMPLE_BLOCK_BYTES if total_bytes >= THIN_BY_LINES_BELOW else 300) / total_bytes)
            raise JobFault(
                f"the sample of {job['downsample']} of {total_bytes:,} bytes holds no line; the smallest useful "
                f"downsample for this input is about {least:.2g}"
            )

    def abandon(self, job: str, run: int) -> None:
        """End the tasks and remove the files of a run that will not commit, as far as the nodes can be reached.

        Also for what a Runner left that died; what cannot be reached now is swept before the next run."""

        def cancel(node: NodeSettings) -> None:
            for server in self.settings.servers():
                if server.node.name == node.name:
                    try:
                        address = (node.address, server.port, self._pki, node.name, 2, CLEANUP_SECONDS)
                        with contextlib.closing(Client(*address)) as client:
                            client.call("cancel", job=job, run=run)
                    except MrcoreError:
                        self._end_server(node, server.name)
            with contextlib.suppress(MrcoreError):
                self._agent(node).call("end_run", job=job, run=run, timeout_seconds=60)

        self._on_all_nodes(cancel)

    def _manifest(self, job: Json, run: int, plan: Json, machine: Attempt, clock: _PhaseClock) -> Manifest:
        shuffled = machine.shuffled
        remote = sum(length for (source, target), length in shuffled.items() if source != target)
        parts = sorted(machine.parts, key=lambda part: str(part["name"]))
        counts = {
            **machine.counters,
            "input_files": plan["input"]["files"],
            "input_bytes": plan["input"]["bytes"],
            "files_read_before": plan["known"],
            "output_items": sum(part["records"] for part in parts),
            "output_bytes": sum(part["bytes"] for part in parts),
            "shuffled_bytes": sum(shuffled.values()),
            "remote_bytes": remote,
            "task_deaths": len(machine.deaths),
            "peak_task_bytes": machine.peak_bytes,
            "skipped": plan["input"]["skipped"],
        }
        return Manifest(
            job=job["job_name"],
            run=run,
            parts=msgspec.convert(parts, list[PlacedPart]),
            delete_job_data=job["delete_job_data"] or plan.get("replaces", False),
            merge_output=job["merge_output"],
            keys_kept=machine.keys_kept,
            partitioner=job["partitioner"],
            partitions=machine.partitions,
            cuts=None if machine.cuts is None else list(machine.cuts),
            ledger=plan.get("ledger"),
            counts={name: count for name, count in counts.items() if count != {}},
            skipped=plan["input"]["skipped"],
            shuffle=[(source, target, length) for (source, target), length in sorted(shuffled.items())],
            task_seconds={name: round(seconds, 3) for name, seconds in machine.seconds.items()},
            phases=clock.seconds(),
            deaths=machine.deaths,
        )

    # --- output ---

    def cat(self, job_name: str, out: BinaryIO, head: int | None = None) -> int:
        """Write a job's output to `out` in part order, one JSON item a line, at most `head` lines; gives their number.

        Parts are fetched from the nodes and checked. Raises UsageError when the job has no output.
        """
        return outputs.cat(self.settings, self._pki, job_name, out, head)

    # --- nodes ---

    def _agent(self, node: NodeSettings) -> Client:
        if node.name not in self._agents:
            self._agents[node.name] = Client(node.address, node.agent_port, self._pki, node.name)
        return self._agents[node.name]

    def _hang_up(self) -> None:
        """Break off all calls that are under way; the next ones connect afresh."""
        for name in list(self._agents):
            self._agents.pop(name).close()

    def _on_all_nodes(self, function: Callable[[NodeSettings], Any]) -> list[Any]:
        """Call `function` for every node, several at once; gives the results in order or raises the first fault."""
        nodes = self.settings.nodes
        if len(nodes) == 1:
            return [function(nodes[0])]
        with ThreadPoolExecutor(min(NODES_AT_ONCE, len(nodes)), "node") as pool:
            return list(pool.map(function, nodes))


class _PhaseClock:
    """Notes when each phase began and tells `progress` of it and of what was counted."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._begun: list[tuple[str, float]] = []
        self._told: tuple[str, dict[str, int]] | None = None

    def enter(self, phase: str, **facts: int) -> None:
        """A phase goes on, or begins."""
        if not self._begun or self._begun[-1][0] != phase:
            self._begun.append((phase, time.monotonic()))
        if (phase, facts) != self._told:
            self._told = (phase, facts)
            self._progress(phase, **facts)

    def seconds(self) -> dict[str, float]:
        """Wall time of each phase so far."""
        ends = [begun for _, begun in self._begun[1:]] + [time.monotonic()]
        return {phase: round(end - begun, 4) for (phase, begun), end in zip(self._begun, ends, strict=True)}
