"""A forked child of user code that comes back into our frames is ended: it must never speak, or write, for its task.

User code may fork, by `os.fork` or multiprocessing, as long as the child ends there. One that returns from a function,
or raises, would go on as a second copy of the task: with its connection, its open output, its folder.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

from mrcore import task

EXIT_STATUS = 70  # EX_SOFTWARE
in_child = False  # known without a system call, for loops; only `check` sees what was forked behind Python's back
_owner = os.getpid()
_lines: io.StringIO | None = None
_watching = False


@contextmanager
def guarded() -> Iterator[None]:
    """Make this process the one that speaks for a task; no child of it leaves the block, not even by an exception."""
    global _owner, _watching
    _owner = os.getpid()
    if not _watching:
        os.register_at_fork(after_in_child=_become_child)
        _watching = True
    try:
        yield
    finally:
        check()


def read_from(lines: io.StringIO | None) -> None:
    """Name the stream whose lines user code gets, so that a child finds no further one there."""
    global _lines
    _lines = lines


def _become_child() -> None:
    global in_child
    in_child = True
    if _lines is not None and not _lines.closed:
        offset = task.offset  # it follows from the place in the stream
        task.set_offset(lambda: offset)
        _lines.seek(0, io.SEEK_END)


def check() -> None:
    """End this process if it is a forked child of the task: for all places that user code comes back to."""
    if os.getpid() != _owner:
        os.write(2, b"mrcore: a process that user code forked came back from it and is ended: end it by os._exit\n")
        os._exit(EXIT_STATUS)
