"""The deployed cluster's launcher over real SSH: sshd, host keys, TLS and daemons are real, systemd is not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import standin_units
from click.testing import CliRunner
from conditions import wait_until
from ssh_nodes import DeployedCluster, Node, keygen

from mrcore import WIRE_VERSION
from mrcore.cli.main import main
from mrcore.errors import ClusterFault, UsageError
from mrcore.launchers import health, ssh
from mrcore.settings.config import load_settings
from mrcore.state import manifest
from mrcore.system import procfs

pytestmark = pytest.mark.needs_sshd

HELPER = (sys.executable, str(Path(standin_units.__file__)))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "HELPER", HELPER)


@pytest.fixture
def deployed(tmp_path: Path) -> Iterator[DeployedCluster]:
    made = DeployedCluster(tmp_path, 2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeployedCluster]:
    """For tests that leave it as it is: running, two nodes with two servers each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssh, "HELPER", HELPER)
        made = DeployedCluster(tmp_path_factory.mktemp("deployed"), 2)
        ssh.start_cluster(made.settings)
    yield made
    made.close()


def call(cluster: DeployedCluster, *arguments: str) -> Any:
    """A command as a person types it."""
    return CliRunner().invoke(whole, ["--config", str(cluster.config), *arguments])


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def whole(arguments: tuple[str, ...]) -> None:
    """`main` with its exit statuses, for click's runner."""
    main(list(arguments))


def states(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {f"{row['name']}@{row['node']}": row["state"] for row in rows}


ALL = ["agent@w1", "agent@w2", "S_0@w1", "S_1@w1", "S_10@w2", "S_11@w2"]


@pytest.mark.slow
def test_start_stop_kill_and_status_may_be_repeated(deployed: DeployedCluster) -> None:
    settings = deployed.settings
    assert states(ssh.status(settings)) == dict.fromkeys(ALL, "absent")
    first = ssh.start_cluster(settings)
    assert states(first) == dict.fromkeys(ALL, "running")
    assert ssh.start_cluster(settings) == first, "the same processes"
    for row in first:
        assert procfs.environment_value(row["pid"], "MRCORE_SERVER").endswith("/" + row["name"])
    for node in deployed.nodes:
        (node.compute_dir / "working/job one/7/1").mkdir(parents=True)
    assert ssh.stop_cluster(settings) == 6
    assert ssh.stop_cluster(settings) == 0
    assert states(ssh.status(settings)) == dict.fromkeys(ALL, "absent")
    assert not any(node.daemons() or list((node.compute_dir / "working").iterdir()) for node in deployed.nodes)
    ssh.start_cluster(settings)
    assert ssh.kill_cluster(settings) == 6
    assert ssh.kill_cluster(settings) == 0
    assert not any(node.daemons() for node in deployed.nodes)


def test_what_has_committed_keeps_its_working_files(deployed: DeployedCluster) -> None:
    """Its parts may not have got their places yet, on a node that was away when the others got theirs."""
    manifest.write(deployed.settings.state_dir, manifest.Manifest("wc", 3))
    for node in deployed.nodes:
        for run in ("wc/2", "wc/3/1/parts", "other/3"):
            (node.compute_dir / "working" / run).mkdir(parents=True)
    ssh.kill_cluster(deployed.settings)
    for node in deployed.nodes:
        folder = node.compute_dir / "working"
        assert {str(path.relative_to(folder)) for path in folder.rglob("*")} == {"wc", "wc/3", "wc/3/1", "wc/3/1/parts"}


def test_a_frozen_daemon_shows(running: DeployedCluster) -> None:
    (row,) = [row for row in ssh.status(running.settings) if row["name"] == "S_10"]
    child = next(iter(procfs.children(row["pid"])))
    os.kill(child, signal.SIGSTOP)
    try:
        wait_until(lambda: procfs.state(child) == "T")
        assert states(ssh.status(running.settings)) == dict.fromkeys(ALL, "running") | {"S_10@w2": "stopped"}
    finally:
        os.kill(child, signal.SIGCONT)


def refused(node: Node) -> Iterator[str]:
    node.stop_sshd()
    yield rf"SSH at {node.address}:{node.ssh_port}: .*refused: is the machine up, and does its sshd listen there"


def silent(node: Node) -> Iterator[str]:
    node.stop_sshd()
    with socket.create_server((node.address, node.ssh_port)):
        yield "gave no answer within 2 s: is the machine up and reachable"


def changed_host_key(node: Node) -> Iterator[str]:
    node.stop_sshd()
    keygen(node.folder / "host_key")
    node.start_sshd()
    yield r"its SSH host key has changed: it shows ssh-ed25519 SHA256:\S+, known is ssh-ed25519 SHA256:\S+\. Nothing"


def unknown_host_key(node: Node) -> Iterator[str]:
    file = node.folder.parent / "master/.ssh/known_hosts"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if node.address not in line))
    yield r"its SSH host key \(ssh-ed25519 SHA256:\S+\) is not among the known ones.*nothing was sent.*`make deploy`"


