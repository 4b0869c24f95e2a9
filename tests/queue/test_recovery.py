"""The Runner, or an agent, killed anywhere: after a restart all is as if nothing had happened. On a real cluster."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import recovery
from checkout import PROJECT
from clusters import TestCluster
from conditions import wait_until
from recovery import FIRST, SECOND

from mrcore.cluster.manage_cluster import ManageCluster
from mrcore.launchers import local
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings, load_settings
from mrcore.state import ledger, manifest
from mrcore.system import failpoints, procfs

AGENTS = ("part flushed", "part renamed", "parts published", "old part removed", "working folder removed")
DRAIN = tuple(each for each in failpoints.POINTS if each.startswith("moved ") or each.endswith(" drain"))  # test_drain
ELSEWHERE = ("restore ready", "restore manifests", "restore queue", *DRAIN)  # test_backup
CODE = "import sys; from mrcore import Runner, load_settings; Runner(load_settings(sys.argv[1])).run(once='--once' in sys.argv)"  # noqa: E501
_names = itertools.count()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with TestCluster(tmp_path_factory.mktemp("cluster"), nodes=2, servers=1) as made:
        yield made


class Master:
    """A master of its own for the module's cluster: state folder, config file, names of jobs and inputs."""

    def __init__(self, cluster: TestCluster, folder: Path) -> None:
        self.cluster, self.name, self.config = cluster, f"job{next(_names)}", folder / "config.json"
        (folder / "script.py").write_text("print('ran')\n")
        values = {
            "home": str(cluster.settings.home),
            "projects_dir": str(cluster.settings.projects_dir),
            "state_dir": str(folder / "state"),
            "logs_dir": str(folder / "logs"),
            "node_timeout_seconds": 3.0,
            "hold_backoff_first_seconds": 0.1,
        }
        self.config.write_text(json.dumps(values))
        self.settings: Settings = load_settings(self.config)
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, fault: str = "") -> subprocess.Popen[bytes]:
        environment = os.environ | {"MRCORE_FAULT": fault}
        self.processes.append(subprocess.Popen([sys.executable, *command], env=environment))
        return self.processes[-1]

    def scenario(self, *more: str, fault: str = "") -> int:
        return self.start(str(recovery.__file__), str(self.config), self.name, *more, fault=fault).wait(120)

    def runner(self, *arguments: str) -> subprocess.Popen[bytes]:
        return self.start("-c", CODE, str(self.config), *arguments)

    def outcome(self) -> dict[str, Any]:
        """All that the scenario brought about, without the numbers of runs."""
        scheduler, found = Scheduler(self.settings), {}
        scheduler.store.check()
        for row in scheduler.store.rows("SELECT job_name, state, reason, last_run FROM jobs"):
            name = row["job_name"].replace(self.name, "job")
            ends = Counter(each["state"] for each in scheduler.history(row["job_name"]))
            found[name] = [row["state"], row["reason"], ends["succeeded"], ends["failed"], ends["running"]]
        _, _, entries = ledger.read(scheduler.store, self.name)
        found["read"] = sorted((Path(path).name, entry[0]) for (_, path), entry in entries.items())
        found["hold"] = scheduler.state()["hold"]
        newest = next(manifest.committed(self.settings.state_dir, self.name))
        found["manifests"] = len(list(self.settings.state_dir.glob("manifests/*/*")))
        parts = {node.layout.reduce_dir(self.name) for node in self.settings.nodes}
        lying = {path.name for folder in parts if folder.is_dir() for path in folder.iterdir()}
        found["parts as committed"] = lying == {part.name for part in newest.parts}
        found["partial"] = [str(path) for path in self.settings.state_dir.rglob("*.partial")]
        found["items"] = sorted(self.items())
        scheduler.store.close()
        return found

    def items(self) -> list[Any]:
        path = self.config.with_name("items")
        with path.open("wb") as out:
            ManageCluster(self.settings).cat(self.name, out)
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def another_master(cluster: TestCluster, tmp_path: Path) -> Iterator[Callable[[], Master]]:
    """Make masters, whose processes do not outlive the test."""
    made: list[Master] = []

    def make() -> Master:
        folder = tmp_path / f"master-{len(made)}"
        folder.mkdir()
        made.append(Master(cluster, folder))
        return made[-1]

    yield make
    for process in [process for master in made for process in master.processes]:
        process.kill()
        process.wait()
    local.start_cluster(cluster.settings)


