"""The queue end to end with a stand-in for the cluster: cycles, groups, holds, recovery, many processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conditions import wait_until
from fake_cluster import FakeCluster, ran
from queues import job, once, states

from mrcore.errors import JobFault, UsageError
from mrcore.queue.cycle import ready
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings, watch_settings
from mrcore.state.doorbell import Doorbell
from mrcore.state.store import JobRow
from mrcore.system.paths import write_atomic


def test_order_force_then_priority_then_submission(scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_jobs([job("a"), job("b"), job("c", job_priority=5), job("d", force_run=True, run_once=False)])
    assert [row["job_name"] for row in scheduler.queue()] == ["d", "c", "a", "b"]
    assert once(settings) == {"succeeded": 4}
    assert [line for line in ran(settings) if line.startswith("start")] == [
        "start d 1",
        "start c 1",
        "start a 1",
        "start b 1",
    ]
    assert [(row["job_name"], row["force_run"]) for row in scheduler.queue()] == [("d", False)]


def test_history_has_phases_counts_and_times(scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_job(job("a"))
    once(settings)
    (row,) = scheduler.history()
    assert list(row["phases"]) == ["MAP", "REDUCE"]
    assert all(phase["ended"] >= phase["started"] for phase in row["phases"].values())
    assert row["counts"] == {"items": 7}
    assert (row["run"], row["attempts"], row["exception"]) == (1, 1, None)
    assert row["start_time"] <= row["end_time"]


def test_recurring_job_runs_once_each_cycle(scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_job(job("a", run_once=False))
    runner = Runner(settings, FakeCluster(settings))
    runner._begin_cycle()
    now = time.time()
    assert runner.step(now) == 0.0
    assert runner.step(now) is None
    assert 29 < runner._until_next_cycle(now) <= 30
    assert runner.step(now + 29) is None
    assert runner._until_next_cycle(now + 30) <= 0.0
    assert runner.step(now + 30) == 0.0
    assert runner.step(now + 30) is None
    assert states(scheduler, "a") == ["succeeded", "succeeded"]


def test_each_once_is_a_cycle_of_its_own(scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_job(job("a", run_once=False))
    assert [once(settings), once(settings)] == [{"succeeded": 1}, {"succeeded": 1}]


def test_every_and_not_before_bound_recurrence() -> None:
    row = JobRow(
        job_name="a", state="queued", reason=None, job_type="mapreduce", group_name=None, job_priority=0.0,
        force_run=False, every=100.0, not_before=None, submitted=1.0, cycle=0, last_run=1, last_start=50.0, number=1,
        cause=None, tries=0, retry_at=None, retries=0, left_at=None, spec_json="{}",
    )  # fmt: skip
    assert not ready([row], 1, 149.0)
    assert ready([row], 1, 150.0) == [row]
    row = row._replace(not_before="1970-01-01T00:10:00+00:00")
    assert not ready([row], 1, 599.0)
    assert ready([row], 1, 600.0) == [row]
    row = row._replace(force_run=True)
    assert ready([row], 1, 60.0) == [row]
    assert not ready([row._replace(cycle=1)], 1, 700.0)


def test_failure_takes_the_group_and_requeue_brings_it_back(scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_jobs(
        [job("a", group_name="g"), job("b", "fail", group_name="g"), job("c", group_name="g"), job("d")]
    )
    assert once(settings) == {"succeeded": 2, "failed": 1}
    assert scheduler.queue() == []
    story = scheduler.show("b")
    assert story["reason"] == "failed: map failed"
    assert story["runs"][0]["exception"]["details"]["line"] == "the line"
    assert scheduler.show("c")["reason"] == "group failed: b run 1: map failed"
    assert sorted(scheduler.requeue("g")) == ["b", "c"]
    with pytest.raises(UsageError, match="nothing waits"):
        scheduler.requeue("g")
    assert sorted(row["job_name"] for row in scheduler.queue()) == ["b", "c"]


def test_an_internal_error_fails_the_job_after_a_few_tries_and_the_innocent_one_behind_it_runs(
    scheduler: Scheduler, settings: Settings
) -> None:
    scheduler.submit_jobs([job("a", "bug"), job("b", job_priority=-1)])
    assert once(settings) == {"handed back": settings.max_attempts - 1, "failed": 1, "succeeded": 1}
    error = scheduler.history("a")[0]["exception"]
    assert (error["class"], error["message"]) == ("InternalError", "internal error: KeyError: 'oops'")
    assert "fake_cluster.py" in error["details"]["internal_traceback"]
    assert scheduler.state()["hold"] is None
    assert not [event for event in scheduler.show("a")["events"] if event["text"].startswith("held")]
    scheduler.submit_job(job("a", "bug"))  # a new job of that name has all its tries again
    assert once(settings.model_copy(update={"max_attempts": 1})) == {"failed": 1}
    scheduler.submit_job(job("a", "bug"))
    assert once(settings) == {"handed back": 2, "failed": 1}


@pytest.mark.parametrize("error", [BrokenPipeError(32, "x"), OSError(28, "full"), ValueError("\ud83d"), KeyError()])
@pytest.mark.parametrize("event", ["started", "progress", "ended", "hold", "recovered", "idle"])
def test_a_report_that_fails_touches_neither_the_record_nor_the_queue(
    scheduler: Scheduler, settings: Settings, error: Exception, event: str
) -> None:
    heard: list[str] = []

    def report(what: str, **facts: Any) -> None:
        heard.append(what)
        if what == "hold":
            (settings.state_dir / "back").touch()
        if what == event:
            raise error

    with scheduler.store.change():  # a run that a dead Runner left
        scheduler.submit_job(job("left"))
        scheduler.store.start_run("left", 1.0)
    scheduler.submit_jobs([job("f", "fail"), job("g", "bug"), job("s", job_priority=-1)])
    held = int(event == "hold")  # nobody else would bring the node back
    scheduler.submit_jobs([job("d", "down")] * held)
    ended = Runner(settings, FakeCluster(settings), report).run(once=True)
    assert ended == {"handed back": 3 + held, "failed": 2, "succeeded": 2 + held}
    assert heard.count(event) == 1 and heard[-1] == event
    assert [row["state"] for row in scheduler.history("f")] == ["failed"]
    assert scheduler.queue() == []


HOSTILE = ["\ud83d", "\x1b[31m\x07", "a\nb\r\tc", "\0", "x" * 3_000_000, "\u202e" * 50_000, "[bold]%s{0}[/]", ""]


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_an_error_says_the_failure_is_recorded_and_the_queue_goes_on(
    scheduler: Scheduler, settings: Settings, text: str
) -> None:
    class Hostile(FakeCluster):
        def run(self, job: dict[str, Any], **facts: Any) -> dict[str, Any]:
            if job["job_name"] == "bad":
                raise JobFault(text, line=text, deep={text: [[[text] * 1000] * 1000]}, number=10**5000)
            if job["job_name"] == "worse":
                raise type("Error" + "\ud83d", (BaseException,), {})(text)
            if job["job_name"] == "odd":
                return {"counts": {text: float("nan"), "n": text}}
            return super().run(job, **facts)

    scheduler.submit_jobs([job("bad"), job("worse"), job("odd"), job("good", job_priority=-1)])
    one = settings.model_copy(update={"max_attempts": 1})
    assert Runner(one, Hostile(one)).run(once=True) == {"failed": 2, "succeeded": 2}
    assert once(settings) == {}
    told = json.dumps(scheduler.show("bad"), ensure_ascii=False) + scheduler.show("bad")["reason"]
    told.encode()
    assert len(told) < 1_000_000
    assert "\n" not in scheduler.show("bad")["reason"] and len(scheduler.show("bad")["reason"]) < 3_000


def test_cluster_fault_holds_the_queue_and_goes_on(scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_jobs([job("a", "down", job_priority=1, group_name="g"), job("b", group_name="g")])
    runner = Runner(settings, FakeCluster(settings))
    thread = threading.Thread(target=runner.run, kwargs={"once": True})
    thread.start()
    hold = wait_until(lambda: scheduler.state()["hold"], message="a hold")
    assert hold["reason"] == "node-0 does not answer"
    wait_until(lambda: scheduler.state()["hold"]["tries"] > 2, message="more tries")
    assert not states(scheduler, "b")
    (settings.state_dir / "back").touch()
    scheduler.resume()
    thread.join(10)
    assert states(scheduler, "a")[0] == "succeeded"
    assert set(states(scheduler, "a")[1:]) == {"handed back"}
    assert states(scheduler, "b") == ["succeeded"]
    assert scheduler.state()["hold"] is None
    assert scheduler.queue() == []


def test_committed_but_unfinished_run_waits_and_is_never_repeated(scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_job(job("a", "half"))
    thread = threading.Thread(target=once, args=(settings,))
    thread.start()
    wait_until(lambda: (scheduler.state()["hold"] or {}).get("tries", 0) > 1, message="a hold")
    (settings.state_dir / "back").touch()
    thread.join(10)
    assert states(scheduler, "a") == ["succeeded"]
    assert ran(settings) == ["start a 1", "finish a 1"]
    assert scheduler.history("a")[0]["counts"] == {"items": 7}


def test_cancel_ends_the_run_only(scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_jobs([job("a", "wait", run_once=False, group_name="g"), job("b", group_name="g")])
    thread = threading.Thread(target=once, args=(settings,))
    thread.start()
    wait_until(lambda: scheduler.queue()[0]["phase"] == "MAP", message="a run")
    with pytest.raises(UsageError, match="not running"):
        scheduler.cancel("b")
    assert scheduler.cancel("a") == 1
    thread.join(10)
    assert states(scheduler, "a") == ["cancelled"]
    assert states(scheduler, "b") == ["succeeded"]
    assert [row["job_name"] for row in scheduler.queue()] == ["a"]


def test_timeout_fails_the_job(scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_job(job("a", "wait", timeout_seconds=0.05))
    assert once(settings) == {"failed": 1}
    assert "timeout: ran longer than its timeout_seconds 0.05" in scheduler.show("a")["reason"]


def test_replace_and_delete_while_running_act_on_the_next_run(scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_jobs([job("a", "wait"), job("z", "wait", run_once=False, group_name="g")])
    thread = threading.Thread(target=once, args=(settings,))
    thread.start()
    wait_until(lambda: scheduler.state()["running"], message="a run")
    answer = scheduler.submit_job(job("a", compress=True))
    assert answer["replaced"] and "the run under way goes on" in answer["message"]
    scheduler.delete_job("z")
    (settings.state_dir / "go").touch()
    thread.join(10)
    assert states(scheduler, "a") == ["succeeded", "succeeded"]
    assert scheduler.show("z")["state"] == "out"
    with pytest.raises(UsageError, match=r"not in the queue"):
        scheduler.delete_job("z")


def test_pause_and_resume(scheduler: Scheduler, settings: Settings) -> None:
    scheduler.pause()
    scheduler.submit_job(job("a"))
    runner = Runner(settings, FakeCluster(settings))
    runner._begin_cycle()
    assert runner.step(time.time()) == 5.0
    assert scheduler.state()["paused"]
    scheduler.resume()
    assert runner.step(time.time()) == 0.0
    assert states(scheduler, "a") == ["succeeded"]


def test_submit_is_all_or_nothing_and_tells_every_fault(scheduler: Scheduler) -> None:
    with pytest.raises(UsageError) as caught:
        scheduler.submit_jobs(
            [job("a"), job("b", "nothing_like_it"), job("c", project_name="fak"), job("a", downsample=0)]
        )
    text = str(caught.value)
    assert "no function 'nothing_like_it'" in text
    assert "did you mean 'fake'?" in text
    assert "downsample" in text
    assert scheduler.queue() == []
    with pytest.raises(UsageError, match="more than once"):
        scheduler.submit_jobs([job("a"), job("a")])
    assert scheduler.queue() == []


def test_estimate_needs_two_runs(scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_job(job("a", run_once=False))
    once(settings)
    assert scheduler.estimate_next_runtime("a") is None
    once(settings)
    estimate = scheduler.estimate_next_runtime("a")
    assert estimate is not None
    assert estimate["min_seconds"] <= estimate["median_seconds"] <= estimate["max_seconds"]
    assert estimate["runs"] == 2


def test_templates_have_the_originals_names(scheduler: Scheduler) -> None:
    assert scheduler.get_mapreduce_job_template()["job_type"] == "mapreduce"
    assert scheduler.get_script_template()["job_type"] == "script"
    assert scheduler.get_file_transfer_template()["job_type"] == "file_transfer"


def test_second_runner_is_refused_by_pid(scheduler: Scheduler, settings: Settings, spawn: Any) -> None:
    first = spawn()
    wait_until(lambda: scheduler.state()["runner"], message="a Runner")
    with pytest.raises(UsageError, match=f"process {first.pid}"):
        once(settings)
    first.kill()
    first.wait()
    scheduler.submit_job(job("a"))
    assert once(settings) == {"succeeded": 1}


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_signal_hands_the_run_back(scheduler: Scheduler, settings: Settings, spawn: Any, sign: signal.Signals) -> None:
    scheduler.submit_job(job("a", "wait"))
    process = spawn()
    wait_until(lambda: scheduler.state()["running"], message="a run")
    process.send_signal(sign)
    assert process.wait(10) == 0
    (row,) = scheduler.history("a")
    assert row["state"] == "handed back"
    assert "Runner was stopped" in row["exception"]["message"]
    assert scheduler.state()["hold"] is None
    (settings.state_dir / "go").touch()
    assert once(settings) == {"succeeded": 1}


def test_killed_runner_before_commit_starts_again(scheduler: Scheduler, settings: Settings, spawn: Any) -> None:
    scheduler.submit_job(job("a", "wait"))
    process = spawn()
    wait_until(lambda: scheduler.state()["running"], message="a run")
    process.kill()
    process.wait()
    assert scheduler.state()["runner"] is False
    (settings.state_dir / "go").touch()
    assert once(settings) == {"handed back": 1, "succeeded": 1}
    assert states(scheduler, "a") == ["succeeded", "handed back"]


def test_killed_runner_after_commit_is_not_repeated(scheduler: Scheduler, settings: Settings, spawn: Any) -> None:
    scheduler.submit_jobs([job("a", "die_after_commit"), job("b")])
    assert spawn("--once").wait(10) == -signal.SIGKILL
    assert once(settings) == {"succeeded": 2}
    assert ran(settings) == ["start a 1", "finish a 1", "start b 1", "end b 1"]


def test_killed_runner_after_cancel_counts_as_cancelled(scheduler: Scheduler, settings: Settings, spawn: Any) -> None:
    scheduler.submit_job(job("a", "stubborn"))
    process = spawn()
    wait_until(lambda: scheduler.state()["running"], message="a run")
    scheduler.cancel("a")
    process.kill()
    process.wait()
    assert once(settings) == {"cancelled": 1}
    assert scheduler.queue() == []


SUBMITTER = """
import sys
from mrcore.settings.config import load_settings
from mrcore.queue.scheduler import Scheduler
scheduler = Scheduler(load_settings(sys.argv[1]))
for n in range(int(sys.argv[3])):
    scheduler.submit_job({"job_name": f"j{sys.argv[2]}_{n}", "project_name": "fake", "input_dirs": ["x"],
                          "map_function_name": "ok", "run_once": True})
