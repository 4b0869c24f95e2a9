"""Where settings come from, how faults are told, and the memory budget."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from deployed import DEPLOYED
from pydantic import ValidationError

from mrcore.errors import UsageError
from mrcore.settings.config import Settings, load_settings, server_memory_bytes
from mrcore.settings.validation import parse_yaml
from mrcore.system.procfs import machine_memory_bytes, oom_kills


def test_embedded_cluster_is_the_default(home: Path) -> None:
    settings = load_settings()
    assert settings.local
    assert (settings.home, settings.state_dir) == (home, home / "state")
    assert settings.projects_dir == Path.cwd() / "projects"
    assert [node.address for node in settings.nodes] == ["127.0.0.1"]
    assert [server.name for server in settings.servers()] == ["S_0", "S_1"]
    assert settings.nodes[0].layout.auxiliary_dir == home / "nodes" / "127.0.0.1" / "auxiliary"
    with pytest.raises(ValidationError, match="frozen"):
        settings.local = False  # type: ignore[misc]


def test_shape_comes_from_cluster_json(home: Path) -> None:
    shape = {"nodes": 3, "servers": 2, "address": "127.0.1.5", "agent_port": 1234, "memory_bytes": 6 << 30}
    (home / "cluster.json").write_text(json.dumps(shape))
    settings = load_settings()
    assert [node.address for node in settings.nodes] == ["127.0.1.5", "127.0.1.6", "127.0.1.7"]
    ports = [(server.name, server.node.name, server.port) for server in settings.servers()]
    assert ports[2:4] == [("S_2", "node-1", 23456), ("S_3", "node-1", 23457)]
    assert settings.nodes[0].agent_port == 1234
    assert server_memory_bytes(settings) == 1 << 30  # shared by all servers of all nodes of this machine


def test_precedence_and_deployed_cluster(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one.yml", tmp_path / "two.yml"
    one.write_text(DEPLOYED.format(home=tmp_path))
    two.write_text(f"home: {tmp_path / 'other'}\nnode_timeout_seconds: 3\n")
    monkeypatch.setenv("MRCORE_CONFIG", str(one))
    settings = load_settings()
    assert (settings.cluster_name, settings.local) == ("office", False)
    assert server_memory_bytes(settings.model_copy(update={"memory_bytes": 600 << 20}), settings.nodes[1]) == 200 << 20
    local = load_settings(two)
    assert (local.local, local.node_timeout_seconds, local.home) == (True, 3, tmp_path / "other")


def test_all_faults_at_once(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "c.yml"
    text = DEPLOYED.format(home=tmp_path).replace("servers: 2", "servrs: 2").replace("servers: 3", "servers: many")
    path.write_text(text + "cycle_intervall_seconds: 5\nmax_attempts: 0\n")
    with pytest.raises(UsageError) as caught:
        load_settings(path)
    text = str(caught.value)
    assert str(path) in text
    assert "unknown key 'cycle_intervall_seconds' (did you mean 'cycle_interval_seconds'?)" in text
    assert "unknown key 'nodes[0].servrs' (did you mean 'servers'?)" in text
    assert "'nodes[0].servers' is missing" in text
    assert "nodes[1].servers: input should be a valid integer, got 'many'" in text
    assert "max_attempts" in text
    assert len(caught.value.details["faults"]) == 5, caught.value.details["faults"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes: 0", "1 to 250"),
        ("nodes: 2\naddress: localhost", "no IPv4 address"),
        ("address: 10.0.0.5", "10.0.0.5 is no loopback address"),
        ("address: 0.0.0.0", "0.0.0.0 is no loopback address"),
        ("nodes: 2\naddress: 127.255.255.255", "128.0.0.0 is no loopback address"),
        ("- a", "one mapping"),
        ("a: [", "neither YAML nor JSON"),
        ("node_timeout_seconds: 3\nnode_timeout_seconds: 4\n", "'node_timeout_seconds' twice, in lines 1 and 2"),
        ("cycle_interval_seconds: 1:30\n", "cycle_interval_seconds: input should be a valid number, got '1:30'"),
        ("[" * 100_000, "nested more than"),
        ("nodes: []", "at least 1"),
        (DEPLOYED.format(home="/x").replace("beta", "alpha"), "two nodes have one name"),
    ],
)
def test_faulty_files(home: Path, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "c.yml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        load_settings(path)


def deployed(home: Path, tmp_path: Path, *nodes: str, more: str = "") -> Settings:
    path = tmp_path / "c.yml"
    path.write_text(f"home: {home}\n{more}nodes:\n" + "".join(f"  - {{{node}, compute_dir: /c}}\n" for node in nodes))
    return load_settings(path)


def test_servers_keep_their_numbers_when_nodes_come_and_go(home: Path, tmp_path: Path) -> None:
    nodes = (
        "name: a, address: 10.0.0.1, servers: 2, first_server: 4",
        "name: b, address: 10.0.0.2, servers: 1",
        "name: c, address: 10.0.0.3, servers: 2, first_server: 0, server_port: 1000, ssh_port: 2222",
    )
    settings = deployed(home, tmp_path, *nodes, more="user: mrcore\n")
    told = [(each.name, each.node.name, each.port) for each in settings.servers()]
    assert told[:3] == [("S_0", "c", 1000), ("S_1", "c", 1001), ("S_4", "a", 23456)]
    assert told[3:] == [("S_5", "a", 23457), ("S_6", "b", 23456)]
    assert (settings.user, settings.nodes[0].ssh_port, settings.nodes[2].ssh_port) == ("mrcore", 22, 2222)
    without = deployed(home, tmp_path, nodes[0], nodes[2])
    assert [each.name for each in without.servers()] == ["S_0", "S_1", "S_4", "S_5"]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("name: b, address: 10.0.0.2, servers: 2, first_server: 1", "a and b would both have a server S_1"),
        ("name: b, address: 10.0.0.1, servers: 2", r"a and b have one address and port \(10.0.0.1:45678\)"),
        ("name: b, address: 10.0.0.1, agent_port: 1, servers: 1", r"a and b have one .* \(10.0.0.1:23456\)"),
        ("name: b, address: 10.0.0.2, agent_port: 23457, servers: 2", "agent and a server of b have one address"),
        ("name: b, address: 10.0.0.2, server_port: 65535, servers: 2", "b: 2 servers from port 65535 on end beyond"),
        ("name: A, address: 10.0.0.2, servers: 2", r"two nodes have one name \(A\)"),
    ],
)
def test_nodes_that_clash_are_named(home: Path, tmp_path: Path, second: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        deployed(home, tmp_path, "name: a, address: 10.0.0.1, servers: 2", second)


def test_missing_file_is_named(home: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the settings /nowhere: No such file"):
        load_settings("/nowhere")


def _root(folder: Path, cgroup: str, **limits: str) -> Path:
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text("MemTotal:       1000 kB\n")
    (folder / "proc/self/cgroup").write_text(cgroup)
    for path, text in limits.items():
        file = folder / "sys/fs/cgroup" / path.replace("__", "/").replace("DOT", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_memory_without_limits(tmp_path: Path) -> None:
    assert machine_memory_bytes(_root(tmp_path, "0::/\n")) == 1000 * 1024
    assert machine_memory_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_memory_limit_of_an_ancestor_in_cgroup_v2(tmp_path: Path) -> None:
    limits = {"a__b__memoryDOTmax": "max\n", "a__memoryDOTmax": "5000\n"}
    assert machine_memory_bytes(_root(tmp_path, "0::/a/b\n", **limits)) == 5000


def test_memory_limit_in_cgroup_v1_seen_from_a_container(tmp_path: Path) -> None:
    groups = "5:cpu,cpuacct:/docker/xyz\n4:memory:/docker/xyz\n"
    limits = {"memory__memoryDOTlimit_in_bytes": "7000\n"}
    assert machine_memory_bytes(_root(tmp_path, groups, **limits)) == 7000


def test_kills_for_memory_are_those_of_the_nearest_group_that_counts_them(tmp_path: Path) -> None:
    counts = {"a__b__memoryDOTevents": "low 0\noom 5\noom_kill 3\n", "a__memoryDOTevents": "oom_kill 9\n"}
    root = _root(tmp_path / "v2", "0::/a/b\n", **counts)
    assert oom_kills(root) == 3
    counts = {"memory__memoryDOToom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"}
    assert oom_kills(_root(tmp_path / "v1", "4:memory:/docker/xyz\n", **counts)) == 4
    machine = _root(tmp_path / "none", "0::/\n")
    assert oom_kills(machine) == 0
    (machine / "proc/vmstat").write_text("nr_free_pages 1\noom_kill 7\nfoo 2\n")
    assert oom_kills(machine) == 7


def test_yaml_is_read_safely() -> None:
    assert parse_yaml("a: [1, 2]", "x") == {"a": [1, 2]}
    with pytest.raises(UsageError, match="x is neither"):
        parse_yaml("!!python/object/apply:os.system [ls]", "x")
    with pytest.raises(UsageError, match="x holds NUL bytes"):
        parse_yaml(b"\xff\xfe\x00", "x")
