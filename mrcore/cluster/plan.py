"""What a run of a mapreduce job would read and take, as far as that is known without an order to any node.

Nodes are asked for their health and for listings only, so that no byte on any disk is changed: no project is sent, no
working folder made. Not even whether a node has the project is asked, since that keeps it there for longer. What is
estimated is computed here from plain numbers (`needed_bytes`, `expected_seconds`).
"""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from mrcore.cluster.connections import Agents
from mrcore.cluster.manage_cluster import require_answers
from mrcore.cluster.partitions import default_partitions
from mrcore.cluster.preflight import (
    MIN_FREE_DISK_BYTES,
    Job,
    check_tails,
    check_versions,
    input_faults,
    list_node,
    without_aliases,
)
from mrcore.engine.inputs import plan_bundles, unread_bytes
from mrcore.errors import MrcoreError
from mrcore.messages.methods import AUXILIARY, HEALTH, Method
from mrcore.messages.nodes import Health, InputFile
from mrcore.project.packages import missing
from mrcore.project.snapshot import project_hash
from mrcore.settings.config import NodeSettings, Settings
from mrcore.state import ledger, manifest
from mrcore.state.store import RunRow, Store
from mrcore.system.readers import format_of
from mrcore.text import one_line, type_name
from mrcore.wire.tls import master_pki

RUNS = 20  # newest successful ones, from which the time is estimated
UNPACKED = 5  # times its size: what a compressed file is taken for where no run tells
GUESS = "the bytes that are read, twice: spills and output; compressed files count five times"


class NodePlan(msgspec.Struct, kw_only=True):
    """What a run would read on one node, in how many bundles of splits, and the disk that it would need there."""

    node: str
    servers: int
    files: int = 0
    bytes: int = 0
    splits: int = 0
    disk_free_bytes: int = 0
    disk_needed_bytes: int = 0


class JobPlan(msgspec.Struct, kw_only=True):
    """What a run of a job would do. `faults`: why it would fail, or the queue hold; `notes`: what to know before."""

    job_name: str
    job_type: str
    faults: list[str] = []
    notes: list[str] = []
    nodes: list[NodePlan] = []
    files: int = 0
    bytes: int = 0
    partitions: int = 0
    skipped: dict[str, int] = {}  # files by reason
    read_before: int = 0  # files of which a job with hold_state has read all
    nothing_new: bool = False
    goes_on_from_run: int | None = None  # whose output is merged
    expected_seconds: float | None = None
    expected_from: str = ""
    disk_from: str = ""


