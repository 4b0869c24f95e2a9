"""Where a process may be made to die, to show that whatever was written by then is enough to go on from.

`MRCORE_FAULT=NAME` has the process SIGKILL itself when it comes to that point, `NAME@3` when it does so for the third
time. Without it a point costs a microsecond. There is one before and after everything that is written durably.
"""

from __future__ import annotations

import os
import signal

# Transactions of the queue, by what they are for (`Store.change`).
CHANGES = ("submit", "queue", "wake", "cycle", "start", "phase", "end", "hold", "ledger", "drain")
POINTS = (
    *(f"{when} {change}" for change in CHANGES for when in ("before", "after")),
    # the master's files: the manifest is the commit of a run
    *(
        "file begun",
        "file flushed",
        "file renamed",
        "file published",
        "finish begun",
        "node finished",
        "nodes finished",
    ),
    # a node's agent publishes the parts of a committed run
    *("part flushed", "part renamed", "parts published", "old part removed", "working folder removed"),
    # a drain: the agents of the new node and of the old one
    *("moved files staged", "moved file named", "moved files published", "moved file removed", "moved files removed"),
    *("restore ready", "restore manifests", "restore queue"),
)
_KNOWN, _passed = frozenset(POINTS), dict.fromkeys(POINTS, 0)


def point(name: str) -> None:
    """Die here if that is wanted. ValueError for a name that is not in POINTS."""
    if name not in _KNOWN:
        raise ValueError(f"{name!r} is no fault point; see POINTS")
    wanted, _, count = os.environ.get("MRCORE_FAULT", "").partition("@")
    if wanted == name:
        _passed[name] += 1
        if _passed[name] >= int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)
