"""The scenario of test_recovery, as a process that can be killed anywhere and started again: it goes on where it was.

`python recovery.py CONFIG NAME [FILE]`; FILE gets how often it came to each failpoint. Steps: submit three jobs, delete
one, run the queue (the cluster is away at first), give more input and submit again, run the queue. Each step may be
repeated, as a user would who got no answer.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from mrcore.cluster.manage_cluster import ManageCluster
from mrcore.errors import Unreachable, UsageError
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings, load_settings
from mrcore.system import failpoints

FIRST, SECOND = "the first words of the first file\n" * 40, "the second file has more words\n" * 30


def write(settings: Settings, name: str, file: str, text: str, node: int) -> None:
    """Put an input file on a node, at once and as it was."""
    folder = settings.nodes[node % len(settings.nodes)].layout.base_dir / "inputs" / name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / file).exists():
        (folder / f"{file}.partial").write_text(text)
        (folder / f"{file}.partial").rename(folder / file)


class Away(ManageCluster):
    """A cluster that is away when a run begins for the first time, and when one is finished for the first time."""

    def _away(self, when: str) -> None:
        mark = self.settings.state_dir / f"was-away-{when}"
        if not mark.exists():
            mark.touch()
            raise Unreachable("the cluster is away")

    def run(self, job: dict[str, Any], *arguments: Any, **keys: Any) -> dict[str, Any]:
        self._away("run")
        return super().run(job, *arguments, **keys)

    def finish(self, job: dict[str, Any], run: int) -> None:
        self._away("finish")
        super().finish(job, run)


def main(config: str, name: str) -> None:
    settings = load_settings(config)
    scheduler = Scheduler(settings)
    count = {
        "job_name": name, "project_name": "gated", "input_dirs": [f"inputs/{name}"], "map_function_name": "count_words",
        "reduce_function_name": "add_up", "hold_state": True, "merge_output": True, "run_once": True,
        "number_of_partitions": 2,
    }  # fmt: skip
    script = {
        "job_name": f"{name}-script", "job_type": "script", "script_location": str(Path(config).with_name("script.py")),
        "run_once": True, "job_priority": -1,
    }  # fmt: skip

    def delete() -> None:
        with contextlib.suppress(UsageError):  # done already
            scheduler.delete_job(f"{name}-gone")

    def again() -> None:
        write(settings, name, "second", SECOND, 1)
        scheduler.submit_job(count)

    def drain() -> None:
        Runner(settings, Away(settings)).run(once=True)

    write(settings, name, "first", FIRST, 0)
    gone = count | {"job_name": f"{name}-gone", "job_priority": 1}
    steps = [lambda: scheduler.submit_jobs([count, gone, script]), delete, drain, again, drain]
    done = settings.state_dir / "steps"
    for number in range(len(done.read_text()) if done.exists() else 0, len(steps)):
        steps[number]()
        with done.open("a") as stream:
            stream.write(".")


if __name__ == "__main__":
    passed, point = Counter(dict.fromkeys(failpoints.POINTS, 0)), failpoints.point

    def counted(name: str) -> None:
        passed[name] += 1
        point(name)

    failpoints.point = counted
    main(*sys.argv[1:3])
    for file in sys.argv[3:]:
        Path(file).write_text(json.dumps(passed))