class Planner:
    """Asks the nodes what runs of jobs would do. `store`: the queue, only read."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings, self._store = settings, store
        self._agents = Agents(settings.nodes, master_pki(settings))

    def close(self) -> None:
        """Hang up."""
        self._agents.hang_up()

    def plan(self, job: Job) -> JobPlan:
        """Return what a run of a validated mapreduce job would do; whatever is wrong is among its faults."""
        made = JobPlan(job_name=job["job_name"], job_type=job["job_type"])
        try:
            self._fill(made, job)
        except MrcoreError as error:
            made.faults += error.details.get("faults") or [error.message]
        except Exception as error:  # noqa: BLE001  an answer that makes no sense is a fault, not the end of the plan
            made.faults.append(f"the nodes' answers cannot be used: {type_name(error)}: {one_line(error)}")
        return made

    def _call(self, node: NodeSettings, method: Method[Any], **arguments: Any) -> Any:
        return self._agents.client(node).call(method, **arguments)

    def _fill(self, made: JobPlan, job: Job) -> None:
        settings = self._settings
        folder = settings.projects_of(job) / job["project_name"]
        project_hash(folder)  # raises for what cannot be sent
        if why := missing(folder):
            made.faults.append(why)
        health = self._health()
        listings = self._agents.on_all(lambda node: list_node(settings, self._call, job, node))
        made.faults += input_faults(settings, job, listings) + self._auxiliary_faults(job)
        listings = without_aliases(listings) if settings.local else listings
        skipped = sum((Counter(listing.skipped) for listing in listings), Counter[str]())
        files: dict[str, Any] = {node.name: each.files for node, each in zip(settings.nodes, listings, strict=True)}
        increment = self._increment(job, files)
        made.skipped = dict(skipped + Counter(increment.skipped))
        made.read_before, made.nothing_new = increment.known, increment.nothing_new
        made.goes_on_from_run = increment.base.run if increment.base else None
        first = 0
        for node in settings.nodes:
            some = increment.files[node.name]
            bundles = plan_bundles(some, node.servers, first)
            first += len(bundles)
            made.nodes.append(
                NodePlan(
                    node=node.name, servers=node.servers, files=len(some), bytes=sum(map(unread_bytes, some)),
                    splits=sum(len(bundle.pieces) for bundle in bundles), 
                    disk_free_bytes=health[node.name].disk_free_bytes,
                )
            )  # fmt: skip
        made.files, made.bytes = (sum(getattr(node, key) for node in made.nodes) for key in ("files", "bytes"))
        self._estimate(made, job, increment.files)

    def _health(self) -> dict[str, Health]:
        """Return what all nodes say of themselves. Raises ClusterFault, naming those that do not fit or answer."""
        found: dict[str, Health] = {}

        def ask(node: NodeSettings) -> None:
            found[node.name] = self._call(node, HEALTH)
            check_versions(node, found[node.name])

        require_answers(self._settings, ask)
        return found

    def _auxiliary_faults(self, job: Job) -> list[str]:
        names = [job[key] for key in ("auxiliary_data_name_mapper", "auxiliary_data_name_reducer") if job[key]]
        return [
            f"auxiliary data {name!r} is not on node {node.name}: `mrcore upload-auxiliary FILE {name}` brings it"
            for name in dict.fromkeys(names)
            for node in self._settings.nodes
            if not self._call(node, AUXILIARY, name=name)
        ]

    def _increment(self, job: Job, files: Mapping[str, Sequence[InputFile]]) -> ledger.Plan:
        if not job["hold_state"]:
            return ledger.Plan(files)
        settings = self._settings
        bases = {node.name: str(node.layout.base_dir) for node in settings.nodes}
        return ledger.plan(
            job, files, functools.partial(check_tails, settings, self._call), self._store,
            state_dir=settings.state_dir, base_dirs=bases, one_machine=settings.local,
        )  # fmt: skip

    def _estimate(self, made: JobPlan, job: Job, files: Mapping[str, Sequence[InputFile]]) -> None:
        """Fill in partitions, time and disk, and note where the disk may not do."""
        servers = sum(node.servers for node in made.nodes)
        latest = manifest.newest(self._settings.state_dir, job["job_name"])
        of_before = latest.partitions if made.goes_on_from_run and latest else None
        made.partitions = of_before or job["number_of_partitions"] or default_partitions(made.bytes, servers)
        runs = self._store.runs(job["job_name"], RUNS, "succeeded")
        made.expected_seconds, made.expected_from = expected_seconds(runs, made.bytes)
        needed, made.disk_from = needed_bytes(latest.counts if latest else {}, made.nodes, files)
        for node in made.nodes:
            node.disk_needed_bytes = needed[node.node]
            if node.disk_free_bytes < MIN_FREE_DISK_BYTES:
                made.faults.append(
                    f"node {node.node} has {node.disk_free_bytes >> 20} MiB of free disk, less than "
                    f"{MIN_FREE_DISK_BYTES >> 20}: make room"
                )
            elif node.disk_free_bytes < needed[node.node]:
                made.notes.append(f"the disk of node {node.node} may not do: more may be needed there than is free")


def expected_seconds(runs: Iterable[RunRow], size: int) -> tuple[float | None, str]:
    """Return how long a run that reads `size` bytes may take, by successful runs of its job, and from what that is."""
    times = [(run.ended - run.started, int(run.counts.get("input_bytes") or 0)) for run in runs if run.ended]
    read = [(seconds, before) for seconds, before in times if before]
    if read and size:
        pace = statistics.median(seconds / before for seconds, before in read)
        return pace * size, f"the pace of {len(read)} earlier runs"
    if times:
        return statistics.median(seconds for seconds, _ in times), f"the time of {len(times)} earlier runs"
    return None, "no run of it has succeeded yet"


def needed_bytes(
    before: Mapping[str, Any], nodes: Sequence[NodePlan], files: Mapping[str, Sequence[InputFile]]
) -> tuple[dict[str, int], str]:
    """Return the disk that a run may need on each node, and from what that is estimated; `before`: an earlier run's
    counts.

    Spills lie where the input is, output where the servers are; both grow with the bytes that are read.
    """
    read, servers = int(before.get("input_bytes") or 0), sum(node.servers for node in nodes) or 1
    if read:
        spilled, put_out = (int(before.get(key) or 0) / read for key in ("spilled_bytes", "output_bytes"))
        weights = {node.node: float(node.bytes) for node in nodes}
    else:
        spilled = put_out = 1.0
        weights = {
            node.node: sum(
                unread_bytes(file) * (UNPACKED if format_of(file.path) else 1.0) for file in files[node.node]
            )
            for node in nodes
        }
    total = sum(weights.values())
    shares = {
        node.node: round(weights[node.node] * spilled + total * put_out * node.servers / servers) for node in nodes
    }
    return shares, "what its last run spilled and put out for each byte that it read" if read else GUESS
