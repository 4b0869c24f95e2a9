"""The embedded cluster as its user meets it: start, stop, kill, again and again; whatever was killed before."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from by_name import ByName
from conditions import wait_until
from daemons import living, own_address
from signals import kill

from mrcore.errors import ClusterFault, MrcoreError, Unreachable, UsageError
from mrcore.launchers import local
from mrcore.queue.job import template as job_template
from mrcore.settings.config import NodeSettings, Settings
from mrcore.state import manifest
from mrcore.system import procfs
from mrcore.wire.client import Client
from mrcore.wire.tls import Pki


def ours(home: Path) -> list[int]:
    """Every living process that was executed, or inherited its environment, as part of this home's cluster."""
    mark = local.cluster_id(home) + "/"
    found = [
        (pid, procfs.environment_value(pid, "MRCORE_SERVER") or "") for pids in procfs.family().values() for pid in pids
    ]
    return [pid for pid, value in found if value.startswith(mark) and living(pid)]


def newcomers(home: Path, seconds: float = 0.15) -> list[int]:
    """Processes of this home that are born within `seconds`: a walk over /proc runs after what forks on and on."""
    mark, found, end = local.cluster_id(home) + "/", [], time.monotonic() + seconds
    seen = newest = procfs.newest_pid()
    while time.monotonic() < end:
        seen, newest = newest, procfs.newest_pid()
        found += [
            pid for pid in range(seen, newest + 1) if procfs.environment_value(pid, "MRCORE_SERVER").startswith(mark)
        ]
    return found


def assert_nothing_left(settings: Settings) -> None:
    assert not ours(settings.home)
    assert not newcomers(settings.home)
    for node in settings.nodes:
        assert not list(node.layout.pids_dir.iterdir()) and not list(node.layout.working_dir.iterdir())
        for port in [node.agent_port, *range(node.server_port, node.server_port + node.servers)]:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((node.address, port))


def master_client(settings: Settings, node: NodeSettings, port: int) -> contextlib.closing[Client]:
    return contextlib.closing(ByName(node.address, port, Pki(settings.pki_dir, "master"), node.name))


def hello(settings: Settings, number: int = 0) -> Any:
    server = settings.servers()[number]
    with master_client(settings, server.node, server.port) as client:
        return client.call("hello", timeout_seconds=5)


@pytest.fixture
def settings(home: Path) -> Iterator[Settings]:
    """A cluster of 2 nodes × 2 servers, not started."""
    configured = local.configure(home, nodes=2, servers=2, address=own_address(), memory_bytes=512 << 20)
    own_address()  # the second node's
    yield configured
    local.kill_cluster(configured)
    assert not ours(home)


Ender = Callable[[Settings], int]
enders = pytest.mark.parametrize("end", [local.stop_cluster, local.kill_cluster])


def test_settings_know_the_configured_shape(settings: Settings) -> None:
    assert settings.local and [node.servers for node in settings.nodes] == [2, 2]
    assert (settings.home / "cluster.json").exists()
    assert [row["state"] for row in local.status(settings)] == ["absent"] * 6


@enders
def test_start_answers_and_the_end_leaves_nothing_and_both_can_be_repeated(settings: Settings, end: Ender) -> None:
    for _ in range(2):
        rows = local.start_cluster(settings)
        assert [row["name"] for row in rows] == ["agent", "agent", "S_0", "S_1", "S_2", "S_3"]
        assert {row["state"] for row in rows} == {"running"} and all(row["pid"] for row in rows)
        assert [hello(settings, number)["name"] for number in range(4)] == ["S_0", "S_1", "S_2", "S_3"]
        before = ours(settings.home)
        assert local.start_cluster(settings) == rows and ours(settings.home) == before
        for node in settings.nodes:
            (node.layout.run_dir("job", 1) / "1").mkdir(parents=True)
        assert end(settings) == 6
        assert_nothing_left(settings)
        assert end(settings) == 0
        assert_nothing_left(settings)


@enders
def test_a_committed_run_keeps_its_working_files_until_it_is_published(settings: Settings, end: Ender) -> None:
    """A node may have been away when the others gave their parts their places; the next Runner sees to it."""
    local.start_cluster(settings)
    manifest.write(settings.state_dir, manifest.Manifest("wc", 3))
    for node in settings.nodes:
        for job, run in (("wc", 2), ("wc", 3), ("other", 3)):
            node.layout.parts_dir(job, run).mkdir(parents=True)
    end(settings)
    for node in settings.nodes:
        left = {str(path.relative_to(node.layout.working_dir)) for path in node.layout.working_dir.rglob("*")}
        assert left == {"wc", "wc/3", "wc/3/parts"}


