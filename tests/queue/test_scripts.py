"""Script jobs: environment, output, how they end, and that nothing of them is left, whoever dies."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conditions import wait_until
from fake_cluster import FakeCluster

from mrcore.cli import main as cli
from mrcore.queue import scripts
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings
from mrcore.system import procfs

# A script with a child, a detached grandchild and a daemon that has wiped its environment; all tell their pids.
FAMILY = """
import os, signal, sys, time
from pathlib import Path

def tell(name):
    file = Path(sys.argv[1], name)
    file.with_suffix(".partial").write_text(str(os.getpid()))
    file.with_suffix(".partial").rename(file)

def stay():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(60)

if len(sys.argv) > 2:
    tell("daemon")
    stay()
if os.fork() == 0:
    tell("child")
    stay()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        tell("grandchild")
        stay()
    # a session of its own, and no environment to be known by
    os.execve(sys.executable, [sys.executable, __file__, sys.argv[1], "again"], {})
tell("script")
print("all are born", flush=True)
"""
MEMBERS = ("script", "child", "grandchild", "daemon")


@pytest.fixture
def config(home: Path, projects_dir: Path) -> Path:
    path = home.parent / "config.json"
    path.write_text(json.dumps({"hold_backoff_first_seconds": 0.05, "projects_dir": str(projects_dir)}))
    return path


def once(settings: Settings) -> dict[str, int]:
    return Runner(settings, FakeCluster(settings)).run(once=True)


def script(folder: Path, text: str, **keys: Any) -> dict[str, Any]:
    file = folder.parent / "work" / f"{keys.get('job_name', 's')}.py"
    file.write_text(text)
    return {"job_type": "script", "job_name": "s", "script_location": str(file), "run_once": True} | keys


def output(settings: Settings, run: int = 1, name: str = "s") -> str:
    return scripts.log_of(settings, name, run).read_text()


def family_of(folder: Path) -> dict[str, int]:
    """Wait until the whole family is born; gives their pids."""
    found = wait_until(
        lambda: (
            {name: int((folder / name).read_text()) for name in MEMBERS if (folder / name).exists()}
            if all((folder / name).exists() for name in MEMBERS)
            else None
        ),
        60,
        "the birth of the family",
    )
    return dict(found)


def assert_dead(pids: dict[str, int]) -> None:
    wait_until(lambda: not any(procfs.state(pid) for pid in pids.values()), 15, f"the end of {pids}")


@pytest.fixture
def family(home: Path) -> Iterator[Path]:
    """A folder for a family's pids; none of it survives the test."""
    folder = home.parent / "family"
    folder.mkdir()
    yield folder
    for file in folder.glob("*"):
        pid = int(file.read_text())
        if procfs.state(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_script_runs_in_its_folder_with_its_arguments_and_is_told_its_job(
    home: Path, scheduler: Scheduler, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (
        "import json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.getcwd(), sys.executable,"
        " {k: v for k, v in os.environ.items() if k.startswith('MRCORE')}]))\n"
        "print('from stderr', file=sys.stderr)\n"
        "assert not sys.stdin.read()\n"
    )
    arguments = ["--flag", "a b\nc", 3, 2.5, ""]
    scheduler.submit_job(script(home, text, script_arguments=arguments, group_name="g", project_name="word_count"))
    assert once(settings) == {"succeeded": 1}
    first, second = output(settings).splitlines()
    given, folder, python, told = json.loads(first)
    assert given == ["--flag", "a b\nc", "3", "2.5", ""]
    assert (folder, second) == (str(home.parent / "work"), "from stderr")
    assert os.path.realpath(python) == os.path.realpath(sys.executable)
    assert (told["MRCORE_JOB"], told["MRCORE_RUN"], told["MRCORE_GROUP"]) == ("s", "1", "g")
    assert told["MRCORE_PROJECT_DIR"] == str(settings.projects_dir / "word_count")
    assert told["MRCORE_BASE_DIRS"] == str(settings.nodes[0].layout.base_dir)
    assert told["MRCORE_HOME"] == str(home)
    (row,) = scheduler.history("s")
    assert list(row["phases"]) == ["SCRIPT"]
    assert row["counts"] == {"output_bytes": scripts.log_of(settings, "s", 1).stat().st_size}
    capfd.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["logs", "s", "--lines", "1"])
    assert capfd.readouterr().out == "from stderr\n"


def test_the_projects_own_interpreter_runs_it(home: Path, scheduler: Scheduler, settings: Settings) -> None:
    python = settings.projects_dir / "word_count/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho by the venv\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    scheduler.submit_job(script(home, "print('hello')", project_name="word_count"))
    assert once(settings) == {"succeeded": 1}
    assert output(settings) == "by the venv\nhello\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("print('so far'); raise SystemExit(3)", "ended with exit status 3: so far"),
        ("import os; os.kill(os.getpid(), 11)", "was killed by SIGSEGV"),
        ("raise ValueError('what is wrong')", "ended with exit status 1: ValueError: what is wrong"),
        ("def broken(:", "ended with exit status 1: SyntaxError"),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\xfe'); sys.exit(9)", "ended with exit status 9: \ufffd\ufffd"),
    ],
)
def test_how_a_script_failed_is_told_with_its_last_lines(
    home: Path, scheduler: Scheduler, settings: Settings, text: str, said: str
) -> None:
    scheduler.submit_jobs([script(home, text, group_name="g"), script(home, "", job_name="t", group_name="g")])
    assert once(settings) == {"failed": 1}
    assert said in scheduler.show("s")["reason"]
    details = scheduler.history("s")[0]["exception"]["details"]
    assert details["log"] == str(scripts.log_of(settings, "s", 1))
    assert details["output"] in Path(details["log"]).read_text(errors="replace")
    assert scheduler.show("t")["reason"].startswith("group failed: s run 1: the script ")


