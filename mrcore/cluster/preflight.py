"""What comes before a run: the nodes answer, have mrcore's version, the project and its packages, and list the inputs.

All of it ends soon after the caller wants it to: it waits for answers in a thread, and whoever waits for the thread
looks at `stop` meanwhile. Agents walk their folders in slices, so that a walk ends with the questions for it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import msgspec

from mrcore import WIRE_VERSION, __version__
from mrcore.engine.inputs import MAX_SPLIT_BYTES, plan_bundles
from mrcore.engine.listing import ALIAS, gather
from mrcore.errors import ClusterFault, JobFault, Malformed, MrcoreError
from mrcore.messages.nodes import InputPage, Tail, Versions
from mrcore.project.packages import Shipment
from mrcore.project.snapshot import pack_project, project_hash
from mrcore.settings.config import NodeSettings, Settings
from mrcore.state import ledger, outputs
from mrcore.state.store import Store
from mrcore.text import listed, one_line
from mrcore.wire.client import Client
from mrcore.wire.data import DataClient
from mrcore.wire.tls import Pki

MIN_FREE_DISK_BYTES = 256 << 20
FILES_A_LOOK = 1000
MAX_SPLITS = 2_000_000  # of all nodes in one run; the master holds half a kilobyte for each
TICK_SECONDS = 0.2
SLICE_ANSWER_SECONDS = 60.0  # for one slice of a walk, on a disk that is slow to wake

Json = dict[str, Any]
OnAllNodes = Callable[[Callable[[NodeSettings], Any]], list[Any]]


class Stopped(MrcoreError):
    """The caller asked for the attempt to end."""


class Preflight:
    """Makes the nodes ready for one run. `agent` gives the connection to a node's agent."""

    def __init__(
        self, settings: Settings, pki: Pki, agent: Callable[[NodeSettings], Client], on_all_nodes: OnAllNodes,
        stop: threading.Event,
    ) -> None:  # fmt: skip
        self._settings, self._pki, self._agent, self._on_all_nodes = settings, pki, agent, on_all_nodes
        self._stop = stop

    def unless_stopped(self, job: Json, run: int, hang_up: Callable[[], None]) -> Json:
        """Return what `plan` does. When `stop` is set first, call `hang_up` and raise Stopped without waiting."""
        future: Future[Json] = Future()

        def work() -> None:
            try:
                future.set_result(self.plan(job, run))
            except BaseException as error:  # noqa: BLE001  whoever waits raises it
                future.set_exception(error)

        threading.Thread(target=work, name=f"preflight {job['job_name']}-{run}", daemon=True).start()
        while not wait([future], TICK_SECONDS).done:
            if self._stop.is_set():
                hang_up()
                raise Stopped("stopped by the Runner")
        return future.result()

    def _call(self, node: NodeSettings, method: str, **arguments: Any) -> Any:
        agent = self._agent(node)
        if self._stop.is_set():  # looked at when the connection is where `hang_up` finds it
            raise Stopped("stopped by the Runner")
        return agent.call(method, **arguments)

    def plan(self, job: Json, run: int) -> Json:
        """Make the nodes ready and list the inputs. Return {"project", "environment", "bundles" (by node), "input",
        "nothing_new"}, and for a `hold_state` job what `ledger.plan` gives."""
        folder = self._settings.projects_of(job) / job["project_name"]
        if not folder.is_dir():
            raise JobFault(f"project folder {folder} does not exist: create it, or submit the job where it is now")
        snapshot = project_hash(folder)
        with Shipment(folder, self._settings.state_dir) as packages:
            listings = self._on_all_nodes(lambda node: self._prepare_node(node, job, run, snapshot, folder, packages))
        self._check_inputs(job, listings)
        if self._settings.local:
            listings = _without_aliases(listings)
        files = {node.name: found.files for node, found in zip(self._settings.nodes, listings, strict=True)}
        plan: Json = {"nothing_new": False, "known": 0}
        if job["hold_state"]:
            base_dirs = {node.name: str(node.layout.base_dir) for node in self._settings.nodes}
            state_dir, one_machine = self._settings.state_dir, self._settings.local
            with contextlib.closing(Store(state_dir)) as store:
                increment = ledger.plan(
                    job, files, self._look, store, state_dir=state_dir, base_dirs=base_dirs, one_machine=one_machine
                )
            plan, files = vars(increment), increment.files
        total = sum(each[1] - sum(each[4:]) for found in files.values() for each in found)
        if (splits := total // MAX_SPLIT_BYTES + sum(map(len, files.values()))) > MAX_SPLITS:
            raise JobFault(
                f"{splits:,} splits of input are more than one run can take ({MAX_SPLITS:,}): read less in one"
            )
        bundles: dict[str, list[Json]] = {}
        for node in self._settings.nodes:
            count = sum(map(len, bundles.values()))
            bundles[node.name] = plan_bundles(files[node.name], node.servers, first_id=count)
        skipped: dict[str, int] = {}
        for some in (*(found.skipped for found in listings), plan.get("skipped", {})):
            for reason, number in some.items():
                skipped[reason] = skipped.get(reason, 0) + number
        read = {"files": sum(map(len, files.values())), "bytes": total, "skipped": skipped}
        return plan | {"project": snapshot, "environment": packages.hash, "bundles": bundles, "input": read}

    def _look(self, node: str, files: list[list[Any]]) -> list[Tail]:
        found: list[Tail] = []
        for first in range(0, len(files), FILES_A_LOOK):
            some = files[first : first + FILES_A_LOOK]
            found += self._call(outputs.node_of(self._settings, node), "look_into", files=some, timeout_seconds=600)
        if wrong := [file[0] for file, (end, *_) in zip(files, found, strict=True) if end > file[1]]:
            raise Malformed(f"node {node} gave no answer to look_into: {one_line(wrong[0], 200)} ends past its size")
        return found

    def _prepare_node(
        self, node: NodeSettings, job: Json, run: int, snapshot: str, folder: Path, packages: Shipment
    ) -> InputPage:
        """Check one node, bring it the project and its packages, make its working folder and list its inputs."""
        call = functools.partial(self._call, node)
        check_versions(node, call("health"))
        with contextlib.closing(DataClient(node.address, node.agent_port, self._pki, node.name)) as client:
            if not call("project_state", hash=snapshot):
                client.put({"project": snapshot}, pack_project(folder))
            packages.bring(call, client.put)
        for key in ("auxiliary_data_name_mapper", "auxiliary_data_name_reducer"):
            if job[key] is not None and not call("auxiliary", name=job[key]):
                file = node.layout.auxiliary_dir / f"{job[key]}.data"
                raise JobFault(f"auxiliary data {job[key]!r} is not on node {node.name}: {file} is missing; upload it")
        # One job runs at a time: whatever else is there is of dead runs.
        call("sweep", keep=[[job["job_name"], run]], timeout_seconds=600)
        free = call("start_run", job=job["job_name"], run=run).disk_free_bytes
        if free < MIN_FREE_DISK_BYTES:
            raise ClusterFault(
                f"node {node.name} has {free >> 20} MiB of free disk, less than {MIN_FREE_DISK_BYTES >> 20}: make room",
                node=node.name,
            )
        asked = {key: job[key] for key in ("input_dirs", "shared_input")}
        if self._settings.local:
            asked["sibling_dirs"] = str(node.compute_dir.parent)
        names = [each.name for each in self._settings.nodes]
        call = functools.partial(call, timeout_seconds=SLICE_ANSWER_SECONDS)
        return gather(functools.partial(call, "list_inputs"), asked, names, node.name)

    def _check_inputs(self, job: Json, listings: list[InputPage]) -> None:
        faults = [fault for found in listings for fault in found.faults]
        for entry in job["input_dirs"]:
            if not any(found.matched.get(entry) for found in listings):
                where = "" if entry.startswith("/") else " under any node's base_dir"
                faults.append(f"the input {entry} matches no file{where}: check the path, or upload the files first")
        prints = {found.fingerprint for found in listings}
        absolute = any(
            entry.startswith("/") and found.matched[entry] for found in listings for entry in job["input_dirs"]
        )
        unclear = job["shared_input"] is None and not self._settings.local and len(listings) > 1
        if unclear and absolute and len(prints) == 1:
            faults.append(
                "every node lists the same files for the absolute input_dirs: set shared_input: true if they are one "
                "shared file system (each file is then read once), false if they only look alike"
            )
        if faults:
            raise JobFault(listed(faults), faults=faults)


def check_versions(node: NodeSettings, health: Versions) -> None:
    """Raise ClusterFault unless a node, by what its `health` says, runs the mrcore and the Python of this master."""
    ours = (__version__, WIRE_VERSION, platform.python_version_tuple()[:2])
    theirs = (health.version, health.wire_version, tuple(health.python.split(".")[:2]))
    if ours != theirs:
        raise ClusterFault(
            f"node {node.name} runs mrcore {theirs[0]} (wire {theirs[1]}) on Python {'.'.join(theirs[2])}, the "
            f"master {ours[0]} (wire {ours[1]}) on {'.'.join(ours[2])}: bring both to the same",
            node=node.name,
        )


def _without_aliases(listings: list[InputPage]) -> list[InputPage]:
    """Where all nodes are one machine, a link in one's folder may lead to what another reads: the first reads it."""
    first_paths: dict[int, list[str]] = {}  # by inode
    left = []
    for listing in listings:
        kept = []
        for file in listing.files:
            if not any(_are_one(file.path, other) for other in first_paths.get(file.inode, ())):
                kept.append(file)
        for file in kept:
            first_paths.setdefault(file.inode, []).append(file.path)
        dropped = len(listing.files) - len(kept)
        skipped = listing.skipped | ({ALIAS: listing.skipped.get(ALIAS, 0) + dropped} if dropped else {})
        left.append(msgspec.structs.replace(listing, files=kept, skipped=skipped))
    return left


def _are_one(path: str, other: str) -> bool:
    with contextlib.suppress(OSError):  # one is gone: reading it will tell
        return os.path.samefile(path, other)
    return False
