"""What comes before a run: the nodes answer, have mrcore's version, the project and its packages, and list the inputs.

All of it ends soon after the caller wants it to: it waits for answers in a thread, and the caller, which waits for the
thread, looks at `stop` meanwhile. Agents walk their folders in slices, so that a walk ends with the questions for it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mrcore import WIRE_VERSION, __version__
from mrcore.cluster.connections import Agents
from mrcore.engine.inputs import MAX_SPLIT_BYTES, plan_bundles, unread_bytes
from mrcore.engine.listing import ALIAS, gather
from mrcore.errors import ClusterFault, JobFault, Malformed, MrcoreError
from mrcore.messages.methods import (
    AUXILIARY,
    CHECK_TAILS,
    HEALTH,
    LIST_INPUTS,
    PROJECT_STATE,
    START_RUN,
    SWEEP,
    Method,
)
from mrcore.messages.nodes import InputFile, InputPage, ReadFile, Tail, Versions
from mrcore.messages.tasks import Bundle
from mrcore.project.packages import Shipment
from mrcore.project.snapshot import pack_project, project_hash
from mrcore.settings.config import NodeSettings, Settings
from mrcore.state import ledger, outputs
from mrcore.state.store import Store
from mrcore.system.parallel import on_nodes
from mrcore.text import listed, one_line
from mrcore.wire.data import DataClient
from mrcore.wire.tls import Pki

T = TypeVar("T")
MIN_FREE_DISK_BYTES = 256 << 20
FILES_A_CHECK = 1000
MAX_SPLITS = 2_000_000  # of all nodes in one run; the master holds half a kilobyte for each
SLICE_ANSWER_SECONDS = 60.0  # for one slice of a walk, on a disk that is slow to wake

Job = dict[str, Any]
Call = Callable[..., Any]  # of a node, a method of its agent, and what that is asked


class Stopped(MrcoreError):
    """The caller asked for the attempt to end."""


@dataclass(frozen=True)
class Plan:
    """What a run reads, in bundles by node, and with what: hashes of project and environment."""

    project: str
    environment: str | None
    increment: ledger.Plan
    bundles: Mapping[str, Sequence[Bundle]]
    files: int
    bytes: int
    skipped: Mapping[str, int]  # files by reason


class Preflight:
    """Makes the nodes ready for one run of a job."""

    def __init__(self, settings: Settings, pki: Pki, agents: Agents, job: Job, run: int, stop: threading.Event) -> None:
        self._settings, self._pki, self._agents = settings, pki, agents
        self._job, self._run, self._stop = job, run, stop

    def unless_stopped(self) -> Plan:
        """Return what `plan` does. When `stop` is set first, hang up and raise Stopped without waiting."""
        return on_nodes([self], Preflight.plan, 1, tick=self._check_stop, abort=self._agents.hang_up)[0]

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped("stopped by the Runner")

    def _call(self, node: NodeSettings, method: Method[T], **arguments: Any) -> T:
        agent = self._agents.client(node)
        self._check_stop()  # when the connection is where `hang_up` finds it
        return agent.call(method, **arguments)

    def plan(self) -> Plan:
        """Make the nodes ready and list the inputs."""
        job, settings = self._job, self._settings
        folder = settings.projects_of(job) / job["project_name"]
        if not folder.is_dir():
            text = f"project folder {folder} does not exist: create it, or submit the job where it is now"
            raise JobFault(text, code="project")
        snapshot = project_hash(folder)
        with Shipment(folder, settings.state_dir) as packages:
            listings = self._agents.on_all(lambda node: self._prepare_node(node, snapshot, folder, packages))
        if errors := input_faults(settings, job, listings):
            raise JobFault(listed(errors), faults=errors, code="inputs")
        if settings.local:
            listings = without_aliases(listings)
        skipped = sum((Counter(listing.skipped) for listing in listings), Counter[str]())
        increment = self._increment(
            {node.name: found.files for node, found in zip(settings.nodes, listings, strict=True)}
        )
        skipped.update(increment.skipped)
        files = [file for some in increment.files.values() for file in some]
        total = sum(map(unread_bytes, files))
        if (splits := total // MAX_SPLIT_BYTES + len(files)) > MAX_SPLITS:
            raise JobFault(
                f"{splits:,} splits of input are more than one run can take ({MAX_SPLITS:,}): read less in one",
                code="inputs",
            )
        bundles: dict[str, list[Bundle]] = {}
        for node in settings.nodes:
            first_id = sum(map(len, bundles.values()))
            bundles[node.name] = plan_bundles(increment.files[node.name], node.servers, first_id)
        return Plan(snapshot, packages.hash, increment, bundles, len(files), total, dict(skipped))

    def _increment(self, files: Mapping[str, Sequence[InputFile]]) -> ledger.Plan:
        """Return what of the files is to be read."""
        settings = self._settings
        if not self._job["hold_state"]:
            return ledger.Plan(files)
        with contextlib.closing(Store(settings.state_dir)) as store:
            return ledger.plan(
                self._job,
                files,
                functools.partial(check_tails, settings, self._call),
                store,
                state_dir=settings.state_dir,
                base_dirs={node.name: str(node.layout.base_dir) for node in settings.nodes},
                one_machine=settings.local,
            )

    def _prepare_node(self, node: NodeSettings, snapshot: str, folder: Path, packages: Shipment) -> InputPage:
        """Check one node, bring it the project and its packages, make its working folder and list its inputs."""
        job, this_run = self._job, {"job": self._job["job_name"], "run": self._run}
        call = functools.partial(self._call, node)
        check_versions(node, call(HEALTH))
        with contextlib.closing(DataClient(node.address, node.agent_port, self._pki, node.name)) as client:
            if not call(PROJECT_STATE, hash=snapshot):
                client.put({"project": snapshot}, pack_project(folder))
            packages.bring(call, client.put)
        for key in ("auxiliary_data_name_mapper", "auxiliary_data_name_reducer"):
            if job[key] is not None and not call(AUXILIARY, name=job[key]):
                file = node.layout.auxiliary_dir / f"{job[key]}.data"
                raise JobFault(
                    f"auxiliary data {job[key]!r} is not on node {node.name}: {file} is missing; upload it",
                    code="auxiliary",
                )
        # One job runs at a time: whatever else is there is of dead runs.
        call(SWEEP, keep=[list(this_run.values())], timeout_seconds=600)
        free = call(START_RUN, **this_run).disk_free_bytes
        if free < MIN_FREE_DISK_BYTES:
            raise ClusterFault(
                f"node {node.name} has {free >> 20} MiB of free disk, less than {MIN_FREE_DISK_BYTES >> 20}: make room",
                node=node.name,
            )
        return list_node(self._settings, self._call, job, node)


def list_node(settings: Settings, call: Call, job: Job, node: NodeSettings) -> InputPage:
    """Return the files of a job's inputs that one node is to read. Changes nothing there."""
    asked = {key: job[key] for key in ("input_dirs", "shared_input")}
    if settings.local:
        asked["sibling_dirs"] = str(node.compute_dir.parent)
    slices = functools.partial(call, node, LIST_INPUTS, timeout_seconds=SLICE_ANSWER_SECONDS)
    return gather(slices, asked, [each.name for each in settings.nodes], node.name)