def test_only_the_last_lines_go_into_the_history(home: Path, scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_job(script(home, "for n in range(100_000): print(n, 'x' * 300)\nraise SystemExit(1)"))
    once(settings)
    kept = scheduler.history("s")[0]["exception"]["details"]["output"]
    assert kept.splitlines()[-1].startswith("99999 x")
    assert len(kept) <= scripts.TAIL_BYTES and len(kept.splitlines()) <= scripts.TAIL_LINES
    assert output(settings).count("\n") == 100_000


def test_script_that_is_gone_and_interpreter_that_is_broken(
    home: Path, scheduler: Scheduler, settings: Settings
) -> None:
    scheduler.submit_job(script(home, "", project_name="word_count"))
    Path("s.py").unlink()
    assert once(settings) == {"failed": 1}
    assert "there is no script" in scheduler.show("s")["reason"]
    python = settings.projects_dir / "word_count/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("no interpreter")
    scheduler.submit_job(script(home, "", project_name="word_count"))
    assert once(settings) == {"failed": 1}
    assert f"cannot be started by {python}: Permission denied" in scheduler.show("s")["reason"]


def test_output_is_in_the_log_while_it_runs(home: Path, scheduler: Scheduler, settings: Settings) -> None:
    text = "import os, time\nprint('begun')\nwhile not os.path.exists('go'): time.sleep(0.01)\n"
    scheduler.submit_job(script(home, text))
    thread = threading.Thread(target=once, args=(settings,))
    thread.start()
    log = scripts.log_of(settings, "s", 1)
    wait_until(lambda: log.exists() and log.read_text() == "begun\n", 20, "its first line")
    assert scheduler.queue()[0]["phase"] == "SCRIPT"
    Path("go").touch()
    thread.join(20)
    assert scheduler.history("s")[0]["state"] == "succeeded"


def test_what_a_script_leaves_behind_ends_with_it(
    home: Path, scheduler: Scheduler, settings: Settings, family: Path
) -> None:
    scheduler.submit_job(script(home, FAMILY, script_arguments=[str(family)]))
    # It ends by itself at once; the others may be swept before they have told their names.
    assert once(settings) == {"succeeded": 1}
    pids = {file.name: int(file.read_text()) for file in family.glob("[a-z]*") if not file.suffix}
    assert "script" in pids
    assert_dead(pids)
    assert "all are born" in output(settings)


WAITING = FAMILY + "stay()\n"


@pytest.mark.parametrize("how", ["cancel", "timeout", "stop"])
def test_the_whole_family_ends(home: Path, scheduler: Scheduler, settings: Settings, family: Path, how: str) -> None:
    job = script(home, WAITING, script_arguments=[str(family)], run_once=False)
    scheduler.submit_jobs([job | ({"timeout_seconds": 3.0} if how == "timeout" else {})])
    runner = Runner(settings, FakeCluster(settings))
    thread = threading.Thread(target=runner.run, kwargs={"once": True})
    thread.start()
    pids = family_of(family)
    began = time.monotonic()
    if how == "cancel":
        scheduler.cancel("s")
    elif how == "stop":
        runner.stop()
    thread.join(30)
    assert not thread.is_alive()
    assert_dead(pids)
    assert time.monotonic() - began < 20  # they ignore SIGTERM: the grace period, then SIGKILL
    (row,) = scheduler.history("s")
    assert row["state"] == {"cancel": "cancelled", "timeout": "failed", "stop": "handed back"}[how]
    assert row["exception"]["details"]["output"] == "all are born"


def test_a_script_may_end_in_its_own_way(home: Path, scheduler: Scheduler, settings: Settings) -> None:
    text = (
        "import signal, sys, time\n"
        "def end(*_): print('tidied up'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\nprint('ready')\ntime.sleep(60)\n"
    )
    scheduler.submit_job(script(home, text))
    thread = threading.Thread(target=once, args=(settings,))
    thread.start()
    log = scripts.log_of(settings, "s", 1)
    wait_until(lambda: log.exists() and "ready" in log.read_text(), 20, "the script")
    scheduler.cancel("s")
    thread.join(20)
    assert log.read_text() == "ready\ntidied up\n"
    assert scheduler.history("s")[0]["state"] == "cancelled"


def test_the_family_ends_when_the_runner_is_killed_and_the_script_runs_again(
    home: Path, scheduler: Scheduler, settings: Settings, family: Path, spawn: Any
) -> None:
    job = script(home, WAITING, script_arguments=[str(family)])
    scheduler.submit_job(job)
    runner = spawn()
    pids = family_of(family)
    runner.kill()
    runner.wait()
    assert_dead(pids)
    Path(job["script_location"]).write_text("print('again')")
    assert once(settings) == {"handed back": 1, "succeeded": 1}
    assert output(settings, 2) == "again\n"


def test_a_guard_that_is_killed_takes_the_script_with_it(
    home: Path, scheduler: Scheduler, settings: Settings, family: Path
) -> None:
    scheduler.submit_job(script(home, WAITING, script_arguments=[str(family)]))
    thread = threading.Thread(target=once, args=(settings,))
    thread.start()
    pids = family_of(family)
    parents = procfs.family()
    (guard,) = [parent for parent, children in parents.items() if pids["script"] in children]
    os.kill(guard, signal.SIGKILL)
    thread.join(20)
    assert scheduler.history("s")[0]["state"] == "failed"
    assert "guard" in scheduler.show("s")["reason"]
    marked = {name: pid for name, pid in pids.items() if name != "daemon"}  # the one that wiped its environment
    assert_dead(marked)


def test_runner_and_guard_killed_at_once_leave_nothing_for_the_next_runner(
    home: Path, scheduler: Scheduler, settings: Settings, family: Path, spawn: Any
) -> None:
    job = script(home, WAITING, script_arguments=[str(family)])
    scheduler.submit_job(job)
    runner = spawn()
    pids = family_of(family)
    (guard,) = procfs.children(runner.pid)
    os.kill(runner.pid, signal.SIGSTOP)
    os.kill(guard, signal.SIGKILL)
    runner.kill()
    runner.wait()
    Path(job["script_location"]).write_text("print('again')")
    assert once(settings) == {"handed back": 1, "succeeded": 1}
    assert_dead({name: pid for name, pid in pids.items() if name != "daemon"})


def test_a_second_sigterm_ends_the_runner_at_once(
    home: Path, scheduler: Scheduler, settings: Settings, family: Path, spawn: Any
) -> None:
    scheduler.submit_job(script(home, WAITING, script_arguments=[str(family)]))
    runner = spawn()
    pids = family_of(family)
    runner.terminate()
    runner.terminate()
    status = runner.wait(30)
    assert_dead(pids)
    if status == 0:  # it was quicker than our second signal: it has handed the run back itself
        assert scheduler.history("s")[0]["state"] == "handed back"
    else:
        assert status == 128 + signal.SIGTERM
        assert "ended at once" in runner.stderr.read()
        assert scheduler.state()["running"]["job_name"] == "s"


def test_logs_of_runs_that_the_history_has_forgotten_go(home: Path, scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_job(script(home, "print('x')", run_once=False))
    short = settings.model_copy(update={"history_keep_runs": 2})
    for _ in range(4):
        Runner(short, FakeCluster(short)).run(once=True)
    kept = sorted(path.name for path in scripts.log_of(settings, "s", 1).parent.iterdir())
    assert kept == ["3.log", "4.log"]
    assert len(scheduler.history("s")) == 2