@pytest.fixture
def master(another_master: Callable[[], Master]) -> Master:
    return another_master()


@pytest.fixture(scope="module")
def first_run(cluster: TestCluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, int]]:
    """The outcome of the scenario without a failure, and how often it came to each failpoint."""
    folder = tmp_path_factory.mktemp("undisturbed")
    master = Master(cluster, folder)
    assert master.scenario(str(folder / "passed")) == 0
    return master.outcome(), json.loads((folder / "passed").read_text())


@pytest.fixture(scope="module")
def passed(first_run: tuple[dict[str, Any], dict[str, int]]) -> dict[str, int]:
    return first_run[1]


@pytest.fixture(scope="module")
def undisturbed(first_run: tuple[dict[str, Any], dict[str, int]]) -> dict[str, Any]:
    outcome, _ = first_run
    assert outcome["items"] == sorted(map(list, Counter((FIRST + SECOND).split()).items()))
    assert outcome["job"] == ["out", "succeeded", 2, 0, 0]
    assert outcome["job-script"] == ["out", "succeeded", 1, 0, 0]
    assert outcome["job-gone"] == ["out", "deleted", 0, 0, 0]
    assert outcome["read"] == [("first", len(FIRST)), ("second", len(SECOND))]
    assert outcome["parts as committed"] and not outcome["partial"]
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("point", [each for each in failpoints.POINTS if each not in AGENTS + ELSEWHERE])
def test_master_killed_at_every_point(
    another_master: Callable[[], Master], undisturbed: dict[str, Any], passed: dict[str, int], point: str
) -> None:
    """At its first time there, and at its second, where the scenario comes there twice."""
    assert passed[point], "the scenario does not come to this point"
    for time in range(1, min(passed[point], 2) + 1):
        master = another_master()
        status = master.scenario(fault=f"{point}@{time}")
        assert status == -signal.SIGKILL or (status == 0 and time > 1)  # waits may end before it comes there again
        assert master.scenario() == 0
        assert master.outcome() == undisturbed
        master.cluster.assert_clean()


@pytest.mark.slow
@pytest.mark.parametrize("point", AGENTS)
def test_agent_killed_at_every_point(
    master: Master, undisturbed: dict[str, Any], point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = [master.cluster.agent_pid(node) for node in range(2)]
    for pid in agents:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(procfs.state, agents)), 10, "the end of the agents")
    with monkeypatch.context() as context:
        context.setenv("MRCORE_FAULT", point)
        context.setattr(local, "_INHERITED", (*local._INHERITED, "MRCORE_FAULT"))
        local.start_cluster(master.settings)
    deadly = [master.cluster.agent_pid(node) for node in range(2)]
    scenario = master.start(str(recovery.__file__), str(master.config), master.name)
    wait_until(lambda: not all(map(procfs.state, deadly)), 60, f"the death of an agent at {point}")
    for pid in deadly:  # the other one may not have come there
        os.kill(pid, signal.SIGKILL) if procfs.state(pid) else None
    wait_until(lambda: not any(map(procfs.state, deadly)), 10, "the end of the agents")
    local.start_cluster(master.settings)
    assert scenario.wait(120) == 0
    assert master.outcome() == undisturbed
    master.cluster.assert_clean()


def test_every_point_is_in_the_code_and_unknown_ones_are_refused() -> None:
    code = "\n".join(path.read_text() for path in PROJECT.glob("mrcore/**/*.py") if path.name != "failpoints.py")
    named = {point for point in failpoints.POINTS if f'failpoints.point("{point}")' in code}
    changes = {change for change in failpoints.CHANGES if f'"{change}")' in code or f'"{change}") as' in code}
    assert changes | {"queue"} == set(failpoints.CHANGES)
    assert named | {f"{when} {change}" for change in failpoints.CHANGES for when in ("before", "after")} == set(
        failpoints.POINTS
    )
    with pytest.raises(ValueError, match="no fault point"):
        failpoints.point("nowhere")


def word_job(master: Master, **keys: Any) -> dict[str, Any]:
    return master.cluster.job(job_name=master.name, input_dirs=[f"inputs/{master.name}"], **keys)


