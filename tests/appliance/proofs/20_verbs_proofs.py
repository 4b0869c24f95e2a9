"""deploy, start, stop, kill and status may be repeated; what runs is left alone."""

from __future__ import annotations

from harness import Machine, Operator, Person


def pids(*machines: Machine) -> dict[str, dict[str, str]]:
    return {machine.name: machine.pids() for machine in machines}


def all_run(operator: Operator, *names: str) -> bool:
    return all(int(pid) > 0 for name in names for pid in operator.machine(name).pids().values())


def test_a_second_deploy_changes_nothing_and_restarts_nothing(
    operator: Operator, m1: Machine, w1: Machine, w2: Machine
) -> None:
    before = pids(m1, w1, w2)
    assert all(int(pid) > 0 for found in before.values() for pid in found.values()), before
    played = operator.make("deploy")
    operator.note_time("deploy with nothing to do", played.seconds)
    assert not any(played.changed.values()), played.output
    assert pids(m1, w1, w2) == before


def test_by_hand_it_is_the_same(operator: Operator, m1: Machine, w1: Machine, w2: Machine) -> None:
    before = pids(m1, w1, w2)
    played = operator.playbook("deploy")
    assert not any(played.changed.values()) and pids(m1, w1, w2) == before


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
        assert machine.run("pgrep -u mrcore -f mrcore", status=None).stdout == ""
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
