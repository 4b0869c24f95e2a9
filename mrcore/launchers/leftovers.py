"""What may go of a node's working files when its cluster ends."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mrcore.state import manifest


def removable(state_dir: Path, entries: Iterable[str]) -> list[str]:
    """Of the entries of a working folder (`JOB`, `JOB/RUN`), those that may be removed.

    A run that has committed may have parts there that have not got their places yet: the next Runner sees to that.
    """
    entries = list(entries)
    kept = {entry for entry in entries if _is_committed(state_dir, entry)}
    parents = {entry.partition("/")[0] for entry in kept}
    return [entry for entry in entries if entry not in kept | parents]


def _is_committed(state_dir: Path, entry: str) -> bool:
    job, _, run = entry.partition("/")
    return run.isdecimal() and manifest.path_of(state_dir, job, int(run)).exists()
