"""The screen window of a server: what functions print is seen there, breakpoint() is usable; for members only."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from harness import Machine, Person, Terminal, wait_until
from lab import HERE


def job(name: str, function: str, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"job_name": name, "job_type": "mapreduce", "project_name": "looking", "run_once": True}
    return found | {"input_dirs": [folder], "map_function_name": function}


@pytest.fixture(scope="module", autouse=True)
def project(anna: Person) -> None:
    anna.bring(HERE / "projects/looking", "/srv/mrcore/projects")


def test_what_a_function_prints_is_seen_in_the_window_and_in_the_log(anna: Person, w1: Machine) -> None:
    w1.write("/var/tmp/look/text", "".join(f"line {n}\n" for n in range(15)))
    with contextlib.ExitStack() as stack:
        windows = [stack.enter_context(anna.terminal(f"mrcore attach {name}")) for name in w1.servers()]
        for window in windows:
            wait_until(lambda window=window: window.read(0.5) or window.shown, 30, "the window shows something")
        anna.submit(job("looking", "say", "/var/tmp/look"))
        wait_until(lambda: any("the function saw: line" in read(window) for window in windows), 60, "it is printed")
        for window in windows:
            window.type("\x01d")  # Ctrl-A d
            assert window.wait_for_end() == 0
    anna.finished("looking")
    logs = "".join(anna.mrcore("logs", name).stdout for name in w1.servers())
    assert "the function saw: line 14" in logs
    assert all(int(pid) > 0 for pid in w1.pids().values()), "leaving the window ends nothing"


def read(window: Terminal) -> str:
    window.read(0.2)
    return window.shown


def test_breakpoint_can_be_used_in_the_window(anna: Person, w1: Machine) -> None:
    w1.write("/var/tmp/stop/text", "here\n")
    with contextlib.ExitStack() as stack:
        windows = [stack.enter_context(anna.terminal(f"mrcore attach {name}")) for name in w1.servers()]
        anna.submit(job("stopping", "ask", "/var/tmp/stop"))
        wait_until(lambda: any("(Pdb)" in read(window) for window in windows), 60, "the debugger's prompt is shown")
        window = next(window for window in windows if "(Pdb)" in window.shown)
        window.type("p answer * 3\r")
        window.wait_for("60")
        window.type("answer = 77\r")
        window.type("c\r")
        anna.finished("stopping")
    assert anna.items("stopping") == [["here", 77]]


@pytest.mark.parametrize("words", [["attach", "S_0"], ["logs", "S_0"], ["queue"]])
def test_nobody_else_may_look(zoe: Person, words: list[str]) -> None:
    done = zoe.mrcore(*words, status=None)
    assert done.status != 0 and "mrcore-users" in done.output, done.output


@pytest.mark.parametrize("name", ["zoe", "anna"])
def test_keys_and_the_queue_are_closed_to_other_accounts(m1: Machine, name: str) -> None:
    for path in ("/etc/mrcore/pki/master.key", "/var/lib/mrcore/state/queue.sqlite", "/var/lib/mrcore/.ssh/id_ed25519"):
        assert m1.run(f"cat {path}", user=name, status=None).status != 0, path
        assert m1.run(f"test -s {path}").status == 0, path
    for command in ("sudo -n -u mrcore sh -c id", "sudo -n -u mrcore screen -ls", "sudo -n true"):
        assert m1.run(command, user=name, status=None).status != 0, command


def test_the_master_may_do_nothing_else_on_a_node(m1: Machine, w1: Machine) -> None:
    """Its key opens a shell of user mrcore, from the master's address alone; sudo lets it do four things."""
    ssh = "ssh -o BatchMode=yes -i /var/lib/mrcore/.ssh/id_ed25519"
    assert m1.run(f"{ssh} {w1.address} sudo -n /opt/mrcore/bin/units status", user="mrcore").stdout
    for command in ("/opt/mrcore/bin/units status ssh", "/opt/mrcore/bin/units restart", "systemctl stop ssh", "id"):
        assert m1.run(f"{ssh} {w1.address} sudo -n {command}", user="mrcore", status=None).status != 0, command
    key = m1.read("/var/lib/mrcore/.ssh/id_ed25519")
    other = Machine(w1.lab, "outsider")
    other.write("/root/key", key, "0600")
    try:
        attempt = f"ssh -o BatchMode=yes -o StrictHostKeyChecking=no -i /root/key mrcore@{w1.address} id"
        assert other.run(attempt, status=None).status == 255
    finally:
        other.run("rm /root/key")
