"""What the day-two playbooks decide: findings of the doctor, the list of removed nodes, releases that stay."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from mrcore.wire import pki

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> Any:
    """A plugin of Ansible as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_plugin", ROOT / "ansible" / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


doctor, day_two = load("filter_plugins/doctor.py"), load("filter_plugins/day_two.py")
NOW = 1_800_000_000.0
ACTIVE = {"LoadState": "loaded", "ActiveState": "active", "SubState": "running", "UnitFileState": "enabled"}


def healthy(**changed: Any) -> dict[str, Any]:
    """What the inspection of a machine in order gives, but for what is changed."""
    room = {"free_bytes": 90 << 30, "bytes": 100 << 30, "free_inodes": 900, "inodes": 1000}
    names = ["mrcore-firewall.service", "mrcore-agent.service", "mrcore-server@S_2.service"]
    certificate = {
        "path": "/etc/mrcore/pki/node.crt", "key": "/etc/mrcore/pki/node.key", "serial": "AB", "mode": "0600",
        "owner": "mrcore", "expires": NOW + 300 * 86_400, "fault": None,
    }  # fmt: skip
    facts: dict[str, Any] = {
        "time": NOW, "skew": 0.4, "is_node": True, "is_master": False, "servers": {"S_2": 23456},
        "release": {"current": "1-a", "there": ["1-a"], "works": True}, "disks": {"/opt": room},
        "units": {name: dict(ACTIVE, Result="success") for name in names}, "failed_units": [],
        "listening": ["10.0.0.21:23456", "10.0.0.21:45678"], "table": True, "windows": {"S_2": True},
        "certificates": [certificate], "ssh": [], "newest_backup": None,
    }  # fmt: skip
    return facts | changed


HOST = {"agent_port": 45678, "servers": 1, "min_free_bytes": 1 << 30}
CLUSTER = {
    "master": "m1", "nodes": ["w1"], "certificate_renew_days": 30, "max_clock_skew_seconds": 60,
    "hosts": {"m1": HOST, "w1": HOST},
}  # fmt: skip


def judged(facts: dict[str, Any]) -> list[str]:
    """What the doctor finds on w1; it finds nothing on a master that is in order."""
    found = doctor.findings(CLUSTER, {"w1": {"facts": facts}, "m1": {"facts": healthy()}}, "prod")
    for each in found:
        assert set(each) == {"where", "what", "means", "do"} and all(each.values())
        assert each["where"] == "w1"
    return [each["what"] for each in found]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"release": {"current": None, "there": [], "works": False}}, ["no release"]),
        ({"release": {"current": "1-a", "there": [], "works": False}}, ["which is not there"]),
        ({"release": {"current": "1-a", "there": ["1-a"], "works": False}}, ["cannot be imported"]),
        ({"release": {"current": "1-b", "there": ["1-b"], "works": True}}, ["the master has 1-a"]),
        ({"skew": 59.0}, []),
        ({"skew": 600.0}, ["600 seconds ahead of"]),
        ({"skew": -61.0}, ["61 seconds behind"]),
        ({"disks": {"/opt": None}}, ["/opt is not there"]),
        ({"disks": {"/d": {"free_bytes": 5, "bytes": 9, "free_inodes": 1, "inodes": 1}}}, ["0.0 GiB free at /d"]),
        (
            {"disks": {"/d": {"free_bytes": 9 << 30, "bytes": 9 << 30, "free_inodes": 1, "inodes": 99}}},
            ["1 inodes free"],
        ),
        ({"disks": {"/d": {"free_bytes": 9 << 30, "bytes": 9 << 30, "free_inodes": 0, "inodes": 0}}}, []),  # btrfs
        ({"units": {"u": {"LoadState": "not-found"}}}, ["unit u is missing"]),
        ({"units": {"u": ACTIVE | {"ActiveState": "failed", "Result": "exit-code"}}}, ["unit u is failed (exit-code)"]),
        ({"units": {"u": ACTIVE | {"UnitFileState": "disabled"}}}, ["unit u is not enabled"]),
        ({"failed_units": ["ssh.service"]}, ["unit ssh.service has failed"]),
        ({"listening": ["[::]:45678"]}, ["nobody listens on port 23456 (S_2)"]),
        ({"listening": None}, []),
        ({"servers": {}}, ["0 servers are set up here"]),
        ({"table": False}, ["table is not loaded"]),
        ({"windows": {"S_2": False}}, ["server S_2 has no screen window"]),
        ({"is_master": True}, ["there is no backup yet"]),
        ({"is_master": True, "newest_backup": NOW - 3600 * 49}, ["the newest backup is 49 hours old"]),
        ({"is_master": True, "newest_backup": NOW - 3600}, []),
    ],
)
def test_doctor_names_each_fault(changed: dict[str, Any], said: list[str]) -> None:
    found = judged(healthy(**changed))
    assert len(found) == len(said) and all(part in what for part, what in zip(said, found, strict=True))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"expires": NOW + 86_400 * 12.2}, "in 12 days"),
        ({"expires": NOW - 5, "fault": "certificate has expired"}, "expired on 2027-01-1"),
        ({"fault": "key values mismatch"}, "key values mismatch"),
        ({"mode": "0644"}, "has mode 0644, owner mrcore"),
        ({"owner": "root"}, "has mode 0600, owner root"),
    ],
)
def test_doctor_judges_certificates(changed: dict[str, Any], said: str) -> None:
    (found,) = judged(healthy(certificates=[healthy()["certificates"][0] | changed]))
    assert said in found


