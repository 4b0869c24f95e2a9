"""How far a run is, as another process than the Runner sees it, on a real cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import watched
from clusters import TestCluster

from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import load_settings
from mrcore.state import profiles

pytestmark = pytest.mark.slow
MAX_AGE_SECONDS = 10.0  # hard; about one second, when the machine has nothing else to do


def run_watched(cluster: TestCluster, folder: Path, *jobs: dict[str, Any]) -> tuple[Scheduler, list[dict[str, Any]]]:
    """Run jobs by a Runner of its own, and return what a third process saw meanwhile."""
    config, file = folder / "config.json", folder / "seen"
    values = {"home": str(cluster.settings.home), "projects_dir": str(folder / "projects")}
    config.write_text(json.dumps(values))
    scheduler = Scheduler(load_settings(config))
    scheduler.submit_jobs(list(jobs))
    code = [sys.executable, watched.__file__]
    with subprocess.Popen([*code, "watch", str(config), str(file)], stdin=subprocess.PIPE) as watcher:
        done = subprocess.run([*code, "run", str(config)], capture_output=True, text=True, timeout=200)
        assert watcher.stdin
        watcher.stdin.close()
    assert done.returncode == 0, done.stderr
    return scheduler, [json.loads(line) for line in file.read_text().splitlines()]


def test_every_phase_rises_while_it_goes_on(tmp_path: Path) -> None:
    with TestCluster(tmp_path, nodes=2, servers=1) as cluster:
        watched.write_project(tmp_path / "projects", map_rounds=900, reduce_rounds=900)
        texts = {f"text-{number}": watched.text(32_000, 2_000, 32_000 * number) for number in range(4)}
        cluster.write_inputs(texts, entry="inputs/busy")
        scheduler, rows = run_watched(cluster, tmp_path, watched.job(number_of_partitions=8))
    (run,) = scheduler.history("busy")
    assert run["state"] == "succeeded", run
    assert max(row["age"] for row in rows) < MAX_AGE_SECONDS
    done: dict[str, list[int]] = defaultdict(list)
    seen = [row for row in rows if "phases" in row]
    for row in seen:
        for phase in row["phases"]:
            if phase["total"]:
                assert 0 <= phase["done"] <= phase["total"]
                done[phase["name"]].append(phase["done"])
    for phase in ("MAP", "SORT", "REDUCE"):
        assert done[phase] == sorted(done[phase]) and len({*done[phase]}) >= 3, (phase, done[phase])
    fractions = [row["fraction"] for row in seen if row["fraction"] is not None]
    assert fractions == sorted(fractions) and all(0 <= fraction < 1 for fraction in fractions)
    assert all(row["eta_seconds"] is None or row["eta_seconds"] >= 0 for row in seen)
    assert {server["phase"] for row in seen for server in row["servers"]} >= {"MAP", "REDUCE"}

    detail, counts = scheduler.run("busy", run["run"])["detail"], run["counts"]
    assert [phase["name"] for phase in detail["phases"]] == ["PREFLIGHT", "MAP", "SORT", "REDUCE", "COMMIT"]
    by_name = {phase["name"]: phase for phase in detail["phases"]}
    assert by_name["MAP"]["done"] == by_name["MAP"]["total"] == counts["input_bytes"]
    assert by_name["MAP"]["records"] == counts["lines"] and by_name["REDUCE"]["records"] == counts["values"]
    assert by_name["SORT"]["done"] == by_name["REDUCE"]["done"] == counts["shuffled_bytes"]
    shares = {phase: [share for share in detail["servers"] if share["phase"] == phase] for phase in by_name}
    assert sum(share["tasks"] for share in shares["REDUCE"]) == 8
    assert sum(share["bytes"] for share in shares["MAP"]) == counts["input_bytes"]
    assert {row["outcome"] for row in detail["slowest"]} == {"done"} and not detail["deaths"]
    assert 0 < detail["median_partition_bytes"] <= detail["largest_partition_bytes"]


FATAL_ONCE = """
import os
from mrcore import task

def counted(line, auxiliary_data):
    task.count("lines")
    task.count("characters", len(line))
    if task.offset and task.offset > 300_000 and not os.path.exists({mark!r}):
        open({mark!r}, "w").close()
        os.kill(os.getpid(), 9)
    for word in line.split()[:3]:
        yield word, 1

def broken(line, auxiliary_data):
    task.count("tries")
    raise ValueError("not this line")

def longer(group, auxiliary_data):
    task.count("groups")
    yield group[0][0], sorted(len(repr(value)) for value in range(2_000))[-1] + len(group)
"""


def test_counters_and_detail_of_a_run_that_lost_a_task(tmp_path: Path) -> None:
    with TestCluster(tmp_path, nodes=2, servers=1) as cluster:
        project = tmp_path / "projects" / "fatal"
        project.mkdir()
        for name in ("map", "reduce"):
            (project / f"{name}_functions.py").write_text(FATAL_ONCE.format(mark=str(tmp_path / "died")))
        texts = {f"text-{number}": watched.text(8_000, 2_000, 8_000 * number) for number in range(2)}
        cluster.write_inputs(texts, entry="inputs/busy")
        names = {"project_name": "fatal", "map_function_name": "counted", "reduce_function_name": "longer"}
        job = watched.job(**names, profile=True)
        broken = job | {"job_name": "broken", "map_function_name": "broken", "job_priority": -1}
        scheduler, _ = run_watched(cluster, tmp_path, job, broken)
    (run,) = scheduler.history("busy")
    lines = [line for text in texts.values() for line in text.splitlines(keepends=True)]
    words = {word for line in lines for word in line.split()[:3]}
    counters = {"lines": len(lines), "characters": sum(map(len, lines)), "groups": len(words)}
    detail = scheduler.run("busy", run["run"])["detail"]
    assert run["counts"]["task_deaths"] == 1 and run["counts"]["counters"] == detail["counters"] == counters
    (death,) = detail["deaths"]
    assert (death["phase"], death["outcome"]) == ("MAP", "died") and "SIGKILL" in death["why"], death
    assert sum(share["tasks"] for share in detail["servers"] if share["phase"] == "MAP") >= 2
    assert detail["heavy_keys"][0]["values"] >= detail["heavy_keys"][-1]["values"] > 0
    svg, scope = profiles.paths(scheduler.settings.state_dir, "busy", run["run"])
    assert detail["profile"] and "longer (reduce_functions.py" in svg.read_text()
    assert {profile["name"] for profile in json.loads(scope.read_text())["profiles"]} >= {"REDUCE"}
    failed = scheduler.run("broken", 1)
    assert failed["state"] == "failed" and failed["detail"]["counters"] == {}, "of tries that count"
    assert {share["phase"] for share in failed["detail"]["servers"]} == {"MAP"}
    assert "not this line" in failed["detail"]["deaths"][0]["why"]
