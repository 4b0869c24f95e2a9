"""A node of a running cluster that lies: the run is handed back by a fault that names it, and nothing else happens."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkout import SUPPORT
from clusters import TestCluster
from conditions import wait_until

from mrcore.errors import UsageError
from mrcore.launchers import local
from mrcore.launchers.launcher import daemons
from mrcore.messages.kinds import convert
from mrcore.messages.tasks import Order
from mrcore.queue.scheduler import Scheduler
from mrcore.state import manifest
from mrcore.system import procfs

NODE = "node-1"
RSS_BYTES = 300 << 20  # of the master, whatever it is told
TIMEOUT_SECONDS = 8.0  # node_timeout_seconds
SECONDS = 4 * TIMEOUT_SECONDS  # of an attempt, on a machine that does a lot beside
ATTEMPT = """
import json, sys, time
from mrcore.settings.config import load_settings
from mrcore.cluster.manage_cluster import ManageCluster
job, begun = json.loads(sys.argv[2]), time.monotonic()
try:
    ManageCluster(load_settings(sys.argv[1])).run(job, run=int(sys.argv[3]))
    made = {"class": None, "message": "", "kinds": []}
except BaseException as error:
    kinds = [each.__name__ for each in type(error).__mro__]
    made = {"class": type(error).__name__, "message": str(error), "kinds": kinds}
# Not ru_maxrss, which a process has from whoever started it: from a test process of any size.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps(made | {"rss": int(peak.split()[1]) * 1024, "seconds": time.monotonic() - begun}))
"""
RUNNER = """
import sys
from mrcore.settings.config import load_settings
from mrcore.queue.runner import Runner
Runner(load_settings(sys.argv[1])).run()
"""


class LyingCluster(TestCluster):
    """Two nodes, of which the second has other daemons than the first."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder, nodes=2, servers=1, node_timeout_seconds=TIMEOUT_SECONDS, hold_backoff_first_seconds=0.2
        )
        self.config = folder / "config.json"
        self.config.write_text(self.settings.model_dump_json())
        self.number = 100
        self.lies = self.settings.nodes[1].compute_dir / "lie.json"
        os.environ["PYTHONPATH"] = str(SUPPORT)
        try:
            self._replace()
        finally:
            del os.environ["PYTHONPATH"]
        self.write_inputs({"a": "one two\n", "b": "two\n"})

    def _replace(self) -> None:
        theirs = [daemon for daemon in daemons(self.settings) if daemon.node.name == NODE]
        running = local._running(self.settings.home)
        for daemon in theirs:
            procfs.send_signal(*running[local._record(daemon)], signal.SIGTERM)
        wait_until(
            lambda: not any(procfs.state(running[local._record(daemon)].pid) for daemon in theirs), 20, "their end"
        )
        local._await_ready({local._launch(self.settings, daemon, "lying_node"): daemon for daemon in theirs})

    def lie(self, **lie: Any) -> None:
        partial = self.lies.with_suffix(".partial")
        partial.write_text(json.dumps(lie))
        partial.replace(self.lies)

    def attempt(self, **keys: Any) -> dict[str, Any]:
        """One attempt by a master of its own; how it ended, and the most memory that it took."""
        self.number += 1
        arguments = [str(self.config), json.dumps(self.job(**keys)), str(self.number)]
        command = [sys.executable, "-X", "faulthandler", "-c", ATTEMPT, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, (done.returncode, done.stdout[-2_000:], done.stderr[-10_000:])
        ended: dict[str, Any] = json.loads(done.stdout)
        return ended

    def files(self) -> set[str]:
        """Every file of both nodes, but for what daemons write of themselves."""
        own = ("logs", "pids")
        return {
            str(path)
            for node in self.settings.nodes
            for path in node.compute_dir.rglob("*")
            if path.is_file() and path.relative_to(node.compute_dir).parts[0] not in own and path != self.lies
        }


@pytest.fixture(scope="module")
def lying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LyingCluster]:
    with LyingCluster(tmp_path_factory.mktemp("lying")) as started:
        yield started


