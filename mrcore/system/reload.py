"""Files that may change while a daemon runs: the list of members, certificates.

Nodes join and leave, certificates are renewed; neither may need a restart, which would end a running task. So the
file is looked at each time, which costs a `stat`, and read again when it is another one.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from mrcore.errors import UsageError

log = logging.getLogger(__name__)
T = TypeVar("T")


class Watched(Generic[T]):
    """What `load` makes of some files, made again at a call after one of them changed. For any thread.

    While a file is missing or `load` raises UsageError, the last good value stays, and the log says so once for each
    state of the files. Raises what `load` does when the first value cannot be made.
    """

    def __init__(self, files: Sequence[Path], load: Callable[[], T]) -> None:
        self._files, self._load = tuple(files), load
        self._lock = threading.Lock()
        self._seen = self._look()  # before reading: what is written meanwhile shows as a change
        self._value = load()

    def __call__(self) -> T:
        """Return the value that belongs to the files as they are now, or to their last good state."""
        if self._look() != self._seen:
            with self._lock:
                if (now := self._look()) != self._seen:
                    self._seen = now
                    try:
                        self._value = self._load()
                    except UsageError as error:
                        log.error("%s; what was read before stays in force", error.message)
        return self._value

    def _look(self) -> list[tuple[int, ...] | None]:
        return [_identity(file) for file in self._files]


def _identity(file: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size
