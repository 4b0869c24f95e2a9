"""Tasks, servers and agents killed or frozen in every phase of a job on a real cluster: the result stays right."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import TestCluster
from conditions import wait_until

from mrcore.errors import JobFault, MrcoreError
from mrcore.launchers import local
from mrcore.messages.methods import HEALTH
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.system import procfs

TEXTS = {
    f"{name}.txt": "".join(f"{name} word{n % 7} word{n % 11} GATE{n % 3}\n" for n in range(300)) + f"GATE {name}\n"
    for name in ("a", "b", "c", "d")
}
EXPECTED = sorted(Counter(word for text in TEXTS.values() for word in text.split()).items())


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[TestCluster]:
    """Two nodes of two servers, inputs on both."""
    with TestCluster(tmp_path, 2, 2) as made:
        made.write_inputs(TEXTS)
        yield made


class Running:
    """A job that runs in a thread of its own."""

    def __init__(self, cluster: TestCluster, **keys: Any) -> None:
        self.manifest: dict[str, Any] | None = None
        self.error: MrcoreError | None = None
        self.stop = threading.Event()
        self._cluster, self._job = cluster, cluster.job(**keys)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.manifest = self._cluster.manager.run(self._job, run=1, stop=self.stop)
        except MrcoreError as error:
            self.error = error

    def result(self, seconds: float = 60) -> dict[str, Any]:
        """Wait for the end; gives the manifest, raises what the run raised."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the job does not end"
        if self.error:
            raise self.error
        assert self.manifest is not None
        return self.manifest


def output(cluster: TestCluster) -> list[tuple[str, int]]:
    return sorted((key, value) for key, value in cluster.items())


@pytest.mark.parametrize("phase", ["map", "sort", "reduce"])
def test_a_task_killed_in_each_phase_is_done_again(cluster: TestCluster, phase: str) -> None:
    cluster.close_gate(phase)
    idle = len(cluster.processes())
    job = Running(cluster, number_of_partitions=3)
    (pid, *_) = cluster.waiting(phase)
    os.kill(pid, signal.SIGKILL)
    cluster.open_gate(phase)
    manifest = job.result()
    assert output(cluster) == EXPECTED
    assert len(manifest["deaths"]) == 1 and "SIGKILL" in manifest["deaths"][0]
    cluster.assert_clean(idle)