@pytest.fixture
def cluster(lying: LyingCluster) -> Iterator[LyingCluster]:
    yield lying
    lying.lies.unlink(missing_ok=True)


LISTED = {"matched": {"inputs/text": 1}, "skipped": {}, "fingerprint": "", "faults": [], "next": None}
POLL = {"incarnation": "ab"}
ANSWERS: dict[str, dict[str, Any]] = {
    "health is null": {"health": None},
    "health has no name": {"health": {"time": 1}},
    "health in other types": {"health": {"name": 5, "version": [], "wire_version": "1", "python": None}},
    "a snapshot is here perhaps": {"project_state": "yes"},
    "free disk is a word": {"start_run": {"disk_free_bytes": "much"}},
    "no run was begun": {"start_run": []},
    "sweep is a list": {"sweep": [1]},
    "inputs are null": {"list_inputs": None},
    "a file of 2^50 bytes": {"list_inputs": LISTED | {"files": [["/x", 1 << 50, 1, 1]]}},
    "files of 2^44 bytes each": {"list_inputs": LISTED | {"files": [[f"/{n}", 1 << 44, 1, 1] for n in range(1000)]}},
    "a file of less than nothing": {"list_inputs": LISTED | {"files": [["/x", -1, 1, 1]]}},
    "a file that is a number": {"list_inputs": LISTED | {"files": [7]}},
    "inputs without a count": {"list_inputs": LISTED | {"files": [], "matched": {}}},
    "the next page is everywhere": {"list_inputs": LISTED | {"files": [], "next": {"page": 2}}},
    "faults are a number": {"list_inputs": LISTED | {"files": [], "faults": 3}},
    "hello is a list": {"hello": []},
    "hello is of no life": {"hello": {"name": "S_1", "incarnation": None, "wire_version": 1, "version": "1"}},
    "poll is null": {"poll": None},
    "poll is a number": {"poll": 5},
    "poll has no events": {"poll": POLL},
    "events are a table": {"poll": POLL | {"events": {}}},
    "an event is a number": {"poll": POLL | {"events": [5]}},
    "an event is a text": {"poll": POLL | {"events": [[1, "want"]]}},
    "an event without a kind": {"poll": POLL | {"events": [[1, {}]]}},
    "an event's number is a text": {"poll": POLL | {"events": [["1", {"event": "want"}]]}},
    "an event's number is huge": {"poll": POLL | {"events": [[1 << 80, {"event": "want"}]]}},
    "an incarnation that hello knows nothing of": {"poll": POLL | {"events": []}},
    "an order is taken by a text": {"order": "ok"},
    "what was published is a list": {"publish": []},
}
RAW: dict[str, dict[str, list[Any]]] = {  # before, text, times, after
    "no JSON": {"list_inputs": ["}", "", 0, ""]},
    "nested deeply": {"list_inputs": ['{"result": ', "[", 100_000, ""]},
    "millions of lists": {"list_inputs": ['{"result": [', "[],", 8_000_000, "1]}"]},
    "millions of lists at a poll": {"poll": ['{"result": [', "[],", 8_000_000, "1]}"]},
    "millions of lists for a small answer": {"start_run": ['{"result": [', "[],", 8_000_000, "1]}"]},
    "neither result nor error": {"start_run": ['{"answer": 1', "", 0, "}"]},
    "a number of a million digits": {"start_run": ['{"result": ', "9", 1_000_000, "}"]},
    "blame where the job has none": {"start_run": ['{"error": {"class": "JobFault", "message": "', "x", 9, '"}}']},
    "an error that is none": {"start_run": ['{"error": {"class": 5', "", 0, "}}"]},
}


