"""Preflight's judgements, the numbers of servers and the wheelhouse's choices: pure functions of the Ansible side."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import PROJECT, module

GOOD = {"m1": "10.0.0.11", "w1": "10.0.0.21", "w2": "10.0.0.22"}


plugin = module("ansible/filter_plugins/mrcore.py")
of_machines = module("ansible/filter_plugins/machines.py")
wheelhouse = module("scripts/wheelhouse.py")


def cluster(
    master: list[str] | None = None, nodes: list[str] | None = None, extra: list[str] | None = None, **changes: Any
) -> dict[str, Any]:
    """What the filter gives for an inventory; `changes` are variables of a host, under its name."""
    masters, members = ["m1"] if master is None else master, ["w1", "w2"] if nodes is None else nodes
    everyone = list(dict.fromkeys([*masters, *members, *(extra or [])]))
    hostvars = {name: {"inventory_dir": "/inv", "ansible_host": GOOD.get(name)} for name in everyone}
    for name, values in changes.items():
        hostvars[name.removesuffix("_host")] |= values
    groups = {"all": everyone, "ungrouped": extra or [], "master": masters, "nodes": members}
    answer: dict[str, Any] = plugin.mrcore_cluster(hostvars, groups)
    return answer


def probe(**changes: Any) -> dict[str, Any]:
    """What Ansible gives of a machine that is fit."""
    found = {
        "skew_seconds": 0.3, "python": [3, 11, 2], "os_id": "debian", "os_version": "12", "systemd": True,
        "machine": "x86_64", "glibc": "2.36", "disk_free_bytes": 50 << 30, "address_is_here": True, "ports_taken": [],
        "unknown_users": [], "release": None, "configured": False, "authority": "",
    }  # fmt: skip
    return {"rc": 0, "stdout": "a banner\n" + json.dumps(found | changes) + "\n"}


def machines(
    authority: str = "",
    release: str | None = "1.0.0-aaaaaaaa",
    removed: tuple[str, ...] = (),
    **changes: dict[str, Any],
) -> dict[str, Any]:
    results = {name: probe(configured=name == "m1") for name in GOOD} | changes
    answer: dict[str, Any] = of_machines.mrcore_machines(results, cluster(), authority, release, removed)
    return answer


# ---- inventories


def test_a_number_of_the_command_line_comes_as_text() -> None:
    given = {"mrcore_upgrade_wait_seconds": "3", "mrcore_certificate_days": "90", "mrcore_cluster_name": "7"}
    found = cluster(m1=given, w1=given, w2=given)
    assert (found["faults"], found["upgrade_wait_seconds"]) == ([], 3)
    assert (found["certificate_days"], found["cluster_name"]) == (90, "7")
    bad = {"mrcore_upgrade_wait_seconds": "3 s"}
    assert "mrcore_upgrade_wait_seconds of m1 is '3 s'" in " ".join(cluster(m1=bad, w1=bad, w2=bad)["faults"])


def test_a_good_inventory_has_its_defaults() -> None:
    found = cluster(w2={"mrcore_servers": 5, "ansible_port": "2222"}, m1={"mrcore_users": []})
    assert found["faults"] == []
    assert (found["master"], found["nodes"], found["pki_dir"]) == ("m1", ["w1", "w2"], "/inv/pki")
    assert found["backup_copy_to"] == "w1"
    assert found["hosts"]["w2"] | {"compute_dir": "-"} == found["hosts"]["w1"] | {
        "cluster_ip": "10.0.0.22", "servers": 5, "ssh_port": 2222, "compute_dir": "-",
    }  # fmt: skip


def test_one_machine_may_be_both() -> None:
    found = cluster(master=["w1"], nodes=["w1"])
    assert found["faults"] == [] and found["backup_copy_to"] == "w1"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"master": []}, "no master: put exactly one"),
        ({"master": ["m1", "w1"]}, r"2 masters \(m1, w1\): leave one"),
        ({"nodes": []}, "no nodes: put 1 to 50"),
        ({"extra": ["w2x"], "w2x": {"ansible_host": "10.0.0.9"}}, "Host w2x is in no group: put it"),
        ({"w2": {"ansible_host": "10.0.0.21"}}, "10.0.0.21 is that of w1 and w2: give each its own mrcore_cluster_ip"),
        ({"w2": {"mrcore_cluster_ip": "10.0.0.11"}}, "10.0.0.11 is that of m1 and w2"),
        ({"w2": {"ansible_host": "w2.example"}}, "Host w2 has no address: set mrcore_cluster_ip"),
        ({"w2": {"ansible_host": None}}, "Host w2 has no address"),
        ({"w2": {"mrcore_cluster_ip": "10.0.0.300"}}, "mrcore_cluster_ip of w2 is '10.0.0.300': it must be an IP"),
        ({"m1": {"mrcore_servrs": 3}}, "Unknown variable mrcore_servrs: did you mean mrcore_servers"),
        ({"m1": {"mrcore_zzzzzz": 3}}, "Unknown variable mrcore_zzzzzz: see inventory/sample"),
        ({"w1": {"mrcore_servers": "3x"}}, "mrcore_servers of w1 is '3x': it must be a number from 1 to 64"),
        ({"w1": {"mrcore_servers": True}}, "mrcore_servers of w1 is True"),
        ({"w1": {"mrcore_compute_dir": "data"}}, "mrcore_compute_dir of w1 is 'data': it must be an absolute path"),
        ({"w1": {"mrcore_agent_port": 23457}}, "Ports of w1 collide"),
        ({"w1": {"mrcore_cluster_name": "other"}}, "mrcore_cluster_name differs between hosts"),
        ({"nodes": ["w1", "w 2"], "w 2": {"ansible_host": "10.0.0.9"}}, "Host name 'w 2' cannot be a node's name"),
        ({"nodes": ["w1", "master"], "master_host": {"ansible_host": "10.0.0.9"}}, "Host name 'master' cannot be"),
    ],
)
def test_a_bad_inventory_is_told_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    faults = cluster(**changes)["faults"]
    assert len(faults) == 1, faults
    assert re.search(sentence, faults[0]) and faults[0].endswith(".")


def test_all_faults_come_at_once() -> None:
    found = cluster(master=[], w1={"mrcore_servers": 0, "mrcore_nods": 1}, w2={"ansible_host": "10.0.0.21"})
    assert len(found["faults"]) == 4


def test_what_all_share_is_told_once() -> None:
    everywhere = {name: {"mrcore_clustr_name": "x"} for name in GOOD}
    assert len(cluster(**everywhere)["faults"]) == 1


def test_settings_that_the_inventory_gives_itself_are_refused() -> None:
    everywhere = {name: {"mrcore_settings": {"state_dir": "/x", "max_attempts": 2}} for name in GOOD}
    assert cluster(**everywhere)["faults"] == [
        "mrcore_settings holds state_dir: leave it out, the inventory's own variables give it."
    ]


def test_a_backup_goes_to_a_node_that_there_is() -> None:
    everywhere = {name: {"mrcore_backup_copy_to": "w7"} for name in GOOD}
    assert "names 'w7'" in cluster(**everywhere)["faults"][0]


def test_the_sample_explains_every_variable() -> None:
    text = (PROJECT / "inventory/sample/group_vars/all.yml").read_text() + "mrcore_cluster_ip"
    assert set(re.findall(r"mrcore_([a-z_]+):", text)) == set(plugin.VARIABLES)


def test_the_samples_defaults_are_those_of_the_code() -> None:
    lines = (PROJECT / "inventory/sample/group_vars/all.yml").read_text().splitlines()
    shown = dict(re.findall(r"^# mrcore_([a-z_]+): (.*)$", "\n".join(lines), re.MULTILINE))
    for name, variable in plugin.VARIABLES.items():
        if variable.default not in (None, [], {}):
            assert yaml.safe_load(shown[name]) == variable.default, name


# ---- machines


def test_fit_machines_and_what_wheels_they_need() -> None:
    found = machines(w2=probe(glibc="2.41", os_version="13"), release="1.0.0-aaaaaaaa")
    assert found == {"faults": [], "targets": [{"python": "3.11", "machine": "x86_64", "glibc": "2.36"}]}
    found = machines(w2=probe(glibc="2.4", machine="aarch64"))
    assert [each["machine"] for each in found["targets"]] == ["aarch64", "x86_64"]


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        ({"unreachable": True, "msg": "Task failed: no\nroute"}, r"Host w2 cannot be reached \(no route\): mend"),
        ({"rc": 127, "stdout": "", "stderr": "sh: not found"}, "Host w2 has no /usr/bin/python3: install python3"),
        ({"rc": 1, "msg": "Missing sudo password", "stdout": ""}, "Host w2 let nothing be run as root"),
        (probe(os_id="ubuntu", os_version="22.04"), "Host w2 runs ubuntu 22.04: mrcore needs Debian 12, Debian 13, Ub"),
        (probe(systemd=False), "Host w2 was not started by systemd"),
        (probe(skew_seconds=600.2), r"The clock of w2 is 600 s ahead of the controller's \(at most 60 s\): set it"),
        (probe(skew_seconds=-75), "The clock of w2 is 75 s behind"),
        (probe(disk_free_bytes=100 << 20), r"Host w2 has 100 MiB free for .* \(at least 1,024 MiB\): make room"),
        (probe(address_is_here=False), "Host w2 has no interface with 10.0.0.22: correct"),
        (probe(ports_taken=[45678]), "Port 45678 of w2 is in use by another program"),
        (probe(machine="../../../etc/x"), "Host w2 gave an answer that cannot be .machine: "),
        (probe(unknown_users=["anna"]), "mrcore_users names anna, who has no account on w2"),
        (probe(release="1.0.0-bbbbbbbb"), "w2 runs release 1.0.0-bbbbbbbb, this checkout is 1.0.0-aaaaaaaa: `make upg"),
    ],
)
def test_an_unfit_machine_is_told_in_one_sentence(result: dict[str, Any], sentence: str) -> None:
    faults = machines(w2=result)["faults"]
    assert len(faults) == 1, faults
    assert re.search(sentence, faults[0]) and faults[0].endswith(".")


def test_an_old_python_and_mixed_ones() -> None:
    faults = machines(w2=probe(python=[3, 10, 12]))["faults"]
    assert len(faults) == 2 and "Python 3.10.12 as /usr/bin/python3: mrcore needs 3.11" in faults[0]
    assert "(3.10 on w2, 3.11 on m1 w1)" in faults[1]


def test_the_masters_disk_is_not_looked_at() -> None:
    assert machines(m1=probe(disk_free_bytes=0))["faults"] == []


def test_another_release_passes_where_it_may() -> None:
    assert machines(release=None, w2=probe(release="1.0.0-bbbbbbbb"))["faults"] == []


def test_a_first_deploy_that_was_cut_off_goes_on_with_another_release() -> None:
    """The master is configured last: before that nothing runs, and `make upgrade` has nothing to upgrade."""
    assert machines(m1=probe(configured=False), w2=probe(release="1.0.0-bbbbbbbb"))["faults"] == []


def test_the_queue_does_not_move_by_the_way() -> None:
    """Another host in the group master would have a second Runner, and every release would pass."""
    found = machines(m1=probe(), w1=probe(configured=True, release="1.0.0-bbbbbbbb"))["faults"]
    assert len(found) == 2 and "w1 is the master already" in found[0] and "make upgrade" in found[1], found


def test_what_is_on_a_node_that_was_removed_is_taken_off_first() -> None:
    (fault,) = machines(removed=("w2",), w2=probe(release="1.0.0-bbbbbbbb"))["faults"]
    assert "make remove-node NODE=w2" in fault and "make upgrade" not in fault


def test_a_variable_with_nothing_behind_it_is_as_if_it_were_left_out() -> None:
    found = cluster(
        m1={"mrcore_users": None, "mrcore_settings": None}, w1={"mrcore_users": None}, w2={"mrcore_users": None}
    )
    assert not found["faults"] and found["users"] == [] and found["settings"] == {}


def block(content: str) -> str:
    return f"-----BEGIN CERTIFICATE-----\n{content}\n-----END CERTIFICATE-----\n"


def test_another_authority_is_not_replaced_by_the_way() -> None:
    ours, other = block("aaaa"), block("bbbb")
    assert machines(authority=ours, w2=probe(authority=ours))["faults"] == []
    assert machines(authority=other + ours, w2=probe(authority=ours))["faults"] == [], "while it is rotated"
    assert machines(authority=ours)["faults"] == [], "a new machine"
    for held in (other, ""):
        assert (
            "another authority than /inv/pki holds" in machines(authority=held, w2=probe(authority=ours))["faults"][0]
        )


# ---- numbers


def numbers(present: dict[str, tuple[int | None, int]] | None, wanted: dict[str, int]) -> dict[str, int]:
    rows = [{"name": name, "first_server": first, "servers": count} for name, (first, count) in (present or {}).items()]
    wish = {"nodes": list(wanted), "hosts": {name: {"servers": count} for name, count in wanted.items()}}
    found: dict[str, int] = plugin.mrcore_numbering({"nodes": rows} if present is not None else None, wish)
    used = [first + index for name, first in found.items() for index in range(wanted[name])]
    assert len(used) == len(set(used)), "no number twice"
    return found


def test_numbers_begin_at_0_and_follow_the_inventory() -> None:
    assert numbers(None, {"w1": 2, "w2": 3, "w3": 1}) == {"w1": 0, "w2": 2, "w3": 5}


def test_a_node_that_joins_leaves_the_others_their_numbers() -> None:
    assert numbers({"w1": (0, 2), "w2": (2, 2)}, {"w0": 2, "w1": 2, "w2": 2}) == {"w0": 4, "w1": 0, "w2": 2}


def test_a_node_that_left_takes_its_numbers_with_it() -> None:
    present = {"w1": (0, 2), "w2": (2, 2), "w3": (4, 2)}
    assert numbers(present, {"w1": 2, "w3": 2}) == {"w1": 0, "w3": 4}
    assert numbers({"w1": (0, 2), "w3": (4, 2)}, {"w1": 2, "w3": 2, "w4": 2}) == {"w1": 0, "w3": 4, "w4": 6}


def test_settings_of_before_there_were_numbers() -> None:
    assert numbers({"w1": (None, 2), "w2": (None, 2)}, {"w2": 2, "w1": 2}) == {"w1": 0, "w2": 2}


def test_a_node_that_grows_moves_only_when_it_must() -> None:
    assert numbers({"w1": (0, 2), "w2": (2, 2)}, {"w1": 2, "w2": 4}) == {"w1": 0, "w2": 2}
    assert numbers({"w1": (0, 2), "w2": (2, 2)}, {"w1": 3, "w2": 2}) == {"w1": 4, "w2": 2}
    assert numbers({"w1": (0, 2), "w2": (2, 2)}, {"w1": 1, "w2": 2}) == {"w1": 0, "w2": 2}


def test_rows_of_nodes_and_host_keys() -> None:
    found = cluster(w2={"ansible_port": 2222})
    rows = plugin.mrcore_nodes(found, {"w1": 0, "w2": 2})
    assert rows[1] == {
        "name": "w2", "address": "10.0.0.22", "first_server": 2, "servers": 2, "agent_port": 45678,
        "server_port": 23456, "ssh_port": 2222, "compute_dir": "/var/lib/mrcore/compute",
    }  # fmt: skip
    told = plugin.mrcore_known_hosts(rows, ["ssh-rsa BBB root@w1\nssh-ed25519 AAA root@w1\n", "ssh-ed25519 CCC\n"])
    assert told.splitlines() == [
        "10.0.0.21,w1 ssh-ed25519 AAA",
        "10.0.0.21,w1 ssh-rsa BBB",
        "[10.0.0.22]:2222,[w2]:2222 ssh-ed25519 CCC",
    ]


def test_files_of_a_project(tmp_path: Path) -> None:
    for name in ("map.py", "data/x.txt", "__pycache__/map.pyc", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    listed = subprocess.run(["sha256sum", "./data/x.txt", "./map.py"], cwd=tmp_path, capture_output=True, text=True)
    assert plugin.mrcore_files(str(tmp_path)) == listed.stdout.splitlines()


# ---- releases and wheels


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(PROJECT / name, tmp_path)
    (tmp_path / "mrcore").mkdir()
    (tmp_path / "mrcore/__init__.py").write_text("a = 1\n")
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock/base.txt").write_text("click==8.1 --hash=sha256:1\n")
    (tmp_path / "lock/dashboard.txt").write_text("jinja2==3.1.6 --hash=sha256:1\n")
    (tmp_path / "mrcore/web/static").mkdir(parents=True)
    (tmp_path / "mrcore/web/static/style.css").write_text("a {}\n")
    return tmp_path


def test_a_release_is_named_by_what_is_installed(checkout: Path) -> None:
    first = wheelhouse.release_of(checkout)
    assert re.fullmatch(r"\d+\.\d+\.\d+-[0-9a-f]{8}", first)
    (checkout / "mrcore/__pycache__").mkdir()
    (checkout / "mrcore/__pycache__/x.pyc").touch()
    (checkout / "README.md").write_text("other words")
    assert wheelhouse.release_of(checkout) == first
    assert plugin.mrcore_release(str(PROJECT)) == wheelhouse.release_of(PROJECT) != first
    (checkout / "mrcore/__init__.py").write_text("a = 2\n")
    second = wheelhouse.release_of(checkout)
    (checkout / "mrcore/more.py").write_text("")
    third = wheelhouse.release_of(checkout)
    text = (checkout / "pyproject.toml").read_text()
    (checkout / "pyproject.toml").write_text(text.replace('"click>=8.1"', '"click>=8.2"'))
    fourth = wheelhouse.release_of(checkout)
    (checkout / "lock/base.txt").write_text("click==8.2 --hash=sha256:2\n")
    fifth = wheelhouse.release_of(checkout)
    (checkout / "lock/dashboard.txt").write_text("jinja2==3.1.7 --hash=sha256:2\n")
    sixth = wheelhouse.release_of(checkout)
    (checkout / "mrcore/web/static/style.css").write_text("b {}\n")
    assert len({first, second, third, fourth, fifth, sixth, wheelhouse.release_of(checkout)}) == 7


def test_platforms_are_not_newer_than_the_nodes_glibc() -> None:
    tags = wheelhouse.platform_tags("x86_64", "2.36")
    assert tags[0] == "manylinux_2_36_x86_64" and "manylinux2014_x86_64" in tags and "manylinux1_x86_64" in tags
    assert not [tag for tag in tags if re.search(r"_2_(3[7-9]|[4-9]\d)_", tag)]
    with pytest.raises(wheelhouse.Fault, match=r"glibc 3\.0"):
        wheelhouse.platform_tags("x86_64", "3.0")


@pytest.mark.parametrize(
    ("made_for", "nodes", "whole"), [("2.36", "2.36", True), ("2.36", "2.41", True), ("2.41", "2.36", False)]
)
def test_a_wheelhouse_is_whole_for_that_glibc_and_newer(tmp_path: Path, made_for: str, nodes: str, whole: bool) -> None:
    assert not wheelhouse.is_whole(tmp_path, nodes)
    (tmp_path / wheelhouse.MARKER).write_text(made_for)
    assert wheelhouse.is_whole(tmp_path, nodes) is whole


# ---- the wrapper of make


def play(tmp_path: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Call scripts/play.sh in a checkout whose ansible-playbook only says how it was called."""
    (tmp_path / "scripts").mkdir(exist_ok=True)
    (tmp_path / ".venv/bin").mkdir(parents=True, exist_ok=True)
    shutil.copy(PROJECT / "scripts/play.sh", tmp_path / "scripts")
    (tmp_path / ".venv/bin/ansible-playbook").write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    (tmp_path / ".venv/bin/ansible-playbook").chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if name not in ("ARGS", "INVENTORY", "NODE", "PROJECT")}
    command = ["/bin/sh", str(tmp_path / "scripts/play.sh"), *arguments]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_make_passes_what_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "inventory/prod").mkdir(parents=True)
    status, said = play(tmp_path, "remove-node", INVENTORY="prod", NODE="w 4", DATA="move", ARGS="--check -v")
    assert status == 0
    assert said == (
        "<-i><inventory/prod><ansible/remove_node.yml><--extra-vars><mrcore_node='w 4'>"
        "<--extra-vars><mrcore_data='move'><--check><-v>"
    )
    other = tmp_path / "elsewhere"
    other.mkdir()
    assert f"<-i><{other}>" in play(tmp_path, "deploy", INVENTORY=str(other))[1]