def key_not_authorised(node: Node) -> Iterator[str]:
    (node.folder / "authorized_keys").write_text("")
    yield "does not accept the master's key .*id_ed25519 for user .*: `make deploy` authorises it"


def helper_fails(text: str, said: str) -> Any:
    def fault(node: Node) -> Iterator[str]:
        script = node.folder.parent / "helper"
        script.write_text(
            f'#!/bin/sh\nif [ "$NODE_FOLDER" = {node.folder} ]; then echo "{text}" >&2; exit 1; fi\n'
            f"exec {' '.join(HELPER)} $*\n"
        )
        script.chmod(0o755)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ssh, "HELPER", (str(script),))
            yield said

    fault.__name__ = text.replace(" ", "_")
    return fault


FAULTS = [
    refused,
    silent,
    changed_host_key,
    unknown_host_key,
    key_not_authorised,
    helper_fails("sudo: a password is required", "sudo refuses .* to the cluster's user: `make deploy`"),
    helper_fails("Sorry, user x is not allowed to execute", "sudo refuses `"),
    helper_fails("sudo: /opt/mrcore/bin/units: command not found", "it has no .*: `make deploy` installs it"),
    helper_fails("units: something else", "ended with status 1: units: something else"),
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda each: each.__name__)
def test_a_node_that_fails_is_named_with_the_cause_and_the_others_go_on(
    fault: Any, deployed: DeployedCluster, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ssh, "CONNECT_SECONDS", 2)
    with contextlib.contextmanager(fault)(deployed.nodes[0]) as said:
        with pytest.raises(ClusterFault, match=f"^start failed on 1 of 2 nodes: w1: .*{said}") as caught:
            ssh.start_cluster(deployed.settings)
        assert "\n" not in caught.value.message and set(caught.value.details["nodes"]) == {"w1"}
        rows = ssh.status(deployed.settings)
        told = states(rows)
        assert {told[name] for name in ALL if name.endswith("w1")} == {"unreachable"}
        assert {told[name] for name in ALL if name.endswith("w2")} == {"running"}
        assert all(("reason" in row) == (row["node"] == "w1") for row in rows)
        with pytest.raises(ClusterFault, match=r"^kill failed on 1 of 2 nodes: w1: "):
            ssh.kill_cluster(deployed.settings)
        assert not deployed.nodes[1].daemons()
    asked = deployed.nodes[0].folder / "asked"
    assert fault is silent or not asked.exists() or "start" not in asked.read_text()
    assert capfd.readouterr().err == "", "no library prints beside it"


def test_all_failed_nodes_are_in_one_error(deployed: DeployedCluster) -> None:
    for node in deployed.nodes:
        node.stop_sshd()
    with pytest.raises(ClusterFault, match=r"(?s)^stop failed on 2 of 2 nodes: \n  w1: .*\n  w2: "):
        ssh.stop_cluster(deployed.settings)


