"""How long something may still take, on a clock that nobody sets."""

from __future__ import annotations

import time
from collections.abc import Iterator


class Deadline:
    """The moment `seconds` from now. Of two, the smaller is the earlier one."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def __lt__(self, other: Deadline) -> bool:
        return self._end < other._end

    @property
    def left_seconds(self) -> float:
        """Return how long it is until then, 0 when it is over."""
        return max(0.0, self._end - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Return whether the moment has passed."""
        return time.monotonic() >= self._end

    def tries(self, pause_seconds: float) -> Iterator[None]:
        """Yield, pause, and yield again until it is over, at least once: `for … else` knows that it was late."""
        yield
        while not self.is_over:
            time.sleep(pause_seconds)
            yield