"""


def test_job_deleted_after_the_pick_is_not_run(scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_job(job("a"))
    scheduler.delete_job("a")
    Runner(settings, FakeCluster(settings))._execute("a", time.time())
    assert scheduler.history() == []


def test_many_submitters_and_a_runner_at_once(
    scheduler: Scheduler, config: Path, settings: Settings, spawn: Any
) -> None:
    runner = spawn()
    arguments = [sys.executable, "-c", SUBMITTER, str(config)]
    submitters = [subprocess.Popen([*arguments, str(number), "20"]) for number in range(6)]
    assert [each.wait(60) for each in submitters] == [0] * 6
    wait_until(lambda: not scheduler.queue(), 60, "an empty queue")
    runner.terminate()
    assert runner.wait(10) == 0
    assert sorted(ran(settings)) == sorted(
        f"{what} j{p}_{n} 1" for what in ("start", "end") for p in range(6) for n in range(20)
    )
    assert len(scheduler.history()) == 120


def test_runner_killed_again_and_again_loses_and_repeats_nothing(
    scheduler: Scheduler, settings: Settings, spawn: Any
) -> None:
    scheduler.submit_jobs([job(f"j{n}") for n in range(60)])
    randomness = random.Random(7)
    while scheduler.queue():
        process = spawn()
        target = len(ran(settings)) + randomness.randrange(1, 12)
        wait_until(lambda t=target: len(ran(settings)) >= t or not scheduler.queue(), 20, "progress")
        process.kill()
        process.wait()
        if not scheduler.queue() and scheduler.state()["running"]:
            once(settings)
    rows = scheduler.history()
    assert sorted(row["job_name"] for row in rows if row["state"] == "succeeded") == sorted(f"j{n}" for n in range(60))


def test_waiting_runner_wakes_at_once_and_adds_little(scheduler: Scheduler, settings: Settings, spawn: Any) -> None:
    spawn()
    wait_until(lambda: scheduler.state()["runner"], message="a Runner")
    began = time.monotonic()
    for number in range(20):
        scheduler.submit_job(job(f"j{number}"))
        wait_until(lambda n=number: states(scheduler, f"j{n}") == ["succeeded"], message="success")
    print(f"submit to success: {(time.monotonic() - began) / 20 * 1000:.1f} ms")
    assert time.monotonic() - began < 20  # far below 20 fallbacks of the doorbell


def test_retention_bounds_the_history(scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_jobs([job("a", run_once=False), job("rare"), job("kept", run_once=False, delete_job_data=False)])
    once(settings)
    scheduler.delete_job("kept")
    (settings.state_dir / "manifests/a/1.json.partial").write_text("of a Runner that died")
    for _ in range(4):
        Runner(settings.model_copy(update={"history_keep_runs": 2}), FakeCluster(settings)).run(once=True)
    assert [row["run"] for row in scheduler.history()] == [5, 4]
    manifests = {
        str(path.relative_to(settings.state_dir / "manifests")) for path in settings.state_dir.glob("manifests/*/*")
    }
    # What `cat` needs stays, however old its run.
    assert manifests == {"a/4.json", "a/5.json", "rare/1.json", "kept/1.json"}


def test_ringing_a_runner_that_ends_at_that_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Doorbell(tmp_path)
    listener.wait(0)
    assert Doorbell(tmp_path).ring()
    opened = os.open

    def open_then_end(*arguments: Any) -> int:
        descriptor = opened(*arguments)
        listener.close()
        return descriptor

    monkeypatch.setattr(os, "open", open_then_end)
    assert not Doorbell(tmp_path).ring()


def test_the_runner_takes_up_changed_settings_between_runs(
    config: Path, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """A node that joins or leaves must not end what runs, so the Runner is not started again for it."""
    keys, fresh = json.loads(config.read_text()), watch_settings(config)
    runner = Runner(settings, FakeCluster(settings), fresh=fresh)

    def step(text: str) -> Settings:
        write_atomic(config, text.encode())
        runner.step(time.time())
        return runner.settings

    runner.store.put("cycle", {"number": 1, "drained": None, "first": 0})
    assert step(json.dumps(keys)) == settings
    two = [{"name": name, "address": "127.0.0.1", "servers": 1, "agent_port": port, "server_port": port + 1,
            "compute_dir": "/c"} for name, port in (("a", 1000), ("b", 2000))]  # fmt: skip
    joined = step(json.dumps(keys | {"home": str(settings.home), "nodes": two, "on_failure": ["/tell"]}))
    assert [node.name for node in joined.nodes] == ["a", "b"]
    assert runner._kinds.cluster().settings is joined
    assert step("{ half a fi") is joined
    assert step(json.dumps(keys | {"home": str(settings.home), "state_dir": "/elsewhere", "nodes": two})) is joined
    runner.step(time.time())
    assert [record.getMessage().split(":")[0] for record in caplog.records][1:] == [
        "the settings name another state_dir, /elsewhere"
    ]
    runner.store.close()
