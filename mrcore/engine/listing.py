"""Which input files a job has on a node: each file once, whatever names lead to it, and what is not read, counted.

The walk goes on in slices of time, so that the caller may stop asking: nothing else keeps it going.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mrcore.engine.globbing import expand
from mrcore.messages.kinds import MAX_INPUT_BYTES, MAX_INPUT_FILES, MAX_INPUT_NAMES
from mrcore.messages.nodes import InputFile, InputPage
from mrcore.messages.pages import InputPages
from mrcore.system.paths import PARTIAL, Layout
from mrcore.system.readers import NotRegular, open_regular
from mrcore.text import one_line

MAX_FILES = 5_000_000  # of one walk, whichever node is to read them
ALIAS = "same file under another name"  # as the reason why a file is skipped
MAX_ERRORS = 9  # listed one by one, so that there is room for the count of the others where nodes are put together


def list_inputs(job: Mapping[str, Any], layout: Layout, node_names: Sequence[str], node_name: str) -> InputPage:
    """Return the files of a job's `input_dirs` that one node is to read, all in one page."""
    listing = Listing(job, layout, node_names, node_name)
    listing.advance(math.inf)
    return listing.result()


def gather(call: Callable[..., InputPage], job: dict[str, Any], node_names: Sequence[str], node: str) -> InputPage:
    """Ask the agent of `node` for its whole listing, by slices of its walk and then by pages, and return it as one.

    Raises Malformed for one that no honest node has.
    """
    pages, cursor = InputPages(node, job["input_dirs"]), None
    while True:
        cursor = pages.add(call(job=job, node_names=node_names, cursor=cursor))
        if cursor is None:
            assert pages.listing is not None
            return pages.listing


def rendezvous(name: str, nodes: Sequence[str]) -> str:
    """Choose the node for a name: the same for every caller, and only 1/n of the names move when a node joins."""
    return max(nodes, key=lambda node: hashlib.blake2b(f"{node}\0{name}".encode(), digest_size=8).digest())


class Listing:
    """The walk over a job's `input_dirs`; `advance` goes on with it, `result` returns what it has come by.

    An entry is a folder (one level), a file or a glob (`globbing.expand`); a relative one lies under base_dir. With
    `shared_input` each file goes to one of `node_names`. `sibling_dirs`, which the local cluster adds to the job,
    is the folder that holds all nodes' own folders: files outside it are shared by their nature, those of other nodes
    are left out. Of a file's names (links, hard links, two mounts) one counts: no link if there is one, then the first.
    """

    def __init__(self, job: Mapping[str, Any], layout: Layout, node_names: Sequence[str], node_name: str) -> None:
        self._shared, self._siblings = job.get("shared_input"), job.get("sibling_dirs")
        self._layout, self._node_names, self._node_name = layout, node_names, node_name
        self._matched = dict.fromkeys(job["input_dirs"], 0)
        self._skipped: dict[str, int] = {}
        self._errors: list[str] = []
        self._more_errors = 0
        self._files: dict[tuple[int, int | str], InputFile] = {}  # by device and inode
        self._aliases: set[str] = set()
        self._seen = hashlib.sha256()
        self._walk = (
            (entry, path) for entry in self._matched for path in expand(entry, str(layout.base_dir), self._cannot_read)
        )

    def advance(self, seconds: float) -> bool:
        """Go on for so long; returns whether the walk has come to its end."""
        deadline = time.monotonic() + seconds
        for entry, path in self._walk:
            if path is not None and not self._is_another_nodes(path):
                self._admit(entry, path)
            if len(self._files) > MAX_FILES:
                self._error(f"input_dirs match more than {MAX_FILES:,} files on one node: give the job fewer of them")
                return True
            if time.monotonic() >= deadline:
                return False
        return True

    def result(self) -> InputPage:
        """Return all that the walk has come by so far.

        The fingerprint covers what absolute entries match, so that equal ones on all nodes are noticed.
        """
        mine = [file for file in self._files.values() if self._is_ours(file.path)]
        total, names = sum(file.size for file in mine), sum(len(file.path) for file in mine)
        if len(mine) > MAX_INPUT_FILES or total > MAX_INPUT_BYTES or names > MAX_INPUT_NAMES:
            self._error(
                f"{len(mine):,} input files of {total:,} bytes on node {self._node_name} are more than it may read in "
                f"one run ({MAX_INPUT_FILES:,} files, {MAX_INPUT_BYTES >> 40} TiB): give the job fewer input_dirs, or "
                "fewer files"
            )
            mine = []
        more = [f"and {self._more_errors:,} more inputs cannot be read"] if self._more_errors else []
        return InputPage(
            files=sorted(mine),
            matched=self._matched,
            skipped=self._skipped,
            fingerprint=self._seen.hexdigest(),
            faults=self._errors + more,
            next=None,
        )

    def _is_another_nodes(self, path: str) -> bool:
        return bool(self._siblings and _under(path, self._siblings)) and not _under(path, str(self._layout.compute_dir))

    def _is_ours(self, path: str) -> bool:
        by_nature = self._shared is None and self._siblings is not None and not _under(path, self._siblings)
        return not (self._shared or by_nature) or rendezvous(path, self._node_names) == self._node_name

    def _error(self, text: str) -> None:
        if len(self._errors) < MAX_ERRORS:
            self._errors.append(one_line(text))
        else:
            self._more_errors += 1

    def _cannot_read(self, path: str, error: OSError) -> None:
        self._error(f"input {path} cannot be read: {error.strerror}")

    def _skip(self, reason: str) -> None:
        self._skipped[reason] = self._skipped.get(reason, 0) + 1

    def _admit(self, entry: str, path: str) -> None:
        name = os.path.basename(path)
        try:
            path.encode()
        except UnicodeEncodeError:
            return self._error(f"the file name {os.fsencode(path)!r} is not UTF-8: rename the file")
        if name.startswith("."):
            return self._skip("dotfile")
        if name.endswith(PARTIAL):
            return self._skip("partial")
        try:
            descriptor = open_regular(path)
        except NotRegular as error:
            return None if error.kind == "folder" else self._skip(error.kind)
        except OSError as error:
            return self._error(f"input file {path} cannot be read: {error.strerror}")
        try:
            status = os.fstat(descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return self._skip("locked by its writer")
        finally:
            os.close(descriptor)
        self._matched[entry] += 1
        if Path(entry).is_absolute():
            self._seen.update(repr((path, status.st_size, status.st_mtime_ns)).encode())
        return self._take(path, status)

    def _take(self, path: str, status: os.stat_result) -> None:
        identity: tuple[int, int | str] = (status.st_dev, status.st_ino or path)  # some file systems count no inodes
        new = InputFile(path, status.st_size, status.st_mtime_ns, status.st_ino)
        known = self._files.setdefault(identity, new)
        if known.path == path or path in self._aliases:  # by another entry
            return
        self._skip(ALIAS)
        best = min(known, new, key=lambda file: (os.path.realpath(file.path) != file.path, file.path))
        self._files[identity] = best
        self._aliases.add((new if best is known else known).path)


def _under(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")
