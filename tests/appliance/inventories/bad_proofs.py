"""Inventories that are wrong in themselves are refused before any machine is asked, with what to mend.

The addresses belong to nobody (RFC 5737): a playbook that tried one would say so, and would take its time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import Operator, Played
from lab import PROJECT, Lab

GOOD: dict[str, Any] = {
    "all": {
        "vars": {"mrcore_users": ["anna"]},
        "children": {
            "master": {"hosts": {"m1": {"ansible_host": "192.0.2.11"}}},
            "nodes": {"hosts": {"w1": {"ansible_host": "192.0.2.21"}, "w2": {"ansible_host": "192.0.2.22"}}},
        },
    }
}
Change = Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], Any]  # of all, the master's hosts, the nodes'
BAD: dict[str, tuple[Change, list[str]]] = {
    "no master": (lambda every, master, nodes: master.clear(), ["no master", "exactly one host", "group master"]),
    "two masters": (
        lambda every, master, nodes: master.update(m2={"ansible_host": "192.0.2.12"}),
        ["2 masters", "m1", "m2", "leave one"],
    ),
    "no node": (lambda every, master, nodes: nodes.clear(), ["no nodes", "group nodes"]),
    "too many nodes": (
        lambda every, master, nodes: nodes.update({f"n{n}": {"ansible_host": f"192.0.2.{n}"} for n in range(100, 150)}),
        ["52 nodes", "at most 50"],
    ),
    "a duplicated address": (
        lambda every, master, nodes: nodes["w2"].update(ansible_host="192.0.2.21"),
        ["192.0.2.21", "w1 and w2", "its own"],
    ),
    "a node in no group": (
        lambda every, master, nodes: every.update(hosts={"w9": {"ansible_host": "192.0.2.29"}}),
        ["w9", "no group", "group master or nodes"],
    ),
    "a node in a group of another name": (
        lambda every, master, nodes: every["children"].update(
            workers={"hosts": {"w9": {"ansible_host": "192.0.2.29"}}}
        ),
        ["w9", "workers", "group master or nodes"],
    ),
    "an unknown variable": (
        lambda every, master, nodes: every["vars"].update(mrcore_sevrers=4),
        ["mrcore_sevrers", "did you mean mrcore_servers"],
    ),
    "an unknown variable of one host": (
        lambda every, master, nodes: nodes["w1"].update(mrcore_cluster_adress="192.0.2.21"),
        ["mrcore_cluster_adress"],
    ),
    "a value of the wrong kind": (
        lambda every, master, nodes: every["vars"].update(mrcore_servers="many"),
        ["mrcore_servers", "'many'"],
    ),
    "no address": (
        lambda every, master, nodes: nodes["w2"].update(ansible_host="w2.example.org"),
        ["w2", "no address", "mrcore_cluster_ip"],
    ),
    "ports that collide": (
        lambda every, master, nodes: every["vars"].update(mrcore_agent_port=23456),
        ["mrcore_agent_port", "23456"],
    ),
}


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    return Operator(Lab("none", tmp_path, "mrcoretest-none-", "192.0.2"))


def refused(operator: Operator, inventory: dict[str, Any], verb: str = "deploy") -> str:
    """What deploy says to an inventory that it has to refuse, white space made single."""
    operator.write_inventory(inventory)
    played = operator.playbook(verb, status=None, timeout=60)
    assert played.done.status not in (0, 4), f"refused, and not because somebody did not answer:\n{played.output}"
    assert "UNREACHABLE" not in played.output and not any(played.changed.values()), played.output
    return " ".join(played.output.split())


@pytest.mark.parametrize("name", BAD)
def test_a_bad_inventory_is_refused_with_what_to_mend(operator: Operator, name: str) -> None:
    inventory = copy.deepcopy(GOOD)
    groups = inventory["all"]["children"]
    change, words = BAD[name]
    change(inventory["all"], groups["master"]["hosts"], groups["nodes"]["hosts"])
    said = refused(operator, inventory)
    for word in words:
        assert word in said, f"{word!r} is not said:\n{said}"


def test_all_faults_are_told_at_once(operator: Operator) -> None:
    inventory = copy.deepcopy(GOOD)
    inventory["all"]["vars"] |= {"mrcore_sevrers": 4}
    inventory["all"]["children"]["nodes"]["hosts"]["w2"]["ansible_host"] = "192.0.2.21"
    said = refused(operator, inventory)
    assert "mrcore_sevrers" in said and "192.0.2.21" in said


@pytest.mark.parametrize("verb", sorted(path.stem for path in (PROJECT / "ansible").glob("*.yml")))
def test_every_verb_checks_the_inventory_first(operator: Operator, verb: str) -> None:
    text = (PROJECT / f"ansible/{verb}.yml").read_text()
    first = yaml.safe_load(text)[0]
    if verb in ("inventory", "numbers"):  # parts of others
        return
    assert re.search(r"(preflight|inventory)\.yml", str(first)), first


@pytest.mark.parametrize("verb", ["reset", "remove_node", "upgrade", "rotate_certs", "doctor"])
def test_a_part_of_the_cluster_is_refused(operator: Operator, verb: str) -> None:
    """--limit would leave out the plays of localhost and of the master, which are what makes these verbs safe."""
    operator.write_inventory(GOOD)
    played = operator.playbook(verb, "--limit", "w1", "--extra-vars", "mrcore_node=w1", status=None, timeout=60)
    said = " ".join(played.output.split())
    assert played.done.status not in (0, 4) and "acts on the whole cluster. Leave out --limit w1" in said, said
    assert "UNREACHABLE" not in said and not any(played.changed.values())


def test_an_inventory_that_does_not_exist_is_answered_with_how_to_make_one(operator: Operator) -> None:
    played: Played = operator._play("deploy", ["make", "deploy", "INVENTORY=nowhere"], 2, 60)
    assert "cp -r inventory/sample inventory/nowhere" in played.output, played.output
