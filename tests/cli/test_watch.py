"""`mrcore watch`, `queue` and `show` of a run under way: what fits the screen, and how each of them ends."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import UNFIT, mrcore
from queues import listening
from screen import Terminal

from mrcore.cli import live
from mrcore.cli.watch import View, view_lines
from mrcore.queue.scheduler import Scheduler
from mrcore.state.progress import Phase, Progress, ServerNow
from mrcore.text import size

MRCORE = [str(Path(sys.executable).with_name("mrcore"))]
Start = Callable[..., Terminal]


@pytest.fixture
def scheduler(scheduler: Scheduler) -> Iterator[Scheduler]:
    """The queue, with a Runner: what a run was at some seconds ago is otherwise a dead one's and not shown."""
    with listening(scheduler.settings.state_dir):
        yield scheduler


@pytest.fixture
def watch(home: Path) -> Iterator[Start]:
    """Start `mrcore watch …` on a terminal of 24 lines; none outlives the test."""
    started: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal([*MRCORE, "watch", *arguments], rows=24))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def submit(scheduler: Scheduler, *names: str, **keys: Any) -> None:
    script = {"job_type": "script", "script_location": __file__, "run_once": True}
    scheduler.submit_jobs([script | {"job_name": name} | keys for name in names])


def begin(scheduler: Scheduler, name: str, servers: int = 100, status: str = "", **more: Any) -> Progress:
    """Have a run of a job under way, as a Runner would."""
    now = time.time()
    run = scheduler.store.start_run(name, now - 20)
    scheduler.store.enter_phase(name, run, "MAP", now - 19)
    progress = Progress(
        job_name=name, run=run, job_type="mapreduce", started=now - 20, updated=now, fraction=0.21, eta_seconds=130,
        phases=[
            Phase(name="PREFLIGHT", started=now - 20, ended=now - 19),
            Phase(name="MAP", started=now - 19, done=57_000_000, total=134_000_000, records=765_000),
        ],
        servers=[
            ServerNow(
                server=f"S_{number}", node=f"node-{number // 4}", up=number != 3, phase="MAP", task=number,
                since=now - number, bytes=number * 1000, records=number, status=status,
            )
            for number in range(servers)
        ],
        counters={"bad lines": 12}, deaths=1, spills=7,
    )  # fmt: skip
    scheduler.store.set_progress(progress)
    return progress


def end(scheduler: Scheduler, name: str, run: int, state: str) -> None:
    error = {"class": "JobFault", "message": "broken", "details": {}} if state == "failed" else None
    scheduler.store.end_run(name, run, state, time.time(), {}, error)
    scheduler.store.move_job(name, "out", state, time.time(), state)


def test_all_of_it_fits_a_terminal_of_80_by_24(watch: Start, scheduler: Scheduler) -> None:
    submit(scheduler, "wc", *(f"later-{number}" for number in range(12)))
    begin(scheduler, "wc")
    scheduler.pause()
    terminal = watch()
    terminal.until(lambda: any("q leaves" in line for line in terminal.display()))
    shown = terminal.display()
    assert "wc runs, 12 jobs wait" in shown[0]
    assert "paused" in shown[1]
    assert shown[3].startswith("wc run 1: 21 %, 2") and "about 2 min left" in shown[3]
    assert "━━━━━━━─────────   43 %" in shown[5] and "57.0 MB of 134 MB" in shown[5] and "MB/s" in shown[5]
    assert shown[6] == "  99 of 99 servers at work, 1 away, 1 died and tried again, 7 spills"
    assert shown[7] == "  counted: bad lines 12"
    assert [line.split() for line in shown[9:11]] == [
        ["NODE", "SERVER", "PHASE", "TASK", "FOR", "DONE", "STATUS"],
        ["node-0", "S_3", "away", "3", *shown[10].split()[4:]],
    ]
    assert shown[23] == "q leaves" and shown[22] == "  … and 7 more" and shown[16] == "NEXT"
    assert any(line.startswith("  … and 9") and line.endswith("more") for line in shown), "servers are cut"
    terminal.type("q")
    assert terminal.wait() == 0


def test_ctrl_c_leaves_with_130_and_the_keys_are_as_they_were(watch: Start, scheduler: Scheduler) -> None:
    terminal = watch()
    terminal.until(lambda: any("nothing runs, 0 jobs wait" in line for line in terminal.display()))
    terminal.type("\x03")
    assert terminal.wait() == 130
    assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l")


