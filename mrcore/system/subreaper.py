"""What a subreaper does with the processes that become its children: reap them, end them, describe how they ended."""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import NotRequired, TypedDict

from mrcore.system import procfs
from mrcore.system.deadline import Deadline

SWEEP_SECONDS = 5.0  # SIGKILL acts at once, except on a process stuck in the kernel (a dead NFS server)

log = logging.getLogger(__name__)


class Ending(TypedDict):
    """How a process ended: its exit status or the signal that killed it, and the same for people."""

    status: NotRequired[int]
    signal: NotRequired[int]
    message: str


def reap(pid: int, seconds: float) -> int | None:
    """Reap one child and return its wait status, or None if it does not end in time."""
    deadline, pause_seconds = Deadline(seconds), 0.0002
    while True:
        reaped, status = os.waitpid(pid, os.WNOHANG)
        if reaped or deadline.is_over:
            return status if reaped else None
        time.sleep(pause_seconds)
        pause_seconds = min(pause_seconds * 2, 0.05)


def sweep(spared: set[int]) -> None:
    """SIGKILL every child of this subreaper but the spared, and theirs as they become ours, until none is left."""
    deadline = Deadline(SWEEP_SECONDS)
    while left := procfs.children(os.getpid()) - spared:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for pid in left:
            reap(pid, deadline.left_seconds)
        if deadline.is_over:
            log.error("processes that user code left do not end: %s", sorted(left))
            return


def describe(status: int) -> Ending:
    """Return a wait status as `status` or `signal`, with a message for people."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return {"status": code, "message": f"ended with exit status {code}"}
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    return {"signal": -code, "message": f"was killed by {name}"}
