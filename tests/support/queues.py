"""Jobs of the stand-in for the cluster, and what the queue makes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fake_cluster import FakeCluster

from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings
from mrcore.state.doorbell import Doorbell


def job(name: str, does: str = "ok", **keys: Any) -> dict[str, Any]:
    base = {"job_name": name, "project_name": "fake", "input_dirs": ["x"], "map_function_name": does, "run_once": True}
    return base | keys


def once(settings: Settings) -> dict[str, int]:
    return Runner(settings, FakeCluster(settings)).run(once=True)


def states(scheduler: Scheduler, name: str) -> list[str]:
    return [row["state"] for row in scheduler.history(name)]


@contextlib.contextmanager
def listening(state_dir: Path) -> Iterator[None]:
    """Have a queue look as if a Runner drained it."""
    with contextlib.closing(Doorbell(state_dir)) as doorbell:
        doorbell.wait(0)
        yield
