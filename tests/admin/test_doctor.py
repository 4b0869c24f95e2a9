"""What the doctor finds: each finding by itself, from facts; then a real cluster, well and ill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import TestCluster
from conditions import wait_until
from signals import kill

from mrcore import WIRE_VERSION, __version__
from mrcore.admin import doctor
from mrcore.admin.doctor import Finding, judge
from mrcore.cli.main import main
from mrcore.launchers import local
from mrcore.queue.scheduler import Scheduler
from mrcore.state import backup
from mrcore.system import procfs
from mrcore.wire import pki

NOW, DAY = 1_800_000_000.0, 86400.0
FAR = NOW + 100 * DAY


def node(name: str, **changes: Any) -> dict[str, Any]:
    versions = {"version": "1.0.0", "release": "1.0.0-abc", "wire_version": 1, "python": "3.11.2"}
    well = {"node": name, "clock_skew_seconds": 0.0, "disk_free_bytes": 1 << 40, "certificate_ends": FAR}
    return versions | well | changes


def facts(**changes: Any) -> Any:
    """A deployed cluster of two nodes in which all is well."""
    master = node(
        "-", local=False, started=True, pki_dir="/p", time=NOW, certificates_end={"ca.crt": FAR, "master.crt": FAR}
    )
    well = {
        "master": master | {"backup": {"time": NOW - DAY, "file": "/b"}},
        "nodes": {"w1": node("w1"), "w2": node("w2")},
        "servers": {"S_0": node("w1"), "S_1": node("w2"), "S_2": node("w2")},
        "queue": {"paused": False, "hold": None, "drain": None, "runner": True, "jobs": 0, "running": None},
        "outputs": [],
    }
    return well | changes


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1, found
    assert all(found[0]), "each says where, what, what it means and what to do"
    return found[0]


def gone(name: str, error: str = "127.0.0.1:1 did not answer: connect", code: str | None = None) -> dict[str, Any]:
    return {"node": name, "error": error, "code": code}


def test_nothing_is_wrong() -> None:
    assert judge(facts()) == []


def test_a_node_that_is_silent_altogether_is_one_finding() -> None:
    servers = facts()["servers"] | {"S_1": gone("w2"), "S_2": gone("w2")}
    found = only(judge(facts(nodes={"w1": node("w1"), "w2": gone("w2")}, servers=servers)))
    assert (found.where, found.what.startswith("nothing on it answers")) == ("node w2", True)
    assert "mrcore cluster start" in found.do


def test_a_cluster_that_is_silent_altogether_is_one_finding() -> None:
    nodes = {"w1": gone("w1"), "w2": gone("w2")}
    servers = {"S_0": gone("w1"), "S_1": gone("w2"), "S_2": gone("w2")}
    found = only(judge(facts(nodes=nodes, servers=servers)))
    assert (found.where, found.code) == ("cluster", "not started") and "`mrcore cluster start`" in found.do
    refused = gone("w1", "has expired", "certificate")
    assert len(judge(facts(nodes=nodes | {"w1": refused}, servers=servers))) == 2, "a start would not help there"


def test_a_hold_that_waits_for_a_cluster_that_is_not_started_is_no_finding_of_its_own() -> None:
    master = facts()["master"] | {"local": True, "started": False}
    for nodes, codes in ((True, ["not started"]), (False, ["not started", "hold"])):
        queue = facts()["queue"] | {"jobs": 1, "hold": {"reason": "it is not started", "nodes": nodes}}
        assert [finding.code for finding in judge(facts(master=master, nodes={}, servers={}, queue=queue))] == codes


def test_a_run_that_a_dead_runner_left_is_named() -> None:
    master = facts()["master"] | {"local": True}
    queue = facts()["queue"] | {"runner": False, "running": {"job_name": "a", "run": 3, "started": NOW}}
    assert "run 3 of a was under way when the last one ended" in only(judge(facts(master=master, queue=queue))).what


def test_an_agent_and_a_server_alone() -> None:
    found = only(judge(facts(nodes={"w1": node("w1"), "w2": gone("w2")})))
    assert found.what.startswith("its agent does not answer")
    found = only(judge(facts(servers=facts()["servers"] | {"S_2": gone("w2")})))
    assert found.where == "server S_2" and "mrcore logs S_2" in found.do


def test_a_refused_certificate_needs_other_certificates_and_no_start() -> None:
    error = "10.0.0.2:45678 has no acceptable certificate: certificate has expired"
    found = only(judge(facts(nodes={"w1": node("w1"), "w2": gone("w2", error, "certificate")})))
    assert "make deploy" in found.do and "cluster start" not in found.do


@pytest.mark.parametrize("change", [{"release": "1.0.0-def"}, {"wire_version": 2}, {"python": "3.12.1"}])
@pytest.mark.parametrize(("kind", "name"), [("nodes", "w1"), ("servers", "S_0")])
def test_another_version(kind: str, name: str, change: dict[str, Any]) -> None:
    found = only(judge(facts(**{kind: facts()[kind] | {name: node("w1", **change)}})))
    assert found.where.endswith(name) and "make upgrade" in found.do


def test_a_daemon_that_names_no_release_is_known_by_its_version() -> None:
    older = {key: value for key, value in node("w1", version="0.9.0").items() if key != "release"}
    assert "runs mrcore 0.9.0 (wire 1)" in only(judge(facts(nodes={"w1": older, "w2": node("w2")}))).what


def test_another_patch_of_python_will_do() -> None:
    assert judge(facts(nodes={"w1": node("w1", python="3.11.9")})) == []


@pytest.mark.parametrize(("skew", "said"), [(61, "61 s ahead of"), (-600, "600 s behind")])
def test_a_clock_that_is_off(skew: float, said: str) -> None:
    found = only(judge(facts(nodes={"w1": node("w1", clock_skew_seconds=skew)})))
    assert said in found.what and "timedatectl" in found.do
    assert judge(facts(nodes={"w1": node("w1", clock_skew_seconds=skew / 100)})) == []


@pytest.mark.parametrize(("low", "high", "skew"), [(10, 12, 0), (12, 14, -1), (5, 8, 3)])
def test_the_time_that_a_call_takes_is_no_skew(low: float, high: float, skew: float) -> None:
    assert doctor._outside(11, low, high) == skew


def test_a_full_disk() -> None:
    found = only(judge(facts(nodes={"w1": node("w1", disk_free_bytes=300 << 20)})))
    assert (found.where, found.what) == ("node w1", "300 MiB of disk are free, less than 1024")
    assert only(judge(facts(master=facts()["master"] | {"disk_free_bytes": 0}))).where == "master"


@pytest.mark.parametrize(("end", "said"), [(NOW + 29 * DAY, "ends on 2027-02-13"), (NOW - DAY, "ended on 2027-01-14")])
def test_a_certificate_that_ends(end: float, said: str) -> None:
    found = only(judge(facts(servers={"S_0": node("w1", certificate_ends=end)})))
    assert said in found.what and "make deploy" in found.do
    ends = facts()["master"]["certificates_end"] | {"ca.crt": end}
    assert only(judge(facts(master=facts()["master"] | {"certificates_end": ends}))).where == "master, ca.crt"


def test_the_queue() -> None:
    queue = facts()["queue"]
    assert "node w2 was lost" in only(judge(facts(queue=queue | {"hold": {"reason": "node w2 was lost"}}))).what
    assert "mrcore resume" in only(judge(facts(queue=queue | {"paused": True}))).do
    assert "a drain was cut off" in only(judge(facts(queue=queue | {"drain": "a drain was cut off"}))).what
    found = only(judge(facts(queue=queue | {"runner": False, "jobs": 3})))
    assert "3 jobs wait" in found.means and "mrcore-runner" in found.do


def test_a_local_cluster_needs_neither_runner_nor_backup_while_nothing_waits() -> None:
    master = facts()["master"] | {"local": True, "backup": None}
    assert judge(facts(master=master, queue=facts()["queue"] | {"runner": False})) == []
    assert judge(facts(master=master, queue=facts()["queue"] | {"runner": False, "jobs": 1}))


@pytest.mark.parametrize(("made", "said"), [(None, "no backup yet"), ({"time": NOW - 2.5 * DAY}, "2.5 days old")])
def test_the_backup(made: dict[str, Any] | None, said: str) -> None:
    found = only(judge(facts(master=facts()["master"] | {"backup": made})))
    assert said in found.what and "mrcore backup" in found.do


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with TestCluster(tmp_path_factory.mktemp("cluster"), nodes=2, servers=1) as made:
        yield made


@pytest.fixture
def cluster(shared: TestCluster) -> TestCluster:
    """The module's cluster, with all daemons running again that a test has stopped."""
    local.start_cluster(shared.settings)
    return shared