def test_every_node_has_its_own_certificate_and_folder_and_a_minimal_environment(settings: Settings) -> None:
    rows = local.start_cluster(settings)
    keys = [(node.layout.pki_dir / "node.key").read_bytes() for node in settings.nodes]
    assert keys[0] != keys[1]
    for row in rows:
        folder = str(settings.home / "nodes" / row["address"])
        assert os.readlink(f"/proc/{row['pid']}/cwd") == folder
        environment = Path(f"/proc/{row['pid']}/environ").read_bytes()
        assert b"PYTEST" not in environment and b"MRCORE_HOME" not in environment
        spec = json.loads(Path(folder, f"{row['name']}.json").read_text())
        assert all(spec[key].startswith(folder) for key in ("compute_dir", "pki_dir"))
        assert spec["memory_bytes"] == 128 << 20


def test_only_what_is_missing_is_started_again(settings: Settings) -> None:
    rows = {(row["node"], row["name"]): row["pid"] for row in local.start_cluster(settings)}
    victims = [("node-0", "agent"), ("node-1", "S_2")]
    for victim in victims:
        os.kill(rows[victim], signal.SIGKILL)
    wait_until(lambda: [row["state"] for row in local.status(settings)].count("absent") == 2)
    again = {(row["node"], row["name"]): row["pid"] for row in local.start_cluster(settings)}
    for key, pid in rows.items():
        assert (again[key] == pid) == (key not in victims)
    assert hello(settings, 2)["name"] == "S_2"


def test_another_shape_while_running_is_refused_and_after_a_stop_taken(settings: Settings) -> None:
    local.start_cluster(settings)
    with pytest.raises(UsageError, match=r"nodes 1.*cluster stop"):
        local.configure(settings.home, nodes=1)
    assert len(local.configure(settings.home, nodes=2).nodes) == 2
    local.stop_cluster(settings)
    assert len(local.configure(settings.home, nodes=1).nodes) == 1
    with pytest.raises(UsageError, match="nodes"):
        local.configure(settings.home, nodes=251)
    assert len(local.configure(settings.home).nodes) == 1


def test_nodes_that_change_their_names_get_new_certificates(settings: Settings) -> None:
    local.start_cluster(settings)
    local.stop_cluster(settings)
    moved = local.configure(settings.home, nodes=1, servers=1, address=settings.nodes[1].address)
    assert moved.nodes[0].name == "node-0" and moved.nodes[0].compute_dir == settings.nodes[1].compute_dir
    local.start_cluster(moved)
    assert hello(moved)["name"] == "S_0"
    local.stop_cluster(moved)


def test_a_port_in_use_is_named_and_nothing_stays_started(settings: Settings) -> None:
    node = settings.nodes[1]
    with socket.create_server((node.address, node.server_port + 1)):
        with pytest.raises(
            UsageError, match=rf"S_3 on node-1, {node.address}:{node.server_port + 1}.*in use.*--server-port"
        ):
            local.start_cluster(settings)
        assert not ours(settings.home)
    local.start_cluster(settings)


def test_a_daemon_that_fails_to_start_shows_its_log_and_all_is_ended(settings: Settings) -> None:
    local.start_cluster(settings)
    local.stop_cluster(settings)
    key = settings.nodes[1].layout.pki_dir / "node.key"
    content = key.read_bytes()
    key.write_bytes(b"damaged")
    with pytest.raises(ClusterFault, match=r"on node-1, .*ended at once; the end of .*logs/(?s:.*)node\.key"):
        local.start_cluster(settings)
    assert_nothing_left(settings)
    key.write_bytes(content)
    local.start_cluster(settings)


STUBBORN = """
import os, signal, sys, time

DETACHED = '''
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), file=open(sys.argv[1], "a"), flush=True)
time.sleep(999)
'''


def note():
    with open(PIDS, "a") as stream:
        print(os.getpid(), file=stream)


def endless(line, auxiliary_data):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        note()
        time.sleep(999)
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.execve(sys.executable, [sys.executable, "-c", DETACHED, PIDS], {})
    while open(PIDS).read().count(chr(10)) < 2:
        time.sleep(0.01)
    if os.fork() == 0:
        end = time.monotonic() + 60  # should the test be killed, nobody else ends it
        while time.monotonic() < end:  # a daemon that is never the same process for long
            os.setsid()
            if os.fork():
                os._exit(0)
        os._exit(0)
    note()
    while True:
        pass
"""


