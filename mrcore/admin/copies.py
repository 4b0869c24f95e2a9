"""Copies of backups on nodes, and how many backups and copies stay."""

from __future__ import annotations

import re
import shlex
import stat
from collections.abc import Iterable
from pathlib import Path

from mrcore.launchers import launcher_of
from mrcore.settings.config import Settings
from mrcore.state.backup import LastBackup, last_backup, note

_MOMENT = re.compile(r"\d{1,12}(\.\d{1,12})?")
MAX_PRUNED = 1_000  # at a time: a command line is no longer


def copy_to_node(settings: Settings, file: Path, node_name: str) -> Path:
    """Keep a copy of a backup in COMPUTE_DIR/backups of a node; return its path there. Raises ClusterFault, UsageError.

    Until it is there the doctor knows that it is missing.
    """
    folder = settings.node(node_name).compute_dir / "backups"
    about = (last_backup(settings.state_dir) or {}) | LastBackup(copy_to=node_name, copied=False)
    note(settings, about)
    target = launcher_of(settings).copy_file(settings, node_name, file, folder)
    note(settings, about | LastBackup(copied=True))
    return target


def prune(settings: Settings, file: Path, keep: int, node_name: str | None = None) -> int:
    """Remove all but the `keep` newest files that are named like `file` but for their numbers, in its folder, and of a
    node's copies; `file` itself stays. Return how many went."""
    like = re.compile("[0-9]+".join(map(re.escape, re.split("[0-9]+", file.name))))

    def surplus(dated: Iterable[tuple[float, str]]) -> list[str]:
        others = sorted((pair for pair in dated if like.fullmatch(pair[1]) and pair[1] != file.name), reverse=True)
        return [name for _, name in others[keep - 1 :]]

    def files(folder: Path) -> Iterable[tuple[float, str]]:
        statuses = ((path.lstat(), path.name) for path in folder.iterdir())
        return [(status.st_mtime, name) for status, name in statuses if stat.S_ISREG(status.st_mode)]

    folders = [file.absolute().parent]
    if node_name is not None:
        folders.append(settings.node(node_name).compute_dir / "backups")
    here = folders if settings.local else folders[:1]
    gone = [path / name for path in here for name in surplus(files(path))]
    for path in gone:
        path.unlink(missing_ok=True)
    if node_name is None or settings.local:
        return len(gone)
    folder = folders[1]
    launcher, place = launcher_of(settings), shlex.quote(str(folder))
    # Every job of that node can write there: a name may hold a newline, the folder be a link.
    listed = launcher.run_on_node(settings, node_name, f"find {place} -maxdepth 1 -type f -printf '%T@ %f\\0'")
    pairs = [line.partition(" ") for line in listed.split("\0")]
    if away := surplus((float(moment), name) for moment, _, name in pairs if _MOMENT.fullmatch(moment)):
        names = " ".join(shlex.quote(f"{folder}/{name}") for name in away[:MAX_PRUNED])
        launcher.run_on_node(settings, node_name, f"test ! -L {place} && rm -f -- {names}")
    return len(gone) + len(away)