@pytest.mark.parametrize("phase", ["map", "reduce"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_cluster_server_killed_or_frozen_has_its_work_done_again(
    cluster: TestCluster, phase: str, number: signal.Signals
) -> None:
    cluster.close_gate(phase)
    idle = len(cluster.processes())
    job = Running(cluster, number_of_partitions=3)
    (task, server), *_ = cluster.waiting(phase).items()
    os.kill(cluster.server_pid(server), number)
    wait_until(lambda: procfs.state(task) in (None, "Z"), 30, "the lost server's task ended")
    cluster.open_gate(phase)
    manifest = job.result()
    assert output(cluster) == EXPECTED
    assert manifest["deaths"]
    cluster.assert_clean(idle)


def test_the_only_server_of_a_node_killed_comes_back_and_the_job_goes_on(tmp_path: Path) -> None:
    with TestCluster(tmp_path, 1, 1) as cluster:
        cluster.write_inputs(TEXTS)
        cluster.close_gate("map")
        job = Running(cluster)
        cluster.waiting("map")
        os.kill(cluster.server_pid("S_0"), signal.SIGKILL)
        cluster.open_gate("map")
        job.result()
        assert output(cluster) == EXPECTED


def test_an_agent_killed_hands_the_run_back_and_the_queue_goes_on_when_it_is_back(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(cluster.settings)
    scheduler.submit_job(cluster.job())
    cluster.close_gate("map")
    runner = Runner(cluster.settings.model_copy(update={"hold_backoff_first_seconds": 0.2}))
    thread = threading.Thread(target=runner.run, kwargs={"once": True}, daemon=True)
    thread.start()
    cluster.waiting("map")
    os.kill(cluster.agent_pid(1), signal.SIGKILL)
    hold = wait_until(lambda: scheduler.state()["hold"], 30, "the queue holds")
    assert "node-1" in hold["reason"] or cluster.settings.nodes[1].address in hold["reason"]
    (run, *_) = scheduler.history("gated")
    assert run["state"] == "handed back"
    assert [row["state"] for row in scheduler.queue()] == ["held"] or [row["state"] for row in scheduler.queue()] == [
        "queued"
    ]
    cluster.open_gate("map")
    local.start_cluster(cluster.settings)
    thread.join(60)
    assert not thread.is_alive()
    assert scheduler.history("gated")[0]["state"] == "succeeded"
    assert scheduler.state()["hold"] is None
    assert output(cluster) == EXPECTED
    cluster.assert_clean()


@pytest.mark.parametrize("phase", ["map", "reduce"])
def test_a_stopped_run_leaves_nothing_and_the_cluster_is_usable_at_once(cluster: TestCluster, phase: str) -> None:
    cluster.close_gate(phase)
    idle = len(cluster.processes())
    job = Running(cluster)
    cluster.waiting(phase)
    job.stop.set()
    with pytest.raises(MrcoreError, match="stopped"):
        job.result()
    cluster.assert_clean(idle)
    cluster.open_gate(phase)
    cluster.manager.run(cluster.job(job_name="next"), run=2)
    assert sorted((key, value) for key, value in cluster.items("next")) == EXPECTED


def test_a_task_that_dies_each_time_fails_the_job_and_names_the_signal(cluster: TestCluster) -> None:
    project = cluster.settings.projects_dir / "gated"
    (project / "map_functions.py").write_text(
        "import os, signal\ndef count_words(line, auxiliary_data):\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    with pytest.raises(JobFault, match="SIGSEGV"):
        cluster.run(cluster.job())
    cluster.assert_clean()


def test_kill_ends_an_endless_map_that_ignores_sigterm_and_has_forked_children(cluster: TestCluster) -> None:
    project = cluster.settings.projects_dir / "gated"
    (project / "map_functions.py").write_text(
        "import os, signal, time\n"
        "from gates import gate\n"
        "def count_words(line, auxiliary_data):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    for detached in (False, True):\n"
        "        if os.fork() == 0:\n"
        "            if detached:\n"
        "                os.setsid()\n"
        "                if os.fork():\n"
        "                    os._exit(0)\n"
        "            while True: time.sleep(1)\n"
        "    gate('map')\n"
    )
    cluster.close_gate("map")
    job = Running(cluster)
    cluster.waiting("map", 2)
    local.kill_cluster(cluster.settings)
    assert not cluster.processes()
    local.kill_cluster(cluster.settings)
    job.stop.set()
    with pytest.raises(MrcoreError):
        job.result()
    for node in cluster.settings.nodes:
        assert not list(node.layout.working_dir.iterdir()) and not list(node.layout.pids_dir.iterdir())


def test_what_is_served_on_the_data_channel_is_what_the_manifest_says(cluster: TestCluster) -> None:
    def served() -> int:
        nodes = cluster.settings.nodes
        return sum(cluster.manager._agents.client(node).call(HEALTH).served_bytes.get("run", 0) for node in nodes)

    before = served()
    manifest = cluster.run(cluster.job(number_of_partitions=5))
    remote = sum(length for source, target, length in manifest["shuffle"] if source != target)
    assert remote == manifest["counts"]["remote_bytes"] > 0
    assert served() - before == remote
    assert output(cluster) == EXPECTED


@pytest.mark.needs_strace
def test_no_process_opens_another_nodes_folder(tmp_path: Path) -> None:
    """Every file name that a process of a node hands to the kernel during a job, by strace."""
    with TestCluster(tmp_path, 3, 1) as cluster:
        cluster.write_inputs(TEXTS)
        folders = {node.name: str(node.compute_dir) for node in cluster.settings.nodes}
        tracers = []
        for node in cluster.settings.nodes:
            pids = [pid for pid in cluster.processes() if f"{folders[node.name]}/" in " ".join(arguments(pid))]
            assert len(pids) == 3, "agent, supervisor and server"
            command = ["strace", "-f", "-s", "4096", "-e", "trace=%file", "-o", str(tmp_path / node.name)]
            for pid in pids:
                command += ["-p", str(pid)]
            tracers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            assert tracers[-1].stderr is not None
            for _ in pids:
                assert "attached" in tracers[-1].stderr.readline()
        try:
            manifest = cluster.run(cluster.job(number_of_partitions=6))
        finally:
            for tracer in tracers:
                tracer.send_signal(signal.SIGINT)
                tracer.communicate(timeout=20)
        assert manifest["counts"]["remote_bytes"] > 0
        for name, folder in folders.items():
            trace = (tmp_path / name).read_text(errors="replace")
            assert f"{folder}/working/" in trace, "the trace saw the job's work"
            for other in folders.values():
                assert other == folder or f"{other}/" not in trace, f"{name} touched {other}"
        assert output(cluster) == EXPECTED


def arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


Break = Callable[[TestCluster], dict[str, Any]]


def _missing_input(cluster: TestCluster) -> dict[str, Any]:
    return {"input_dirs": ["inputs/nothing", "/nowhere/*.txt"]}


def _not_utf8(cluster: TestCluster) -> dict[str, Any]:
    (cluster.settings.nodes[0].layout.base_dir / "inputs/text/x.txt").write_bytes(b"good\nbad \xff byte\n")
    return {}


def _truncated(cluster: TestCluster) -> dict[str, Any]:
    import gzip

    content = gzip.compress(os.urandom(100_000).hex().encode())
    (cluster.settings.nodes[0].layout.base_dir / "inputs/text/x.gz").write_bytes(content[:-1000])
    return {}


def _raising(cluster: TestCluster) -> dict[str, Any]:
    file = cluster.settings.projects_dir / "gated/map_functions.py"
    file.write_text("def count_words(line, auxiliary_data):\n    return [(line, 1 / 0)]\n")
    return {}


def _no_pair(cluster: TestCluster) -> dict[str, Any]:
    file = cluster.settings.projects_dir / "gated/map_functions.py"
    file.write_text("def count_words(line, auxiliary_data):\n    return line.split()\n")
    return {}


def _bad_value(cluster: TestCluster) -> dict[str, Any]:
    file = cluster.settings.projects_dir / "gated/map_functions.py"
    file.write_text("def count_words(line, auxiliary_data):\n    return [('k', {1})]\n")
    return {}


def _bad_reduce(cluster: TestCluster) -> dict[str, Any]:
    file = cluster.settings.projects_dir / "gated/reduce_functions.py"
    file.write_text("def add_up(group, auxiliary_data):\n    raise KeyError('no such thing')\n")
    return {}


def _no_auxiliary(cluster: TestCluster) -> dict[str, Any]:
    return {"auxiliary_data_name_mapper": "stop_words"}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_missing_input, ["inputs/nothing", "/nowhere/*.txt", "matches no file"]),
        (_not_utf8, ["x.txt", "byte 9", "on_bad_text"]),
        (_truncated, ["x.gz", "damaged or cut off", "upload it again"]),
        (_raising, ["count_words", "ZeroDivisionError", "byte 0", "map_functions.py, line 2"]),
        (_no_pair, ["count_words", "no (key, value) pair", "byte 0"]),
        (_bad_value, ["count_words", "type set", "byte 0"]),
        (_bad_reduce, ["add_up", "KeyError", "no such thing", "key"]),
        (_no_auxiliary, ["stop_words", "upload"]),
    ],
)
def test_bad_input_fails_the_job_with_one_clear_error_and_leaves_nothing(
    cluster: TestCluster, spoil: Break, words: list[str]
) -> None:
    keys = spoil(cluster)
    with pytest.raises(JobFault) as caught:
        cluster.run(cluster.job(**keys))
    for word in words:
        assert word in caught.value.message, caught.value.message
    cluster.assert_clean()
    for node in cluster.settings.nodes:
        assert not (node.layout.base_dir / "gated").exists()
