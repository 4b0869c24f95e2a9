"""The node agent's share in reading inputs: lists them, and looks at the ends of those that grow."""

from __future__ import annotations

import os
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from msgspec.structs import replace

from mrcore.engine.listing import Listing
from mrcore.errors import JobFault, Refused
from mrcore.messages.kinds import PAGE_FILES, JobName
from mrcore.messages.nodes import InputPage, ReadFile, Tail
from mrcore.system.paths import Layout
from mrcore.system.readers import format_of, open_regular, unfinished_bytes
from mrcore.wire.tls import Identity

MAX_LISTINGS = 4  # begun and not read to their end
LISTING_SECONDS = 300.0  # until one that nobody goes on with is dropped
SLICE_SECONDS = 1.0  # of a walk, in one call
BLOCK_BYTES = 64 * 1024
SETTLE_SECONDS = 60.0
NOTHING = InputPage(files=[], matched={}, skipped={}, fingerprint="", faults=[], next=None)


@dataclass
class _Held:
    """A listing of inputs that is not read to its end."""

    walk: Listing
    page: InputPage | None = None  # with all files that are left, once the walk has come to its end
    asked: float = 0.0  # monotonic, when somebody wanted to go on


class Inputs:
    """What a node agent does before a run; all of it is for the master only."""

    RPC = "list_inputs check_tails auxiliary"

    def __init__(self, layout: Layout, node: str, sibling_dirs: str | None) -> None:
        self._layout, self._node, self._sibling_dirs = layout, node, sibling_dirs
        self._listings: dict[str, _Held] = {}  # by cursor
        self._lock = threading.Lock()  # never held while listing

    def list_inputs(
        self, caller: Identity, job: dict[str, Any], node_names: list[str], cursor: str | None = None
    ) -> InputPage:
        """List the input files of a job (`input_dirs`, `shared_input`) on this node: by slices of time, then by pages.

        Return what `Listing.result` does, of at most PAGE_FILES files, and "next": the cursor to go on with, or None.
        Until the walk has come to its end all is empty. A listing that nobody goes on with walks no further.
        Raises Refused when it is no longer held: begin again.
        """
        now = time.monotonic()
        with self._lock:
            for key in [key for key, held in self._listings.items() if held.asked < now - LISTING_SECONDS]:
                del self._listings[key]
            held = self._listings.pop(cursor, None) if cursor is not None else None
        if held is None and cursor is not None:
            raise Refused("this listing of inputs is no longer held: begin again")
        if held is None:
            asked = job | {"sibling_dirs": self._sibling_dirs}
            held = _Held(Listing(asked, self._layout, node_names, self._node))
        if held.page is None and held.walk.advance(SLICE_SECONDS):
            held.page = held.walk.result()
        if held.page is not None and len(held.page.files) <= PAGE_FILES:
            return held.page
        held.asked, following = time.monotonic(), secrets.token_hex(8)
        with self._lock:
            self._listings[following] = held
            while len(self._listings) > MAX_LISTINGS:
                del self._listings[next(iter(self._listings))]
        page = held.page or NOTHING
        held.page = held.page and replace(held.page, files=held.page.files[PAGE_FILES:])
        return replace(page, files=page.files[:PAGE_FILES], next=following)

    def check_tails(self, caller: Identity, files: list[ReadFile]) -> list[Tail]:
        """Return where to end reading each of these listed files, and whether what was read before is as it was."""
        now = time.time()
        return [check_tail(file, now) for file in files]

    def auxiliary(self, caller: Identity, name: JobName) -> bool:
        """Return whether auxiliary data of this name is on this node."""
        return (self._layout.auxiliary_dir / f"{name}.data").is_file()


def check_tail(file: ReadFile, now: float) -> Tail:
    """Return the position up to which to read a listed file, and checksums of what is before that and before `read`.

    The latter is None when `read` is past the size, or inside of a line. Raises JobFault when the file is not what was
    listed.
    """
    path, size, read = file.path, file.size, file.read
    try:
        with open(open_regular(path), "rb", buffering=0) as stream:
            descriptor = stream.fileno()
            if os.fstat(descriptor).st_ino != file.inode:
                raise JobFault(f"input file {path} was replaced since it was listed: run the job again", file=path)
            end, before = size, None
            if not format_of(path) and (
                abs(now - file.mtime_ns / 1e9) < SETTLE_SECONDS
                or unfinished_bytes(os.pread(descriptor, 3, max(0, size - 3)))  # it does go on, however late
            ):
                end = _end_of_lines(descriptor, min(read, size), size)
            # A line ends there, or its newline is what came: otherwise part of a line was taken for all of it.
            if read in (0, size) or (read < size and b"\n" in os.pread(descriptor, 2, read - 1)):
                before = _checksum(descriptor, read)
            return Tail(end, _checksum(descriptor, end), before)
    except OSError as error:
        raise JobFault(f"input file {path} cannot be read: {error.strerror or error}", file=path) from error


def _checksum(descriptor: int, end: int) -> int:
    """Return the crc32 of the block before `end`."""
    start = max(0, end - BLOCK_BYTES)
    return crc32(os.pread(descriptor, end - start, start))


def _end_of_lines(descriptor: int, start: int, end: int) -> int:
    """Return the offset behind the last newline between `start` and `end`, `start` when there is none."""
    while end > start:
        begin = max(start, end - BLOCK_BYTES)
        newline = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return start
