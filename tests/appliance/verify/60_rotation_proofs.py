"""New keys and a new authority while a job is under way; Ansible is killed in the middle of it, twice."""

from __future__ import annotations

import json
from pathlib import Path

import waiting
from harness import AGENT_PORT, Machine, Operator, Person, wait_until

from mrcore.errors import Refused
from mrcore.messages.methods import HEALTH
from mrcore.wire.client import Client
from mrcore.wire.tls import Pki

# What a run that is killed was at: the new authority is trusted beside the old; some machine has its new pair.
MOMENTS = ("Trust both authorities everywhere", "Put it in place")


def keep(machine: Machine, folder: Path, stem: str) -> None:
    """A machine's present pair, as somebody who was on it may have kept it."""
    for name in (f"{stem}.crt", f"{stem}.key", "ca.crt"):
        (folder / name).write_text(machine.read(f"/etc/mrcore/pki/{name}"))


def answers(machine: Machine, folder: Path, stem: str) -> bool:
    client = Client(machine.address, AGENT_PORT, Pki(folder, stem), connect_timeout_seconds=5)
    try:
        return bool(client.call(HEALTH))
    except Refused as error:
        assert "was withdrawn" in error.message, error
        return False
    finally:
        client.close()


def test_what_a_rotation_replaces_counts_no_more(
    operator: Operator, anna: Person, m1: Machine, w1: Machine, w2: Machine, tmp_path: Path
) -> None:
    """The authority stays the same, so TLS itself has nothing against the former certificates."""
    w2.nft("delete", "table", "inet", "mrcore")  # this machine is no member
    try:
        keep(m1, tmp_path, "master")
        keep(w1, tmp_path, "node")
        assert answers(w2, tmp_path, "master") and answers(w2, tmp_path, "node")
        operator.cut_off("rotate_certs", "Put it in place")
        anna.mrcore("cluster", "check")
        operator.make("rotate-certs")
        anna.mrcore("cluster", "check")
        assert not answers(w2, tmp_path, "master") and not answers(w2, tmp_path, "node")
        listed = json.loads(w2.read("/etc/mrcore/members.json"))
        assert {len(each["serials"]) for each in listed["members"].values()} == {1}, listed
    finally:
        w2.run("systemctl restart mrcore-firewall")
    assert not operator.make("deploy", ARGS="--check").changed["w1"]


def test_a_rotation_that_is_cut_off_goes_on_where_it_was(
    operator: Operator, anna: Person, m1: Machine, w1: Machine, w2: Machine
) -> None:
    waiting.bring(operator, anna)
    waiting.hold(operator)
    anna.submit(waiting.job("during_rotation"))
    wait_until(lambda: any(row["state"] == "running" for row in anna.runs("during_rotation")), 60, "the job runs")
    machines = (m1, w1, w2)
    before = {machine.name: machine.text("cd /etc/mrcore/pki && sha256sum *") for machine in machines}
    daemons = {machine.name: machine.pids() for machine in machines}
    for moment in MOMENTS:
        operator.cut_off("rotate_certs", moment, "--extra-vars", "mrcore_ca=yes")
        anna.mrcore("cluster", "check")
    operator.make("rotate-certs", CA="yes")
    anna.mrcore("cluster", "check")
    for machine in machines:
        kept = set(before[machine.name].split("\n")) & set(
            machine.text("cd /etc/mrcore/pki && sha256sum *").split("\n")
        )
        assert not kept, f"{machine.name} has everything anew"
    assert {machine.name: machine.pids() for machine in machines} == daemons
    assert [row["state"] for row in anna.runs("during_rotation")] == ["running"]
    waiting.let_go(operator)
    anna.finished("during_rotation", seconds=240)
    assert sorted(anna.items("during_rotation")) == waiting.expected()
    assert not operator.make("deploy", ARGS="--check").changed["w1"]
