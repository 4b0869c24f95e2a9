"""The queue is read ahead of without a byte changed, whoever has it open and however old it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from stores import V2_JOBS, job, make_v2

from mrcore.errors import ClusterFault
from mrcore.state.store import Store, StoreToRead

SUPPORT = str(Path(__file__).parent.parent / "support")


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    store = StoreToRead(folder)
    found = [row.job_name for row in store.queued()]
    store.check()
    store.close()
    return found


def test_without_a_queue_it_is_empty_and_none_is_made(tmp_path: Path) -> None:
    assert names(tmp_path / "state") == [] and not (tmp_path / "state").exists()


def test_what_another_has_open_is_read_to_its_newest(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.submit(job("a"), 1.0)
    before = files(tmp_path / "state")
    assert "queue.sqlite-wal" in before
    read = "import sys, test_store_to_read as t; print(t.names(t.Path(sys.argv[1])))"
    command = [sys.executable, "-c", read, str(tmp_path / "state")]
    paths = os.pathsep.join([str(Path(__file__).parent), SUPPORT])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("['a']\n", "")
    assert files(tmp_path / "state") == before
    store.submit(job("b"), 2.0)
    assert names(tmp_path / "state") == ["a", "b"]
    store.close()
    closed = files(tmp_path / "state")
    assert names(tmp_path / "state") == ["a", "b"] and files(tmp_path / "state") == closed


def test_what_a_killed_process_left_is_read_and_stays_as_it_was(tmp_path: Path) -> None:
    code = (
        "import os, sys; sys.path[:0] = [sys.argv[2]]\n"
        "from pathlib import Path; from stores import job; from mrcore.state.store import Store\n"
        "store = Store(Path(sys.argv[1])); store.submit(job('a'), 1.0); os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "state"), SUPPORT], check=False)
    before = files(tmp_path / "state")
    assert before["queue.sqlite-wal"][0]
    assert names(tmp_path / "state") == ["a"] and files(tmp_path / "state") == before


def test_one_of_an_earlier_release_is_upgraded_in_memory_only(tmp_path: Path) -> None:
    make_v2(tmp_path / "queue.sqlite")
    before = files(tmp_path)
    queued = sorted(name for name, (state, _, _) in V2_JOBS.items() if state != "out")
    assert sorted(names(tmp_path)) == queued and files(tmp_path) == before


def test_a_damaged_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "queue.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(ClusterFault, match="cannot read the queue"):
        StoreToRead(tmp_path)