def start_stubborn(settings: Settings, file: Path) -> list[int]:
    """Run a job on S_0 whose map ignores SIGTERM, spins, and leaves children behind; gives all their pids."""
    file.touch()
    project = settings.nodes[0].layout.projects_dir / ("a" * 32)
    project.mkdir(parents=True, exist_ok=True)
    (project / "map_functions.py").write_text(f"PIDS = {str(file)!r}\n" + STUBBORN)
    data = settings.nodes[0].layout.base_dir / "input"
    data.write_text("a line\n")
    found = data.stat()
    template = job_template("mapreduce")
    template |= {"job_name": "endless", "project_name": "p", "map_function_name": "endless", "input_dirs": ["input"]}
    identity = {"job": "endless", "run": 1, "phase": "MAP", "task": 0, "try": 1}
    piece = [str(data), 0, found.st_size, found.st_size, found.st_mtime_ns, found.st_ino]
    order = {"identity": identity, "job": template, "project": "a" * 32, "partitions": 2, "node": "node-0"}
    order |= {"bundles": [{"id": 0, "pieces": [piece]}], "sources": [], "sample_by_lines": False}
    server = settings.servers()[0]
    with master_client(settings, server.node, server.port) as client:
        client.call("order", order=order)
        incarnation = client.call("hello")["incarnation"]

        def started() -> bool:
            for _, event in client.call("poll", incarnation=incarnation, after=0, wait_seconds=0.05)["events"]:
                assert event["event"] not in ("failed", "died"), event
            return len(file.read_text().split()) == 3

        wait_until(started, 15, "the stubborn task")
    return [int(word) for word in file.read_text().split()]


@enders
@pytest.mark.parametrize(
    "before", ["nothing", "supervisor stopped", "child stopped", "supervisor killed", "records gone"]
)
def test_the_end_is_certain_whatever_the_task_does(settings: Settings, tmp_path: Path, end: Ender, before: str) -> None:
    rows = local.start_cluster(settings)
    pids = start_stubborn(settings, tmp_path / "pids")
    supervisor = next(row["pid"] for row in rows if row["name"] == "S_0")
    if before == "supervisor stopped":
        os.kill(supervisor, signal.SIGSTOP)
        wait_until(lambda: "stopped" in [row["state"] for row in local.status(settings) if row["name"] == "S_0"])
    elif before == "child stopped":
        os.kill(hello(settings)["pid"], signal.SIGSTOP)
    elif before == "supervisor killed":
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: not living(pids[-1]))
    elif before == "records gone":
        for record in settings.home.glob("nodes/*/pids/*"):
            record.unlink()
    end(settings)
    gone = [pid for pid in pids if not living(pid)]
    detached = [pid for pid in pids if living(pid)]
    try:
        assert_nothing_left(settings)
        if before not in ("supervisor killed", "records gone"):
            assert len(gone) == len(pids)
    finally:
        for pid in detached:
            kill(pid)


def test_the_agent_ends_a_stopped_server_which_then_answers_again(settings: Settings) -> None:
    local.start_cluster(settings)
    server = settings.servers()[3]
    pid = hello(settings, 3)["pid"]
    os.kill(pid, signal.SIGSTOP)
    with master_client(settings, server.node, server.node.agent_port) as agent:
        assert agent.call("end_server", name="S_3") is True
        assert agent.call("end_server", name="S_77") is False

    def answers() -> bool:
        try:
            return bool(hello(settings, 3)["pid"] != pid)
        except Unreachable:
            return False

    wait_until(answers)
    supervisor = next(row["pid"] for row in local.status(settings) if row["name"] == "S_3")
    os.kill(supervisor, signal.SIGSTOP)
    pid = hello(settings, 3)["pid"]
    with master_client(settings, server.node, server.node.agent_port) as agent:
        assert agent.call("end_server", name="S_3") is True
    wait_until(answers)


def test_a_process_id_used_again_is_left_alone(settings: Settings) -> None:
    local.start_cluster(settings)
    local.stop_cluster(settings)
    record = settings.nodes[0].layout.pids_dir / "S_0.json"
    for known in (
        {"pid": os.getpid(), "start_ticks": procfs.start_ticks(os.getpid())},  # not ours by its environment
        {"pid": os.getpid(), "start_ticks": 1},
        {"pid": 4_000_000, "start_ticks": 1},
    ):
        record.write_text(json.dumps(known))
        assert local.stop_cluster(settings) == 0 and local.kill_cluster(settings) == 0
    record.write_text("{")
    assert local.stop_cluster(settings) == 0


def test_many_starts_at_once_start_one_cluster(settings: Settings) -> None:
    results: list[Any] = []

    def start() -> None:
        try:
            results.append(local.start_cluster(settings))
        except MrcoreError as error:
            results.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result == results[0] for result in results), results
    assert len(ours(settings.home)) == 2 + 4 * 2
