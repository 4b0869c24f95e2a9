"""A node whose disk is full, for real: a small tmpfs is its compute_dir (mounting needs root, as CI has it)."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import TestCluster
from conditions import wait_until

from mrcore.cluster import preflight
from mrcore.launchers import local
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings

LINES = 400_000


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestCluster]:
    """A 1 × 1 cluster whose node has 16 MiB of disk, 8 MiB of them taken by its input."""
    mounted: list[Path] = []
    start = local.start_cluster

    def mount_then_start(settings: Settings) -> object:
        folder = settings.nodes[0].compute_dir
        folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=True)
        mounted.append(folder)
        return start(settings)

    monkeypatch.setattr(local, "start_cluster", mount_then_start)
    try:
        with TestCluster(tmp_path, 1, 1) as cluster:
            cluster.write_inputs({"numbers": "".join(f"word{n % 1000} line {n:06d}\n" for n in range(LINES))})
            yield cluster
    finally:
        for folder in mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(cluster: TestCluster, size: str) -> None:
    folder = str(cluster.settings.nodes[0].compute_dir)
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


@pytest.mark.slow
@pytest.mark.needs_root
def test_a_full_disk_holds_the_queue_and_the_job_goes_on_when_there_is_room(
    small_disk: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = small_disk
    settings = cluster.settings.model_copy(update={"hold_backoff_first_seconds": 0.2, "hold_backoff_max_seconds": 0.5})
    scheduler = Scheduler(settings)
    scheduler.submit_job(cluster.job(reduce_function_name="add_up", combine_function_name=None))
    thread = threading.Thread(target=Runner(settings).run, kwargs={"once": True}, daemon=True)
    thread.start()

    def reason() -> str:
        return str((scheduler.state()["hold"] or {}).get("reason", ""))

    wait_until(lambda: "MiB of free disk" in reason(), 30, "preflight notices the short disk")
    monkeypatch.setattr(preflight, "MIN_FREE_DISK_BYTES", 0)
    wait_until(lambda: "is full" in reason(), 60, "the task meets the full disk")
    assert str(cluster.settings.nodes[0].compute_dir) in reason()
    resize(cluster, "200m")
    thread.join(90)
    assert not thread.is_alive()
    assert scheduler.history("gated")[0]["state"] == "succeeded"
    items = dict(cluster.items())
    assert items["word0"] == LINES // 1000 and items["line"] == LINES and len(items) == LINES + 1001
    cluster.assert_clean()
