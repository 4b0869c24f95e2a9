"""The ends of input files on the node that holds them: up to where to read them, whether what was read is as it was."""

from __future__ import annotations

import os
from typing import Any
from zlib import crc32

from mrcore.errors import JobFault
from mrcore.system.readers import format_of, open_regular, unfinished_bytes

BLOCK_BYTES = 64 * 1024
SETTLE_SECONDS = 60.0


def look_into(path: str, size: int, inode: int, mtime_ns: int, read: int, now: float) -> list[Any]:
    """Look into a listed file that was read up to `read` before (0: never).

    Gives [position up to which to read it, crc32 of the block before that, crc32 of the block before `read`]; the last
    is None when `read` is past the size, or inside of a line. Raises JobFault when the file is not what was listed.
    """
    try:
        with open(open_regular(path), "rb", buffering=0) as stream:
            if os.fstat(stream.fileno()).st_ino != inode:
                raise JobFault(f"input file {path} was replaced since it was listed: run the job again", file=path)
            end, before = size, None
            if not format_of(path) and (
                abs(now - mtime_ns / 1e9) < SETTLE_SECONDS
                or unfinished_bytes(os.pread(stream.fileno(), 3, max(0, size - 3)))  # it does go on, however late
            ):
                end = _end_of_lines(stream.fileno(), min(read, size), size)
            # A line ends there, or its newline is what came: otherwise part of a line was taken for all of it.
            if read in (0, size) or (read < size and b"\n" in os.pread(stream.fileno(), 2, read - 1)):
                before = _checksum(stream.fileno(), read)
            return [end, _checksum(stream.fileno(), end), before]
    except OSError as error:
        raise JobFault(f"input file {path} cannot be read: {error.strerror or error}", file=path) from error


def _checksum(descriptor: int, end: int) -> int:
    start = max(0, end - BLOCK_BYTES)
    return crc32(os.pread(descriptor, end - start, start))


def _end_of_lines(descriptor: int, start: int, end: int) -> int:
    """The offset behind the last newline between `start` and `end`, `start` when there is none."""
    while end > start:
        begin = max(start, end - BLOCK_BYTES)
        found = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return start
