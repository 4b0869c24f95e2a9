"""deploy, start, stop, kill and status may be repeated; what runs is left alone."""

from __future__ import annotations

from harness import Machine, Operator, Person
from operate import foreign_rules


def pids(*machines: Machine) -> dict[str, dict[str, str]]:
    return {machine.name: machine.pids() for machine in machines}


def all_run(operator: Operator, *names: str) -> bool:
    return all(int(pid) > 0 for name in names for pid in operator.machine(name).pids().values())


def test_another_deploy_by_hand_changes_nothing_restarts_nothing_and_cuts_nobody_off(
    operator: Operator, m1: Machine, w1: Machine, w2: Machine
) -> None:
    """Typed as `ansible-playbook …`, with a session over SSH that stays open, and other tools' rules as they were."""
    before, rules = pids(m1, w1, w2), {machine.name: foreign_rules(machine) for machine in (m1, w1, w2)}
    assert all(int(pid) > 0 for found in before.values() for pid in found.values()), before
    assert "ufw-user-input" in rules["w1"] and "8080" in rules["w1"]
    with Person(w1, "admin").terminal("cat") as session:
        session.type("before\r")
        session.wait_for("before")
        played = operator.playbook("deploy")
        w1.run("systemctl restart mrcore-firewall")
        session.type("afterwards\r")
        session.wait_for("afterwards")
    operator.note_time("deploy with nothing to do", played.seconds)
    assert not any(played.changed.values()), played.output
    assert pids(m1, w1, w2) == before
    assert {machine.name: foreign_rules(machine) for machine in (m1, w1, w2)} == rules


def test_stop_twice_then_start_twice(operator: Operator, w1: Machine, w2: Machine, anna: Person) -> None:
    played = operator.make("stop")
    operator.note_time("stop", played.seconds)
    assert pids(w1, w2) == {name: dict.fromkeys(operator.machine(name).units(), "0") for name in ("w1", "w2")}
    again = operator.make("stop")
    assert not any(again.changed.values()), again.output
    assert {unit: w1.unit(unit)["ActiveState"] for unit in w1.units()} == dict.fromkeys(w1.units(), "inactive")
    played = operator.make("start")
    operator.note_time("start", played.seconds)
    assert all_run(operator, "m1", "w1", "w2")
    before = pids(w1, w2)
    again = operator.make("start")
    assert not any(again.changed.values()) and pids(w1, w2) == before, again.output


def test_kill_twice_ends_all_and_what_was_done_stays(
    operator: Operator, w1: Machine, w2: Machine, anna: Person
) -> None:
    words = anna.items("licence_words")
    played = operator.make("kill")
    operator.note_time("kill", played.seconds)
    for machine in (w1, w2):
        assert machine.daemons() == []
        assert {machine.unit(unit)["ActiveState"] for unit in machine.units()} == {"inactive"}
    operator.make("kill")
    operator.make("start")
    assert all_run(operator, "m1", "w1", "w2")
    assert sorted(anna.items("licence_words")) == sorted(words)


def test_status_shows_every_daemon_and_changes_nothing(operator: Operator, w1: Machine, w2: Machine) -> None:
    before = pids(w1, w2)
    played = operator.make("status")
    for word in ("w1", "w2", *w1.servers(), *w2.servers(), "running"):
        assert word in played.output, played.output
    assert not any(played.changed.values()) and pids(w1, w2) == before