def test_doctor_tells_a_changed_host_key_from_other_trouble() -> None:
    away = {"name": "w2", "address": "10.0.0.22", "status": 255, "errors": "ssh: connect: Connection refused"}
    other = away | {"errors": "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed."}
    assert judged(healthy(ssh=[away | {"status": 0}])) == []
    found = [doctor.findings(CLUSTER, {"m1": {"facts": healthy(ssh=[each])}}, "prod")[0] for each in (away, other)]
    assert [("intrusion" in each["do"], "w2" in each["what"]) for each in found] == [(False, True), (True, True)]


def test_a_silent_node_is_told_of_once() -> None:
    away = {"name": "w1", "address": "10.0.0.21", "status": 255, "errors": "ssh: no route"}
    results = {"m1": {"facts": healthy(ssh=[away])}, "w1": {"unreachable": True, "msg": "no route"}}
    (found,) = doctor.findings(CLUSTER, results, "prod")
    assert found["where"] == "w1"


def test_doctor_tells_of_machines_that_do_not_answer_and_of_a_program_that_does_not_work() -> None:
    (found,) = doctor.findings(CLUSTER, {"w1": {"unreachable": True, "msg": "Failed:\nno route"}}, "prod")
    assert (found["where"], found["what"]) == ("w1", "does not answer: no route")
    assert doctor.masters_view({"unreachable": True, "msg": "no route"}, "m1") == []
    row = {"where": "w1", "what": "a", "means": "b", "do": "c"}
    assert doctor.masters_view({"stdout": json.dumps([row]), "rc": 1}, "m1") == [row]
    assert doctor.masters_view({"stdout": json.dumps({"findings": [row]}), "rc": 1}, "m1") == [row]
    (found,) = doctor.masters_view({"stdout": "", "stderr": "Traceback\nImportError: no rpyc", "rc": 1}, "m1")
    assert found["where"] == "m1" and "ImportError: no rpyc" in found["what"]


def test_what_a_machine_told_the_master_need_not_tell_again() -> None:
    def row(where: str, what: str) -> dict[str, str]:
        return {"where": where, "what": what, "means": "m", "do": "d"}

    local = [row("w1", "the clock is 90 seconds ahead of the controller's"), row("m1", "there is no backup yet")]
    view = [row("node w1", "its clock is 90 s ahead of the master's"), row("node w2", "its clock is 9 s behind"),
            row("master", "there was no backup yet"), row("server S_1", "does not answer: refused")]  # fmt: skip
    found = doctor.merged(local, view, "m1")
    assert [(each["where"], each["what"][:9]) for each in found[2:]] == [
        ("w2", "its clock"),
        ("server S_1", "does not "),
    ]