def test_a_real_cluster(
    cluster: TestCluster, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = doctor.gather(cluster.settings)
    assert judge(found) == []
    for each in (*found["nodes"].values(), *found["servers"].values()):
        assert (each["version"], each["wire_version"]) == (__version__, WIRE_VERSION)
        years = (each["certificate_ends"] - time.time()) / (365 * DAY)
        assert round(years) == round(pki.VALID_DAYS / 365)
    assert found["master"]["backup"] is None
    backup.backup(cluster.settings, cluster.folder / "kept")
    assert doctor.gather(cluster.settings)["master"]["backup"]["file"] == str(cluster.folder / "kept")
    os.kill(cluster.agent_pid(1), signal.SIGSTOP)
    begun = time.monotonic()
    finding = only(judge(doctor.gather(cluster.settings)))
    assert time.monotonic() - begun < doctor.ASK_SECONDS + 5
    assert (finding.where, finding.what.split(":")[0]) == ("node node-1", "its agent does not answer")
    monkeypatch.setenv("MRCORE_HOME", str(cluster.settings.home))
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", "--json"])
    assert json.loads(capfd.readouterr().out)["findings"][0]["where"] == "node node-1"
    os.kill(cluster.agent_pid(1), signal.SIGCONT)
    wait_until(lambda: not judge(doctor.gather(cluster.settings)), 20, "the doctor is content")
    with pytest.raises(SystemExit, match="0"):
        main(["doctor"])
    assert "nothing is wrong: 2 nodes, 2 cluster servers" in capfd.readouterr().out


def test_a_daemon_that_is_not_the_one_that_is_meant_needs_other_certificates(cluster: TestCluster) -> None:
    first, second = cluster.settings.nodes
    meant = cluster.settings.model_copy(update={"nodes": (first, second.model_copy(update={"name": "another"}))})
    gathered = doctor.gather(meant)
    assert gathered["nodes"]["another"]["code"] == "certificate"
    finding = only(judge(gathered))
    assert (finding.where, finding.code) == ("node another", "node silent")
    assert f"rm {cluster.settings.pki_dir}/ca.*" in finding.do


def said(*arguments: str, **surroundings: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", "from mrcore.cli.main import main; main()", *arguments],
        env=os.environ | surroundings, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not done.stderr
    return done.returncode, done.stdout


NOT_LOCAL = ("ping", "systemctl", "make deploy", "make upgrade", "controller", "ca.crt", "timedatectl")


def test_a_fresh_home_and_a_stopped_cluster_are_told_to_start(cluster: TestCluster, tmp_path: Path) -> None:
    fresh = said("doctor", MRCORE_HOME=str(tmp_path / "fresh"))
    local.stop_cluster(cluster.settings)
    home = str(cluster.settings.home)
    for code, text in (fresh, said("doctor", MRCORE_HOME=home)):
        assert (code, text.split("\n")[0]) == (1, "local cluster: it is not started")
        assert "do: `mrcore cluster start`" in text
        assert not [word for word in NOT_LOCAL if word in text]
    scheduler = Scheduler(cluster.settings)
    scheduler.submit_job(cluster.job(job_name="waits"))
    code, text = said("doctor", MRCORE_HOME=home)
    assert code == 1 and "its jobs wait" in text and "`mrcore run`" in text
    assert not [word for word in NOT_LOCAL if word in text]
    assert json.loads(said("doctor", "--json", MRCORE_HOME=home)[1])["facts"]["nodes"] == {}
    scheduler.delete_job("waits")


def test_a_local_cluster_of_which_part_is_gone_is_told_to_start_it(cluster: TestCluster) -> None:
    for pid in [pid for pid in cluster.processes() if _of_node(pid, cluster.settings.nodes[1].address)]:
        kill(pid)
    wait_until(lambda: judge(doctor.gather(cluster.settings)), 20, "a finding")
    code, text = said("doctor", MRCORE_HOME=str(cluster.settings.home))
    assert code == 1 and "mrcore cluster start" in text and not [word for word in NOT_LOCAL if word in text]


def _of_node(pid: int, address: str) -> bool:
    return procfs.environment_value(pid, "MRCORE_SERVER").endswith(f"agent@{address}")


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": {"w1": node("w1"), "w2": gone("w2")}},
        {"nodes": {"w1": node("w1"), "w2": gone("w2", "it has expired", "certificate")}},
        {"servers": {"S_0": node("w1", release="1.0.0-def")}},
        {"servers": {"S_0": node("w1", certificate_ends=NOW - DAY)}},
        {"queue": facts()["queue"] | {"runner": False, "jobs": 3}},
    ],
)
def test_what_a_local_cluster_is_told_can_be_done_there(change: dict[str, Any]) -> None:
    found = only(judge(facts(master=facts()["master"] | {"local": True}, **change)))
    told = " ".join(found)
    assert "`mrcore " in told and not [word for word in NOT_LOCAL if word in told]
