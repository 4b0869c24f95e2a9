"""Reset takes away what deploy brought, asks before, keeps the data unless told so; other tools stay as they are."""

from __future__ import annotations

import shlex

from harness import Machine, Operator, Person
from operate import foreign_rules

PAUSED = """import sqlite3
queue = sqlite3.connect("/var/lib/mrcore/state/queue.sqlite")
print(*queue.execute("SELECT value FROM meta WHERE key = 'paused'").fetchone())"""


def test_reset_wants_the_clusters_name(operator: Operator, w1: Machine) -> None:
    before = w1.pids()
    for given in ({}, {"CONFIRM": "another"}):
        said = " ".join(operator.make("reset", status=2, **given).output.split())
        assert "mrcore" in said and w1.pids() == before, said


def test_reset_leaves_data_ssh_and_foreign_rules(operator: Operator, m1: Machine, w1: Machine, w2: Machine) -> None:
    before = {machine.name: foreign_rules(machine) for machine in (m1, w1, w2)}
    m1.run("mrcore pause; touch /opt/mrcore/resume")  # so an upgrade leaves it that was cut off
    operator.make("reset", CONFIRM="mrcore")
    assert {machine.name: foreign_rules(machine) for machine in (m1, w1, w2)} == before
    for machine in (m1, w1, w2):
        assert "mrcore" not in machine.nft("list", "tables")
        assert machine.daemons() == []
        assert machine.text("ls -d /opt/mrcore /etc/mrcore 2>/dev/null || true") == ""
        assert "mrcore" not in machine.text("systemctl list-unit-files --no-pager --plain")
        assert Person(machine, "admin").run("echo in").stdout == "in\n"
    assert w1.text("ls /var/lib/mrcore/compute/cluster"), "the data stays"
    assert m1.text(f"python3 -c {shlex.quote(PAUSED)}") == "false", "the next deploy's queue goes on"


def test_reset_with_purge_removes_the_data_as_well(operator: Operator, m1: Machine, w1: Machine) -> None:
    operator.make("reset", CONFIRM="mrcore", PURGE="yes")
    for machine in (m1, w1):
        assert machine.text("ls -d /*/mrcore /var/*/mrcore /etc/*/mrcore* 2>/dev/null || true") == ""
        ours = "find / -xdev '(' -nouser -o -nogroup ')' -not -path '/proc/*' -not -path '/var/tmp/*'"
        assert machine.text(ours) == "", "nothing is left of accounts that are gone, but what jobs brought elsewhere"
