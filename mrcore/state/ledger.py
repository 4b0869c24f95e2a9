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
from typing import TYPE_CHECKING, Any

from mrcore.errors import JobFault, UsageError
from mrcore.state import manifest
from mrcore.system.readers import format_of

if TYPE_CHECKING:  # agents come here for `look_into` and need no SQLite
    from mrcore.state.store import Store

NAMED_FILES = 3  # of those that changed, in an error's text

Json = dict[str, Any]
Listed = Sequence[Any]  # path, size in bytes, mtime in ns, inode
Entry = tuple[int, int, int, int]  # read up to, in bytes; mtime in ns; inode; crc32 of the block before
Entries = Mapping[tuple[str, str], Entry]  # by holder (a node, "" for files that any node may read) and path
Look = Callable[[str, list[list[Any]]], list[list[Any]]]
_NEW: Entry = (0, 0, 0, 0)


# --- On the node that holds the file ---------------------------------------------------------------------------------


# --- Comparing -------------------------------------------------------------------------------------------------------


@dataclass
class News:
    """What a listing has that the ledger has not: by node, `[path, read up to, mtime_ns, inode, read from]`.

    `known` counts the files of which nothing is new, `unfinished` those whose last line has to wait.
    """

    files: dict[str, list[list[Any]]] = field(default_factory=dict)
    entries: list[list[Any]] = field(default_factory=list)  # holder, path and the Entry that follows from reading
    changed: list[str] = field(default_factory=list)
    known: int = 0
    unfinished: int = 0


def compare(files: Mapping[str, Sequence[Listed]], entries: Entries, look: Look, holders: Mapping[str, str]) -> News:
    """Find what is new. `look(node, [[*listed, read up to]…])` brings what `look_into` gives on that node.

    A file of which size, mtime and inode are those of the ledger is not looked into.
    """
    news = News()
    for node, listed in files.items():
        known = [entries.get((holders[node], file[0]), _NEW) for file in listed]
        todo = [(file, entry) for file, entry in zip(listed, known, strict=True) if entry[:3] != tuple(file[1:])]
        news.files[node] = []
        news.known += len(listed) - len(todo)
        found = look(node, [[*file, entry[0]] for file, entry in todo])
        for (file, entry), (end, checksum, before) in zip(todo, found, strict=True):
            path, size, mtime_ns, inode = file
            why = _change(path, size, inode, entry, before)
            if why:
                news.changed.append(f"{path} {why}")
                continue
            news.unfinished += end < size
            news.known += end == entry[0] > 0
            if end > entry[0]:
                news.files[node].append([path, end, mtime_ns, inode, entry[0]])
                news.entries.append([holders[node], path, end, mtime_ns, inode, checksum])
    return news


def _change(path: str, size: int, inode: int, entry: Entry, before: int | None) -> str | None:
    """What happened to a file that did not only grow."""
    read, _, old_inode, checksum = entry
    if not read:
        return None
    if inode != old_inode:
        return "was replaced"
    if size < read:
        return f"shrank from {read} to {size} bytes"
    if size == read or format_of(path):
        return "was written to"
    return None if before == checksum else f"is not what it was before byte {read}"


def plan(
    job: Json,
    files: Mapping[str, Sequence[Listed]],
    look: Look,
    store: Store,
    *,
    state_dir: Path,
    base_dirs: Mapping[str, str],
    one_machine: bool,
) -> Json:
    """Say what a `hold_state` job does with the files listed by node: read which, from where, merged with what.

    Gives {"files" (as News.files), "known", "skipped", "nothing_new", "replaces" (earlier output goes), "base" (the
    manifest of the run whose output is merged, or None), "ledger" (for the manifest)}. Raises JobFault. `base_dirs` are
    the nodes'; `one_machine`: all nodes are this one.
    """
    # Where all nodes see the same disk a path says it all, whatever node reads it, and whatever the nodes are called.
    holders = {node: "" if one_machine or job["shared_input"] else node for node in files}
    run, forgotten, entries = read(store, job["job_name"])
    _refuse_rewritten(files, base_dirs, state_dir)
    news = compare(files, entries, look, holders)
    anew = run is None
    if news.changed and job["on_changed_input"] == "reprocess_all":
        anew, forgotten, news = True, True, compare(files, {}, look, holders)
    elif news.changed and job["on_changed_input"] == "fail":
        more = f" and {len(news.changed) - NAMED_FILES} more" if len(news.changed) > NAMED_FILES else ""
        raise JobFault(
            f"of what was read before, {'; '.join(news.changed[:NAMED_FILES])}{more}. Set on_changed_input: "
            "reprocess_all to read all files anew, or ignore to leave these alone",
            files=news.changed[:100],
        )
    nothing_new = not anew and not any(news.files.values())
    removed = "removed" in (manifest.newest(state_dir, job["job_name"]) or {})
    skipped = {"unfinished last line": news.unfinished, "changed since it was read": len(news.changed)}
    return {
        "files": news.files,
        "known": news.known,
        "skipped": {key: number for key, number in skipped.items() if number},
        "nothing_new": nothing_new,
        "replaces": job["merge_output"] or forgotten,
        "base": None if anew or (nothing_new and not removed) else _earlier(job, run, state_dir, set(base_dirs)),
        "ledger": {"replace": anew, "entries": news.entries},
    }


