"""What jobs run in cannot gain rights, cannot fill the disk by printing, and is closed to other accounts."""

from __future__ import annotations

from typing import Any

import pytest
from harness import Machine, Person, wait_until
from lab import HERE

COMPUTE = "/var/lib/mrcore/compute"
LOG_BYTES = 32 << 20


def job(name: str, function: str, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"job_name": name, "job_type": "mapreduce", "project_name": "looking", "run_once": True}
    return found | {"input_dirs": [folder], "map_function_name": function}


@pytest.fixture(scope="module", autouse=True)
def project(anna: Person) -> None:
    anna.bring(HERE / "projects/looking", "/srv/mrcore/projects")


def test_daemons_and_all_that_they_started_gain_no_rights(m1: Machine, w1: Machine) -> None:
    """The agent, each server with its screen and its window, and the Runner."""
    for machine in (m1, w1):
        told = machine.text("grep -sHE '^(PPid|NoNewPrivs):' /proc/[0-9]*/status; true")
        facts: dict[str, dict[str, str]] = {}
        for line in told.splitlines():
            path, name, value = line.split(":")
            facts.setdefault(path.split("/")[2], {})[name] = value.strip()
        for unit, main in machine.pids().items():
            family = {main}
            while more := {pid for pid, each in facts.items() if each.get("PPid") in family} - family:
                family |= more
            assert {facts[pid]["NoNewPrivs"] for pid in family if pid in facts} == {"1"}, (unit, family)
            assert len(family) >= (4 if "server" in unit else 1), (unit, family)


def test_tasks_gain_no_rights(anna: Person, w1: Machine) -> None:
    w1.write("/var/tmp/confined/text", "here\n")
    anna.submit(job("confined", "confined", "/var/tmp/confined"))
    anna.finished("confined")
    assert ["NoNewPrivs:", "1"] in anna.items("confined")


def test_scripts_gain_no_rights(anna: Person) -> None:
    anna.write("/var/tmp/confined.py", "print(open('/proc/self/status').read())\n")
    script = {"job_name": "confined_script", "job_type": "script", "script_location": "/var/tmp/confined.py"}
    anna.submit(script | {"run_once": True})
    anna.finished("confined_script")
    assert "NoNewPrivs:\t1" in anna.mrcore("logs", "confined_script").stdout


def test_a_function_that_floods_its_window_fills_no_disk(anna: Person, w1: Machine) -> None:
    w1.write("/var/tmp/flood/text", "here\n")
    anna.submit(job("flood", "flood", "/var/tmp/flood"))
    anna.finished("flood", seconds=300)

    def told() -> bool:
        return any("after the flood" in anna.mrcore("logs", name).stdout for name in w1.servers())

    wait_until(told, 60, "the last line is in a log")
    for name in w1.servers():
        taken = w1.text(f"cat {COMPUTE}/logs/{name}.log* | wc -c")
        assert int(taken) <= LOG_BYTES, (name, taken)
    assert "bytes left out" in w1.text(f"cat {COMPUTE}/logs/S_*.log* | grep -a 'left out'")


CLOSED = {
    "w1": [COMPUTE, f"{COMPUTE}/logs", f"{COMPUTE}/cluster"],
    "m1": ["/var/lib/mrcore/state", "/var/lib/mrcore/backups", "/var/log/mrcore"],
}


def test_data_logs_and_queue_are_closed_to_other_accounts(m1: Machine, w1: Machine) -> None:
    for machine, users in ((w1, ["nobody"]), (m1, ["nobody", "zoe", "anna"])):
        for folder in CLOSED[machine.name]:
            assert machine.run(f"test -d {folder}").status == 0, folder
            for user in users:
                assert machine.run(f"ls {folder}", user=user, status=None).status != 0, (user, folder)
