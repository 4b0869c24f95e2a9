"""Reading on in logs that grow and turn round (`BoundedLog`): what came since the last look, each byte once."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

MAX_READ_BYTES = 1 << 20  # of one log at a look: more than one may grow meanwhile


class Position(NamedTuple):
    """How far a log was read: which file it was, and up to which byte."""

    inode: int
    offset: int


class Growth(NamedTuple):
    """What a log has grown by, and how far it is read now."""

    data: bytes
    position: Position


def read_on(file: Path, since: Position | None, back_bytes: int = 0) -> Growth | None:
    """Return what a log has grown by since a position; None: there is no such file.

    Without a position it begins `back_bytes` before the end. What was written before the log turned round, and not read
    yet, comes first.
    """
    rest = b""
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            inode, size = status.st_ino, status.st_size
            if since is None:
                start = max(0, size - back_bytes)
            elif since.inode == inode:
                start = min(since.offset, size)  # a script's log, whose end is written again and again
            else:
                rest, start = _rest(Path(f"{file}.1"), since), 0
            stream.seek(start)
            data = stream.read(MAX_READ_BYTES)
    except FileNotFoundError:
        return None
    return Growth(rest + data, Position(inode, start + len(data)))


def _rest(earlier: Path, since: Position) -> bytes:
    with contextlib.suppress(OSError), earlier.open("rb") as stream:
        if os.fstat(stream.fileno()).st_ino == since.inode:
            stream.seek(since.offset)
            return stream.read(MAX_READ_BYTES)
    return b""


class Lines:
    """Whole lines out of pieces of a log."""

    def __init__(self) -> None:
        self._partial = b""

    def of(self, data: bytes) -> list[bytes]:
        """Return the lines that `data` completes, with their ends."""
        *whole, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > MAX_READ_BYTES:
            whole, self._partial = [*whole, self._partial], b""
        return [line + b"\n" for line in whole]
