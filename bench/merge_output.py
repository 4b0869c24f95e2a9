"""Increments: a run that merges 1 % of new text into the earlier output, against a full run over all of it.

`python bench/merge_output.py [--scale 0.1] [--repeats 3]`: word count on a warm cluster of one node and two servers.
The full run is what a job without `hold_state` does; both outputs are compared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from works import digest, make_inputs

from mrcore.cluster.manage_cluster import ManageCluster
from mrcore.launchers import local
from mrcore.queue import job as jobs

HERE = Path(__file__).resolve().parent
SHARE = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="size of the input, 1: 128 MB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=HERE.parent / ".mrcore" / "bench")
    options = parser.parse_args()
    inputs = make_inputs(options.folder / "inputs", "text", options.scale)
    home = options.folder / f"merge-{os.getpid()}"
    address = f"127.{101 + os.getpid() // 250 % 100}.{1 + os.getpid() % 250}.1"
    configured = local.configure(home, nodes=1, servers=2, address=address)
    settings = configured.model_copy(update={"projects_dir": HERE.parent / "projects"})
    try:
        local.start_cluster(settings)
        return measure(ManageCluster(settings), inputs, options.repeats)
    finally:
        local.kill_cluster(settings)
        shutil.rmtree(home, ignore_errors=True)


def measure(cluster: ManageCluster, inputs: list[Path], repeats: int) -> int:
    """Print both times and their ratio; gives the exit status."""
    folder = cluster.settings.nodes[0].layout.base_dir / "inputs" / "text"
    folder.mkdir(parents=True)
    for path in inputs:
        shutil.copy(path, folder)
    total = sum(path.stat().st_size for path in inputs)
    lines = inputs[0].read_bytes()[: int(total * SHARE)]
    fresh = lines[: lines.rfind(b"\n") + 1]
    number = 0

    def run(name: str, **keys: Any) -> float:
        nonlocal number
        number += 1
        wanted = {"job_name": name, "project_name": "word_count", "input_dirs": ["inputs/text"]}
        functions = {"map_function_name": "count_words", "reduce_function_name": "add_up"}
        job = jobs.validate(jobs.template("mapreduce") | wanted | functions | keys, cluster.settings.projects_dir)
        started = time.perf_counter()
        found = cluster.run(job, run=number)
        seconds = time.perf_counter() - started
        print(f"  {name:12}{seconds:8.2f} s, {found['counts']['bytes']:>12,} bytes read", flush=True)
        return seconds

    def output(name: str) -> str:
        return digest(sorted((folder.parents[1] / name / "reduce").iterdir()), False, None)

    merging = {"hold_state": True, "merge_output": True}
    print(f"word count, {total:,} bytes, then {len(fresh):,} more each time")
    run("increments", **merging)
    full, merged, equal = [], [], True
    for each in range(repeats):
        (folder / f"new-{each}").write_bytes(fresh)
        merged.append(run("increments", **merging))
        full.append(run("full"))
        equal = equal and output("increments") == output("full")
    ratio = statistics.median(new / old for new, old in zip(merged, full, strict=True))
    print(
        f"merging {SHARE:.0%} takes {ratio:.2f} of a full run ({1 / ratio:.1f} times as fast); results equal: {equal}"
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
