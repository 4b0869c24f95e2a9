"""Increments: what a `hold_state` job has read so far, and what of its inputs it is to read this time.

The ledger has one entry for each file: the position up to which it was read, its mtime and inode, and the crc32 of the
last block before that position. It is written after the commit, from the manifest, as often as need be: an entry says
nothing that a manifest did not say before. What the entries add up to is the output of one run, `ledgers.run`.

A file is read to the end of its last whole line. What follows waits for its newline, unless nobody has written to the
file for SETTLE_SECONDS: then it is a last line without one, unless it ends inside of a character. Should such a line go
on later, the file counts as changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mrcore.errors import JobFault, UsageError
from mrcore.messages.nodes import InputFile, ReadFile, Tail
from mrcore.state import manifest
from mrcore.state.manifest import LedgerUpdate, Manifest, Read
from mrcore.state.store import Store
from mrcore.system.readers import format_of

NAMED_FILES = 3  # of those that changed, in an error's text

Job = dict[str, Any]


class Entry(NamedTuple):
    """How far a file was read, and its time, inode and the crc32 of the block before that position."""

    read: int = 0
    mtime_ns: int = 0
    inode: int = 0
    checksum: int = 0


Key = tuple[str, str]  # holder (a node, "" for files that any node may read) and path
Entries = Mapping[Key, Entry]
Move = tuple[Key, Key, int, int, int]  # from where, to where, mtime_ns there and here, inode here
CheckTails = Callable[[str, list[ReadFile]], Sequence[Tail]]  # called with a node and files there


# --- Comparing -------------------------------------------------------------------------------------------------------


@dataclass
class News:
    """What a listing has that the ledger has not.

    `known` counts the files of which nothing is new, `unfinished` those whose last line has to wait.
    """

    files: dict[str, list[ReadFile]] = field(default_factory=dict)  # by node; `size`: the end of what is to be read
    entries: list[Read] = field(default_factory=list)  # what follows from reading them
    changed: list[str] = field(default_factory=list)
    known: int = 0
    unfinished: int = 0


def compare(
    files: Mapping[str, Sequence[InputFile]], entries: Entries, check_tails: CheckTails, holders: Mapping[str, str]
) -> News:
    """Return what is new in the files by node. `holders`: who holds a node's files.

    A file of which size, mtime and inode are those of the ledger is not looked into.
    """
    news = News()
    for node, listed in files.items():
        known = [(file, entries.get((holders[node], file.path), Entry())) for file in listed]
        todo = [(file, entry) for file, entry in known if entry[:3] != (file.size, file.mtime_ns, file.inode)]
        news.files[node] = []
        news.known += len(known) - len(todo)
        asked = [ReadFile(file.path, file.size, file.mtime_ns, file.inode, entry.read) for file, entry in todo]
        for (file, entry), tail in zip(todo, check_tails(node, asked), strict=True):
            if why := _change(file, entry, tail.before):
                news.changed.append(f"{file.path} {why}")
                continue
            news.unfinished += tail.end < file.size
            news.known += tail.end == entry.read > 0
            if tail.end > entry.read:
                news.files[node].append(ReadFile(file.path, tail.end, file.mtime_ns, file.inode, entry.read))
                news.entries.append(Read(holders[node], file.path, tail.end, file.mtime_ns, file.inode, tail.checksum))
    return news


def _change(file: InputFile, entry: Entry, before: int | None) -> str | None:
    """Return what happened to a file that did not only grow."""
    if not entry.read:
        return None
    if file.inode != entry.inode:
        return "was replaced"
    if file.size < entry.read:
        return f"shrank from {entry.read} to {file.size} bytes"
    if file.size == entry.read or format_of(file.path):
        return "was written to"
    return None if before == entry.checksum else f"is not what it was before byte {entry.read}"


@dataclass
class Plan:
    """What a run does with the files that are listed; of a job without `hold_state` it reads all."""

    files: Mapping[str, Sequence[InputFile]]  # by node; a ReadFile is to be read from where it was left
    known: int = 0  # files of which nothing is new
    skipped: dict[str, int] = field(default_factory=dict)  # files by reason
    nothing_new: bool = False
    replaces: bool = False  # earlier output goes
    base: Manifest | None = None  # of the run whose output is merged
    ledger: LedgerUpdate | None = None  # for the manifest


def plan(
    job: Job,
    files: Mapping[str, Sequence[InputFile]],
    check_tails: CheckTails,
    store: Store,
    *,
    state_dir: Path,
    base_dirs: Mapping[str, str],
    one_machine: bool,
) -> Plan:
    """Decide what a `hold_state` job reads of the files listed by node, and what it merges. Raises JobFault.

    `base_dirs` are the nodes'; `one_machine`: all nodes are this one.
    """
    # Where all nodes see the same disk a path says it all, whatever node reads it, and whatever the nodes are called.
    holders = {node: "" if one_machine or job["shared_input"] else node for node in files}
    run, forgotten, entries = read(store, job["job_name"])
    _refuse_rewritten(files, base_dirs, state_dir)
    news = compare(files, entries, check_tails, holders)
    again = run is None
    if news.changed and job["on_changed_input"] == "reprocess_all":
        again, forgotten, news = True, True, compare(files, {}, check_tails, holders)
    elif news.changed and job["on_changed_input"] == "fail":
        more = f" and {len(news.changed) - NAMED_FILES} more" if len(news.changed) > NAMED_FILES else ""
        raise JobFault(
            f"of what was read before, {'; '.join(news.changed[:NAMED_FILES])}{more}. Set on_changed_input: "
            "reprocess_all to read all files again, or ignore to leave these alone",
            files=news.changed[:100],
            code="changed_input",
        )
    nothing_new = not again and not any(news.files.values())
    latest = manifest.newest(state_dir, job["job_name"])
    # What goes on from output that was removed fails even if nothing is new.
    checks = not again and (not nothing_new or bool(latest and latest.removed))
    skipped = {"unfinished last line": news.unfinished, "changed since it was read": len(news.changed)}
    return Plan(
        files=news.files,
        known=news.known,
        skipped={key: number for key, number in skipped.items() if number},
        nothing_new=nothing_new,
        replaces=job["merge_output"] or forgotten,
        base=_earlier(job, run, latest, set(base_dirs)) if checks else None,
        ledger=LedgerUpdate(again, news.entries),
    )


def _refuse_rewritten(files: Mapping[str, Sequence[InputFile]], base_dirs: Mapping[str, str], state_dir: Path) -> None:
    """Refuse output of a job with `merge_output`, which writes all of it each time: as increments it counts again."""
    jobs = set()
    for node, listed in files.items():
        base = base_dirs[node].rstrip("/") + "/"
        parts = (file.path[len(base) :].split("/", 2) for file in listed if file.path.startswith(base))
        jobs |= {part[0] for part in parts if len(part) == 3 and part[1] == "reduce"}
    for job in sorted(jobs):
        if (latest := manifest.newest(state_dir, job)) and latest.merge_output:
            raise JobFault(
                f"input_dirs holds the output of {job}, a job with merge_output, which writes all of it again in each "
                f"run: leave out hold_state here, or let {job} accumulate (delete_job_data: false)",
                code="inputs",
            )


def _earlier(job: Job, run: int | None, latest: Manifest | None, nodes: set[str]) -> Manifest | None:
    """Return the manifest whose output `merge_output` goes on from. Raises JobFault with the way out if it cannot."""
    latest = latest or Manifest(job["job_name"], 0)
    partitions = job["number_of_partitions"] or latest.partitions
    why = None
    if latest.run != run:
        why = f"what it has read went into run {run}, and its output is of run {latest.run or None}"
    elif not job["merge_output"]:
        return None
    elif gone_how := manifest.removal(latest):
        why = f"its earlier output {gone_how}"
    elif not latest.merge_output:
        why = "its earlier output was made without merge_output"
    elif not latest.keys_kept:
        why = "its reduce function gave other keys than those of the groups, so its output is not sorted by them"
    elif (latest.partitioner, latest.partitions) != (job["partitioner"], partitions):
        was = f"{latest.partitions} partitions by {latest.partitioner}"
        why = f"its earlier output has {was}, the job wants {partitions} by {job['partitioner']}"
    elif gone := {part.node for part in latest.parts} - nodes:
        why = f"part of its earlier output lies on {', '.join(sorted(gone))}, no node of the cluster any more"
    if why:
        forget = f"`mrcore ledger forget {job['job_name']}`"
        text = f"{why}: this run cannot go on from it. {forget} makes the next run read all its inputs again"
        raise JobFault(text, code="ledger")
    return latest if latest.parts else None


# --- The tables ------------------------------------------------------------------------------------------------------


def read(store: Store, job: str) -> tuple[int | None, bool, dict[Key, Entry]]:
    """Return the run that the ledger belongs to (None: there is none), whether it was forgotten, and its entries."""
    known = store.rows("SELECT run, held FROM ledgers WHERE job_name = ?", job)
    run, held = (known[0]["run"], bool(known[0]["held"])) if known else (None, True)
    rows = store.rows("SELECT * FROM ledger WHERE job_name = ?", job)
    entries = {(row["holder"], row["path"]): Entry(*(row[key] for key in Entry._fields)) for row in rows}
    return (run if held else None), not held, entries


def job_names(store: Store) -> list[str]:
    """Return the jobs that have a ledger."""
    return [row["job_name"] for row in store.rows("SELECT job_name FROM ledgers WHERE held")]


def commit(store: Store, committed: Manifest) -> None:
    """Enter what a manifest says was read. May be repeated; does nothing once a later run has, or it was forgotten."""
    job, update = committed.job, committed.ledger
    if not update:
        return
    with store.change("ledger") as db:
        row = db.execute("SELECT run FROM ledgers WHERE job_name = ?", (job,)).fetchone()
        if row and row["run"] >= committed.run:
            return
        if update.replace:
            db.execute("DELETE FROM ledger WHERE job_name = ?", (job,))
        entries = ((job, *entry) for entry in update.entries)
        db.executemany("INSERT OR REPLACE INTO ledger VALUES (?, ?, ?, ?, ?, ?, ?)", entries)
        db.execute("INSERT OR REPLACE INTO ledgers VALUES (?, ?, 1)", (job, committed.run))


def relocate(store: Store, moves: Sequence[Move]) -> None:
    """Note that files lie elsewhere, as they were: how far they were read stays known.

    What was known of another file at the new place, which is gone, does not.
    """
    with store.change("ledger") as db:
        for (job,) in db.execute("SELECT job_name FROM ledgers").fetchall():
            for old, new, old_mtime_ns, mtime_ns, inode in moves:
                db.execute("DELETE FROM ledger WHERE job_name = ? AND holder = ? AND path = ?", (job, *new))
                db.execute(
                    "UPDATE ledger SET holder = ?, path = ?, inode = ?, mtime_ns = iif(mtime_ns = ?, ?, mtime_ns) "
                    "WHERE job_name = ? AND holder = ? AND path = ?",
                    (*new, inode, old_mtime_ns, mtime_ns, job, *old),
                )


def forget(store: Store, job: str) -> int:
    """Drop a job's entries, also those of a run that is under way; return how many. Raises UsageError: no ledger."""
    with store.change("ledger") as db:
        row = db.execute("SELECT run FROM ledgers WHERE job_name = ?", (job,)).fetchone()
        known = store.job(job)
        if not row and not (known and known.spec.get("hold_state")):
            raise UsageError(f"job {job!r} has no ledger: only jobs with hold_state have one, once they have run")
        run = max(row["run"] if row else 0, known.last_run if known else 0)
        db.execute("INSERT OR REPLACE INTO ledgers VALUES (?, ?, 0)", (job, run))
        return db.execute("DELETE FROM ledger WHERE job_name = ?", (job,)).rowcount
