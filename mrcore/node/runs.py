"""The node agent's share in a run: its working folder, the spills and parts that it serves, the parts it publishes."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from mrcore.engine import spills
from mrcore.errors import ClusterFault, Refused
from mrcore.messages.kinds import Count, JobName, PartName, convert
from mrcore.messages.nodes import KeptRun, Published, Space
from mrcore.system import failpoints
from mrcore.system.paths import PART_NAME, Layout, fsync_dir, fsync_file, remove_tree
from mrcore.wire.data import Range
from mrcore.wire.tls import Identity


class SpillRequest(Struct, frozen=True):
    """Which ranges of a spill a GET asks for: those of a `partition`, or of the keys from `low` up to `high`."""

    job: JobName
    run: Count
    id: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\Z")]
    partition: Count | UnsetType = UNSET
    low: list[Any] | UnsetType | None = UNSET
    high: list[Any] | UnsetType | None = UNSET


class PartRequest(Struct, frozen=True):
    """A whole published part, for which other nodes ask to merge it."""

    job: JobName
    name: PartName


class Runs:
    """What a node agent does for runs; its methods are for the master only."""

    RPC = "start_run publish end_run"

    def __init__(self, layout: Layout, node: str) -> None:
        self._layout, self._node = layout, node

    def start_run(self, caller: Identity, job: JobName, run: Count) -> Space:
        """Make the working folder of a run. Raises ClusterFault if it cannot be written."""
        folder = self._layout.run_dir(job, run)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ClusterFault(f"node {self._node}: cannot make {folder}: {error.strerror}") from None
        return Space(disk_free_bytes=shutil.disk_usage(folder).free)

    def publish(
        self, caller: Identity, job: JobName, run: Count, parts: list[PartName], delete_job_data: bool
    ) -> Published:
        """Give the parts of a committed run that lie on this node their place; remove those of earlier runs if asked.

        May be repeated, also after a crash in its middle. Raises ClusterFault when a part is in neither place.
        """
        source, target, names = self._layout.parts_dir(job, run), self._layout.reduce_dir(job), set(parts)
        if (before := source.parent / "1" / source.name).is_dir():  # of a run that committed in the release before
            source = before
        if not names and not target.is_dir():
            return Published(published=0, removed=0)
        target.mkdir(parents=True, exist_ok=True)
        published = 0
        for name in sorted(names):
            if (source / name).exists():
                fsync_file(source / name)
                failpoints.point("part flushed")
                os.replace(source / name, target / name)
                failpoints.point("part renamed")
                published += 1
            elif not (target / name).exists():
                raise ClusterFault(f"node {self._node}: part {name} of {job} is neither in {source} nor published")
        for folder in (target, target.parent, self._layout.base_dir):
            fsync_dir(folder)
        failpoints.point("parts published")
        others = (path for path in target.iterdir() if delete_job_data and path.name not in names)
        old = [path for path in others if (match := PART_NAME.fullmatch(path.name)) and int(match[1]) <= run]
        for path in old:
            path.unlink(missing_ok=True)
            failpoints.point("old part removed")
        return Published(published=published, removed=len(old))

    def end_run(self, caller: Identity, job: JobName, run: Count) -> bool:
        """Remove everything temporary of a run; fine when there is nothing (left)."""
        folder = self._layout.run_dir(job, run)
        remove(folder, self._node)
        failpoints.point("working folder removed")
        with contextlib.suppress(OSError):  # other runs of the job
            folder.parent.rmdir()
        return True

    def sweep(self, keep: Sequence[KeptRun]) -> int:
        """Remove the working folders of all runs but these; return how many."""
        kept = {self._layout.run_dir(run.job, run.run) for run in keep}
        jobs = list(self._layout.working_dir.iterdir())
        inside = (run for job in jobs for run in (job.iterdir() if job.is_dir() else [job]))
        removed = [path for path in inside if path not in kept]
        for path in removed:
            remove(path, self._node)
        for job in jobs:
            with contextlib.suppress(OSError):
                job.rmdir()
        return len(removed)

    # ---- data requests

    def spill(self, plain: object) -> list[Range]:
        """Return the ranges of a spill that a GET asks for. Raises Refused."""
        asked = _checked(SpillRequest, plain)
        if asked.partition is UNSET and UNSET in (asked.low, asked.high):
            raise Refused("not a valid request: neither a partition nor a range of keys")
        selector: dict[str, Any] = {"low": asked.low, "high": asked.high}
        folder = self._layout.runs_dir(asked.job, asked.run)
        try:
            ranges = spills.select(
                folder, asked.id, selector if asked.partition is UNSET else {"partition": asked.partition}
            )
        except FileNotFoundError:
            raise Refused(f"node {self._node} has no run {asked.id} of {(asked.job, asked.run)}") from None
        return [Range(folder / f"{asked.id}.data", offset, length, "run") for offset, length in ranges]

    def part(self, plain: object) -> list[Range]:
        """Return the whole of a published part. Raises Refused."""
        asked = _checked(PartRequest, plain)
        path = self._layout.reduce_dir(asked.job) / asked.name
        if not path.is_file():
            raise Refused(f"node {self._node} has no part {path.name} of {asked.job}")
        return [Range(path, 0, path.stat().st_size, "part")]


def _checked(kind: type[Any], plain: object) -> Any:
    try:
        return convert(kind, plain)
    except ValueError as error:
        raise Refused(f"not a valid request: {error}") from None


def remove(path: Path, node: str) -> None:
    """Remove a file, or a folder with all in it. Raises ClusterFault when something of it stays."""
    try:
        path.unlink() if path.is_symlink() or path.is_file() else remove_tree(path)
    except OSError as error:
        raise ClusterFault(f"node {node}: cannot remove {path}: {error.strerror}") from None
