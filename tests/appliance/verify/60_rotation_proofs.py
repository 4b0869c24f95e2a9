"""New keys and a new authority while a job is under way; Ansible is killed in the middle of it, twice."""

from __future__ import annotations

import waiting
from harness import Machine, Operator, Person, wait_until

# What a run that is killed was at: the new authority is trusted beside the old; some machine has its new pair.
MOMENTS = ("Trust both authorities everywhere", "Put it in place")


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
