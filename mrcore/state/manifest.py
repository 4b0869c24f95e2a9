"""The commit point of a run: one file on the master, renamed into place, that names what the run produced.

`state/manifests/JOB/RUN.json`. Whether a run has committed is whether this file exists; all that follows from it (the
parts' final names, removal of older output, the ledger, the run's row) can be done again after a crash.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from mrcore.errors import UsageError
from mrcore.messages.kinds import Count, JobName, Positive, Seconds, convert
from mrcore.messages.tasks import PlacedPart
from mrcore.system.paths import PARTIAL, fsync_dir, write_atomic

FORMAT = 1  # raised when a release before could not read it; files of before have none

T = TypeVar("T")


class Read(NamedTuple):
    """How far a run has read a file, with what tells whether the file has changed since."""

    holder: str  # a node, "" for a file that any node may read
    path: str
    end: int
    mtime_ns: int
    inode: int
    checksum: int  # of the block before `end`


class LedgerUpdate(msgspec.Struct):
    """What a run enters into its job's ledger, in place of all that is there with `replace`."""

    replace: bool
    entries: list[Read]


class Removal(msgspec.Struct):
    """When and by whom output was removed."""

    time: Seconds
    by: str


class Manifest(msgspec.Struct):
    """What a committed run produced."""

    job: JobName
    run: Positive
    format: Count = FORMAT
    parts: list[PlacedPart] = []
    delete_job_data: bool = False  # the output of earlier runs goes
    merge_output: bool = False
    keys_kept: bool = False  # the output is sorted by its keys
    partitioner: str = "hash"
    partitions: Count = 0
    cuts: list[Any] | None = None  # keys between the partitions of a range partitioner
    ledger: LedgerUpdate | None = None
    removed: Removal | None = None
    counts: dict[str, Any] = {}
    skipped: dict[str, Count] = {}
    shuffle: list[tuple[str, str, Count]] = []  # from node, to node, bytes
    task_seconds: dict[str, Seconds] = {}
    phases: dict[str, Seconds] = {}  # seconds of each
    deaths: list[str] = []


def load(path: Path, kind: type[T], what: str, next_step: str) -> T:
    """Return what one of the master's JSON files holds, decoded strictly. FileNotFoundError; UsageError: damaged."""
    try:
        return convert(kind, json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what} {path} is damaged: {error}; {next_step}") from None


def path_of(state_dir: Path, job: str, run: int) -> Path:
    """Return where the manifest of a run lies."""
    return state_dir / "manifests" / job / f"{run}.json"


def to_dict(manifest: Manifest) -> dict[str, Any]:
    """Return a manifest as users and the file have it."""
    return msgspec.to_builtins(manifest)  # type: ignore[no-any-return]


def write(state_dir: Path, manifest: Manifest) -> None:
    """Commit: after this returns the run has happened."""
    path = path_of(state_dir, manifest.job, manifest.run)
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in (path.parent.parent, state_dir):
            fsync_dir(folder)
    write_atomic(path, json.dumps(to_dict(manifest), separators=(",", ":")).encode())


def read(state_dir: Path, job: str, run: int) -> Manifest | None:
    """Return the manifest of a run, or None when it has not committed. Raises UsageError when it is damaged."""
    path = path_of(state_dir, job, run)
    restore = f"bring it back from a backup, or, should there be none, remove it and run {job} again"
    try:
        manifest = load(path, Manifest, "the manifest", restore)
    except FileNotFoundError:
        return None
    if manifest.format > FORMAT:
        raise UsageError(
            f"the manifest {path} is of format {manifest.format}, this mrcore reads {FORMAT}: update mrcore"
        )
    return manifest


def _runs(state_dir: Path, job: str) -> list[int]:
    paths = (state_dir / "manifests" / job).glob("*.json")
    return sorted((int(path.stem) for path in paths if path.stem.isdecimal()), reverse=True)


