"""Ending processes that may end by themselves."""

from __future__ import annotations

import contextlib
import os
import signal


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process, unless it has ended meanwhile, as what a supervisor started does with it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
