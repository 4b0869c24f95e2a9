"""The doorbell of a queue: who changes the queue rings, and the Runner, which sleeps on it, wakes."""

from __future__ import annotations

import contextlib
import os
import select
from pathlib import Path


class Doorbell:
    """A FIFO in the state folder: anyone rings, the Runner wakes. Needs no address, leaves nothing in memory."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "doorbell"
        self._descriptor: int | None = None

    def ring(self) -> bool:
        """Wake the Runner; False if none listens."""
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            os.write(descriptor, b".")
        except BlockingIOError:  # full: it is awake anyhow
            pass
        except BrokenPipeError:  # it ended just now
            return False
        finally:
            os.close(descriptor)
        return True

    def is_heard(self) -> bool:
        """Return whether a Runner listens, without waking it."""
        try:
            os.close(os.open(self.path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    def wait(self, seconds: float) -> None:
        """Sleep until somebody rings, at most `seconds`."""
        if self._descriptor is None:
            with contextlib.suppress(FileExistsError):
                os.mkfifo(self.path, 0o600)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_NONBLOCK)  # RDWR: no end of file between ringers
        if select.select([self._descriptor], [], [], max(0.0, seconds))[0]:
            os.read(self._descriptor, 65536)

    def close(self) -> None:
        """Listen no longer."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
