"""Log lines that strangers cause, few however many there are: one per peer and reason and interval, then a count."""

from __future__ import annotations

import logging
import threading
import time

from mrcore.system.deadline import Deadline
from mrcore.text import one_line

INTERVAL_SECONDS = 60.0
MAX_KEYS = 100  # told apart in one interval; what more there are is counted together
TEXT_LIMIT = 300  # characters of a reason
OTHERS = "others", "refused or failed"


class LimitedLog:
    """Writes to `log` the first line of each peer and reason in an interval, and at its end how many more there were.

    So one interval makes at most 2 × (MAX_KEYS + 1) lines, however many peers connect. For any number of threads.
    """

    def __init__(self, log: logging.Logger, interval_seconds: float = INTERVAL_SECONDS) -> None:
        self._log, self._interval_seconds = log, interval_seconds
        self._lock = threading.Lock()
        self._more: dict[tuple[str, str], tuple[int, int]] = {}  # by peer and reason: level, how many were left out
        self._end = Deadline(0)  # of the interval

    def log(self, level: int, peer: str, reason: object, exc_info: bool = False) -> None:
        """Log `reason` of `peer`, or count it when both were logged in this interval already."""
        key = one_line(peer, TEXT_LIMIT), one_line(reason, TEXT_LIMIT)
        self.tick()
        with self._lock:
            if not self._more:
                self._end = Deadline(self._interval_seconds)
            if key not in self._more and len(self._more) >= MAX_KEYS:
                key = OTHERS
            if key in self._more:
                self._more[key] = level, self._more[key][1] + 1
                return
            self._more[key] = level, 0
        self._log.log(level, "%s: %s", *key, exc_info=exc_info)

    def tick(self) -> None:
        """End the interval when its time has come; who has a loop calls this, so that no count waits for long."""
        if self._end.is_over:
            self.flush()

    def flush(self) -> None:
        """End the interval: log how many were left out of each kind."""
        with self._lock:
            ended, self._more = self._more, {}
        for (peer, reason), (level, count) in ended.items():
            if count:
                seconds = f"{self._interval_seconds:g} s"
                self._log.log(level, "and %s more in the last %s from %s: %s", f"{count:,}", seconds, peer, reason)


class RateLimit:
    """A bucket of `burst` tokens that fills at `per_second`; for any thread."""

    def __init__(self, per_second: float, burst: int) -> None:
        self._per_second, self._burst = per_second, burst
        self._left, self._at, self.suppressed = float(burst), time.monotonic(), 0
        self._lock = threading.Lock()

    def allow(self) -> bool:
        """Take a token; False when there is none, which `suppressed` counts."""
        with self._lock:
            now = time.monotonic()
            self._left = min(float(self._burst), self._left + (now - self._at) * self._per_second)
            self._at = now
            if self._left < 1:
                self.suppressed += 1
                return False
            self._left -= 1
            return True

    def since(self) -> str:
        """Return what to add to the next line: how many were suppressed since the last, if any; counts again from 0."""
        with self._lock:
            count, self.suppressed = self.suppressed, 0
        return f" (and {count} more like it before, left out)" if count else ""
