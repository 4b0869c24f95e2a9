"""The cluster as the master sees it: start and stop it, run one attempt of a mapreduce job, read its output.

`run` is: preflight (nodes answer, same version, project pushed, inputs listed) → the attempt's phases (`phases`
decides, `links` carries out) → commit (the manifest) → publish on the nodes. An order is
`{"identity", "job", "project", "environment", "partitions", "sample_by_lines", "node", …}` and, for MAP, "bundles" and
"no_more", for REDUCE, "partition", "low", "high" and "sources".
"""

from __future__ import annotations

import contextlib
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from mrcore import WIRE_VERSION, __version__, environments, faults, ledger, manifest, outputs
from mrcore.answers import InputPages
from mrcore.config import NodeSettings, Settings, load_settings
from mrcore.errors import ClusterFault, JobFault, Malformed, MrcoreError, UsageError
from mrcore.inputs import MAX_SPLIT_BYTES, SAMPLE_BLOCK_BYTES, THIN_BY_LINES_BELOW, plan_bundles
from mrcore.launchers import health
from mrcore.links import Links
from mrcore.phases import Attempt, EndServer, Give, Start, default_partitions
from mrcore.rpc.client import Client
from mrcore.rpc.data import DataClient
from mrcore.rpc.tls import master_pki
from mrcore.store import Store
from mrcore.text import listed, one_line
from mrcore.usercode import pack_project, project_hash

MIN_FREE_DISK_BYTES = 256 << 20
TICK_SECONDS = 0.5
CLEANUP_SECONDS = 5.0
NODES_AT_ONCE = 16
FILES_A_LOOK = 1000
MAX_SPLITS = 2_000_000  # of all nodes in one run; the master holds half a kilobyte for each

Json = dict[str, Any]
Progress = Callable[..., None]


