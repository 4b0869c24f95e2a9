"""Hooks: told what ended, as JSON; whatever they do, the Runner goes on."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conditions import wait_until
from fake_cluster import FakeCluster

from mrcore.errors import JobFault, UsageError
from mrcore.queue import hooks
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings, load_settings
from mrcore.system import procfs

TELL = "import sys, pathlib; pathlib.Path(sys.argv[1]).open('a').write(sys.stdin.read() + chr(10))"


@pytest.fixture
def settings(home: Path, projects_dir: Path) -> Settings:
    project = projects_dir / "fake"
    project.mkdir()
    (project / "map_functions.py").write_text("def ok(line, aux): ...\ndef fail(line, aux): ...\ndef down(l, a): ...\n")
    path = home.parent / "config.json"
    tell = {key: [sys.executable, "-c", TELL, str(home / key)] for key in ("on_success", "on_failure", "on_hold")}
    path.write_text(json.dumps({"projects_dir": str(projects_dir), "hold_backoff_first_seconds": 0.05} | tell))
    return load_settings(path)


def job(name: str, does: str = "ok", **keys: Any) -> dict[str, Any]:
    base = {"job_name": name, "project_name": "fake", "input_dirs": ["x"], "map_function_name": does, "run_once": True}
    return base | keys


def once(settings: Settings) -> dict[str, int]:
    return Runner(settings, FakeCluster(settings)).run(once=True)


def told(home: Path, key: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / key).read_text().splitlines()]


def lines(home: Path, key: str) -> int:
    return (home / key).read_text().count("\n") if (home / key).exists() else 0


def test_hooks_are_told_how_each_run_ended(home: Path, scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_jobs([job("a"), job("b", "fail", group_name="g", job_priority=-1), job("c", group_name="g")])
    scheduler.submit_job(job("c", group_name="g", job_priority=-2))
    assert once(settings) == {"succeeded": 1, "failed": 1}
    (good,), (bad,) = told(home, "on_success"), told(home, "on_failure")
    assert (good["job_name"], good["run"], good["state"], good["counts"]) == ("a", 1, "succeeded", {"items": 7})
    assert (bad["job_name"], bad["state"], bad["left_the_queue"]) == ("b", "failed", ["c"])
    assert bad["exception"]["message"] == "map failed"
    assert bad["exception"]["details"]["line"] == "the line"


def test_a_hook_gets_json_that_every_parser_takes_whatever_the_error_says(
    home: Path, scheduler: Scheduler, settings: Settings
) -> None:
    class Hostile(FakeCluster):
        def run(self, job: dict[str, Any], **facts: Any) -> dict[str, Any]:
            raise JobFault("cut \ud83d \x1b[31m" + "x" * 3_000_000, line="\udce9\0", number=float("nan"))

    scheduler.submit_job(job("a"))
    assert Runner(settings, Hostile(settings)).run(once=True) == {"failed": 1}
    text = (home / "on_failure").read_bytes().decode()
    assert len(text) < 100_000 and "\\ud83d " not in text.replace("\\\\", "") and "NaN" not in text
    (bad,) = told(home, "on_failure")
    assert bad["exception"]["message"].startswith("cut \\ud83d \\x1b[31mxxx")
    assert bad["exception"]["details"] == {"line": "\\udce9\\x00", "number": "nan"}


def test_runs_that_are_handed_back_or_cancelled_call_no_hook(
    home: Path, scheduler: Scheduler, settings: Settings
) -> None:
    scheduler.submit_job(job("a", "down"))
    thread = threading.Thread(target=once, args=(settings,))
    thread.start()
    wait_until(lambda: (scheduler.state()["hold"] or {}).get("tries", 0) > 1, message="holds")
    (settings.state_dir / "back").touch()
    thread.join(20)
    assert [each["state"] for each in told(home, "on_success")] == ["succeeded"]
    assert not (home / "on_failure").exists()


def test_a_hold_is_told_when_it_begins_and_when_it_ends_not_at_each_try(
    home: Path, scheduler: Scheduler, settings: Settings
) -> None:
    """Once by a run that was handed back, once because no node answers."""
    scheduler.submit_job(job("a", "down"))
    thread = threading.Thread(target=once, args=(settings,))
    thread.start()
    wait_until(lambda: (scheduler.state()["hold"] or {}).get("tries", 0) > 2, message="holds")
    since = scheduler.state()["hold"]["since"]
    wait_until(lambda: lines(home, "on_hold") == 1, message="the hook was told")
    (settings.state_dir / "back").touch()
    thread.join(20)
    held, released = told(home, "on_hold")
    assert (held["state"], held["job_name"], held["run"], held["nodes"]) == ("held", "a", 1, False)
    assert held["reason"] == released["reason"] == "node-0 does not answer"
    assert held["since"] == released["since"] == since and released["state"] == "released"
    assert held["time"] >= since and released["time"] >= held["time"]

    (settings.state_dir / "no-nodes").write_text("all are away")
    scheduler.submit_job(job("b"))
    thread = threading.Thread(target=once, args=(settings,))
    thread.start()
    wait_until(lambda: (scheduler.state()["hold"] or {}).get("tries", 0) > 2, message="holds")
    wait_until(lambda: lines(home, "on_hold") == 3, message="the hook was told")
    (settings.state_dir / "no-nodes").unlink()
    thread.join(20)
    held, released = told(home, "on_hold")[2:]
    assert (held["state"], held["job_name"], held["run"], held["nodes"]) == ("held", None, None, True)
    assert (released["state"], released["reason"], released["nodes"]) == ("released", "all are away", True)


def test_a_runner_that_finds_the_queue_held_does_not_tell_it_again(
    home: Path, scheduler: Scheduler, settings: Settings
) -> None:
    scheduler.submit_job(job("a", "down"))
    for tries in (1, 3):
        runner = Runner(settings, FakeCluster(settings))
        thread = threading.Thread(target=runner.run)
        thread.start()
        wait_until(lambda least=tries: (scheduler.state()["hold"] or {}).get("tries", 0) > least, message="holds")
        runner.stop()
        thread.join(20)
    assert [each["state"] for each in told(home, "on_hold")] == ["held"]


def test_a_bad_hook_of_a_hold_stops_nothing(
    home: Path, scheduler: Scheduler, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    (settings.state_dir / "no-nodes").write_text("all are away")
    scheduler.submit_job(job("a"))
    runner = Runner(settings.model_copy(update={"on_hold": ["/nowhere/hook"]}), FakeCluster(settings))
    thread = threading.Thread(target=runner.run, args=(True,))
    thread.start()
    wait_until(lambda: "hook /nowhere/hook cannot be started" in caplog.text, message="the log says so")
    (settings.state_dir / "no-nodes").unlink()
    thread.join(20)
    assert runner.ended == {"succeeded": 1}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["/nowhere/hook"], "hook /nowhere/hook cannot be started: No such file or directory"),
        (["/"], "hook / cannot be started: Permission denied"),
        ([sys.executable, "-c", "raise SystemExit(3)"], "ended with status 3"),
        ([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], "ended with status -9"),
        ([sys.executable, "-c", "import os; os.close(0)"], None),
        ([sys.executable, "-c", "print('x' * 3_000_000)"], None),
    ],
)
def test_a_bad_hook_stops_nothing(
    home: Path, scheduler: Scheduler, settings: Settings, command: list[str], said: str | None
) -> None:
    scheduler.submit_jobs([job("a"), job("b")])
    assert once(settings.model_copy(update={"on_success": command})) == {"succeeded": 2}
    texts = [event["text"] for name in "ab" for event in scheduler.show(name)["events"]]
    assert sum(said in text for text in texts) == 2 if said else not any("hook" in text for text in texts)


def test_a_hook_that_hangs_is_ended_with_its_children_and_holds_up_no_job(
    home: Path, scheduler: Scheduler, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "HOOK_SECONDS", 1.0)
    monkeypatch.setattr(hooks, "MAX_HOOKS", 2)
    code = (
        "import os, pathlib, sys, time\nos.fork()\n"
        "pathlib.Path(sys.argv[1], str(os.getpid())).touch()\nwhile True: time.sleep(60)\n"
    )
    folder = home / "pids"
    folder.mkdir()
    scheduler.submit_jobs([job(f"j{n}") for n in range(6)])
    assert once(settings.model_copy(update={"on_success": [sys.executable, "-c", code, str(folder)]})) == {
        "succeeded": 6
    }
    assert len(scheduler.history()) == 6
    pids = [int(path.name) for path in folder.iterdir()]
    wait_until(lambda: not any(procfs.state(pid) for pid in pids), 10, "the end of the hooks")
    texts = [event["text"] for n in range(6) for event in scheduler.show(f"j{n}")["events"] if "hook" in event["text"]]
    assert len(texts) == 6
    assert sum("hook not called: 2 others still run" in text for text in texts) >= 1
    assert sum("took longer than 1 s and was ended" in text for text in texts) >= 2


def test_the_log_of_hooks_is_bounded_over_many_runs(home: Path, scheduler: Scheduler, settings: Settings) -> None:
    settings = settings.model_copy(update={"log_bytes": 1 << 20})
    code = "import sys, json; told = json.load(sys.stdin); print('x' * 200_000, told['job_name'])"
    for number in range(8):
        scheduler.submit_job(job(f"j{number}"))
        once(settings.model_copy(update={"on_success": [sys.executable, "-c", code]}))
    files = sorted(settings.logs_dir.glob("hooks.log*"))
    assert [file.name for file in files] == ["hooks.log", "hooks.log.1"]
    assert sum(file.stat().st_size for file in files) <= 1 << 20
    assert files[0].read_text().endswith(" j7\n")


@pytest.mark.parametrize("value", ["command", [], [1], {"a": 1}])
def test_a_hook_is_a_command_as_a_list(home: Path, settings: Settings, value: Any) -> None:
    path = home / "bad.json"
    path.write_text(json.dumps({"on_failure": value}))
    with pytest.raises(UsageError, match="on_failure"):
        load_settings(path)
