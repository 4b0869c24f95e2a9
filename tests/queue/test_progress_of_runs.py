"""How far a run is, written about once a second, and what stays known of it: whatever its ending."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conditions import wait_until
from fake_cluster import FakeCluster
from queues import job, listening

from mrcore.cli.live import now_of
from mrcore.errors import MrcoreError
from mrcore.queue.progress import Keeper
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings
from mrcore.state import profiles
from mrcore.state.progress import Phase, Progress, RunDetail, ServerNow, TaskRow

ROW = TaskRow(phase="MAP", task=0, try_=1, server="S_0", node="a", started=1.0, seconds=2.0)


class Telling(FakeCluster):
    """A cluster whose run tells how far it is, then does what its job's map function is called."""

    def run(
        self, job: dict[str, Any], *, run: int, progress: Callable[..., None], stop: threading.Event
    ) -> dict[str, Any]:
        progress("PREFLIGHT")
        now = ServerNow(server="S_0", node="a", up=True, phase="MAP", task=0)
        seen = Progress(
            job_name=job["job_name"], run=run, job_type="mapreduce", started=5.0, updated=6.0,
            phases=[Phase(name="MAP", started=5.0, done=40, total=100)], servers=[now], counters={"bad": 2, "odd": 1},
        )  # fmt: skip
        progress("MAP", seen=seen, bundles_done=4, bundles=10)
        try:
            return super().run(job, run=run, progress=progress, stop=stop) | {"counts": {"counters": {"bad": 2}}}
        finally:
            detail = RunDetail(slowest=[ROW], counters={"bad": 2})
            progress("MAP", seen=seen, detail=detail, profiles={"MAP": {"f (a.py:1);g (a.py:2)": 3}})


@pytest.fixture
def reports() -> list[tuple[str, dict[str, Any]]]:
    return []


@pytest.fixture
def runner(settings: Settings, reports: list[tuple[str, dict[str, Any]]]) -> Runner:
    return Runner(settings, Telling(settings), lambda event, **facts: reports.append((event, facts)))


def test_it_is_read_by_others_and_told_while_the_run_goes_on(
    settings: Settings, scheduler: Scheduler, runner: Runner, reports: list[tuple[str, dict[str, Any]]]
) -> None:
    scheduler.submit_job(job("wc", "wait"))
    thread = threading.Thread(target=runner.run, args=(True,))
    thread.start()
    try:
        seen = wait_until(lambda: (seen := scheduler.progress()) and seen.servers and seen, 10, "progress")
        again = wait_until(lambda: (new := scheduler.progress()) and new.updated > seen.updated + 1 and new, 10, "more")
        told = wait_until(lambda: [facts for event, facts in reports if event == "progress"], 10, "a report")
    finally:
        (settings.state_dir / "go").touch()
        thread.join()
    assert (again.job_name, again.run, again.job_type) == ("wc", 1, "mapreduce")
    assert {phase.name: (phase.done, phase.total) for phase in again.phases} == {"PREFLIGHT": (0, 0), "MAP": (40, 100)}
    assert again.counters == {"bad": 2, "odd": 1} and again.servers[0].server == "S_0"
    assert again.started > 5.0, "that of the run, not of the attempt"
    last = told[-1]
    assert isinstance(last["progress"], Progress) and last["phase"] == "MAP" and "seen" not in last
    assert scheduler.progress() is None, "of a run that has ended"
    assert [event for event, _ in reports][-2:] == ["ended", "idle"], "nothing is told of a run that has ended"


@pytest.mark.parametrize(
    ("does", "ending"), [("ok", "succeeded"), ("fail", "failed"), ("bug", "handed back"), ("wait", "cancelled")]
)
def test_what_stays_known_whatever_the_ending(
    settings: Settings, scheduler: Scheduler, runner: Runner, does: str, ending: str
) -> None:
    scheduler.submit_job(job("wc", does))
    thread = threading.Thread(target=runner.run, args=(True,))
    thread.start()
    if does == "wait":
        wait_until(scheduler.progress, 10, "progress")
        scheduler.cancel("wc")
    thread.join()
    first = scheduler.history("wc")[-1]
    detail = scheduler.run("wc", 1)["detail"]
    assert first["state"] == ending
    assert {phase["name"] for phase in detail["phases"]} >= {"PREFLIGHT", "MAP"}
    assert all(phase["ended"] is not None for phase in detail["phases"])
    assert detail["counters"] == {"bad": 2} and detail["slowest"][0]["server"] == "S_0" and detail["profile"]
    assert [path.name for path in profiles.paths(settings.state_dir, "wc", 1)] == ["1.svg", "1.speedscope.json"]


def test_counters_are_in_the_history(settings: Settings, scheduler: Scheduler, runner: Runner) -> None:
    scheduler.submit_job(job("wc"))
    runner.run(once=True)
    assert scheduler.history("wc")[0]["counts"]["counters"] == {"bad": 2}