@pytest.mark.parametrize(("state", "status"), [("succeeded", 0), ("failed", 1)])
def test_with_a_job_it_ends_with_its_run(watch: Start, scheduler: Scheduler, state: str, status: int) -> None:
    submit(scheduler, "wc")
    begin(scheduler, "wc", servers=2)
    terminal = watch("wc")
    terminal.until(lambda: any("wc run 1" in line for line in terminal.display()))
    end(scheduler, "wc", 1, state)
    assert terminal.wait() == status
    assert f"wc run 1: {state}" in "".join(terminal.display())


def test_a_job_that_waits_is_watched_to_the_end_of_its_next_run(watch: Start, scheduler: Scheduler) -> None:
    submit(scheduler, "wc")
    end(scheduler, "wc", begin(scheduler, "wc").run, "failed")
    submit(scheduler, "wc")
    terminal = watch("wc")
    terminal.until(lambda: any("NEXT" in line for line in terminal.display()))
    assert terminal.process.poll() is None
    end(scheduler, "wc", begin(scheduler, "wc").run, "succeeded")
    assert terminal.wait() == 0


def test_one_snapshot_in_a_pipe_and_as_json(scheduler: Scheduler) -> None:
    submit(scheduler, "wc", "behind")
    begin(scheduler, "wc", servers=30)
    code, out, _ = mrcore("watch")
    assert code == 0 and out.count("S_") == 30 and "behind" in out and not UNFIT.search(out)
    found = json.loads(mrcore("watch", "--json")[1])
    assert found["progress"]["phases"][1]["done"] == 57_000_000 and found["paused"] is False
    assert [row["job_name"] for row in found["jobs"]] == ["wc", "behind"]
    assert mrcore("watch", "nobody")[0] == 2


def test_queue_and_show_say_how_far_a_run_is(scheduler: Scheduler) -> None:
    submit(scheduler, "wc")
    begin(scheduler, "wc")
    assert "running MAP 43 %, about 2 min left" in mrcore("queue")[1]
    assert "run 1 is under way: running MAP 43 %, about 2 min left\n" in mrcore("show", "wc")[1]


def test_hostile_texts_are_cleaned(watch: Start, scheduler: Scheduler) -> None:
    submit(scheduler, "wc")
    begin(scheduler, "wc", servers=1, status="\x1b]0;title\x07[bold]\n\u202eworse")
    out = mrcore("watch", "--once")[1]
    assert "\\x1b]0;title\\x07[bold]\\n\\u202eworse" in out and not UNFIT.search(out)
    terminal = watch()
    terminal.until(lambda: any("title" in line for line in terminal.display()))
    assert "\x1b]0" not in terminal.output and "\u202e" not in terminal.output


@pytest.mark.parametrize("room", range(1, 40))
def test_however_little_room_there_is_it_is_kept(room: int) -> None:
    now = time.time()
    servers = [ServerNow(server=f"S_{number}", node="n", up=True) for number in range(9)]
    progress = Progress(job_name="j", run=1, job_type="script", started=now, updated=now, servers=servers)
    state = {"paused": True, "drain": None, "hold": None, "runner": True, "running": None}
    rows = [{"job_name": str(number), "running": False, "why": {"text": "it is next"}} for number in range(9)]
    assert len(view_lines(View(state, rows, progress), now, room)) <= room


def test_that_nobody_drains_the_queue_is_said() -> None:
    state = {"paused": False, "drain": None, "hold": None, "runner": False, "running": None}
    lines = view_lines(View(state, [], None), time.time(), 20)
    assert any("no Runner drains this queue now" in str(line) for line in lines)


def test_amounts_are_short_and_phases_say_what_they_did() -> None:
    assert [size(count) for count in (0, 999, 1000, 134_217_728, 99_950_000, 5e13)] == [
        "0 B", "999 B", "1.0 kB", "134 MB", "100 MB", "50.0 TB"
    ]  # fmt: skip
    phase = Phase(name="MAP", started=10.0, ended=22.3, done=134_000_000, total=134_000_000, records=1_800_000)
    assert live.phase_line(phase, 99) == "MAP 12.3 s, 134 MB, 1,800,000 lines"
