"""mrcore: a local cluster with daemons, TLS and queue, started once; each work is submitted and run by a Runner."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import mrcore
from mrcore.cluster.manage_cluster import ManageCluster
from mrcore.launchers import local
from mrcore.queue.scheduler import Runner, Scheduler
from mrcore.settings.validation import parse_yaml
from mrcore.state import manifest

PROJECTS = Path(__file__).resolve().parents[1] / "projects"
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "wordcount": ("word_count", {"combine_function_name": None}),
    "wordcount-combiner": ("word_count", {}),
    "sort": ("total_sort", {"sort_values": False}),  # as the others: keys in order
    "join": ("join", {}),
    "empty": ("word_count", {}),
}


class Competitor:
    """One cluster. The name says its shape: "mrcore 2x1" is two nodes of one server each."""

    how = "through the queue (submit, Runner) on a warm cluster; default settings; output and manifest flushed to disk"
    separator = None

    def __init__(self, name: str, folder: Path) -> None:
        nodes, servers = map(int, name.split()[-1].split("x"))
        self.versions = {"mrcore": mrcore.__version__}
        home = folder / name.replace(" ", "-")
        shutil.rmtree(home, ignore_errors=True)
        address = f"127.{101 + os.getpid() // 250 % 100}.{1 + os.getpid() % 250}.1"
        settings = local.configure(home, nodes=nodes, servers=servers, address=address)
        self._settings = settings.model_copy(update={"projects_dir": PROJECTS})
        try:
            local.start_cluster(self._settings)
            self._scheduler = Scheduler(self._settings)
            self._manager = ManageCluster(self._settings)
            self._runner = Runner(self._settings, manage_cluster=self._manager)
        except BaseException:
            local.kill_cluster(self._settings)
            raise

    def run(self, work: str, inputs: list[Path], out: Path) -> dict[str, Any]:
        project, changes = JOBS[work]
        file = PROJECTS / project / "job.yml"
        job = parse_yaml(file.read_bytes(), str(file)) | changes
        job |= {"job_name": work, "input_dirs": [str(path) for path in inputs]}
        self._scheduler.submit_job(job)
        self._runner.ended = {}
        if self._runner.run(once=True) != {"succeeded": 1}:
            raise RuntimeError(f"{work}: {self._scheduler.history(work, 1)[0]['exception']}")
        found = next(manifest.committed(self._settings.state_dir, work))
        return {key: getattr(found, key) for key in ("counts", "phases", "task_seconds")}

    def output(self, work: str, out: Path) -> list[Path]:
        found = [path for node in self._settings.nodes for path in node.layout.base_dir.glob(f"{work}/reduce/part-*")]
        return sorted(found, key=lambda path: path.name)

    def close(self) -> None:
        local.stop_cluster(self._settings)