def check(ended: dict[str, Any], seconds: float = SECONDS) -> None:
    """The attempt ended soon, by a fault of the cluster that names the node, and the master stayed small.

    Where what it sends takes too long, the node is named by its address.
    """
    assert "ClusterFault" in ended["kinds"], ended
    assert re.search(rf"{NODE}|127\.[0-9.]+:\d+", ended["message"]) and len(ended["message"]) < 2_000, ended
    assert ended["rss"] < RSS_BYTES, f"{ended['rss'] >> 20} MiB"
    assert ended["seconds"] < seconds, ended


@pytest.mark.slow
@pytest.mark.parametrize("what", ANSWERS)
def test_what_is_no_answer_is_a_fault_of_the_cluster_that_names_the_node(cluster: LyingCluster, what: str) -> None:
    cluster.lie(answers=ANSWERS[what])
    before = cluster.files()
    check(cluster.attempt())
    if "publish" not in ANSWERS[what]:  # the run has committed then

        def left() -> set[str]:
            return {each for each in cluster.files() - before if "/projects/" not in each}

        if left():  # of an order that arrived when the attempt had just ended: the next run sweeps it
            check(cluster.attempt())
        wait_until(lambda: not left(), 60, "nothing is left")


@pytest.mark.slow
@pytest.mark.parametrize("what", RAW)
def test_what_is_no_message_is_a_fault_of_the_cluster(cluster: LyingCluster, what: str) -> None:
    cluster.lie(raw=RAW[what])
    check(cluster.attempt())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["endless", "same cursor", "empty"])
def test_listings_without_an_end_are_ended(cluster: LyingCluster, kind: str) -> None:
    cluster.lie(pages=kind)
    check(cluster.attempt(), seconds=10 * SECONDS)  # half a million files are taken before it is too much


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flood", "lives"])
def test_events_without_an_end_are_ended(cluster: LyingCluster, kind: str) -> None:
    cluster.lie(events=kind)
    check(cluster.attempt())


@pytest.mark.slow
def test_content_without_an_end_is_ended(cluster: LyingCluster) -> None:
    cluster.lie(**{"endless bytes": True})
    check(cluster.attempt(number_of_partitions=2))


def manifests(cluster: LyingCluster) -> list[Path]:
    return sorted(cluster.settings.state_dir.glob("manifests/*/*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["/tmp/mrcore-evil", "../../../../evil", "a/b", "part-000001-00000-00000.data", "", 5])
def test_no_part_gets_a_name_that_a_node_chooses(cluster: LyingCluster, name: Any) -> None:
    """The hole that wrote files: a part's path went by the manifest to the next run, which fetched it there."""
    before, files = manifests(cluster), cluster.files()
    cluster.lie(results={"parts": {"name": name}})
    check(cluster.attempt(map_function_name="count_words", reduce_function_name=None))
    assert manifests(cluster) == before and not Path("/tmp/mrcore-evil").exists()
    assert cluster.files() - files <= {path for path in cluster.files() if "/projects/" in path}


RESULTS: dict[str, Any] = {  # of a map task
    "null": None,
    "a list": [],
    "without counters": {"counters": None},
    "counters below nothing": {"counters": {"lines": -1}},
    "counters of 2^63": {"counters": {"lines": 1 << 63}},
    "seconds in words": {"seconds": {"map": "long"}},
    "spills are a table": {"runs": 7},
    "a spill is a number": {"runs": [7]},
    "a spill outside": {"runs": {"id": "../../evil"}},
    "a spill of another task": {"runs": {"id": "map-99-1-0"}},
    "a spill below nothing": {"runs": {"bytes": -1}},
    "a partition that there is not": {"runs": {"partitions": {"999": 1}}},
    "samples that are no keys": {"runs": {"samples": [["{", 1]]}},
    "a part of 2^70 bytes": {"parts": [{"name": "part-000001-00000-00000.data", "bytes": 1 << 70}]},
}


@pytest.mark.slow
@pytest.mark.parametrize("what", RESULTS)
def test_what_is_no_result_is_a_fault_of_the_cluster_that_names_the_node(cluster: LyingCluster, what: str) -> None:
    before, files = manifests(cluster), cluster.files()
    cluster.lie(results=RESULTS[what])
    check(cluster.attempt(number_of_partitions=2))
    assert manifests(cluster) == before
    assert cluster.files() - files <= {path for path in cluster.files() if "/projects/" in path}


@pytest.mark.parametrize("name", ["/tmp/evil", "../evil", "part-000001-00000-00000.data/../../evil", ""])
def test_a_manifest_is_looked_at_again_before_a_name_of_it_becomes_a_path(tmp_path: Path, name: str) -> None:
    """On the master, which says what to do, and once more by the server that gets the order."""
    part: dict[str, Any] = {"name": name, "node": "other", "partition": 0, "crc32": 0}
    part |= dict.fromkeys(("records", "bytes", "text_bytes", "batch_bytes", "max_decoded"), 1)
    path = manifest.path_of(tmp_path, "j", 1)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"job": "j", "run": 1, "parts": [part]}))
    with pytest.raises(UsageError, match=r"the manifest .* is damaged: .*name"):
        manifest.read(tmp_path, "j", 1)
    identity = {"job": "j", "run": 2, "phase": "REDUCE", "task": 0, "try": 1}
    order = {"identity": identity, "node": "n", "job": {}, "project": "a" * 32, "partitions": 1}
    good = [part | {"name": "part-000001-00000-00000.data"}]
    assert convert(Order, order | {"earlier": {"parts": good, "sources": []}}).earlier
    with pytest.raises(ValueError, match="earlier"):
        convert(Order, order | {"earlier": {"parts": [part], "sources": []}})


