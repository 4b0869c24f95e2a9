"""What a master knows, to compare before and after a restore; and backups with something added."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings
from mrcore.state import backup


def contents(settings: Settings) -> dict[str, Any]:
    """Return what a master knows, without the numbers of runs that a restore skips."""
    made = Scheduler(settings)
    made.store.check()
    jobs = made.store.rows("SELECT * FROM jobs ORDER BY job_name")
    known = {
        "jobs": [{key: value for key, value in row.items() if key != "last_run"} for row in jobs],
        "runs": made.store.rows("SELECT * FROM runs ORDER BY id"),
        "events": made.store.rows("SELECT * FROM events ORDER BY id"),
        "meta": made.store.rows("SELECT * FROM meta ORDER BY key"),
        "manifests": {
            str(path.relative_to(settings.state_dir)): path.read_text()
            for path in settings.state_dir.glob("manifests/*/*.json")
        },
    }
    made.store.close()
    return known


def rewritten(settings: Settings, folder: Path, add: Callable[[tarfile.TarFile], object]) -> Path:
    """Write an unsigned backup with something added; return its path."""
    source, hostile = folder / "source", folder / "hostile.backup"
    with source.open("wb") as stream:
        backup.write(settings, stream)
    with tarfile.open(source) as archive, tarfile.open(hostile, "w:gz") as target:
        for member in archive:
            target.addfile(member, archive.extractfile(member))
        add(target)
    return hostile