def test_an_inventory_that_is_not_there_is_answered_with_what_to_do(tmp_path: Path) -> None:
    status, said = play(tmp_path, "deploy", INVENTORY="prod")
    assert status == 2 and "    cp -r inventory/sample inventory/prod\n" in said and "inventory/prod/hosts.yml" in said
    status, said = play(tmp_path, "deploy")
    assert status == 2 and "make deploy INVENTORY=prod" in said


# ---- scripts that are run on machines


def test_the_probe_tells_what_preflight_reads(tmp_path: Path) -> None:
    asked = {
        "address": "127.0.0.1",
        "compute_dir": str(tmp_path / "not/yet"),
        "ports": [],
        "users": ["root", "nobody-x"],
    }
    command = [sys.executable, "-c", (PROJECT / "roles/common/files/probe.py").read_text(), "0", json.dumps(asked)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert set(found) == set(json.loads(probe()["stdout"].splitlines()[1]))
    assert found["skew_seconds"] > 1e9 and found["python"] == list(sys.version_info[:3])
    assert found["unknown_users"] == ["nobody-x"] and found["address_is_here"] is True
    assert found["disk_free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)


SYSTEMCTL = """#!/bin/sh
cat <<'END'
Id=mrcore-agent.service
ActiveState=active
ExecMainStartTimestamp=@1000

Id=mrcore-server@S_1.service
ActiveState=active
ExecMainStartTimestamp=@1000

Id=mrcore-server@S_2.service
ActiveState=inactive
ExecMainStartTimestamp=
END
"""


@pytest.mark.parametrize(
    ("written", "stale"),
    [
        ("", []),
        ("specs/agent.json", ["mrcore-agent.service"]),
        ("specs/S_1.json", ["mrcore-server@S_1.service"]),
        ("specs/S_2.json", []),
        ("units/mrcore-server@.service", ["mrcore-server@S_1.service"]),
        ("current", ["mrcore-agent.service", "mrcore-server@S_1.service"]),
    ],
)
def test_daemons_that_are_older_than_what_they_are_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], written: str, stale: list[str]
) -> None:
    names = ["specs/agent.json", "specs/S_1.json", "specs/S_2.json", "current"]
    for name in [*names, "units/mrcore-agent.service", "units/mrcore-server@.service"]:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
        os.utime(file, (2000, 2000) if name == written else (900, 900))
    (tmp_path / "systemctl").write_text(SYSTEMCTL)
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script: Any = module("roles/mrcore_node/files/stale.py")
    script.UNITS, script.SPECS, script.RELEASE = tmp_path / "units", tmp_path / "specs", tmp_path / "current"
    script.main()
    assert capsys.readouterr().out.split() == stale