@pytest.mark.slow
def test_the_queue_holds_and_obeys_and_goes_on_when_the_node_is_honest(cluster: LyingCluster) -> None:
    """The job waits, no run fails; cancel and stop are obeyed; afterwards the same job succeeds."""
    scheduler = Scheduler(cluster.settings)
    started: list[subprocess.Popen[bytes]] = []

    def runner() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", RUNNER, str(cluster.config)]))
        return started[-1]

    def states(name: str) -> list[str]:
        return [row["state"] for row in scheduler.store.rows("SELECT state FROM runs WHERE job_name = ?", name)]

    try:
        lies: list[dict[str, Any]] = [{"poll": POLL | {"events": 5}}, {"list_inputs": 7}]
        for priority, (name, answers) in enumerate(zip(("first", "second"), lies, strict=True)):
            cluster.lie(answers=answers)
            scheduler.submit_job(cluster.job(job_name=name, job_priority=priority))
            process = runner()
            wait_until(lambda: states(name).count("handed back") > 1, 90, f"{name} is handed back twice")  # noqa: B023
            assert (hold := scheduler.store.hold()) is None or NODE in hold.reason
            process.terminate()
            assert process.wait(60) == 0, "it stops while the queue holds"
            assert set(states(name)) <= {"handed back"} and scheduler.store.job(name).state in ("held", "queued")  # type: ignore[union-attr]
        cluster.lie(events="silence")
        scheduler.submit_job(cluster.job(job_name="third", job_priority=9))
        process = runner()
        wait_until(lambda: states("third") == ["running"], 60, "a run that hears nothing")
        scheduler.cancel("third")
        wait_until(lambda: states("third") == ["cancelled"], 60, "cancel is obeyed")
        wait_until(lambda: "running" in states("second"), 60, "the next, which hears nothing either")
        process.terminate()
        assert process.wait(60) == 0, "and so is stop"
        cluster.lies.unlink()
        process = runner()
        for name in ("first", "second"):
            wait_until(lambda: "succeeded" in states(name), 120, f"{name} succeeds")  # noqa: B023
            assert set(states(name)) <= {"handed back", "succeeded"}
        process.terminate()
        assert process.wait(60) == 0
    finally:
        for each in started:
            each.kill()
            each.wait()
        scheduler.store.close()
