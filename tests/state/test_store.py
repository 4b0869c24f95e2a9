"""The queue file: transitions, durability, many processes."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkout import SUPPORT
from stores import V2_JOBS, job, make_v2

from mrcore.errors import ClusterFault, MrcoreError, UsageError
from mrcore.state.progress import RunDetail
from mrcore.state.store import ENDINGS, JOB_MOVES, Store


@pytest.fixture
def store(tmp_path: Path) -> Any:
    made = Store(tmp_path / "state")
    yield made
    made.check()
    made.close()


def test_a_jobs_way_through_the_queue(store: Store) -> None:
    assert store.submit(job(), 1.0) is None
    run = store.start_run("a", 2.0)
    store.enter_phase("a", run, "MAP", 2.5)
    store.enter_phase("a", run, "SORT", 3.5)
    assert store.running().job_name == "a"  # type: ignore[union-attr]
    store.end_run("a", run, "succeeded", 4.0, counts={"items": 1})
    assert store.running() is None
    (row,) = store.rows("SELECT * FROM runs")
    assert (row["run"], row["state"], row["ended"]) == (1, "succeeded", 4.0)
    assert row["phases"] == '{"MAP": {"started": 2.5, "ended": 3.5}, "SORT": {"started": 3.5, "ended": 4.0}}'
    store.move_job("a", "out", "succeeded", 4.0)
    assert store.submit(job(), 5.0) == "out"
    assert store.submit(job(), 5.0) == "queued"
    assert store.start_run("a", 6.0) == 2
    texts = [row["text"] for row in store.rows("SELECT text FROM events ORDER BY id")]
    assert texts == ["queued", "running", "succeeded", "out: succeeded", "queued", "replaced", "running"]


@pytest.mark.parametrize("before", ["queued", "held", "out"])
@pytest.mark.parametrize("after", ["queued", "held", "out", "nonsense"])
def test_jobs_move_only_along_the_table(store: Store, before: str, after: str) -> None:
    store.submit(job(), 1.0)
    if before != "queued":
        store.move_job("a", before, "why", 2.0)
    if (before, after) in JOB_MOVES:
        store.move_job("a", after, None, 3.0)
    else:
        with pytest.raises(MrcoreError, match=f"no way from {before} to {after}; its history: queued"):
            store.move_job("a", after, None, 3.0)
        assert store.job("a").state == before  # type: ignore[union-attr]


@pytest.mark.parametrize("ending", ENDINGS)
def test_runs_end_once(store: Store, ending: str) -> None:
    store.submit(job(), 1.0)
    store.start_run("a", 2.0)
    with pytest.raises(MrcoreError, match="to running"):
        store.start_run("a", 2.0)
    with pytest.raises(MrcoreError, match="from running to nonsense"):
        store.end_run("a", 1, "nonsense", 3.0)
    store.end_run("a", 1, ending, 3.0)
    with pytest.raises(MrcoreError, match=f"from {ending} to succeeded"):
        store.end_run("a", 1, "succeeded", 4.0)
    with pytest.raises(MrcoreError, match="from nothing"):
        store.end_run("a", 9, "succeeded", 4.0)


def test_a_change_is_all_or_nothing(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.change():
        store.submit(job("a"), 1.0)
        store.submit(job("b"), 1.0)
        raise ZeroDivisionError
    assert store.rows("SELECT * FROM jobs") == []
    with store.change():
        store.submit(job("a"), 1.0)
    assert len(store.rows("SELECT * FROM events")) == 1


def test_values_of_the_queue(store: Store) -> None:
    assert store.get("hold", "none") == "none"
    store.put("hold", {"reason": "é"})
    assert store.get("hold") == {"reason": "é"}


def test_a_newer_schema_is_refused(store: Store) -> None:
    store.put("schema", 99)
    with pytest.raises(UsageError, match="has schema 99, this mrcore 4"):
        Store(store.path.parent)


def test_a_file_that_is_no_queue_is_named(tmp_path: Path) -> None:
    (tmp_path / "queue.sqlite").write_text("not a database, but long enough to look at" * 100)
    with pytest.raises(ClusterFault, match="cannot open the queue"):
        Store(tmp_path)


def test_a_full_disk_changes_nothing_and_is_named(store: Store) -> None:
    store.submit(job("a"), 1.0)
    pages = store.rows("PRAGMA page_count")[0]["page_count"]
    store.rows(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(ClusterFault, match="full; free the disk"):
        for number in range(1000):
            store.submit(job(f"b{number}"), 1.0)
    store.rows("PRAGMA max_page_count = 1000000")
    count = len(store.rows("SELECT * FROM jobs"))
    store.submit(job("c"), 1.0)
    assert len(store.rows("SELECT * FROM jobs")) == count + 1


def test_what_was_committed_survives_kill_9(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; sys.path.insert(0, sys.argv[2])\n"
        "from mrcore.state.store import Store; from stores import job\n"
        "store = Store(pathlib.Path(sys.argv[1]))\n"
        "store.submit(job('a'), 1.0)\n"
        "with store.change():\n    store.submit(job('b'), 1.0); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(SUPPORT)], check=False)
    assert done.returncode == -9
    store = Store(tmp_path)
    assert [row["job_name"] for row in store.rows("SELECT job_name FROM jobs")] == ["a"]
    store.check()
    store.close()


def test_many_processes_open_and_write_a_new_queue(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[2])\n"
        "from mrcore.state.store import Store; from stores import job\n"
        "store = Store(pathlib.Path(sys.argv[1]))\n"
        "for n in range(10): store.submit(job(f'j{sys.argv[3]}_{n}'), 1.0)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "s"), str(SUPPORT)]
    processes = [subprocess.Popen([*command, str(number)]) for number in range(8)]
    assert [process.wait(60) for process in processes] == [0] * 8
    store = Store(tmp_path / "s")
    numbers = [row["number"] for row in store.rows("SELECT number FROM jobs")]
    assert sorted(numbers) == list(range(1, 81))
    store.close()


def test_check_finds_a_broken_invariant(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.submit(job(), 1.0)
    with sqlite3.connect(store.path) as other:
        other.execute("UPDATE jobs SET state = 'nowhere'")
    with pytest.raises(MrcoreError, match="damaged"):
        store.check()
    store.close()


def test_a_queue_of_the_version_before_is_kept_with_all_its_jobs(tmp_path: Path) -> None:
    make_v2(tmp_path / "queue.sqlite")
    store = Store(tmp_path)
    rows = {row["job_name"]: row for row in store.rows("SELECT * FROM jobs")}
    found = {name: (row["state"], row["reason"], row["cause"]) for name, row in rows.items()}
    assert found == V2_JOBS
    assert {row["left_at"] for row in rows.values() if row["state"] != "out"} == {None}
    assert (rows["bad"]["left_at"], rows["old"]["left_at"]) == (206.0, 100.0)
    assert {(row["tries"], row["retry_at"], row["cycle"], row["last_run"]) for row in rows.values()} == {
        (0, None, 3, 1)
    }
    assert (store.get("schema"), store.get("paused"), store.get("cycle")["number"]) == (4, True, 4)
    assert store.rows("SELECT * FROM ledger, ledgers") == []
    assert len(store.rows("SELECT * FROM runs")) == 1
    store.check()
    store.close()
    again = Store(tmp_path)
    assert {row["job_name"]: row for row in again.rows("SELECT * FROM jobs")} == rows
    again.close()


def test_many_processes_that_open_an_older_queue_upgrade_it_once(tmp_path: Path) -> None:
    make_v2(tmp_path / "queue.sqlite")
    code = "import sys, pathlib; from mrcore.state.store import Store; Store(pathlib.Path(sys.argv[1])).check()"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(6)]
    assert [process.wait(60) for process in processes] == [0] * 6


def test_an_upgrade_that_is_cut_off_changes_nothing(tmp_path: Path) -> None:
    make_v2(tmp_path / "queue.sqlite")
    code = (
        "import os, sys, sqlite3; from mrcore.state import database\n"
        "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "db.create_function('die', 0, lambda: os.kill(os.getpid(), 9))\n"
        "database._TO_3 += 'SELECT die();'\n"
        "database.upgrade(db)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "queue.sqlite")], check=False)
    assert done.returncode == -9
    with contextlib.closing(sqlite3.connect(tmp_path / "queue.sqlite")) as db:
        assert [row[1] for row in db.execute("PRAGMA table_info(jobs)")][-1] == "last_start"
        assert db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() == ("2",)
    store = Store(tmp_path)
    assert store.job("bad").cause == "failed"  # type: ignore[union-attr]
    store.close()


def test_the_end_of_a_jobs_story(store: Store) -> None:
    for moment in range(1, 8):
        store.submit(job(), float(moment))
    assert [event["time"] for event in store.events("a")] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert [event["time"] for event in store.events("a", 3)] == [5.0, 6.0, 7.0]


def test_what_another_release_noted_of_a_run_is_nothing_known(store: Store) -> None:
    """Else nothing that shows the queue, nor the next Runner, would start after an upgrade in the middle of a run."""
    store.submit(job(), 1.0)
    run = store.start_run("a", 2.0)
    with store.change() as db:
        db.execute("INSERT INTO progress VALUES (1, ?)", ('{"job_name": "a", "run": "first"}',))
        db.execute("INSERT INTO details VALUES (?, ?, ?)", ("a", run, "{"))
    assert store.progress() is None and store.detail("a", run) is None
    store.set_detail("a", run, RunDetail(largest_partition_bytes=5))
    assert store.detail("a", run) == RunDetail(largest_partition_bytes=5)