def test_a_command_that_hangs_ends(running: DeployedCluster) -> None:
    with pytest.raises(ClusterFault, match=r"w1: `sleep 60` did not end within 1 s"):
        ssh.run_on_node(running.settings, "w1", "sleep 60", 1)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.9, "the connection broke during"), (1.0, "did not end within 1 s"), (9, "did not end")]
)
def test_a_channel_that_the_timer_closed_is_no_broken_connection(
    monkeypatch: pytest.MonkeyPatch, seconds: float, said: str
) -> None:
    now = 0.0

    class Busy:
        def run(self, command: str, **options: object) -> SimpleNamespace:
            nonlocal now
            now += seconds
            return SimpleNamespace(exited=-1, stdout="", stderr="")

    monkeypatch.setattr("time.monotonic", lambda: now)
    with pytest.raises(ClusterFault, match=said):
        ssh._try(Busy(), "sleep 60", 1)  # type: ignore[arg-type]


def test_a_daemon_that_does_not_come_up_is_told_with_the_end_of_its_log(
    deployed: DeployedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "READY_SECONDS", 4.0)
    (deployed.nodes[1].folder / "members.json").write_text("{")
    said = (
        r"(?s)start failed on 1 of 2 nodes: w2: agent does not answer: .*the end of .*agent.log:\n"
        r".*the members file .* is no JSON.*S_10 does not answer"
    )
    with pytest.raises(ClusterFault, match=said):
        ssh.start_cluster(deployed.settings)


def test_another_release_is_told_at_once(running: DeployedCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "RELEASE", "1.0.0-0badcafe")
    found = health.check(running.settings, running.settings.nodes[:1], 60)
    assert [fault.daemon for fault in found["w1"]] == ["agent", "S_0", "S_1"]
    wire = f"(wire {WIRE_VERSION})"
    assert f"runs mrcore 1.0.0 {wire}, not 1.0.0-0badcafe {wire} as here" in found["w1"][0].text


def test_nodes_are_asked_in_batches(running: DeployedCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "NODES_AT_ONCE", 1)
    at_once, most, lock, real = 0, 0, threading.Lock(), ssh._look

    def look(*arguments: Any) -> Any:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        try:
            return real(*arguments)
        finally:
            with lock:
                at_once -= 1

    monkeypatch.setattr(ssh, "_look", look)
    assert len(ssh.status(running.settings)) == 6 and most == 1


