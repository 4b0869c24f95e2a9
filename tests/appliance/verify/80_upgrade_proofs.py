"""An upgrade to a build that speaks another wire version, in mid-job; and one to a build that does not start."""

from __future__ import annotations

import pytest
import waiting
from checkouts import checkout
from harness import Machine, Operator, Person, wait_until
from lab import Lab

WAIT = ("--extra-vars", "mrcore_upgrade_wait_seconds=3")  # for a run to end by itself, which ours does not

CUT_OFF = "Check it with the release's own program"  # what an upgrade is at when Ansible is killed


def releases(operator: Operator) -> dict[str, str]:
    return {name: operator.machine(name).text("readlink -f /opt/mrcore/current") for name in ("m1", *waiting.NODES)}


@pytest.fixture(scope="module")
def upgraded(lab: Lab) -> Operator:
    return Operator(lab, project=checkout(lab.folder / "next", "1.1.0", wire=77))


@pytest.fixture(scope="module")
def bad(lab: Lab) -> Operator:
    return Operator(lab, project=checkout(lab.folder / "bad", "1.2.0", wire=77, broken=True))


@pytest.fixture(scope="module", autouse=True)
def inputs(operator: Operator, anna: Person) -> None:
    waiting.bring(operator, anna)


def test_deploy_refuses_another_build(upgraded: Operator, operator: Operator) -> None:
    before = releases(operator)
    said = " ".join(upgraded.playbook("deploy", status=None).output.split())
    assert "make upgrade" in said and releases(operator) == before, said


def test_an_upgrade_in_mid_job_loses_no_job(upgraded: Operator, operator: Operator, anna: Person, m1: Machine) -> None:
    before, names = releases(operator), ("slow_0", "slow_1", "slow_2")
    waiting.hold(operator)
    anna.submit(*(waiting.job(name) for name in names))
    wait_until(lambda: any(row["state"] == "running" for row in anna.runs("slow_0")), 60, "the first job runs")
    upgraded.cut_off("upgrade", CUT_OFF, *WAIT)
    assert len(set(releases(operator).values())) == 2, "one node is on the new release"
    assert "paused" in anna.mrcore("queue").output
    played = upgraded.playbook("upgrade", *WAIT)
    operator.note_time("upgrade of a node and the master, after one node", played.seconds)
    after = releases(operator)
    assert len(set(after.values())) == 1 and "/1.1.0-" in after["w1"] and after != before, after
    waiting.let_go(operator)
    for name in names:
        anna.finished(name, seconds=240)
        assert sorted(anna.items(name)) == waiting.expected()
        states = [row["state"] for row in anna.runs(name)]
        assert states.count("succeeded") == 1 and set(states) <= {"succeeded", "handed back"}, states
    assert "handed back" in [row["state"] for row in anna.runs("slow_0")], "it was in mid-job"
    code = "import mrcore; print(mrcore.__version__, mrcore.WIRE_VERSION)"
    assert m1.text(f"/opt/mrcore/current/bin/python -c '{code}'") == "1.1.0 77"
    anna.mrcore("cluster", "check")
    played = upgraded.playbook("deploy")
    assert not any(played.changed.values()), f"upgrade has left nothing to deploy: {played.output}"


def test_a_build_that_does_not_start_stops_and_is_rolled_back(bad: Operator, operator: Operator, anna: Person) -> None:
    before = releases(operator)
    waiting.hold(operator)
    anna.submit(waiting.job("during_a_bad_upgrade"))
    wait_until(lambda: anna.runs("during_a_bad_upgrade"), 60, "the job runs")
    played = bad.playbook("upgrade", *WAIT, status=None)
    assert played.done.status != 0
    said = " ".join(played.output.split())
    assert "w1" in said and "back on the release before" in said, played.output[-3000:]
    assert releases(operator) == before
    waiting.let_go(operator)
    anna.finished("during_a_bad_upgrade", seconds=240)
    assert sorted(anna.items("during_a_bad_upgrade")) == waiting.expected()
    anna.mrcore("cluster", "check")
