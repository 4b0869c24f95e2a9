"""What has become of submitted jobs: a run that goes on is waited for, whatever ended before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_cluster import FakeCluster
from queues import job

from mrcore.queue.awaited import Awaited
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings


@pytest.fixture
def config(home: Path, projects_dir: Path) -> Path | None:
    """The settings of this home."""
    (projects_dir / "fake").mkdir()
    names = ("ok", "fail", "flaky", "wait")
    (projects_dir / "fake/map_functions.py").write_text("".join(f"def {name}(line, aux): ...\n" for name in names))
    return None


def drain(settings: Settings) -> None:
    Runner(settings, FakeCluster(settings)).run(once=True)


@pytest.fixture
def submit(scheduler: Scheduler) -> Callable[..., Awaited]:
    """Queue jobs and wait for them."""

    def queue(*jobs: dict[str, object]) -> Awaited:
        answers = scheduler.submit_jobs(list(jobs))
        return Awaited(scheduler.store, [answer["job_name"] for answer in answers])

    return queue


def test_each_job_ends_with_its_first_run_and_a_recurring_one_stays(
    submit: Callable[..., Awaited], settings: Settings
) -> None:
    awaited = submit(job("once"), job("again", run_once=False), job("bad", "fail"))
    assert awaited.look() == [] and len(awaited.left) == 3
    drain(settings)
    found = {each.job_name: each for each in awaited.look()}
    assert not awaited.left and awaited.look() == []
    assert {name: (each.run, each.state, each.stays) for name, each in found.items()} == {
        "once": (1, "succeeded", False),
        "again": (1, "succeeded", True),
        "bad": (1, "failed", False),
    }
    assert found["bad"].why == "map failed" and not found["bad"].good


def test_an_earlier_run_does_not_end_the_wait_for_the_next(submit: Callable[..., Awaited], settings: Settings) -> None:
    submit(job("a"))
    drain(settings)
    awaited = submit(job("a"))
    assert awaited.look() == []
    drain(settings)
    assert [(each.run, each.state) for each in awaited.look()] == [(2, "succeeded")]


def test_retries_are_waited_for(submit: Callable[..., Awaited], settings: Settings, scheduler: Scheduler) -> None:
    awaited = submit(job("a", "flaky", retries=2, retry_delay=600))
    runner = Runner(settings, FakeCluster(settings), report=lambda event, **facts: event == "ended" and runner.stop())
    runner.run()
    assert scheduler.history()[0]["state"] == "failed" and awaited.look() == []
    (settings.state_dir / "mended").touch()
    scheduler.requeue("a")
    drain(settings)
    assert [(each.run, each.state) for each in awaited.look()] == [(2, "succeeded")]


def test_what_left_without_a_run_says_why(
    submit: Callable[..., Awaited], settings: Settings, scheduler: Scheduler
) -> None:
    awaited = submit(job("first", "fail", group_name="g"), job("second", group_name="g"), job("third"))
    scheduler.delete_job("third")
    drain(settings)
    found = {each.job_name: each for each in awaited.look()}
    assert found["first"].state == "failed"
    assert (found["second"].run, found["second"].state) == (None, "left")
    assert str(found["second"].why).startswith("group failed: first run 1: map failed")
    assert (found["third"].run, found["third"].why) == (None, "deleted")