def test_off_the_master_it_says_who_may(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text(
        f"{{home: {tmp_path}, user: mrcore, nodes: [{{name: a, address: 127.0.0.1, servers: 1, compute_dir: /c}}]}}"
    )
    settings = load_settings(tmp_path / "c.yml")
    for action in (ssh.start_cluster, ssh.stop_cluster, ssh.status):
        with pytest.raises(UsageError, match=r"cannot read .*id_ed25519: No such file.* on its master, as user mrcore"):
            action(settings)


# ---- the commands


def test_logs_of_daemons_on_nodes(running: DeployedCluster) -> None:
    log = running.nodes[1].compute_dir / "logs/S_11.log"
    with log.open("ab") as stream:
        stream.write("eins\nzwei – ".encode() + b"\xff" + b"\ndrei\n")
    assert ssh.read_log(running.settings, "w2", "S_11", 2) == "zwei – \ufffd\ndrei\n".encode()
    done = call(running, "logs", "S_11", "--lines", "1")
    assert (done.output, done.exit_code) == ("drei\n", 0)
    listed = call(running, "logs").output
    assert f"w2:{log}" in listed and f"w1:{running.nodes[0].compute_dir}/logs/agent.log" in listed
    (running.nodes[0].compute_dir / "logs/agent.log").write_text("of the agent\n")
    assert call(running, "logs", "agent@w1").output == "of the agent\n"
    wrong = call(running, "logs", "S_99")
    assert wrong.exit_code == 2 and "there is no log of 'S_99'; known: S_0, S_1, S_10, S_11, agent@NODE" in wrong.output


def test_status_tells_what_it_could_not_ask(running: DeployedCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    good = call(running, "cluster", "status", "--json")
    assert good.exit_code == 0 and len(json.loads(good.stdout)) == 6
    running.nodes[0].stop_sshd()
    try:
        bad = call(running, "cluster", "status")
        assert bad.exit_code == 1 and "no answer from 1 of 2 nodes:\n  w1: SSH at" in bad.stderr
        assert "REASON" not in bad.stdout and bad.stdout.count("unreachable") == 3
    finally:
        running.nodes[0].start_sshd()


def test_check_is_a_gate(running: DeployedCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    good = call(running, "cluster", "check")
    assert (good.exit_code, good.stdout) == (0, "all daemons of w1, w2 answer\n")
    monkeypatch.setattr(health, "RELEASE", "2.0")
    bad = call(running, "cluster", "check", "w2", "--wait", "5")
    assert bad.exit_code == 1 and [line[:8] for line in bad.stderr.splitlines()] == ["w2: agen", "w2: S_10", "w2: S_11"]
    wrong = call(running, "cluster", "check", "w9")
    assert wrong.exit_code == 2 and "there is no node 'w9'; there are w1, w2" in wrong.stderr


def test_attach_goes_where_the_window_is(running: DeployedCluster) -> None:
    """The command itself is run, with another program than screen at its end: sshd, keys and terminal are real."""
    command = ssh.attach_command(running.settings, "S_10")
    assert command[-1] == "SCREENDIR=/run/mrcore-S_10 exec screen -U -x S_10" and command[-2].endswith(
        running.nodes[1].address
    )
    said = subprocess.run([*command[:-1], "echo $NODE_FOLDER; tty"], capture_output=True, text=True, timeout=20)
    assert said.stdout.split() == [str(running.nodes[1].folder), "not", "a", "tty"], said.stderr
    (running.home / ".ssh/known_hosts").rename(running.home / "aside")
    try:
        (running.home / ".ssh/known_hosts").touch()
        unknown = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert unknown.returncode == 255 and "Host key verification failed" in unknown.stderr
    finally:
        (running.home / "aside").rename(running.home / ".ssh/known_hosts")
    with pytest.raises(UsageError, match="no cluster server 'S_2'; there are S_0, S_1, S_10, S_11"):
        ssh.attach_command(running.settings, "S_2")


def test_a_local_cluster_has_no_windows(home: Path) -> None:
    done = CliRunner().invoke(whole, ["attach", "S_0"])
    assert done.exit_code == 2 and "have no windows: `mrcore logs S_0`" in done.stderr


def test_a_file_is_copied_whole_or_not_at_all(running: DeployedCluster, tmp_path: Path) -> None:
    source, folder = tmp_path / "backup-1", running.nodes[0].compute_dir / "back ups"
    source.write_bytes(os.urandom(3 << 20))
    target = ssh.copy_file(running.settings, "w1", source, folder)
    assert target == folder / "backup-1" and target.read_bytes() == source.read_bytes()
    assert (folder.stat().st_mode & 0o777, target.stat().st_mode & 0o777) == (0o700, 0o600)
    source.write_bytes(b"newer")
    assert ssh.copy_file(running.settings, "w1", source, folder).read_bytes() == b"newer"
    assert [path.name for path in folder.iterdir()] == ["backup-1"]
    with pytest.raises(ClusterFault, match=r"w1: .*(mkdir|File exists|Not a directory)"):
        ssh.copy_file(running.settings, "w1", source, target)


def test_logs_of_nodes_are_searched_and_read_on(running: DeployedCluster) -> None:
    folder = running.nodes[1].compute_dir / "logs"
    assert ssh.read_on(running.settings, "w2", {"S_77": None}, 0) == {}
    (folder / "S_10.log.1").write_text("t j/1 map-0-1 | old\nt other/1 map-0-1 | no\n")
    (folder / "S_10.log").write_text("t j/1 map-0-1 | new\n")
    (folder / "S_11.log").write_text("t j/1 map-1-1 | else\nt j/12 map-1-1 | no\n")
    found = ssh.find_in_logs(running.settings, "w2", " j/1 ", 10)
    assert [line.rpartition(b" ")[2] for line in found] == [b"old\n", b"new\n", b"else\n"]
    assert ssh.find_in_logs(running.settings, "w2", " nobody/1 ", 10) == []
    grown = ssh.read_on(running.settings, "w2", {"S_10": None, "S_11": None}, 5)
    assert [grown[name].data for name in ("S_10", "S_11")] == [b" new\n", b"| no\n"]
    with (folder / "S_10.log").open("ab") as log:
        log.write(b"\xff more\n")
    again = ssh.read_on(running.settings, "w2", {name: each.position for name, each in grown.items()}, 5)
    assert [again[name].data for name in ("S_10", "S_11")] == [b"\xff more\n", b""]