class _Stopped(MrcoreError):
    """The caller asked for the attempt to end."""


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
        health.insist(self.settings, lambda node: self._check_versions(node, self._agent(node).call("health")))

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
            plan = self._preflight(job, run)
            if plan["nothing_new"]:
                self._on_all_nodes(lambda node: self._agent(node).call("end_run", job=job["job_name"], run=run))
                counts = {"input_files": 0, "input_bytes": 0, "bytes": 0, "files_read_before": plan["known"]}
                return {"job": job["job_name"], "run": run, "nothing_new": True, "counts": counts}
            machine = self._drive(job, run, attempt, plan, clock, stop)
        except BaseException:
            self.abandon(job["job_name"], run)
            raise
        clock.enter("COMMIT")
        found = self._manifest(job, run, attempt, plan, machine, clock)
        manifest.write(self.settings.state_dir, found)
        self.finish(job, run)
        return found

    def finish(self, job: Json, run: int) -> None:
        """Do what follows from a commit: publish the parts, remove what is temporary. May be repeated after a crash."""
        name = job["job_name"]
        found = manifest.read(self.settings.state_dir, name, run)
        if found is None:
            raise UsageError(f"run {run} of {name} has not committed")

        def publish(node: NodeSettings) -> None:
            parts = [part["name"] for part in found["parts"] if part["node"] == node.name]
            agent = self._agent(node)
            facts = {"attempt": found["attempt"], "parts": parts, "delete_job_data": found["delete_job_data"]}
            agent.call("publish", job=name, run=run, **facts, timeout_seconds=600)
            agent.call("end_run", job=name, run=run, timeout_seconds=600)
            faults.point("node finished")

        faults.point("finish begun")
        self._on_all_nodes(publish)
        faults.point("nodes finished")
        if found.get("ledger"):
            with contextlib.closing(Store(self.settings.state_dir)) as store:
                ledger.commit(store, found)

    def _preflight(self, job: Json, run: int) -> Json:
        """Make the nodes ready and list the inputs. Gives {"project", "bundles" (by node), "input", "nothing_new"}, and
        for a `hold_state` job what `ledger.plan` gives."""
        folder = self.settings.projects_of(job) / job["project_name"]
        if not folder.is_dir():
            raise JobFault(f"project folder {folder} does not exist: create it, or submit the job where it is now")
        snapshot = project_hash(folder)
        with environments.Shipment(folder, self.settings.state_dir) as packages:
            listings = self._on_all_nodes(lambda node: self._prepare_node(node, job, run, snapshot, folder, packages))
        files = {node.name: found["files"] for node, found in zip(self.settings.nodes, listings, strict=True)}
        self._check_inputs(job, listings)
        plan: Json = {"nothing_new": False, "known": 0}
        if job["hold_state"]:
            base_dirs = {node.name: str(node.layout.base_dir) for node in self.settings.nodes}
            state_dir, one_machine = self.settings.state_dir, self.settings.local
            with contextlib.closing(Store(state_dir)) as store:
                plan = ledger.plan(
                    job, files, self._look, store, state_dir=state_dir, base_dirs=base_dirs, one_machine=one_machine
                )
            files = plan["files"]
        total = sum(each[1] - sum(each[4:]) for found in files.values() for each in found)
        if (splits := total // MAX_SPLIT_BYTES + sum(map(len, files.values()))) > MAX_SPLITS:
            raise JobFault(
                f"{splits:,} splits of input are more than one run can take ({MAX_SPLITS:,}): read less in one"
            )
        bundles: dict[str, list[Json]] = {}
        for node in self.settings.nodes:
            count = sum(map(len, bundles.values()))
            bundles[node.name] = plan_bundles(files[node.name], node.servers, first_id=count)
        skipped: dict[str, int] = {}
        for found in (*listings, plan):
            for reason, number in found.get("skipped", {}).items():
                skipped[reason] = skipped.get(reason, 0) + number
        read = {"files": sum(map(len, files.values())), "bytes": total, "skipped": skipped}
        return plan | {"project": snapshot, "environment": packages.hash, "bundles": bundles, "input": read}

    def _look(self, node: str, files: list[list[Any]]) -> list[list[Any]]:
        agent, found = self._agent(outputs.node_of(self.settings, node)), []
        for first in range(0, len(files), FILES_A_LOOK):
            found += agent.call("look_into", files=files[first : first + FILES_A_LOOK], timeout_seconds=600)
        if wrong := [file[0] for file, (end, *_) in zip(files, found, strict=True) if end > file[1]]:
            raise Malformed(f"node {node} gave no answer to look_into: {one_line(wrong[0], 200)} ends past its size")
        return found

    def _prepare_node(
        self, node: NodeSettings, job: Json, run: int, snapshot: str, folder: Path, packages: environments.Shipment
    ) -> Json:
        """Check one node, bring it the project and its packages, make its working folder and list its inputs."""
        agent = self._agent(node)
        self._check_versions(node, agent.call("health"))
        with contextlib.closing(DataClient(node.address, node.agent_port, self._pki, node.name)) as client:
            if not agent.call("project_state", hash=snapshot):
                client.put({"project": snapshot}, pack_project(folder))
            packages.bring(agent.call, client.put)
        for key in ("auxiliary_data_name_mapper", "auxiliary_data_name_reducer"):
            if job[key] is not None and not agent.call("auxiliary", name=job[key]):
                file = node.layout.auxiliary_dir / f"{job[key]}.data"
                raise JobFault(f"auxiliary data {job[key]!r} is not on node {node.name}: {file} is missing; upload it")
        # One job runs at a time: whatever else is there is of dead runs.
        agent.call("sweep", keep=[[job["job_name"], run]], timeout_seconds=600)
        free = agent.call("start_run", job=job["job_name"], run=run)["disk_free_bytes"]
        if free < MIN_FREE_DISK_BYTES:
            raise ClusterFault(
                f"node {node.name} has {free >> 20} MiB of free disk, less than {MIN_FREE_DISK_BYTES >> 20}: make room",
                node=node.name,
            )
        asked = {key: job[key] for key in ("input_dirs", "shared_input")}
        if self.settings.local:
            asked["sibling_dirs"] = str(node.compute_dir.parent)
        names = [each.name for each in self.settings.nodes]
        pages, cursor = InputPages(node.name, job["input_dirs"]), None
        while True:
            page = agent.call("list_inputs", job=asked, node_names=names, cursor=cursor, timeout_seconds=600)
            if (cursor := pages.add(page)) is None:
                break
        return pages.listing

    def _check_versions(self, node: NodeSettings, health: Json) -> None:
        ours = (__version__, WIRE_VERSION, platform.python_version_tuple()[:2])
        theirs = (health["version"], health["wire_version"], tuple(health["python"].split(".")[:2]))
        if ours != theirs:
            raise ClusterFault(
                f"node {node.name} runs mrcore {theirs[0]} (wire {theirs[1]}) on Python {'.'.join(theirs[2])}, the "
                f"master {ours[0]} (wire {ours[1]}) on {'.'.join(ours[2])}: bring both to the same",
                node=node.name,
            )

    def _check_inputs(self, job: Json, listings: list[Json]) -> None:
        faults = [fault for found in listings for fault in found["faults"]]
        for entry in job["input_dirs"]:
            if not any(found["matched"].get(entry) for found in listings):
                where = "" if entry.startswith("/") else " under any node's base_dir"
                faults.append(f"the input {entry} matches no file{where}: check the path, or upload the files first")
        prints = {found["fingerprint"] for found in listings}
        absolute = any(
            entry.startswith("/") and found["matched"][entry] for found in listings for entry in job["input_dirs"]
        )
        unclear = job["shared_input"] is None and not self.settings.local and len(listings) > 1
        if unclear and absolute and len(prints) == 1:
            faults.append(
                "every node lists the same files for the absolute input_dirs: set shared_input: true if they are one "
                "shared file system (each file is then read once), false if they only look alike"
            )
        if faults:
            raise JobFault(listed(faults), faults=faults)

    def _drive(
        self, job: Json, run: int, attempt: int, plan: Json, clock: _PhaseClock, stop: threading.Event
    ) -> Attempt:
        """Take the attempt through its phases. Raises the fault that ended it, _Stopped when asked to stop."""
        servers = self.settings.servers()
        timeout_seconds = self.settings.node_timeout_seconds
        total_bytes = plan["input"]["bytes"]
        # Those of a job with merge_output are for good, so they are not counted by what the first run happens to read.
        partitions = default_partitions((1 << 62) if job["merge_output"] else total_bytes, len(servers))
        base = plan.get("base") or {"parts": [], "partitions": job["number_of_partitions"] or partitions, "cuts": None}
        earlier: dict[int, list[Json]] = {}
        for part in base["parts"]:
            earlier.setdefault(part["partition"], []).append(part)
        machine = Attempt(
            {"job": job["job_name"], "run": run, "attempt": attempt},
            {each.name: each.node.name for each in servers},
            plan["bundles"],
            partitions=base["partitions"],
            earlier=earlier,
            cuts=base["cuts"],
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
                    raise _Stopped("stopped by the Runner")
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

    def _manifest(self, job: Json, run: int, attempt: int, plan: Json, machine: Attempt, clock: _PhaseClock) -> Json:
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
        }
        return {
            "job": job["job_name"],
            "run": run,
            "attempt": attempt,
            "committed": time.time(),
            "partitioner": job["partitioner"],
            "partitions": machine.partitions,
            "cuts": machine.cuts,
            "delete_job_data": job["delete_job_data"] or plan.get("replaces", False),
            "merge_output": job["merge_output"],
            "merged_run": (plan.get("base") or {}).get("run"),
            "ledger": plan.get("ledger"),
            "compress": job["compress"],
            "project": plan["project"],
            "keys_kept": machine.keys_kept,
            "parts": parts,
            "shuffle": [[source, target, length] for (source, target), length in sorted(shuffled.items())],
            "skipped": plan["input"]["skipped"],
            "counts": counts,
            "task_seconds": {name: round(seconds, 3) for name, seconds in machine.seconds.items()},
            "phases": clock.seconds(),
            "deaths": machine.deaths,
        }

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
