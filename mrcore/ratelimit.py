"""How often something may happen: so many times at once, then so many a second. For logs, and floods of a peer."""

from __future__ import annotations

import threading
import time


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
        """Return what to add to the next line: how many were suppressed since the last, if any; counts anew."""
        with self._lock:
            count, self.suppressed = self.suppressed, 0
        return f" (and {count} more like it before, left out)" if count else ""
