"""Backup and restore of what the master knows: queue, history, ledger (one SQLite file) and manifests, in one file.

A backup is a gzipped tar: `backup.json` (version, schema, time), `queue.sqlite`, `manifests/JOB/RUN.json`. The queue is
copied first: each run that it says has succeeded has its manifest in the backup then.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sqlite3
import tarfile
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mrcore import __version__, faults
from mrcore.config import Settings
from mrcore.errors import UsageError
from mrcore.paths import PARTIAL, fsync_dir, fsync_file, publish_file, remove_tree, write_atomic
from mrcore.store import SCHEMA_VERSION, Store, sole_runner

_MEMBER = re.compile(r"backup\.json|queue\.sqlite|manifests/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}/\d{1,19}\.json")
_DAMAGED = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, KeyError, sqlite3.Error)


def backup(settings: Settings, file: Path) -> dict[str, Any]:
    """Write a backup to `file`, which appears when it is whole; a Runner may go on meanwhile. Gives counts."""
    partial, copy = file.with_name(file.name + PARTIAL), file.with_name(file.name + ".queue" + PARTIAL)
    about = {"version": __version__, "schema": SCHEMA_VERSION, "time": time.time()}
    store = Store(settings.state_dir)
    try:
        (about_file := copy.with_name(copy.name + ".json")).write_text(json.dumps(about))
        for file_of_ours in (copy, partial):
            file_of_ours.unlink(missing_ok=True)
            os.close(os.open(file_of_ours, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))  # no other's, from the start
        with contextlib.closing(sqlite3.connect(copy)) as target:
            store.copy_to(target)
            counts = {
                table: target.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("jobs", "runs")
            }
        with partial.open("wb") as stream:
            with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=5) as archive:
                archive.add(about_file, "backup.json")
                archive.add(copy, "queue.sqlite")
                manifests = sorted(settings.state_dir.glob("manifests/*/*.json"))
                for path in manifests:
                    with contextlib.suppress(FileNotFoundError):  # forgotten meanwhile
                        archive.add(path, str(path.relative_to(settings.state_dir)))
            stream.flush()
            os.fsync(stream.fileno())
        publish_file(partial, file)
    finally:
        store.close()
        for path in file.parent.glob(f"{copy.name}*"):
            path.unlink()
        partial.unlink(missing_ok=True)
    _note(settings, time=about["time"], file=str(file.absolute()))
    return {**counts, "manifests": len(manifests), "bytes": file.stat().st_size}


def copy_to_node(settings: Settings, file: Path, node_name: str) -> Path:
    """Keep a copy of a backup in COMPUTE_DIR/backups of a node; gives its path there. Raises ClusterFault, UsageError.

    Until it is there the doctor knows that it is missing.
    """
    folder = settings.node(node_name).compute_dir / "backups"
    about = (last_backup(settings.state_dir) or {}) | {"copy_to": node_name, "copied": False}
    _note(settings, **about)
    if settings.local:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = folder / file.name
        write_atomic(target, file.read_bytes(), 0o600)
    else:
        from mrcore.launchers import ssh

        target = ssh.copy_file(settings, node_name, file, folder)
    _note(settings, **about | {"copied": True})
    return target


def prune(settings: Settings, file: Path, keep: int, node_name: str | None = None) -> int:
    """Remove all but the `keep` newest files that are named like `file` but for their numbers, in its folder, and of a
    node's copies; `file` itself stays. Gives how many went."""
    like = re.compile("[0-9]+".join(map(re.escape, re.split("[0-9]+", file.name))))

    def surplus(found: Iterable[tuple[float, str]]) -> list[str]:
        others = sorted((each for each in found if like.fullmatch(each[1]) and each[1] != file.name), reverse=True)
        return [name for _, name in others[keep - 1 :]]

    gone = surplus((path.stat().st_mtime, path.name) for path in file.absolute().parent.iterdir() if path.is_file())
    for name in gone:
        file.with_name(name).unlink(missing_ok=True)
    if node_name is None:
        return len(gone)
    folder = settings.node(node_name).compute_dir / "backups"
    if settings.local:
        away = surplus((path.stat().st_mtime, path.name) for path in folder.iterdir() if path.is_file())
        for name in away:
            (folder / name).unlink(missing_ok=True)
        return len(gone) + len(away)
    from mrcore.launchers import ssh

    place = shlex.quote(str(folder))
    listed = ssh.run_on_node(settings, node_name, f"find {place} -maxdepth 1 -type f -printf '%T@ %f\\n'").splitlines()
    pairs = (line.partition(" ") for line in listed)
    if away := surplus((float(moment), name) for moment, _, name in pairs):
        names = " ".join(shlex.quote(name) for name in away)
        ssh.run_on_node(settings, node_name, f"cd {place} && rm -f -- {names}")
    return len(gone) + len(away)