def test_the_report_says_each_finding_once() -> None:
    row = {"where": "w1", "what": "a", "means": "b", "do": "c"}
    assert doctor.report([row, dict(row), row | {"where": "w2"}]).splitlines() == [
        "w1: a", "  means: b", "  do:    c", "w2: a", "  means: b", "  do:    c"
    ]  # fmt: skip


def test_an_inventory_without_a_node_keeps_the_master_and_another_place_for_backups() -> None:
    host = {"cluster_ip": "10.0.0.1"}
    cluster = {
        "master": "m1",
        "nodes": ["w1", "w2"],
        "hosts": {"m1": host, "w1": host, "w2": host},
        "backup_copy_to": "w1",
    }
    left = day_two.without(cluster, "w1")
    assert (left["nodes"], list(left["hosts"]), left["backup_copy_to"]) == (["w2"], ["m1", "w2"], "w2")
    assert day_two.without(cluster, "w2")["backup_copy_to"] == "w1" and cluster["nodes"] == ["w1", "w2"]
    both = {"master": "w1", "nodes": ["w1", "w2"], "hosts": {"w1": host, "w2": host}, "backup_copy_to": "w2"}
    assert list(day_two.without(both, "w1")["hosts"]) == ["w1", "w2"]
    assert day_two.without(both, "w2")["backup_copy_to"] == "w1"


def test_what_a_node_holds_is_told_in_a_phrase() -> None:
    kinds = {
        "input": {"files": 2, "bytes": 30},
        "output": {"files": 1, "bytes": 9},
        "auxiliary": {"files": 0, "bytes": 0},
    }
    told = {"kinds": kinds, "jobs": [{"job_name": "count"}], "cannot_move": ["a link"], "elsewhere": []}
    assert day_two.holdings(told) == (
        "2 files of input (30 bytes); 1 files of output (9 bytes); output of the jobs count; "
        "what cannot be moved: a link"
    )
    assert day_two.holdings({"kinds": {"input": {"files": 0, "bytes": 0}}}) == day_two.holdings({}) == ""


def test_a_failed_task_is_told_by_what_its_program_said_last() -> None:
    assert day_two.said({"stderr": "a\nb  c\n", "msg": "non-zero"}) == "b c"
    assert day_two.said({"stderr": "", "stdout": "", "msg": "non-zero"}) == "non-zero"
    assert day_two.said({}) == "no reason given"


def test_the_newest_releases_stay_and_those_in_use_in_any_case() -> None:
    rows = [{"path": f"/opt/mrcore/releases/{name}", "mtime": age} for name, age in (("a", 1), ("b", 2), ("c", 3))]
    assert day_two.superfluous(rows, "c", "b") == ["a"]
    assert day_two.superfluous(rows, "a", "b") == ["c"]
    assert day_two.superfluous(rows, "a", None) == ["b"]
    assert day_two.superfluous(rows[:1], "a", "gone") == []


# ---- the module that looks, on this machine


@pytest.fixture(scope="module")
def inspect() -> Any:
    sys.modules.setdefault("ansible.module_utils.basic", types.SimpleNamespace(AnsibleModule=None))  # type: ignore[arg-type]
    return load("library/mrcore_inspect.py")


def test_a_certificate_is_judged_as_a_daemon_would(inspect: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        pki.make_authority(folder, "c")
        serial = pki.issue(folder, folder, "node", "w1", "node", ["10.0.0.1"])
    seen = inspect.certificate(str(second / "node"))
    assert (seen["fault"], seen["mode"], seen["serial"]) == (None, "0600", serial)
    assert seen["expires"] - time.time() > 3600 * 86_400
    shutil.copy(first / "ca.crt", second)
    assert "certificate" in inspect.certificate(str(second / "node"))["fault"]
    shutil.copy(first / "node.key", second)
    assert "mismatch" in inspect.certificate(str(second / "node"))["fault"].lower()
    (second / "node.key").unlink()
    assert "expires" not in inspect.certificate(str(second / "node"))


def test_commands_that_are_missing_or_hang_are_told_and_bounded(inspect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert inspect.run("no-such-command-here")[0] == 127
    monkeypatch.setattr(inspect, "SECONDS", 0.2)
    assert inspect.run("sleep", "5")[0] == 124
    assert inspect.disk("/no/such/folder") is None and inspect.disk("/")["bytes"] > 0
