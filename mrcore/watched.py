"""Files that may change while a daemon runs: who is a member of the cluster, and certificates.

Nodes join and leave, certificates are renewed; neither may need a restart, which would end a running task. So whoever
needs such a file asks again each time, which costs a `stat`, and the file is read anew when it is another one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from mrcore.errors import UsageError

log = logging.getLogger(__name__)
T = TypeVar("T")
_SERIAL = re.compile(r"[0-9A-F]{1,40}")


class Watched(Generic[T]):
    """What `load` makes of some files, made anew at a call after one of them changed. For any thread.

    While a file is missing or `load` raises UsageError, the last good value stays, and the log says so once for each
    state of the files. Raises what `load` does when the first value cannot be made.
    """

    def __init__(self, files: Sequence[Path], load: Callable[[], T]) -> None:
        self._files, self._load = tuple(files), load
        self._lock = threading.Lock()
        self._seen = self._look()  # before reading: what is written meanwhile shows as a change
        self._value = load()

    def __call__(self) -> T:
        """Give the value that belongs to the files as they are now, or to their last good state."""
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
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


class Membership(NamedTuple):
    """Names of the nodes that may connect, and serials (as `tls.Identity` has them) of certificates that may not."""

    members: frozenset[str]
    denied: frozenset[str]


def read_membership(file: Path) -> Membership:
    """Read `{"members": [names], "denied": [serials]}`; `denied` may be left out. Raises UsageError."""
    try:
        plain: Any = json.loads(file.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read the members file {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the members file {file} is no JSON: {error}") from None
    names = plain.get("members") if isinstance(plain, dict) else None
    serials = plain.get("denied", []) if isinstance(plain, dict) else None
    for each in (names, serials):
        if not isinstance(each, list) or not all(isinstance(text, str) for text in each):
            raise UsageError(f'the members file {file} must hold {{"members": [names], "denied": [serials]}}')
    denied = {text.replace(":", "").upper().lstrip("0") for text in serials or ()}
    if wrong := [text for text in denied if not _SERIAL.fullmatch(text)]:
        raise UsageError(f"the members file {file} denies {wrong[0]!r:.100}, which is no serial in hexadecimal")
    return Membership(frozenset(names or ()), frozenset(denied))


def watch_membership(file: Path) -> Watched[Membership]:
    """The cluster's members as this file tells them from now on. Raises UsageError when it cannot be read at first."""
    return Watched([file], lambda: read_membership(file))
