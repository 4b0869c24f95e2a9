"""A stand-in for ManageCluster that does what the map function's name says; run as a script it is a Runner."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mrcore.errors import ClusterFault, JobFault, MrcoreError, Unreachable
from mrcore.queue.runner import Runner
from mrcore.settings.config import Settings, load_settings
from mrcore.system.paths import write_atomic


class FakeCluster:
    """Does what the job's map function is called: succeed, fail, lose a node, wait, die before or after commit."""

    def __init__(self, settings: Settings) -> None:
        self.state_dir = settings.state_dir

    def _log(self, text: str) -> None:
        with (self.state_dir / "ran.log").open("a") as log:
            log.write(text + "\n")

    def manifest(self, job: dict[str, Any], run: int) -> dict[str, Any]:
        path = self.state_dir / "manifests" / job["job_name"] / f"{run}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "job": job["job_name"],
            "counts": {"items": 7},
            "run": run,
            "delete_job_data": job["delete_job_data"],
        }
        write_atomic(path, json.dumps(content).encode())
        return content

    def run(
        self, job: dict[str, Any], *, run: int, progress: Callable[..., None], stop: threading.Event
    ) -> dict[str, Any]:
        name, what = job["job_name"], job["map_function_name"]
        self._log(f"start {name} {run}")
        progress("MAP", done=0, total=1)
        if what == "fail" or (what == "flaky" and not (self.state_dir / "mended").exists()):
            raise JobFault("map failed", traceback="File x.py, line 3\n", line="the line")
        if what == "bug":
            raise KeyError("oops")
        if what == "down" and not (self.state_dir / "back").exists():
            raise Unreachable("node-0 does not answer")
        if what in ("wait", "stubborn"):
            while not (self.state_dir / "go").exists():
                if stop.wait(0.01) and what == "wait":
                    raise MrcoreError("stopped")
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        progress("REDUCE", done=1, total=1)
        manifest = self.manifest(job, run)
        if what == "die_after_commit":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "half" and not (self.state_dir / "back").exists():
            raise ClusterFault("node-0 went away while publishing")
        self._log(f"end {name} {run}")
        return manifest

    def check_nodes(self) -> None:
        """What the file `no-nodes` says is wrong with them."""
        if (reason := self.state_dir / "no-nodes").exists():
            raise Unreachable(reason.read_text())

    def abandon(self, job: str, run: int) -> None:
        self._log(f"abandon {job} {run}")

    def finish(self, job: dict[str, Any], run: int) -> None:
        if job["map_function_name"] == "half" and not (self.state_dir / "back").exists():
            raise ClusterFault("node-0 still away")
        self._log(f"finish {job['job_name']} {run}")


def ran(settings: Settings) -> list[str]:
    """What all fakes of this state folder did, in order."""
    log = settings.state_dir / "ran.log"
    return log.read_text().splitlines() if log.exists() else []


if __name__ == "__main__":
    chosen = load_settings(Path(sys.argv[1]))
    Runner(chosen, FakeCluster(chosen)).run(once="--once" in sys.argv)