def test_a_profile_that_cannot_be_written_fails_no_run(
    settings: Settings, scheduler: Scheduler, runner: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    (settings.state_dir / "profiles").write_text("in the way")
    scheduler.submit_job(job("wc"))
    assert runner.run(once=True) == {"succeeded": 1}
    assert "no profile of run 1 of wc" in caplog.text and not scheduler.run("wc", 1)["detail"]["profile"]


def test_progress_that_cannot_be_written_fails_no_run(
    scheduler: Scheduler, runner: Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(progress: Progress) -> None:
        raise MrcoreError("the disk is full")

    monkeypatch.setattr(runner.store, "set_progress", full)
    scheduler.submit_job(job("wc"))
    assert runner.run(once=True) == {"succeeded": 1}
    assert "the progress is not written: the disk is full" in caplog.text


def test_history_that_teaches_nothing_fails_no_run(
    scheduler: Scheduler, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise ValueError("no number")

    monkeypatch.setattr("mrcore.queue.forecast.past", broken)
    scheduler.submit_jobs([job("one"), job("two")])
    assert runner.run(once=True) == {"succeeded": 2}


def test_what_a_dead_runner_left_stays_known(settings: Settings, scheduler: Scheduler, runner: Runner) -> None:
    scheduler.submit_job(job("wc"))
    runner.store.start_run("wc", 10.0)
    phases = [Phase(name="MAP", started=11.0, done=4, total=10)]
    runner.store.set_progress(
        Progress(job_name="wc", run=1, job_type="mapreduce", started=10, updated=20, phases=phases, counters={"bad": 1})
    )
    runner.run(once=True)
    assert [run["state"] for run in scheduler.history("wc")] == ["succeeded", "handed back"]
    detail = scheduler.run("wc", 1)["detail"]
    assert detail["phases"][0]["done"] == 4 and detail["phases"][0]["ended"] and detail["counters"] == {"bad": 1}


def test_detail_of_a_run_whose_output_came_into_place_later(
    settings: Settings, scheduler: Scheduler, runner: Runner, reports: list[tuple[str, dict[str, Any]]]
) -> None:
    scheduler.submit_job(job("wc", "half"))
    thread = threading.Thread(target=runner.run, args=(True,))
    thread.start()
    wait_until(lambda: [event for event, _ in reports if event == "hold"], 20, "the hold")
    (settings.state_dir / "back").touch()
    thread.join()
    assert scheduler.history("wc")[0]["state"] == "succeeded"
    assert scheduler.run("wc", 1)["detail"]["slowest"][0]["server"] == "S_0"


def test_details_and_profiles_go_with_the_history(config: Path, scheduler: Scheduler, home: Path) -> None:
    settings = scheduler.settings.model_copy(update={"history_keep_runs": 2})
    scheduler.submit_job(job("wc", run_once=False))
    for _ in range(4):
        Runner(settings, Telling(settings)).run(once=True)
        scheduler.store.set_cycle(scheduler.store.cycle())
    kept = {run["run"] for run in scheduler.history("wc")}
    left = {path.name.partition(".")[0] for path in (settings.state_dir / "profiles/wc").iterdir()}
    assert len(kept) == 2 and left == {str(run) for run in kept}
    assert {row["run"] for row in scheduler.store.rows("SELECT run FROM details")} == kept


def test_a_script_has_its_phase(settings: Settings, scheduler: Scheduler, tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text(f"import os, time\nwhile not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)\n")
    scheduler.submit_job({"job_type": "script", "job_name": "s", "script_location": str(script), "run_once": True})
    thread = threading.Thread(target=Runner(settings, Telling(settings)).run, args=(True,))
    thread.start()
    try:
        seen = wait_until(lambda: (new := scheduler.progress()) and new.phases and new, 20, "progress")
    finally:
        (tmp_path / "go").touch()
        thread.join()
    assert (seen.job_type, seen.phases[0].name, seen.phases[0].unit) == ("script", "SCRIPT", "")
    assert scheduler.run("s", 1)["detail"]["phases"][0]["ended"] is not None


def test_a_transfer_has_bytes_of_a_total(scheduler: Scheduler) -> None:
    keeper = Keeper(scheduler.store, {"job_name": "up", "job_type": "file_transfer"}, 1, lambda event, **facts: None)
    keeper("LIST", files=0, sent_bytes=0, total_bytes=0)
    keeper("TRANSFER", files=0, sent_bytes=0, total_bytes=100)
    keeper("TRANSFER", files=2, sent_bytes=40, total_bytes=100)
    list_, moved = keeper.progress(time.time()).phases
    assert (list_.name, list_.unit, list_.total) == ("LIST", "", 0) and list_.ended is not None
    assert (moved.name, moved.unit, moved.done, moved.total, moved.records) == ("TRANSFER", "bytes", 40, 100, 2)


def test_a_hook_gets_the_counters(settings: Settings, scheduler: Scheduler, tmp_path: Path) -> None:
    taken = tmp_path / "facts.json"
    hook = ["sh", "-c", f"cat > {taken}.partial && mv {taken}.partial {taken}"]
    scheduler.submit_job(job("wc"))
    Runner(settings.model_copy(update={"on_success": hook}), Telling(settings)).run(once=True)
    assert json.loads(taken.read_text())["counts"]["counters"] == {"bad": 2}


def test_a_run_whose_runner_is_no_more_is_not_shown_as_under_way(settings: Settings, scheduler: Scheduler) -> None:
    """Killed in the middle, it leaves its last word in the queue's file."""
    store, now = scheduler.store, time.time()
    scheduler.submit_job(job("wc"))
    run = store.start_run("wc", now)
    store.enter_phase("wc", run, "MAP", now)
    seen = Progress(job_name="wc", run=run, job_type="mapreduce", started=now - 60, updated=now - 30, fraction=0.5)
    store.set_progress(seen)
    assert scheduler.progress() is None and now_of(scheduler) is None
    assert scheduler.show("wc")["progress"] is None and scheduler.queue()[0]["progress"] is None
    with listening(settings.state_dir):
        assert scheduler.progress() == seen == now_of(scheduler), "one that is only slow is shown"