def committed(state_dir: Path, job: str) -> Iterator[Manifest]:
    """Yield the manifests of a job's committed runs, the newest first."""
    for run in _runs(state_dir, job):
        if (manifest := read(state_dir, job, run)) is not None:
            yield manifest


def newest(state_dir: Path, job: str) -> Manifest | None:
    """Return the manifest of a job's newest committed run, or None."""
    return next(committed(state_dir, job), None)


def output(state_dir: Path, job: str) -> list[Manifest]:
    """Return the manifests of which a job's output consists: the last run's, after earlier ones' that were kept."""
    kept: list[Manifest] = []
    for manifest in committed(state_dir, job):
        kept.insert(0, manifest)
        if manifest.delete_job_data:
            break
    return kept


def parts(state_dir: Path, job: str, run: int | None = None) -> list[PlacedPart]:
    """Return the parts that make up a job's output, or those that one run added to it. UsageError: there are none."""
    kept = output(state_dir, job)
    if kept and run is not None:
        there = [manifest for manifest in kept if not manifest.removed]
        if run not in [manifest.run for manifest in there]:
            runs = ", ".join(str(manifest.run) for manifest in there) or "none"
            why = removal(next((manifest for manifest in kept if manifest.run == run), Manifest(job, run)))
            why = why or "is not there: it did not succeed, had nothing new to read, or a later run has replaced it"
            raise UsageError(f"the output of run {run} of job {job!r} {why}; runs whose output is there: {runs}")
        return next(manifest.parts for manifest in there if manifest.run == run)
    if not kept:
        raise UsageError(f"job {job!r} has no output yet: no run of it has succeeded (see `mrcore history`)")
    if all(manifest.removed for manifest in kept):
        again = f"`mrcore ledger forget {job}` has its next run read all" if kept[-1].ledger else "run it again"
        raise UsageError(f"the output of job {job!r} {removal(kept[-1])}; to have it again: {again}")
    return [part for manifest in kept for part in manifest.parts]


def prune(state_dir: Path, job: str, kept_runs: set[int]) -> None:
    """Forget the manifests of runs that are neither to be kept nor part of the job's output any more.

    Also what a Runner left that died while it wrote one: so no run of the job may be under way.
    """
    for path in (state_dir / "manifests" / job).glob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)
    kept = output(state_dir, job)
    if kept and kept[0].delete_job_data:  # what came before it is gone
        for run in _runs(state_dir, job):
            if run < kept[0].run and run not in kept_runs:
                path_of(state_dir, job, run).unlink(missing_ok=True)


def relocate(state_dir: Path, job: str, run: int, nodes: Mapping[str, tuple[str, str]]) -> None:
    """Let parts of a run lie on another node: by name, the node that they were on, and the one that has them now.

    May be repeated. Nothing is written when the run has no such part.
    """
    manifest = read(state_dir, job, run)
    if manifest is None:
        return
    ways = [(part, *nodes.get(part.name, ("", ""))) for part in manifest.parts]
    if any(part.node == old for part, old, _ in ways):
        parts = [msgspec.structs.replace(part, node=new) if part.node == old else part for part, old, new in ways]
        write(state_dir, msgspec.structs.replace(manifest, parts=parts))


def remove_parts(state_dir: Path, job: str, run: int, by: str) -> None:
    """Note that the parts of a run are no part of the job's output any more, and who removed them. May be repeated."""
    manifest = read(state_dir, job, run)
    if manifest and not manifest.removed:
        write(state_dir, msgspec.structs.replace(manifest, removed=Removal(time.time(), by), parts=[]))


def removal(manifest: Manifest) -> str | None:
    """Return when and by whom the output that a manifest named was removed, None if it was not."""
    if manifest.removed is None:
        return None
    day = datetime.fromtimestamp(manifest.removed.time).astimezone().isoformat(" ", timespec="minutes")
    return f"was removed on {day} by {manifest.removed.by}"
