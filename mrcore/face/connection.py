"""The cluster as a Python program has it: `mrcore.connect()`."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mrcore.cluster.manage_cluster import ManageCluster
from mrcore.errors import UsageError
from mrcore.face import packing
from mrcore.face.job import JobHandle
from mrcore.face.shown import escape
from mrcore.launchers import launcher_of
from mrcore.launchers.launcher import DaemonStatus
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings, load_settings

MapFunction = packing.Function | str
ReduceFunction = packing.Function | str | None
NAME_CHARACTERS = 80  # of a function's name, in that of a job that was given none
Input = str | os.PathLike[str]


def connect(
    *,
    config: str | os.PathLike[str] | None = None,
    home: str | os.PathLike[str] | None = None,
    local: bool = False,
    nodes: int | None = None,
    servers: int | None = None,
    address: str | None = None,
) -> Cluster:
    """Return the cluster of the settings that the command `mrcore` would find here, or of the file `config`.

    With `local`, or with `home`, its folder, it is a local cluster whatever else is configured; `nodes`, `servers` (of
    each node) and `address` (of the first node) say its shape, which is kept. Nothing is started.
    """
    shape = {"nodes": nodes, "servers": servers, "address": address}
    if not (local or home or any(value is not None for value in shape.values())):
        return Cluster(load_settings(config))
    if config is not None:
        raise UsageError("config names a cluster; home, nodes, servers and address describe a local one: leave one out")
    folder = Path(home or os.environ.get("MRCORE_HOME") or "~/.mrcore").expanduser().absolute()
    from mrcore.launchers import local as launcher

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Cluster(launcher.configure(folder, **shape))


class Cluster:
    """A cluster and its queue."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._scheduler = Scheduler(settings)

    def __repr__(self) -> str:
        kind = (
            f"local cluster of {self.settings.home}" if self.settings.local else f"cluster {self.settings.cluster_name}"
        )
        return f"<mrcore {kind}: {len(self.settings.nodes)} nodes, {len(self.settings.servers())} cluster servers>"

    def _repr_html_(self) -> str:
        return escape(repr(self).strip("<>"))

    def start(self) -> Cluster:
        """Start all daemons that do not run, wait until they answer, and return the cluster."""
        ManageCluster(self.settings).start_cluster()
        self._scheduler.end_hold()  # which may have waited for this
        return self

    def stop(self) -> None:
        """Stop all daemons. Queue, history and output stay."""
        ManageCluster(self.settings).stop_cluster()

    def status(self) -> list[DaemonStatus]:
        """Return a row for each daemon: name, node, address, port, pid, state."""
        return launcher_of(self.settings).status(self.settings)

    def job(self, name: str) -> JobHandle:
        """Return a job that was submitted before, by whomever. Raises UsageError."""
        return JobHandle(self._scheduler, name)

    def submit(
        self,
        *,
        map: MapFunction,
        reduce: ReduceFunction = None,
        combine: ReduceFunction = None,
        inputs: Input | Iterable[Input],
        project: str | None = None,
        name: str | None = None,
        **keys: Any,
    ) -> JobHandle:
        """Queue a mapreduce job and return it; it is on disk then, and runs once unless `run_once=False`.

        `map`, `reduce` and `combine` are functions, or, with `project`, names of functions of a project. An input is a
        text as in a job file (relative: on the nodes), or a Path, which is one of this machine. Without a `name` the
        job is named by its content: the same job again replaces the one before. `keys` are any others of docs/jobs.md.
        Raises UsageError naming every error.
        """
        given = {"map_function_name": map, "reduce_function_name": reduce, "combine_function_name": combine}
        given = {key: value for key, value in given.items() if value is not None}
        entries: Iterable[Input] = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
        job = {"job_type": "mapreduce", "run_once": True} | keys | {"input_dirs": [_input(entry) for entry in entries]}
        if project is not None:
            if wrong := [key for key, value in given.items() if not isinstance(value, str)]:
                raise UsageError(f"with project={project!r} functions are given by name: {', '.join(wrong)} is none")
            return self._queue(self._scheduler, job | given | {"project_name": project}, name)
        if any(isinstance(value, str) for value in given.values()):
            raise UsageError("a function is given by its name: say project=… too, or give the function itself")
        packed = packing.pack(given, may_pickle=self.settings.local)  # type: ignore[arg-type]
        scheduler = self._scheduler
        if (
            self.settings.local
        ):  # a job of a local cluster keeps the folder; a deployed cluster has one for all projects
            folder = self.settings.home / "notebooks"
            scheduler = Scheduler(self.settings.model_copy(update={"projects_dir": folder}))
        store = scheduler.store
        needed = {str(row.spec.get("project_name")) for row in (*store.queued(), *store.fallen())}
        packing.write(packed, scheduler.settings.projects_dir, needed)
        return self._queue(scheduler, job | packed.functions | {"project_name": packed.name}, name)

    def _queue(self, scheduler: Scheduler, job: dict[str, Any], name: str | None) -> JobHandle:
        if name is None:
            content = json.dumps(job, sort_keys=True, default=str).encode()
            said = re.sub("[^A-Za-z0-9_]", "_", job["map_function_name"])[:NAME_CHARACTERS]
            name = f"{said}-{hashlib.sha256(content).hexdigest()[:8]}"
        scheduler.submit_job(job | {"job_name": name})
        return JobHandle(self._scheduler, name)


def _input(entry: Input) -> str:
    """Return an input as a job names it."""
    return entry if isinstance(entry, str) else str(Path(entry).expanduser().absolute())
