"""`mrcore run` on a terminal: results stand on lines of their own, and how it ends is what its status says."""

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
from daemons import own_address
from screen import Terminal

from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import load_settings

MRCORE = [str(Path(sys.executable).with_name("mrcore"))]
Run = Callable[..., Terminal]


@pytest.fixture
def run(home: Path) -> Iterator[Run]:
    """Start `mrcore run …` on a terminal; none outlives the test."""
    started: list[Terminal] = []

    def start(*arguments: str, **streams: Any) -> Terminal:
        started.append(Terminal([*MRCORE, "run", *arguments], **streams))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def submit(scheduler: Scheduler, name: str, code: str, **keys: Any) -> None:
    file = Path(f"{name}.py")
    file.write_text(code)
    job = {"job_type": "script", "job_name": name, "script_location": str(file), "run_once": True}
    scheduler.submit_job(job | keys)


WAITS = "import time\nopen('{name}.began', 'w').close()\nwhile True: time.sleep(0.1)\n"


def test_results_stand_on_lines_of_their_own_beside_the_spinner(run: Run, scheduler: Scheduler) -> None:
    submit(scheduler, "one", "pass")
    submit(scheduler, "two", "raise SystemExit('no [bold]good[/bold]')")
    submit(scheduler, "three", "import time; time.sleep(0.5)")
    submit(scheduler, "four", "raise SystemExit(1)", retries=1, retry_delay=0.3)
    terminal = run("--once", columns=200)
    assert terminal.wait() == 1
    script = Path("two.py").absolute()
    failed = f"the script {Path('four.py').absolute()} ended with exit status 1"
    assert [re.sub(r"in 0\.\d\d s", "in N s", line) for line in terminal.screen() if line] == [
        "one run 1: succeeded",
        f"two run 1: failed: the script {script} ended with exit status 1: no [bold]good[/bold]",
        "three run 1: succeeded",
        f"four run 1: failed: {failed} (retry 1 of 1 in N s)",
        f"four run 2: failed: {failed}",
        "mrcore: 2 of 5 runs failed: see `mrcore history`",
    ]
    assert re.search("three run 1: .* SCRIPT ", terminal.output, re.DOTALL), "nothing in place: this test shows nothing"
    assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l"), "the cursor stays hidden"


def test_results_go_to_standard_output_when_only_errors_go_to_the_terminal(
    run: Run, scheduler: Scheduler, tmp_path: Path
) -> None:
    submit(scheduler, "one", "pass")
    submit(scheduler, "two", "raise SystemExit(3)")
    with (tmp_path / "out").open("wb") as out:
        terminal = run("--once", stdout=out, columns=200)
        assert terminal.wait() == 1
    assert (tmp_path / "out").read_text() == "one run 1: succeeded\n"
    shown = [line for line in terminal.screen() if line]
    assert [line.split(":")[0] for line in shown] == ["two run 1", "mrcore"]


@pytest.mark.parametrize("arguments", [["--once"], []])
def test_ctrl_c_hands_the_run_back_and_ends_with_130(run: Run, scheduler: Scheduler, arguments: list[str]) -> None:
    submit(scheduler, "waits", WAITS.format(name="waits"))
    terminal = run(*arguments)
    terminal.until(Path("waits.began").exists)
    terminal.type("\x03")
    assert terminal.wait() == 130
    assert [row["state"] for row in scheduler.history()] == ["handed back"]
    assert "waits run 1: handed back" in "".join(terminal.screen())
    assert scheduler.queue()[0]["state"] == "queued"


@pytest.mark.parametrize(("arguments", "status"), [(["--once"], 143), ([], 0)])
def test_sigterm_ends_a_service_well_and_a_single_cycle_before_its_end_with_143(
    run: Run, scheduler: Scheduler, arguments: list[str], status: int
) -> None:
    submit(scheduler, "waits", WAITS.format(name="waits"))
    terminal = run(*arguments)
    terminal.until(Path("waits.began").exists)
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.wait() == status
    assert [row["state"] for row in scheduler.history()] == ["handed back"]


def test_ctrl_c_while_nothing_runs_ends_with_130(run: Run, scheduler: Scheduler) -> None:
    terminal = run()
    terminal.until(lambda: scheduler.state()["runner"])
    terminal.type("\x03")
    assert terminal.wait() == 130


def test_a_second_ctrl_c_ends_at_once_and_shows_the_cursor(run: Run, scheduler: Scheduler) -> None:
    stubborn = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAITS.format(name="stubborn")
    submit(scheduler, "stubborn", stubborn)
    terminal = run()
    terminal.until(Path("stubborn.began").exists)
    terminal.type("\x03")
    terminal.until(lambda: "^C" in terminal.output)
    terminal.type("\x03")
    assert terminal.wait() == 130
    if "ended at once" in terminal.output:  # else the first one was obeyed before the second came
        assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l")


def test_without_a_cluster_one_line_says_what_to_do(run: Run, scheduler: Scheduler) -> None:
    project = Path("projects/p")
    project.mkdir(parents=True)
    (project / "map_functions.py").write_text("def m(line, aux): return []\n")
    scheduler.submit_job(
        {"job_name": "wc", "project_name": "p", "input_dirs": ["/etc/hostname"], "map_function_name": "m"}
    )
    submit(scheduler, "script", "print('needs no node')")
    terminal = run(columns=300)
    terminal.until(lambda: (scheduler.state()["hold"] or {"tries": 0})["tries"] > 1 and scheduler.history())
    told = f"the local cluster of {load_settings().home} is not started: `mrcore cluster start`"
    assert scheduler.state()["hold"]["reason"] == told
    assert [(row["job_name"], row["state"]) for row in scheduler.history()] == [("script", "succeeded")]
    terminal.type("\x03")
    assert terminal.wait() == 130
    lines = [line for line in terminal.screen() if "holds" in line]
    assert {line.removeprefix("^C") for line in lines} == {f"the queue holds: {told}"}  # the terminal echoes the key
    assert "Errno" not in terminal.output and "Traceback" not in terminal.output
    assert scheduler.queue()[0]["last_run"] == 0


@pytest.mark.slow
def test_to_start_the_cluster_ends_the_wait_for_it(run: Run, scheduler: Scheduler, home: Path) -> None:
    project = Path("projects/p")
    project.mkdir(parents=True)
    (project / "map_functions.py").write_text("def m(line, aux): return [(line, 1)]\n")
    Path("input").write_text("a\nb\n")
    scheduler.submit_job(
        {"job_name": "wc", "project_name": "p", "input_dirs": [str(Path("input").absolute())], "map_function_name": "m",
         "run_once": True}
    )  # fmt: skip
    (home / "cluster.json").write_text(json.dumps({"hold_backoff_first_seconds": 300, "address": own_address()}))
    Path("elsewhere").mkdir()
    terminal = run("--once", cwd="elsewhere", columns=200)
    terminal.until(lambda: scheduler.state()["hold"])
    started = subprocess.run([*MRCORE, "cluster", "start", "--nodes", "1", "--servers", "1"], capture_output=True)
    try:
        assert started.returncode == 0, started.stderr
        assert terminal.wait(120) == 0
        assert [line.split(":")[0] for line in terminal.screen() if line] == ["the queue holds", "wc run 1"]
        assert [(row["run"], row["state"]) for row in scheduler.history()] == [(1, "succeeded")]
        assert scheduler.state()["hold"] is None
    finally:
        subprocess.run([*MRCORE, "cluster", "kill"], capture_output=True, check=True)
