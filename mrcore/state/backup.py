"""Backup and restore of what the master knows: queue, history, ledger (one SQLite file) and manifests, in one file.

A backup is a line with a signature and a gzipped tar: `backup.json` (version, schema, time), `queue.sqlite`,
`manifests/JOB/RUN.json`. The queue is copied first: every run that has succeeded by it has its manifest in the backup
then. A restored queue runs scripts on the master, so a restore wants the signature of the cluster's own key, and
shows what would run. On a deployed master only root has that key; see `may_sign`.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import sqlite3
import stat
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypedDict, cast

from mrcore import __version__
from mrcore.errors import UsageError
from mrcore.messages.kinds import Count, Seconds, convert
from mrcore.settings.config import Settings
from mrcore.state.database import SCHEMA_VERSION, sole_runner, upgrade
from mrcore.state.manifest import load
from mrcore.state.store import Store
from mrcore.system import archives, failpoints
from mrcore.system.paths import PARTIAL, fsync_dir, fsync_file, publish_file, remove_tree, write_atomic

MAX_BACKUP_BYTES, MAX_UNPACKED_BYTES, MAX_MEMBERS = 4 << 30, 16 << 30, 200_000
MAX_HEADER_BYTES = 1 << 20  # about one file of the tar
MIN_FREE_DISK_BYTES = 256 << 20
_MEMBER = re.compile(r"backup\.json|queue\.sqlite|manifests/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}/\d{1,19}\.json")
_DAMAGED = (
    tarfile.TarError, OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, OverflowError, RecursionError,
    sqlite3.Error,
)  # fmt: skip
_SIGNED = re.compile(rb"mrcore backup, signed ([0-9a-f]{128})\n")
_SIGNED_BYTES = len("mrcore backup, signed ") + 128 + 1
_TAKE_ANOTHER = "take another one; --unverified takes this, whoever wrote it"
_TO_RUN = (
    "SELECT job_name, job_type, json_extract(spec, '$.job_submitter') AS submitter, "
    "json_extract(spec, '$.script_location') AS script FROM jobs WHERE state != 'out' ORDER BY job_type DESC, number"
)


class LastBackup(TypedDict, total=False):
    """What `last_backup.json` holds of the newest backup."""

    time: Seconds
    file: str
    copy_to: str  # a node, if a copy was asked for
    copied: bool


class About(TypedDict):
    """What a backup holds of itself, `backup.json`."""

    version: str
    schema: Count
    time: Seconds


class ToRun(TypedDict):
    """A job that would run after a restore."""

    job_name: str
    job_type: str
    submitter: str | None
    script: str | None


class Restored(About):
    """What `restore` brings, or has brought."""

    jobs: list[ToRun]


# --- Signatures ------------------------------------------------------------------------------------------------------


def _key(settings: Settings, kind: str) -> Path:
    """The key that signs (`key`), or what verifies its signatures (`pub`).

    Deployed, they lie beside the folder that user mrcore, as whom jobs run, may read.
    """
    return (settings.pki_dir if settings.local else settings.pki_dir.parent) / f"backup.{kind}"


def may_sign(settings: Settings) -> bool:
    """Whether this process can sign: that of a local cluster's user, whose key is made now, or of a master's root."""
    if settings.local:
        from mrcore.wire import pki  # late, here and below: a Runner, which completes restores, needs no cryptography

        pki.make_backup_key(settings.pki_dir)
    return os.access(_key(settings, "key"), os.R_OK, effective_ids=True)


def sign(settings: Settings, content: IO[bytes], target: IO[bytes]) -> None:
    """Write a backup and its signature before it."""
    from mrcore.wire import pki

    target.write(b"mrcore backup, signed %s\n" % pki.sign(_key(settings, "key"), _digest(content)).hex().encode())
    content.seek(0)
    shutil.copyfileobj(content, target, 1 << 20)


def _digest(content: IO[bytes], start: int = 0) -> bytes:
    content.seek(start)
    return b"mrcore backup\0" + hashlib.file_digest(content, "sha512").digest()  # type: ignore[arg-type]


def _signed_from(settings: Settings, content: IO[bytes]) -> int:
    """Where in a file the backup begins whose signature is right. Raises ValueError, UsageError (no key)."""
    from mrcore.wire import pki

    content.seek(0)
    line = _SIGNED.fullmatch(content.read(_SIGNED_BYTES))
    if line is None:
        raise ValueError(f"it is not signed, or no backup: {_TAKE_ANOTHER}")
    if not pki.is_signed(_key(settings, "pub"), _digest(content, _SIGNED_BYTES), bytes.fromhex(line[1].decode())):
        signer = _key(settings, "key")
        raise ValueError(f"its signature is wrong: it was changed or cut, or not {signer} signed it: {_TAKE_ANOTHER}")
    return _SIGNED_BYTES


# --- Backup ----------------------------------------------------------------------------------------------------------


def write(settings: Settings, stream: IO[bytes]) -> dict[str, Any]:
    """Write a backup, not signed, into a binary stream; a Runner may go on meanwhile. Return counts."""
    about = {"version": __version__, "schema": SCHEMA_VERSION, "time": time.time()}
    with (
        contextlib.closing(Store(settings.state_dir)) as store,
        tempfile.TemporaryDirectory(prefix="backup.", suffix=PARTIAL, dir=settings.state_dir) as folder,
    ):
        about_file, copy = Path(folder) / "backup.json", Path(folder) / "queue.sqlite"
        about_file.write_text(json.dumps(about))
        with contextlib.closing(sqlite3.connect(copy)) as target:
            store.copy_to(target)
            tables = ("jobs", "runs")
            counts = {name: target.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables}
        # No extended headers, which a reader has to take into memory whole.
        with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=5, format=tarfile.USTAR_FORMAT) as archive:
            archive.add(about_file, "backup.json", filter=_plain)
            archive.add(copy, "queue.sqlite", filter=_plain)
            manifests = sorted(settings.state_dir.glob("manifests/*/*.json"))
            if len(manifests) > MAX_MEMBERS - 2:
                raise UsageError(
                    f"there are {len(manifests)} manifests, more than a backup takes: lower history_keep_runs"
                )
            for path in manifests:
                with contextlib.suppress(FileNotFoundError):  # forgotten meanwhile
                    archive.add(path, str(path.relative_to(settings.state_dir)), filter=_plain)
    return {**counts, "manifests": len(manifests)}


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = int(member.mtime)
    return member


def backup(settings: Settings, file: Path, signed: IO[bytes] | None = None) -> dict[str, Any]:
    """Write a backup to `file`, which appears when it is whole: signed if we can (`may_sign`), or what is `signed`
    already. Return counts."""
    partial, begun = file.with_name(file.name + PARTIAL), time.time()
    partial.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with open(os.open(partial, flags, 0o600), "wb") as stream:  # no other's, from the start
            counts: dict[str, Any] = {}
            if signed:
                shutil.copyfileobj(signed, stream, 1 << 20)
            elif may_sign(settings):
                with tempfile.TemporaryFile(dir=file.parent) as content:
                    counts = write(settings, content)
                    sign(settings, content, stream)
            else:
                counts = write(settings, stream)
            stream.flush()
            os.fsync(stream.fileno())
        publish_file(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    note(settings, {"time": begun, "file": str(file.absolute())})
    return {**counts, "bytes": file.stat().st_size}


def note(settings: Settings, about: LastBackup) -> None:
    """Write down which backup is the newest."""
    write_atomic(settings.state_dir / "last_backup.json", json.dumps(about).encode())


def last_backup(state_dir: Path) -> LastBackup | None:
    """Return the newest backup, None if none is known. Raises UsageError when the note is damaged."""
    try:
        return load(state_dir / "last_backup.json", LastBackup, "the note of", "`mrcore backup FILE` writes it again")
    except FileNotFoundError:
        return None


def restore(
    settings: Settings, file: Path, force: bool = False, verify: bool = True,
    agree: Callable[[Restored], None] | None = None,
) -> Restored:  # fmt: skip
    """Make queue, history, ledger and manifests what they were at a backup; return that. `agree` is called with it
    before anything is changed, and may raise.

    All of it or nothing, also if it is killed. Raises UsageError while a Runner runs, for a file that is no whole
    backup, unless not to `verify` for one that this cluster has not signed, and, unless `force`, when there are jobs in
    the queue or the history, which would be lost.
    """
    state_dir = settings.state_dir
    state_dir.mkdir(parents=True, exist_ok=True)
    with sole_runner(state_dir), contextlib.closing(Store(state_dir)) as store:
        complete(state_dir)
        if reason := store.held_by_drain():
            raise UsageError(f"{reason}; a restore has to wait for that")
        known = store.last_runs()
        if known and not force:
            raise UsageError(f"{store.path} holds {len(known)} jobs, which a restore would replace: add --force")
        partial = state_dir / f"restore{PARTIAL}"
        remove_tree(partial)
        (partial / "manifests").mkdir(parents=True)
        try:
            with tempfile.TemporaryFile(dir=state_dir) as content:  # what is verified is what is unpacked
                _take(file, content)
                start = _signed_from(settings, content) if verify else _unverified_from(content)
                content.seek(start)
                about = _unpack(content, partial)
            restored = Restored(**about, jobs=_check(partial / "queue.sqlite", about["time"], known))
            if agree:
                agree(restored)
        except BaseException as error:
            remove_tree(partial)
            if isinstance(error, UsageError) or not isinstance(error, _DAMAGED):
                raise
            raise UsageError(f"cannot restore {file}: {error or type(error).__name__}") from None
        fsync_file(partial / "queue.sqlite")  # all else was flushed when it was unpacked
        fsync_dir(partial)
        os.replace(partial, state_dir / "restore")
        fsync_dir(state_dir)
        failpoints.point("restore ready")
        complete(state_dir)
    return restored


def complete(state_dir: Path) -> None:
    """Do what is left of a restore that has begun to take effect; a Runner calls it at its start."""
    ready = state_dir / "restore"
    if not ready.is_dir():
        return
    if (ready / "manifests").is_dir():
        remove_tree(state_dir / "manifests")
        os.replace(ready / "manifests", state_dir / "manifests")
        fsync_dir(state_dir)
    failpoints.point("restore manifests")
    with (
        contextlib.closing(sqlite3.connect(ready / "queue.sqlite")) as source,
        contextlib.closing(sqlite3.connect(state_dir / "queue.sqlite", timeout=60)) as target,
    ):
        source.backup(target)  # one transaction, also for those who have the queue open
    failpoints.point("restore queue")
    remove_tree(ready)


def _take(file: Path, target: IO[bytes]) -> None:
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BACKUP_BYTES:
            raise ValueError(f"it is no plain file, or has more than {MAX_BACKUP_BYTES >> 20} MiB")
        shutil.copyfileobj(stream, target, 1 << 20)


def _unverified_from(content: IO[bytes]) -> int:
    content.seek(0)
    return _SIGNED_BYTES if _SIGNED.fullmatch(content.read(_SIGNED_BYTES)) else 0


def _unpack(content: IO[bytes], folder: Path) -> About:
    room = min(MAX_UNPACKED_BYTES, shutil.disk_usage(folder).free - MIN_FREE_DISK_BYTES)
    kind = "part of a backup, or too many parts"
    try:
        with gzip.GzipFile(fileobj=content, mode="rb") as stream:
            archives.unpack(
                cast(IO[bytes], stream), folder, most_bytes=room, most_files=MAX_MEMBERS, names=_MEMBER, kind=kind
            )
    except archives.BadArchive as error:
        raise ValueError(f"it {error}") from None
    with (folder / "backup.json").open("rb") as about_file:
        about = convert(About, json.loads(about_file.read(MAX_HEADER_BYTES)))
    if about["schema"] > SCHEMA_VERSION:
        raise ValueError(f"it is of schema {about['schema']}, this mrcore knows {SCHEMA_VERSION}: update mrcore")
    return about


def _check(queue: Path, begun: float, known: dict[str, int]) -> list[ToRun]:
    """Check the queue of a backup, return the jobs that wait in it, and see to it that no number of a run since then is
    used again.

    Servers refuse orders of an older run, and parts are named by the run. How many runs there were since the backup
    is not known, but a job hardly runs more often than once a second.
    """
    with contextlib.closing(sqlite3.connect(queue)) as db:
        if (state := db.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
            raise ValueError(f"its queue is damaged: {state}")
        if (schema := upgrade(db)) != SCHEMA_VERSION:
            raise ValueError(f"its queue is of schema {schema}, this mrcore knows {SCHEMA_VERSION}: update mrcore")
        db.execute("UPDATE jobs SET last_run = last_run + ?", (max(0, int(time.time() - begun)) + 1,))
        for name, last_run in known.items():
            db.execute("UPDATE jobs SET last_run = max(last_run, ?) WHERE job_name = ?", (last_run, name))
        db.commit()
        db.execute("PRAGMA journal_mode=DELETE")  # one file again
        db.row_factory = sqlite3.Row
        return convert(list[ToRun], [dict(row) for row in db.execute(_TO_RUN)])