def input_faults(settings: Settings, job: Job, listings: Sequence[InputPage]) -> list[str]:
    """Return what is wrong with a job's inputs, by the listings of all nodes."""
    errors = [error for listing in listings for error in listing.faults]
    entries = job["input_dirs"]
    matched = {entry: any(listing.matched.get(entry) for listing in listings) for entry in entries}
    for entry in entries:
        if not matched[entry]:
            where = "" if entry.startswith("/") else " under any node's base_dir"
            errors.append(f"the input {entry} matches no file{where}: check the path, or upload the files first")
    absolute = any(entry.startswith("/") and matched[entry] for entry in entries)
    unclear = job["shared_input"] is None and not settings.local and len(listings) > 1
    if unclear and absolute and len({listing.fingerprint for listing in listings}) == 1:
        errors.append(
            "every node lists the same files for the absolute input_dirs: set shared_input: true if they are one "
            "shared file system (each file is then read once), false if they only look alike"
        )
    return errors


def check_tails(settings: Settings, call: Call, name: str, files: list[ReadFile]) -> list[Tail]:
    """Return up to where to read these files of the node `name`. Changes nothing there."""
    node, tails = outputs.node_of(settings, name), list[Tail]()
    for first in range(0, len(files), FILES_A_CHECK):
        some = files[first : first + FILES_A_CHECK]
        found: list[Tail] = call(node, CHECK_TAILS, files=some, timeout_seconds=600)
        tails += found
    if wrong := [file.path for file, tail in zip(files, tails, strict=True) if tail.end > file.size]:
        raise Malformed(f"node {name} gave no answer to check_tails: {one_line(wrong[0], 200)} ends past its size")
    return tails


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


def without_aliases(listings: Sequence[InputPage]) -> list[InputPage]:
    """Where all nodes are one machine, a link in one's folder may lead to what another reads: the first reads it."""
    first_paths: dict[int, list[str]] = {}  # by inode
    left = []
    for listing in listings:
        kept = [
            file
            for file in listing.files
            if not any(_are_one(file.path, other) for other in first_paths.get(file.inode, ()))
        ]
        for file in kept:
            first_paths.setdefault(file.inode, []).append(file.path)
        skipped = Counter(listing.skipped) + Counter({ALIAS: len(listing.files) - len(kept)})
        left.append(msgspec.structs.replace(listing, files=kept, skipped=skipped))
    return left


def _are_one(path: str, other: str) -> bool:
    with contextlib.suppress(OSError):  # one is gone: reading it will tell
        return os.path.samefile(path, other)
    return False
