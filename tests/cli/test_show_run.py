"""`mrcore show JOB --run N` and `mrcore history --failed`: one run whole, and the runs that failed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import UNFIT, mrcore

from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import load_settings
from mrcore.state.progress import HeavyKey, RunDetail, ServerShare, TaskRow

NASTY = "\x1b]0;t\x07[bold]\nword\u202e"


@pytest.fixture
def scheduler(home: Path) -> Iterator[Scheduler]:
    made = Scheduler(load_settings())
    made.submit_job({"job_type": "script", "job_name": "wc", "script_location": __file__, "run_once": False})
    yield made
    made.store.check()
    made.store.close()


def run(scheduler: Scheduler, state: str, **facts: object) -> int:
    store = scheduler.store
    number = store.start_run("wc", time.time() - 12)
    store.enter_phase("wc", number, "MAP", time.time() - 12)
    store.end_run("wc", number, state, time.time(), **facts)
    return number


def test_one_run_is_told_whole(scheduler: Scheduler, home: Path) -> None:
    number = run(scheduler, "succeeded", counts={"output_items": 7, "skipped": {"dotfile": 2}})
    row = TaskRow(
        phase="MAP", task=4, try_=2, server="S_1", node="node-1", started=1.0, seconds=9.5, bytes=134_000_000,
        records=1_800_000, peak_bytes=52_000_000, outcome="died", why=f"killed {NASTY}",
    )  # fmt: skip
    share = ServerShare(phase="MAP", server="S_1", node="node-1", tasks=3, seconds=11.0, bytes=5_000, records=12)
    detail = RunDetail(
        servers=[share], slowest=[row] * 30, deaths=[row], counters={"bad lines": 1_234}, profile=True,
        heavy_keys=[HeavyKey(key=NASTY, values=900_000, partition=3)],
        largest_partition_bytes=8_000_000, median_partition_bytes=1_000_000,
    )  # fmt: skip
    scheduler.store.set_detail("wc", number, detail)
    flames = home / "state/profiles/wc"
    flames.mkdir(parents=True)
    (flames / "1.svg").touch()
    code, out, _ = mrcore("show", "wc", "--run", "1")
    assert code == 0 and not UNFIT.search(out)
    for part in (
        "run 1: succeeded", "  MAP: 12.0", "  output_items: 7", "  skipped: 2 dotfile", "  bad lines: 1,234",
        "servers by phase:", "tasks that died:", "\\x1b]0;t\\x07[bold]\\nword\\u202e", "900,000", "134 MB",
        "partitions: the largest has 8.0 MB, the median 1.0 MB", f"flame graph: {flames / '1.svg'}",
    ):  # fmt: skip
        assert part in out, part
    assert out.count("1,800,000") == 10, "the longest"
    told = json.loads(mrcore("show", "wc", "--run", "1", "--json")[1])
    assert len(told["detail"]["slowest"]) == 30 and told["profiles"] == [str(flames / "1.svg")]


def test_a_failed_run_has_its_traceback_and_one_of_an_earlier_release_no_detail(scheduler: Scheduler) -> None:
    details = {"traceback": "File x.py, line 3\n", "line": "the line"}
    run(scheduler, "failed", exception={"class": "JobFault", "message": "map failed", "details": details})
    out = mrcore("show", "wc", "--run", "1")[1]
    assert "JobFault: map failed" in out and "    File x.py, line 3" in out and "  line: the line" in out
    code, _, err = mrcore("show", "wc", "--run", "7")
    assert (code, err) == (2, "mrcore: job 'wc' has no run 7; those in the history: 1 to 1\n")


def test_history_lists_only_what_failed_up_to_the_limit(scheduler: Scheduler) -> None:
    error = {"class": "JobFault", "message": "broken", "details": {}}
    for state in ("failed", "succeeded", "failed", "succeeded", "failed"):
        run(scheduler, state, exception=error if state == "failed" else None)
    found = json.loads(mrcore("history", "--failed", "--limit", "2", "--json")[1])
    assert [(row["run"], row["state"]) for row in found] == [(5, "failed"), (3, "failed")]
    out = mrcore("history", "wc", "--failed")[1]
    assert out.count("failed") == 3 and "succeeded" not in out
