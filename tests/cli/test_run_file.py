"""`mrcore run FILE`, `mrcore submit --wait`: jobs are run or waited for, and the status says how they ended."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conditions import wait_until
from screen import Terminal

from mrcore.queue.scheduler import Scheduler

MRCORE = [str(Path(sys.executable).with_name("mrcore"))]
WAITS = "import os, time\nopen('{name}.began', 'w').close()\nwhile not os.path.exists('go'): time.sleep(0.02)\n"
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """Start `mrcore …` with pipes; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        command = ["env", "--default-signal=INT", *MRCORE, *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def script(name: str, code: str, **keys: Any) -> str:
    """Write a script and its job file; return the file's name."""
    Path(f"{name}.py").write_text(code)
    job = {"job_type": "script", "job_name": name, "script_location": str(Path(f"{name}.py").absolute())}
    Path(f"{name}.json").write_text(json.dumps(job | {"run_once": True} | keys))
    return f"{name}.json"


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, out, err


def test_run_queues_jobs_runs_them_and_says_what_to_type_next(start: Start, scheduler: Scheduler) -> None:
    status, out, err = ended(start("run", script("one", "pass"), script("two", "pass", run_once=False)))
    assert status == 0, err
    said = re.sub(r"in \d\.\d+ s", "in N s", out).splitlines()
    assert said == [
        "one: queued; it runs once",
        "two: queued; it recurs each cycle (run_once: true runs it once)",
        "one run 1: succeeded in N s; next: `mrcore logs one`",
        "two run 1: succeeded in N s; next: `mrcore logs two`; it is still in the queue: `mrcore run` goes on with it",
    ]
    assert re.fullmatch(r"one run 1: SCRIPT \d\.\d+ s\ntwo run 1: SCRIPT \d\.\d+ s\n", err), err
    assert [row["job_name"] for row in scheduler.queue()] == ["two"]


def test_a_run_that_fails_and_a_job_that_left_are_status_1(start: Start, scheduler: Scheduler) -> None:
    bad = script("bad", "raise SystemExit('no')", group_name="g")
    status, out, err = ended(start("run", bad, script("after", "pass", group_name="g")))
    assert status == 1
    assert "bad run 1: failed: the script" in err and "see `mrcore show bad --run 1`" in err
    assert "after has not run: group failed: bad run 1" in err and "succeeded" not in out


def test_jobs_that_are_due_before_run_first_and_are_named(start: Start, scheduler: Scheduler) -> None:
    assert ended(start("submit", script("before", "pass", job_priority=5)))[0] == 0
    ended(start("submit", script("behind", "pass", job_priority=-5)))
    status, out, err = ended(start("run", script("mine", "pass")))
    assert status == 0
    assert "before run 1 is due before, and runs first" in err
    assert "before run 1: succeeded\n" in out
    assert [row["job_name"] for row in scheduler.queue()] == ["behind"], "only what was asked for is waited for"


def test_a_paused_queue_is_not_waited_for(start: Start, scheduler: Scheduler) -> None:
    scheduler.pause()
    for command in (["run"], ["submit", "--wait"]):
        status, out, err = ended(start(*command, script("one", "pass")))
        assert (status, out) == (1, out) and "the queue is paused: `mrcore resume` goes on" in err
        assert scheduler.queue()[0]["job_name"] == "one" and not scheduler.history()


def test_submit_wait_waits_for_the_runner_that_there_is_and_ctrl_c_leaves_it_alone(
    start: Start, scheduler: Scheduler
) -> None:
    runner = start("run")
    wait_until(lambda: scheduler.state()["runner"], 60, "the Runner")
    leaves = start("run", script("one", WAITS.format(name="one")))
    wait_until(Path("one.began").exists, 60, "the run")
    leaves.send_signal(signal.SIGINT)
    status, _, err = ended(leaves)
    assert status == 130 and "the Runner goes on: `mrcore watch one`" in err
    assert scheduler.state()["running"]["job_name"] == "one"
    waits = start("submit", "--wait", "--json", script("two", "pass"))
    Path("go").touch()
    status, out, err = ended(waits)
    assert status == 0, err
    assert {key: json.loads(out)[0][key] for key in ("job_name", "run", "state", "why")} == {
        "job_name": "two", "run": 1, "state": "succeeded", "why": None
    }  # fmt: skip
    assert sorted((row["job_name"], row["state"]) for row in scheduler.history()) == [
        ("one", "succeeded"), ("two", "succeeded")
    ]  # fmt: skip
    assert runner.poll() is None


def test_run_takes_over_when_the_runner_ends(start: Start, scheduler: Scheduler) -> None:
    runner = start("run")
    wait_until(lambda: scheduler.state()["runner"], 60, "the Runner")
    mine = start("run", script("one", WAITS.format(name="one")))
    wait_until(Path("one.began").exists, 60, "the run")
    runner.send_signal(signal.SIGTERM)
    assert ended(runner)[0] == 0
    Path("go").touch()
    status, out, err = ended(mine)
    assert status == 0 and "one run 2: succeeded" in out, err


def test_ctrl_c_hands_a_run_that_is_under_way_here_back(start: Start, scheduler: Scheduler) -> None:
    mine = start("run", script("one", WAITS.format(name="one")))
    wait_until(Path("one.began").exists, 60, "the run")
    mine.send_signal(signal.SIGINT)
    status, _, err = ended(mine)
    assert status == 130 and "one run 1: handed back" in err
    assert [(row["job_name"], row["state"]) for row in scheduler.queue()] == [("one", "queued")]


def test_a_job_of_tomorrow_is_waited_for_with_a_word_and_deleting_it_ends_the_wait(
    start: Start, scheduler: Scheduler
) -> None:
    mine = start("run", script("one", "pass", not_before="2199-01-01T06:00"))
    assert mine.stderr
    said = mine.stderr.readline()
    assert said == "one waits: not before 2199-01-01 06:00; Ctrl-C leaves it in the queue\n"
    scheduler.delete_job("one")
    status, _, err = ended(mine)
    assert (status, err) == (1, "one has not run: deleted; see `mrcore show one`\n")


def test_options_that_do_not_go_together_are_refused(start: Start, home: Path) -> None:
    assert ended(start("run", "--once", script("one", "pass")))[0] == 2
    assert ended(start("run", "--set", "retries=1"))[0] == 2


def test_on_a_terminal_the_run_is_shown_in_place_and_no_line_holds_two_things(scheduler: Scheduler) -> None:
    terminal = Terminal([*MRCORE, "run", script("one", WAITS.format(name="one")), script("two", "pass")], rows=24)
    try:
        terminal.until(lambda: any("  SCRIPT" in line for line in terminal.display()))
        shown = [line for line in terminal.display() if line]
        assert [re.sub(r"\d+(\.\d+)? s", "N s", line) for line in shown] == [
            "one: queued; it runs once",
            "two: queued; it runs once",
            "one run 1: N s",
            f"  SCRIPT    {' ' * 23}    N s",
        ]
        Path("go").touch()
        assert terminal.wait() == 0
        assert [re.sub(r"\d+\.\d+ s", "N s", line) for line in terminal.display() if line] == [
            "one: queued; it runs once",
            "two: queued; it runs once",
            "one run 1: succeeded in N s; next: `mrcore logs one`",
            "two run 1: succeeded in N s; next: `mrcore logs two`",
        ]
    finally:
        terminal.kill()
