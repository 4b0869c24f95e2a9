"""A cluster of another commit comes to this checkout by `make upgrade`, in mid-job: nothing that it had is lost."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import waiting
from checkouts import committed
from harness import Machine, Operator, Person, wait_until
from lab import Lab
from operate import prepare

WAIT = "--extra-vars mrcore_upgrade_wait_seconds=3"  # for a run to end by itself, which ours does not
UNDER_WAY = ("slow_0", "slow_1")  # the first runs, the second waits in the queue
NEW_LINES = 5


@pytest.fixture(scope="module")
def former(lab: Lab, operator: Operator) -> Operator:
    """The operator of before, with the checkout of that commit."""
    prepare(operator)
    return Operator(lab, project=committed(lab.folder / "before", os.environ["MRCORE_TEST_UPGRADE_FROM"]))


def increments() -> dict[str, Any]:
    """The job that reads in each run what is new."""
    return waiting.job("increments") | {"hold_state": True, "delete_job_data": False}


def known(anna: Person) -> dict[str, Any]:
    """What the master knows: ended runs, the ledger, what is queued, and the output of what has ended."""
    rows = [row for row in json.loads(anna.mrcore("history", "--json").stdout) if row["state"] == "succeeded"]
    queue = json.loads(anna.mrcore("queue", "--json").stdout)
    return {
        "history": {f"{row['job_name']} {row['run']}": row for row in rows},
        "ledger": json.loads(anna.mrcore("ledger", "show", "increments", "--json").stdout),
        "queue": [job["job_name"] for job in queue["jobs"]],
        "paused": queue["paused"],
        "output": sorted(anna.items("increments")),
    }


def is_part(before: Any, after: Any) -> bool:
    """Whether all of `before` is in `after`, which may have further keys: a later release may say more."""
    if isinstance(before, dict) and isinstance(after, dict):
        return all(key in after and is_part(value, after[key]) for key, value in before.items())
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(is_part, before, after))
    return bool(before == after)


def releases(operator: Operator) -> set[str]:
    return {operator.machine(name).text("readlink -f /opt/mrcore/current") for name in ("m1", *waiting.NODES)}


def test_an_upgrade_from_that_commit_loses_nothing(
    former: Operator, operator: Operator, anna: Person, w1: Machine
) -> None:
    former.playbook("deploy")
    waiting.bring(operator, anna)
    waiting.let_go(operator)
    anna.submit(increments())
    anna.finished("increments")
    waiting.hold(operator)
    anna.submit(*(waiting.job(name) for name in UNDER_WAY))
    wait_until(lambda: any(row["state"] == "running" for row in anna.runs(UNDER_WAY[0])), 60, "the first job runs")
    before, release = known(anna), releases(operator)
    assert before["output"] == waiting.expected() and set(UNDER_WAY) <= set(before["queue"]), before

    played = operator.make("upgrade", ARGS=WAIT)
    operator.note_time("upgrade from another commit, in mid-job", played.seconds)
    assert len(releases(operator)) == 1 and not releases(operator) & release, "all run this checkout's release"
    after = known(anna)
    assert is_part(before, after), (before, after)

    waiting.let_go(operator)
    for name in UNDER_WAY:
        anna.finished(name, seconds=240)
        assert sorted(anna.items(name)) == waiting.expected()
        states = [row["state"] for row in anna.runs(name)]
        assert states.count("succeeded") == 1 and set(states) <= {"succeeded", "handed back"}, states
    assert "handed back" in [row["state"] for row in anna.runs(UNDER_WAY[0])], "it was in mid-job"

    w1.write("/var/tmp/slow/later", "".join(f"later {number}\n" for number in range(NEW_LINES)))
    anna.submit(increments())
    run = anna.finished("increments", more_than=1)
    assert run["counts"]["input_files"] == 1, "it goes on from the ledger of before"
    later = [[f"later {number}", 1] for number in range(NEW_LINES)]
    assert sorted(anna.items("increments")) == sorted(waiting.expected() + later)
    anna.mrcore("cluster", "check")
    assert not any(operator.make("deploy").changed.values()), "upgrade has left nothing to deploy"