RULES = {
    "nftables": [
        {"chain": {"family": "inet", "table": "mrcore", "name": "input", "hook": "input", "policy": "accept"}},
        {"rule": {"family": "inet", "table": "mrcore", "chain": "input", "expr": [{"drop": None}]}},
        {"chain": {"family": "ip", "table": "filter", "name": "INPUT", "hook": "input", "policy": "drop"}},
        {"chain": {"family": "inet", "table": "other", "name": "in", "hook": "input", "policy": "accept"}},
        {"rule": {"family": "inet", "table": "other", "chain": "in", "expr": [{"accept": None}]}},
    ]
}


def test_what_blocks_is_named_and_our_own_table_is_not(tmp_path: Path) -> None:
    text = (PROJECT / "roles/firewall/files/blockers.py").read_text().replace("/usr/sbin:", f"{tmp_path}:", 1)
    for name, script in (("nft", f"cat <<'END'\n{json.dumps(RULES)}\nEND\n"), ("ufw", "echo Status: active\n")):
        (tmp_path / name).write_text("#!/bin/sh\n" + script)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "ufw is active (ufw allow from MEMBER to any port PORT proto tcp); "
        "chain INPUT of table ip filter drops packets (nft list table ip filter)"
    )


def test_who_does_not_answer_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        open_port = server.getsockname()[1]
        places = [["w1", "127.0.0.1", open_port], ["w2", "127.0.0.1", 1]]
        text = (PROJECT / "roles/firewall/files/reach.py").read_text()
        command = [sys.executable, "-c", text, json.dumps(places)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "w2 (127.0.0.1 port 1: Connection refused)"