def _note(settings: Settings, **about: Any) -> None:
    write_atomic(settings.state_dir / "last_backup.json", json.dumps(about).encode())


def last_backup(state_dir: Path) -> dict[str, Any] | None:
    """The newest backup: time, file, and if a copy was asked for `copy_to` (a node) and `copied`. None: none known."""
    try:
        found: dict[str, Any] = json.loads((state_dir / "last_backup.json").read_text())
    except (OSError, ValueError):
        return None
    return found


def restore(settings: Settings, file: Path, force: bool = False) -> dict[str, Any]:
    """Make queue, history, ledger and manifests what they were at a backup. Gives what the backup says of itself.

    All of it or nothing, also if it is killed. Raises UsageError while a Runner runs, for a file that is no whole
    backup, and, unless `force`, when there are jobs in the queue or the history, which would be lost.
    """
    state_dir = settings.state_dir
    state_dir.mkdir(parents=True, exist_ok=True)
    with sole_runner(state_dir), contextlib.closing(Store(state_dir)) as store:
        complete(state_dir)
        if reason := store.held_by_drain():
            raise UsageError(f"{reason}; a restore has to wait for that")
        known = {row["job_name"]: row["last_run"] for row in store.rows("SELECT job_name, last_run FROM jobs")}
        if known and not force:
            raise UsageError(f"{store.path} holds {len(known)} jobs, which a restore would replace: add --force")
        partial = state_dir / f"restore{PARTIAL}"
        remove_tree(partial)
        (partial / "manifests").mkdir(parents=True)
        try:
            about = _unpack(file, partial)
            _check(partial / "queue.sqlite", about, known)
        except _DAMAGED as error:
            remove_tree(partial)
            raise UsageError(f"cannot restore {file}: {error or type(error).__name__}") from None
        for path in sorted(partial.rglob("*"), reverse=True):
            fsync_dir(path) if path.is_dir() else fsync_file(path)
        fsync_dir(partial)
        os.replace(partial, state_dir / "restore")
        fsync_dir(state_dir)
        faults.point("restore ready")
        complete(state_dir)
    return about


def complete(state_dir: Path) -> None:
    """Do what is left of a restore that has begun to take effect; a Runner calls it at its start."""
    ready = state_dir / "restore"
    if not ready.is_dir():
        return
    if (ready / "manifests").is_dir():
        remove_tree(state_dir / "manifests")
        os.replace(ready / "manifests", state_dir / "manifests")
        fsync_dir(state_dir)
    faults.point("restore manifests")
    with (
        contextlib.closing(sqlite3.connect(ready / "queue.sqlite")) as source,
        contextlib.closing(sqlite3.connect(state_dir / "queue.sqlite", timeout=60)) as target,
    ):
        source.backup(target)  # one transaction, also for those who have the queue open
    faults.point("restore queue")
    remove_tree(ready)


def _unpack(file: Path, folder: Path) -> dict[str, Any]:
    with tarfile.open(file, "r:gz") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isreg() and _MEMBER.fullmatch(member.name) else None
            if content is None:
                raise ValueError(f"it holds {member.name!r:.100}, which is no part of a backup")
            target = folder / member.name
            target.parent.mkdir(exist_ok=True)
            with content, target.open("wb") as out:
                while piece := content.read(1 << 20):
                    out.write(piece)
    about: dict[str, Any] = json.loads((folder / "backup.json").read_text())
    if about["schema"] != SCHEMA_VERSION:
        raise ValueError(f"it is of schema {about['schema']}, this mrcore has {SCHEMA_VERSION}")
    return about


def _check(queue: Path, about: dict[str, Any], known: dict[str, int]) -> None:
    """Check the queue of a backup, and see to it that no number of a run since then is used again.

    Servers refuse orders of an older run, and parts are named by the run. How many runs there were since the backup
    is not known, but a job hardly runs more often than once a second.
    """
    with contextlib.closing(sqlite3.connect(queue)) as db:
        if (found := db.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
            raise ValueError(f"its queue is damaged: {found}")
        db.execute("UPDATE jobs SET last_run = last_run + ?", (max(0, int(time.time() - about["time"])) + 1,))
        for name, last_run in known.items():
            db.execute("UPDATE jobs SET last_run = max(last_run, ?) WHERE job_name = ?", (last_run, name))
        db.commit()
        db.execute("PRAGMA journal_mode=DELETE")  # one file again
