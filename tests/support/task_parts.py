"""What surrounds a task in tests of its parts: pieces of input files, memory that calls for spills on demand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from mrcore.messages.tasks import Split


def piece(path: Path, start: int = 0, end: int | None = -1) -> Split:
    state = path.stat()
    return Split(str(path), start, state.st_size if end == -1 else end, state.st_size, state.st_mtime_ns, state.st_ino)


class StubWatch:
    """Stands where MemoryWatch stands: calls for a spill every `period` looks at `due`."""

    def __init__(self, period: int, budget_bytes: int = 64 << 20) -> None:
        self.budget_bytes, self.floor_bytes = budget_bytes, 0
        self._looks = itertools.count(1)
        self._period = period
        self.released = 0

    @property
    def due(self) -> bool:
        return next(self._looks) % self._period == 0

    def look(self) -> None:
        pass

    def watch_growth(self, container: Any) -> None:
        pass

    def release(self) -> None:
        self.released += 1

    def fits(self, more_bytes: int, share: float = 1.0) -> bool:
        return True

    def anonymous_bytes(self) -> int:
        return 0