def write_words(master: Master) -> dict[str, int]:
    texts = {f"{n}.txt": f"GATE{n} " + "some words are words\n" * 50 for n in range(4)}
    master.cluster.write_inputs(texts, entry=f"inputs/{master.name}")
    return dict(Counter(" ".join(texts.values()).split()))


@pytest.fixture
def gate(master: Master) -> Iterator[Callable[[str], None]]:
    closed: list[str] = []

    def close(name: str) -> None:
        closed.append(name)
        master.cluster.close_gate(name)

    yield close
    for name in closed:
        master.cluster.open_gate(name)
        for path in master.cluster.gates.glob(f"*{name}*"):
            path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["map", "sort", "reduce"])
def test_runner_killed_in_mid_run_on_a_real_cluster(master: Master, gate: Callable[[str], None], phase: str) -> None:
    expected = write_words(master)
    gate(phase)
    scheduler = Scheduler(master.settings)
    scheduler.submit_job(word_job(master))
    first = master.runner()
    tasks = master.cluster.waiting(phase, 2 if phase == "map" else 1)
    first.kill()
    first.wait()
    assert all(procfs.state(pid) for pid in tasks)  # the servers know nothing of it: they obey the next Runner
    second = master.runner("--once")
    wait_until(lambda: not any(procfs.state(pid) for pid in tasks), 30, "the end of the dead Runner's tasks")
    assert master.cluster.waiting(phase)
    master.cluster.open_gate(phase)
    assert second.wait(60) == 0
    assert [(row["run"], row["state"]) for row in scheduler.history()] == [(2, "succeeded"), (1, "handed back")]
    assert dict(master.items()) == expected
    master.cluster.assert_clean()
    scheduler.store.check()
    scheduler.store.close()


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["map", "reduce"])
def test_after_a_cancel_the_cluster_is_usable_at_once(master: Master, gate: Callable[[str], None], phase: str) -> None:
    expected = write_words(master)
    gate(phase)
    scheduler = Scheduler(master.settings)
    scheduler.submit_job(word_job(master))
    runner = Runner(master.settings)
    thread = threading.Thread(target=runner.run)
    thread.start()
    tasks = master.cluster.waiting(phase)
    scheduler.cancel(master.name)
    wait_until(lambda: scheduler.history()[0]["state"] == "cancelled", 20, "the end of the run")
    assert not any(procfs.state(pid) for pid in tasks)
    master.cluster.assert_clean()
    master.cluster.open_gate(phase)
    scheduler.submit_job(word_job(master))
    wait_until(lambda: scheduler.history()[0]["state"] == "succeeded", 30, "the next run")
    runner.stop()
    thread.join(20)
    assert dict(master.items()) == expected


@pytest.mark.slow
def test_a_node_that_is_down_when_its_turn_comes_holds_the_queue(master: Master) -> None:
    expected = write_words(master)
    down = master.cluster.agent_pid(1)
    os.kill(down, signal.SIGKILL)
    wait_until(lambda: not procfs.state(down), 10, "the end of the agent")
    scheduler = Scheduler(master.settings)
    script = {"job_name": "after", "job_type": "script", "script_location": str(master.config.with_name("script.py"))}
    scheduler.submit_jobs(
        [word_job(master, group_name="g", job_priority=1), script | {"group_name": "g", "run_once": True}]
    )
    runner = master.runner("--once")
    hold = wait_until(lambda: scheduler.state()["hold"], 30, "a hold")
    node = master.settings.nodes[1]
    assert node.address in hold["reason"] or node.name in hold["reason"]
    wait_until(lambda: scheduler.state()["hold"]["tries"] >= 3, 30, "more tries")
    assert sorted(row["job_name"] for row in scheduler.queue()) == sorted([master.name, "after"])
    assert scheduler.queue()[0]["why"]["code"] == "hold"
    assert scheduler.history() == [], "a wait for a node makes no run, and the script waits for the job of its group"
    local.start_cluster(master.settings)
    assert runner.wait(60) == 0
    assert scheduler.queue() == [] and scheduler.state()["hold"] is None
    ends = Counter((row["job_name"], row["state"]) for row in scheduler.history())
    assert ends[master.name, "succeeded"] == ends["after", "succeeded"] == 1
    assert not any(state == "failed" for _, state in ends)
    assert dict(master.items()) == expected
    master.cluster.assert_clean()