def _refuse_rewritten(files: Mapping[str, Sequence[Listed]], base_dirs: Mapping[str, str], state_dir: Path) -> None:
    """A job with `merge_output` writes all of its output each time: read as increments it would count again."""
    jobs = set()
    for node, listed in files.items():
        base = base_dirs[node].rstrip("/") + "/"
        parts = (file[0][len(base) :].split("/", 2) for file in listed if file[0].startswith(base))
        jobs |= {each[0] for each in parts if len(each) == 3 and each[1] == "reduce"}
    for job in sorted(jobs):
        if (newest := manifest.newest(state_dir, job)) and newest.get("merge_output"):
            raise JobFault(
                f"input_dirs holds the output of {job}, a job with merge_output, which writes all of it anew in each "
                f"run: leave out hold_state here, or let {job} accumulate (delete_job_data: false)"
            )


def _earlier(job: Json, run: int | None, state_dir: Path, nodes: set[str]) -> Json | None:
    """The manifest whose output `merge_output` goes on from. Raises JobFault with the way out when it cannot be."""
    newest = manifest.newest(state_dir, job["job_name"]) or {"run": None}
    gone = {part["node"] for part in newest.get("parts", ())} - nodes
    partitions = job["number_of_partitions"] or newest.get("partitions")
    why = None
    if newest["run"] != run:
        why = f"what it has read went into run {run}, and its output is of run {newest['run']}"
    elif not job["merge_output"]:
        return None
    elif gone_how := manifest.removal(newest):
        why = f"its earlier output {gone_how}"
    elif not newest["merge_output"]:
        why = "its earlier output was made without merge_output"
    elif not newest["keys_kept"]:
        why = "its reduce function gave other keys than those of the groups, so its output is not sorted by them"
    elif (newest["partitioner"], newest["partitions"]) != (job["partitioner"], partitions):
        was = f"{newest['partitions']} partitions by {newest['partitioner']}"
        why = f"its earlier output has {was}, the job wants {partitions} by {job['partitioner']}"
    elif gone:
        why = f"part of its earlier output lies on {', '.join(sorted(gone))}, no node of the cluster any more"
    if why:
        forget = f"`mrcore ledger forget {job['job_name']}`"
        raise JobFault(f"{why}: this run cannot go on from it. {forget} makes the next run read all its inputs anew")
    return newest if newest["parts"] else None


# --- The tables ------------------------------------------------------------------------------------------------------


def read(store: Store, job: str) -> tuple[int | None, bool, dict[tuple[str, str], Entry]]:
    """Give the run that the ledger belongs to (None: there is none), whether it was forgotten, and its entries."""
    found = store.rows("SELECT run, held FROM ledgers WHERE job_name = ?", job)
    rows = store.rows("SELECT * FROM ledger WHERE job_name = ?", job)
    entries = {
        (each["holder"], each["path"]): (each["read"], each["mtime_ns"], each["inode"], each["checksum"])
        for each in rows
    }
    return (found[0]["run"] if found and found[0]["held"] else None), bool(found and not found[0]["held"]), entries


def commit(store: Store, found: Json) -> None:
    """Enter what a manifest says was read. May be repeated; does nothing once a later run has, or it was forgotten."""
    job, told = found["job"], found.get("ledger")
    if not told:
        return
    with store.change("ledger") as db:
        row = db.execute("SELECT run FROM ledgers WHERE job_name = ?", (job,)).fetchone()
        if row and row["run"] >= found["run"]:
            return
        if told["replace"]:
            db.execute("DELETE FROM ledger WHERE job_name = ?", (job,))
        db.executemany(
            "INSERT OR REPLACE INTO ledger VALUES (?, ?, ?, ?, ?, ?, ?)", ([job, *each] for each in told["entries"])
        )
        db.execute("INSERT OR REPLACE INTO ledgers VALUES (?, ?, 1)", (job, found["run"]))


def relocate(store: Store, moves: Sequence[tuple[tuple[str, str], tuple[str, str], int, int, int]]) -> None:
    """Files lie elsewhere now, as they were: holder and path of before and of now, mtime_ns of both, inode.

    How far they were read stays known. What was known of another file at the new place, which is gone, does not.
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
    """Drop a job's entries, also those of a run that is under way; gives how many. Raises UsageError: no ledger."""
    with store.change("ledger") as db:
        row = db.execute("SELECT run FROM ledgers WHERE job_name = ?", (job,)).fetchone()
        known = store.job(job)
        if not row and not (known and known["spec"].get("hold_state")):
            raise UsageError(f"job {job!r} has no ledger: only jobs with hold_state have one, once they have run")
        run = max(row["run"] if row else 0, known["last_run"] if known else 0)
        db.execute("INSERT OR REPLACE INTO ledgers VALUES (?, ?, 0)", (job, run))
        return db.execute("DELETE FROM ledger WHERE job_name = ?", (job,)).rowcount
