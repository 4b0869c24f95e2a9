"""What becomes of a job that failed: it stays, is tried again, or leaves with its group; and why a job waits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from fake_cluster import FakeCluster, ran
from queues import job, states

from mrcore.errors import UsageError
from mrcore.queue.job import keeps, retry_seconds, validate
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings


class Clocked(Runner):
    """A Runner that is stepped by hand, with what it reported; its runs end at the time of the step."""

    def __init__(self, settings: Settings) -> None:
        self.told: list[dict[str, Any]] = []
        super().__init__(
            settings, FakeCluster(settings), lambda event, **facts: self.told.append({"event": event} | facts)
        )
        self.now = time.time()
        self._begin_cycle()

    def _conclude(self, execution: Any, now: float) -> None:
        super()._conclude(execution, self.now)

    def until_idle(self) -> list[str]:
        """Step until there is nothing to do at this time; gives what ran, as "name state"."""
        before = len(self.told)
        while self.step(self.now) == 0.0:
            pass
        return [f"{each['job_name']} {each['state']}" for each in self.told[before:] if each["event"] == "ended"]

    def after(self, seconds: float, cycle: bool = False) -> list[str]:
        """The same, later, with `cycle` at the begin of the next cycle."""
        self.now += seconds
        if cycle:
            assert self._until_next_cycle(self.now) <= 0
        return self.until_idle()


@pytest.fixture
def runner(scheduler: Scheduler, settings: Settings) -> Any:
    made = Clocked(settings)
    yield made
    made.store.close()


def mend(settings: Settings) -> None:
    (settings.state_dir / "mended").touch()


def workflow(**keys: Any) -> list[dict[str, Any]]:
    """A recurring group of three steps; the one in the middle, with these keys, fails until it is mended."""
    steps = {"a": ("ok", {}), "b": ("flaky", keys), "c": ("ok", {})}
    return [job(name, does, group_name="g", run_once=False, **more) for name, (does, more) in steps.items()]


def why(scheduler: Scheduler, name: str) -> dict[str, Any]:
    return next(row["why"] for row in scheduler.queue() if row["job_name"] == name)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("keys", "stays"),
    [
        ({"run_once": True}, False),
        ({"run_once": False}, True),
        ({"run_once": False, "on_failure": "leave"}, False),
        ({"run_once": True, "on_failure": "keep"}, True),
    ],
)
def test_who_stays_after_a_failure(
    scheduler: Scheduler, runner: Clocked, settings: Settings, keys: dict[str, Any], stays: bool
) -> None:
    assert keeps(validate(job("a", **keys))) is stays
    scheduler.submit_job(job("a", "flaky", **keys))
    assert runner.until_idle() == ["a failed"]
    assert (runner.told[-2]["stays"], runner.told[-2]["retry_at"]) == (stays, None)
    assert [row["job_name"] for row in scheduler.queue()] == (["a"] if stays else [])
    assert [row["job_name"] for row in scheduler.fallen()] == ([] if stays else ["a"])
    assert runner.after(29) == []  # not before the next cycle
    mend(settings)
    assert runner.after(1, cycle=stays) == (["a succeeded"] if stays else [])
    assert states(scheduler, "a") == (["succeeded", "failed"] if stays else ["failed"])
    assert bool(scheduler.queue()) is (stays and not keys["run_once"])


def test_a_kept_job_waits_for_every_and_shows_each_failure(scheduler: Scheduler, runner: Clocked) -> None:
    scheduler.submit_job(job("a", "fail", run_once=False, every=100))
    assert runner.until_idle() == ["a failed"]
    assert runner.told[-2]["exception"]["message"] == "map failed"
    assert runner.after(31) == [] and runner._until_next_cycle(runner.now) > 60
    assert runner.after(69, cycle=True) == ["a failed"]
    assert runner.after(100, cycle=True) == ["a failed"]
    assert states(scheduler, "a") == ["failed"] * 3
    assert why(scheduler, "a")["text"].endswith("; its last run failed")


def test_a_kept_job_is_no_hot_loop_when_cycles_follow_at_once(scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_jobs([job("a", "flaky", run_once=False), job("b", run_once=False)])
    runner = Clocked(settings.model_copy(update={"cycle_interval_seconds": 0}))
    assert sorted(runner.until_idle()) == ["a failed", "b succeeded"]
    assert runner._until_next_cycle(runner.now) == pytest.approx(5.0)
    mend(settings)
    assert runner.after(5, cycle=True) == ["a succeeded", "b succeeded"]
    assert runner._until_next_cycle(runner.now) <= 0
    runner.store.close()


def test_retries_wait_twice_as_long_each_time_and_then_it_is_final(scheduler: Scheduler, runner: Clocked) -> None:
    scheduler.submit_jobs([job("a", "fail", retries=3, retry_delay="10s"), job("b")])
    assert runner.until_idle() == ["a failed", "b succeeded"]
    for number, seconds in enumerate((10, 20, 40), 1):
        assert runner.store.job("a").tries == number  # type: ignore[union-attr]
        assert why(scheduler, "a")["code"] == "retry"
        assert why(scheduler, "a")["text"].startswith(f"retry {number} of 3 in ")
        assert runner.after(seconds - 0.5) == []
        assert runner.after(0.5) == ["a failed"]
    assert scheduler.queue() == []
    assert states(scheduler, "a") == ["failed"] * 4
    assert runner.ended == {"retried": 3, "failed": 1, "succeeded": 1}
    assert [row["cause"] for row in scheduler.fallen()] == ["failed"]
    texts = [event["text"] for event in scheduler.show("a")["events"]]
    assert "retry 1 of 3 in 10 s" in texts and "retry 3 of 3 in 40 s" in texts


def test_retry_delays_are_bounded() -> None:
    usual = validate(job("a", retries=20))
    assert [retry_seconds(usual, n) for n in (0, 1, 6, 7, 19, 20)] == [30, 60, 1920, 3600, 3600, None]
    assert retry_seconds(validate(job("a", retries=1000, retry_delay="1d")), 999) == 86400
    assert retry_seconds({}, 0) is None  # of a version that knew no retries
    for keys in ({"retries": -1}, {"retries": 1001}, {"retries": True}, {"retry_delay": 0}, {"on_failure": "stay"}):
        with pytest.raises(UsageError, match=next(iter(keys))):
            validate(job("a", **keys))


def test_a_retry_that_succeeds_starts_the_count_anew(scheduler: Scheduler, runner: Clocked, settings: Settings) -> None:
    scheduler.submit_job(job("a", "flaky", run_once=False, retries=1, retry_delay=10, every=1000))
    assert runner.until_idle() == ["a failed"]
    mend(settings)
    assert runner.after(10) == ["a succeeded"]  # a retry does not wait for `every`
    (settings.state_dir / "mended").unlink()
    assert runner.after(999) == []
    assert runner.after(1, cycle=True) == ["a failed"]
    assert why(scheduler, "a")["text"].startswith("retry 1 of 1")
    assert runner.after(10) == ["a failed"]
    assert runner.ended == {"retried": 2, "succeeded": 1, "failed": 1}
    assert [row["job_name"] for row in scheduler.queue()] == ["a"]


def test_once_waits_for_retries(scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_jobs([job("a", "fail", retries=2, retry_delay=0.05, run_once=False), job("b", run_once=False)])
    assert Runner(settings, FakeCluster(settings)).run(once=True) == {"retried": 2, "failed": 1, "succeeded": 1}
    assert states(scheduler, "b") == ["succeeded"]


def test_other_jobs_go_on_while_one_waits_for_its_retry(
    scheduler: Scheduler, runner: Clocked, settings: Settings
) -> None:
    scheduler.submit_jobs([job("a", "flaky", retries=1, retry_delay=3600, run_once=False), job("b", run_once=False)])
    assert runner.until_idle() == ["a failed", "b succeeded"]
    assert runner.after(30, cycle=True) == ["b succeeded"]
    assert runner.after(30, cycle=True) == ["b succeeded"]
    mend(settings)
    assert runner.after(3540) == ["a succeeded"]


def test_a_group_waits_for_the_retry_of_one_of_its_steps(
    scheduler: Scheduler, runner: Clocked, settings: Settings
) -> None:
    scheduler.submit_jobs([*workflow(retries=1, retry_delay=100), job("other", run_once=False)])
    assert runner.until_idle() == ["a succeeded", "b failed", "other succeeded"]
    assert (why(scheduler, "c")["code"], why(scheduler, "c")["behind"]) == ("group", "b")
    assert runner.after(30, cycle=True) == ["other succeeded"]
    mend(settings)
    assert runner.after(70, cycle=True) == ["b succeeded", "c succeeded", "other succeeded"]  # a had its turn before b
    assert runner.after(30, cycle=True) == ["a succeeded", "b succeeded", "c succeeded", "other succeeded"]


def test_the_rest_of_a_group_is_skipped_when_a_step_that_stays_fails(
    scheduler: Scheduler, runner: Clocked, settings: Settings
) -> None:
    scheduler.submit_jobs([*workflow(), job("d")])
    assert runner.until_idle() == ["a succeeded", "b failed", "d succeeded"]
    assert [row["job_name"] for row in scheduler.queue()] == ["a", "b", "c"]
    assert why(scheduler, "c")["text"].endswith("; skipped, since a job of its group failed")
    assert why(scheduler, "b")["text"].endswith("; its last run failed")
    assert "skipped in this cycle: group failed: b run 1: map failed" in scheduler.show("c")["events"][-1]["text"]
    mend(settings)
    assert runner.after(30, cycle=True) == ["a succeeded", "b succeeded", "c succeeded"]
    assert {row["cause"] for row in scheduler.queue()} == {None}


def test_requeue_runs_a_kept_group_at_once(scheduler: Scheduler, runner: Clocked, settings: Settings) -> None:
    scheduler.submit_jobs(workflow())
    assert runner.until_idle() == ["a succeeded", "b failed"]
    mend(settings)
    assert scheduler.requeue("g") == ["b", "c"]
    assert runner.until_idle() == ["b succeeded", "c succeeded"]


def test_requeue_ends_the_waiting_for_a_retry(scheduler: Scheduler, runner: Clocked, settings: Settings) -> None:
    scheduler.submit_job(job("a", "flaky", retries=1, retry_delay="1d"))
    assert runner.until_idle() == ["a failed"]
    assert runner.until_idle() == []
    mend(settings)
    assert scheduler.requeue("a") == ["a"]
    assert runner.until_idle() == ["a succeeded"]


def test_a_group_leaves_whole_when_a_step_that_leaves_fails(scheduler: Scheduler, runner: Clocked) -> None:
    scheduler.submit_jobs(
        [
            job("a", "fail", group_name="g", retries=1, retry_delay=10),
            job("b", group_name="g", run_once=False, retries=3),
        ]
    )
    assert runner.until_idle() == ["a failed"]
    assert runner.after(10) == ["a failed"]
    assert scheduler.queue() == []
    left = {row["job_name"]: (row["cause"], row["requeue"]) for row in scheduler.fallen()}
    assert left == {"a": ("failed", "g"), "b": ("group failed", "g")}
    assert scheduler.requeue("g") == ["a", "b"] and scheduler.fallen() == []


def test_force_run_waits_for_no_retry(scheduler: Scheduler, runner: Clocked) -> None:
    scheduler.submit_jobs([job("a", "fail", group_name="g", retries=1, retry_delay=1000)])
    assert runner.until_idle() == ["a failed"]
    scheduler.submit_job(job("b", group_name="g", force_run=True))
    assert runner.until_idle() == ["b succeeded"]


def test_what_left_is_listed_until_it_is_brought_back_replaced_or_deleted(
    scheduler: Scheduler, runner: Clocked
) -> None:
    scheduler.submit_jobs([job(name, "fail") for name in "abc"] + [job("ok")])
    runner.until_idle()
    assert [row["job_name"] for row in scheduler.fallen()] == ["a", "b", "c"]
    assert all(row["left"] and row["reason"] == "failed: map failed" for row in scheduler.fallen())
    scheduler.requeue("a")
    scheduler.submit_job(job("b"))
    scheduler.delete_job("c")
    assert scheduler.fallen() == []
    with pytest.raises(UsageError, match="not in the queue"):
        scheduler.delete_job("c")
    with pytest.raises(UsageError, match="not in the queue"):
        scheduler.delete_job("ok")


def test_the_hook_is_called_for_each_failed_run_and_told_what_follows(
    scheduler: Scheduler, settings: Settings, tmp_path: Path
) -> None:
    log = tmp_path / "hook.log"
    command = ["sh", "-c", f'cat >> "{log}"; echo >> "{log}"']
    scheduler.submit_job(job("a", "fail", retries=1, retry_delay=0.05, run_once=False))
    Runner(settings.model_copy(update={"on_failure": command}), FakeCluster(settings)).run(once=True)
    told = sorted((json.loads(line) for line in log.read_text().splitlines()), key=lambda each: each["run"])
    assert [(each["run"], each["state"], each["stays"], each["retry_at"] is None) for each in told] == [
        (1, "failed", True, False),
        (2, "failed", True, True),
    ]


# --- why a job does not start now ---


def test_why_each_job_waits(scheduler: Scheduler, runner: Clocked, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler.submit_jobs(
        [job("a"), job("b"), job("later", not_before="2999-01-01T06:00"), job("again", run_once=False, every=7200)]
    )
    assert why(scheduler, "a")["code"] == "no_runner"
    assert why(scheduler, "later") == {
        "code": "not_before", "text": "not before 2999-01-01 06:00", "behind": None,
        "until": pytest.approx(32472115200, abs=86400),
    }  # fmt: skip
    monkeypatch.setattr(scheduler._doorbell, "ring", lambda: True)  # as if a Runner listened
    assert [(row["job_name"], row["why"]["code"], row["why"]["behind"]) for row in scheduler.queue()] == [
        ("a", "next", None),
        ("b", "behind", "a"),
        ("later", "not_before", None),
        ("again", "behind", "b"),
    ]
    scheduler.store.start_run("b", time.time())
    assert [(row["job_name"], row["why"]["code"], row["why"]["behind"]) for row in scheduler.queue()] == [
        ("b", "running", None),
        ("a", "behind", "b"),
        ("later", "not_before", None),
        ("again", "behind", "a"),
    ]
    scheduler.store.end_run("b", 1, "handed back", time.time())
    scheduler.pause()
    assert {why(scheduler, name)["code"] for name in ("a", "b", "again")} == {"paused"}
    scheduler.resume()
    runner.until_idle()
    assert why(scheduler, "again")["code"] == "every"
    assert why(scheduler, "again")["text"].startswith("every 2 h at most, so in ")
    scheduler.submit_job(job("each", run_once=False))
    runner.until_idle()
    found = why(scheduler, "each")
    assert (found["code"], found["text"][:15]) == ("cycle", "its next cycle,") and 25 < found[
        "until"
    ] - time.time() <= 30
    (runner.store.path.parent / "no-nodes").write_text("nobody there")
    scheduler.submit_job(job("c"))
    assert runner.step(time.time()) > 0
    assert why(scheduler, "c")["code"] == "hold" and why(scheduler, "later")["code"] == "not_before"


# --- no cluster ---


def script(name: str, tmp_path: Path, **keys: Any) -> dict[str, Any]:
    file = tmp_path / "script.py"
    file.write_text("print('done')\n")
    return {"job_type": "script", "job_name": name, "script_location": str(file), "run_once": True} | keys


def test_without_nodes_the_queue_holds_before_a_run_begins_and_scripts_run(
    scheduler: Scheduler, runner: Clocked, settings: Settings, tmp_path: Path
) -> None:
    missing = settings.state_dir / "no-nodes"
    missing.write_text("the cluster is not started")
    scheduler.submit_jobs([job("a", job_priority=1), script("s", tmp_path), script("t", tmp_path, run_once=False)])
    assert runner.until_idle() == ["s succeeded", "t succeeded"]
    hold = scheduler.state()["hold"]
    assert (hold["reason"], hold["tries"], hold["nodes"]) == ("the cluster is not started", 1, True)
    for tries in (2, 3, 4):
        assert runner.after(60) == []
        assert scheduler.state()["hold"]["tries"] == tries
    assert scheduler.history("a") == [] and runner.store.job("a").last_run == 0  # type: ignore[union-attr]
    assert [event["text"] for event in scheduler.show("a")["events"]] == ["queued"]
    assert ran(settings) == []
    missing.unlink()
    assert runner.after(60) == ["a succeeded"]
    assert scheduler.state()["hold"] is None and scheduler.history("a")[0]["run"] == 1


def test_a_script_does_not_overtake_the_step_before_it(
    scheduler: Scheduler, runner: Clocked, settings: Settings, tmp_path: Path
) -> None:
    (settings.state_dir / "no-nodes").write_text("away")
    scheduler.submit_jobs(
        [script("first", tmp_path, group_name="g"), job("a", group_name="g"), script("last", tmp_path, group_name="g")]
    )
    assert runner.until_idle() == ["first succeeded"]
    (settings.state_dir / "no-nodes").unlink()
    scheduler.end_hold()
    assert runner.after(1) == ["a succeeded", "last succeeded"]


def test_a_hold_for_nodes_ends_when_no_job_needs_them_any_more(
    scheduler: Scheduler, runner: Clocked, settings: Settings
) -> None:
    (settings.state_dir / "no-nodes").write_text("away")
    scheduler.submit_job(job("a"))
    assert runner.until_idle() == []
    scheduler.delete_job("a")
    assert runner.after(60) == []
    assert scheduler.state()["hold"] is None


def test_a_nodes_answer_that_makes_no_sense_holds_the_queue(
    scheduler: Scheduler, runner: Clocked, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nonsense() -> None:
        raise KeyError("version\x1b[31m\n")

    monkeypatch.setattr(runner._kinds.cluster(), "check_nodes", nonsense)
    scheduler.submit_job(job("a"))
    assert runner.until_idle() == []
    assert scheduler.state()["hold"]["reason"].startswith("the nodes' answers cannot be used: KeyError: 'version")
    assert scheduler.history() == []
    monkeypatch.undo()
    assert runner.after(60) == ["a succeeded"]


def test_a_transfer_waits_for_nodes_too(
    scheduler: Scheduler, runner: Clocked, settings: Settings, tmp_path: Path
) -> None:
    (settings.state_dir / "no-nodes").write_text("away")
    (tmp_path / "aux").write_text("{}")
    transfer = {"job_type": "file_transfer", "job_name": "t", "transfer_type": "upload_auxiliary", "run_once": True}
    scheduler.submit_job(transfer | {"input_file_name": str(tmp_path / "aux"), "auxiliary_data_name": "x"})
    assert runner.until_idle() == [] and scheduler.history() == []


def test_a_jobs_projects_dir_is_settled_where_it_is_submitted(
    scheduler: Scheduler, settings: Settings, tmp_path: Path
) -> None:
    scheduler.submit_job(job("a", projects_dir="/etc"))
    assert scheduler.show("a")["job"]["projects_dir"] == str(settings.projects_dir)
    elsewhere = settings.model_copy(update={"projects_dir": tmp_path / "elsewhere"})
    spec = scheduler.show("a")["job"]
    assert elsewhere.projects_of(spec) == settings.projects_dir
    assert elsewhere.projects_of({}) == tmp_path / "elsewhere"  # of a version that did not settle it
    deployed = elsewhere.model_copy(update={"local": False})
    assert deployed.projects_of(spec | {"projects_dir": "/etc"}) == tmp_path / "elsewhere"
