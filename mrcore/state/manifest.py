"""The commit point of a run: one file on the master, renamed into place, that says what the run produced.

`state/manifests/JOB/RUN.json`. Whether a run has committed is whether this file exists; all that follows from it (the
parts' final names, removal of older output, the ledger, the run's row) can be done again after a crash.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from mrcore.errors import UsageError
from mrcore.system.paths import PARTIAL, fsync_dir, write_atomic


def path_of(state_dir: Path, job: str, run: int) -> Path:
    """Where the manifest of a run lies."""
    return state_dir / "manifests" / job / f"{run}.json"


def write(state_dir: Path, manifest: dict[str, Any]) -> None:
    """Commit: after this returns the run has happened."""
    path = path_of(state_dir, manifest["job"], manifest["run"])
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in (path.parent.parent, state_dir):
            fsync_dir(folder)
    write_atomic(path, json.dumps(manifest, separators=(",", ":")).encode())


def read(state_dir: Path, job: str, run: int) -> dict[str, Any] | None:
    """Give the manifest of a run, or None when it has not committed."""
    try:
        found: dict[str, Any] = json.loads(path_of(state_dir, job, run).read_bytes())
    except FileNotFoundError:
        return None
    return found


def prune(state_dir: Path, job: str, kept_runs: set[int]) -> None:
    """Forget the manifests of runs that are neither to be kept nor part of the job's output any more.

    Also what a Runner left that died while it wrote one: so no run of the job may be under way.
    """
    for path in (state_dir / "manifests" / job).glob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(UsageError):
        for found in committed(state_dir, job):
            if found.get("delete_job_data"):  # what came before it is gone
                for path in (state_dir / "manifests" / job).glob("*.json"):
                    if path.stem.isdecimal() and int(path.stem) < found["run"] and int(path.stem) not in kept_runs:
                        path.unlink(missing_ok=True)
                return


def relocate(state_dir: Path, job: str, run: int, nodes: Mapping[str, tuple[str, str]]) -> None:
    """Let parts of a run lie on another node: by name, the node that they were on, and the one that has them now.

    May be repeated. Nothing is written when the run has no such part.
    """
    found = read(state_dir, job, run)
    moved = [each for each in found["parts"] if nodes.get(each["name"], ("",))[0] == each["node"]] if found else []
    for part in moved:
        part["node"] = nodes[part["name"]][1]
    if found and moved:
        write(state_dir, found)


def newest(state_dir: Path, job: str) -> dict[str, Any] | None:
    """Give the manifest of a job's newest committed run, or None."""
    with contextlib.suppress(UsageError):
        return next(committed(state_dir, job), None)
    return None


def committed(state_dir: Path, job: str) -> Iterator[dict[str, Any]]:
    """Give the manifests of a job's committed runs, the newest first. Raises UsageError when there is none."""
    folder = state_dir / "manifests" / job
    runs = sorted((int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal()), reverse=True)
    if not runs:
        raise UsageError(f"job {job!r} has no output yet: no run of it has succeeded (see `mrcore history`)")
    for run in runs:
        if (found := read(state_dir, job, run)) is not None:
            yield found


def parts(state_dir: Path, job: str) -> list[dict[str, Any]]:
    """Give the parts that make up a job's output, the last run's and earlier ones' as far as they were kept, in order.

    Raises UsageError when there is none.
    """
    found: list[dict[str, Any]] = []
    for each in committed(state_dir, job):
        found.append(each)
        if each["delete_job_data"]:
            break
    if all("removed" in each for each in found):
        anew = f"`mrcore ledger forget {job}` has its next run read all" if found[0].get("ledger") else "run it again"
        raise UsageError(f"the output of job {job!r} {removal(found[0])}; to have it again: {anew}")
    return [part for each in reversed(found) for part in each["parts"]]


def remove_parts(state_dir: Path, job: str, run: int, by: str) -> None:
    """Note that the parts of a run are no part of the job's output any more, and who removed them. May be repeated."""
    found = read(state_dir, job, run)
    if found and "removed" not in found:
        write(state_dir, found | {"removed": {"time": time.time(), "by": by}, "parts": []})


def removal(found: dict[str, Any]) -> str | None:
    """Return when and by whom the output that a manifest named was removed, None if it was not."""
    if not (removed := found.get("removed")):
        return None
    day = datetime.fromtimestamp(removed["time"]).astimezone().isoformat(" ", timespec="minutes")
    return f"was removed on {day} by {removed['by']}"
