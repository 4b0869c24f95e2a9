"""How much memory this task process holds, and when it is time to spill.

Counted is anonymous resident memory (statm: resident minus shared), which is what the kernel's OOM killer counts
against us; page cache is free. Memory does not come back as one hopes: a few small objects that survive a spill pin
whole arenas of the allocator, so a threshold on resident memory alone would in the end spill always. Therefore a
spill also needs a minimum of fresh memory, and after each one the free arenas are given back (`release`).
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Sized

from mrcore import task

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
POLL_SECONDS = 0.002  # keys that jump from 50 bytes to 1 MB outrun any count of items
NOTE_SHARE = 0.01  # of a processor, at most, goes into noting what is in hand
SPILL_SHARE = 0.8  # of the budget: the rest is for sorting, encoding and what the user's code holds
GROWTH_SHARE = 0.95
MIN_SPILL_BYTES = 2 << 20  # also where auxiliary data alone is past the threshold
_libc = ctypes.CDLL(None, use_errno=True)


class MemoryWatch:
    """Watches this process against `budget_bytes`; `due` turns True when a spill is called for.

    A thread of its own looks every few milliseconds, since the loop over items must not pay for it. Use as a
    context manager; `peak_bytes` is the highest that was seen.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.due = False
        self.peak_bytes = 0
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        self.floor_bytes = self.anonymous_bytes()
        self._grown: Sized = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()
        os.close(self._statm)

    def anonymous_bytes(self) -> int:
        """Read this process's anonymous resident memory, in bytes (about a microsecond)."""
        fields = os.pread(self._statm, 64, 0).split()
        return (int(fields[1]) - int(fields[2])) * PAGE_BYTES

    def look(self) -> None:
        """Set `due` when memory is short: past the threshold, or the growing dict's next doubling would not fit."""
        held = self.anonymous_bytes()
        if held > self.peak_bytes:
            self.peak_bytes = held
            task.note_memory(held, self.budget_bytes)
        growth = 2 * sys.getsizeof(self._grown)
        if held > SPILL_SHARE * self.budget_bytes or held + growth > GROWTH_SHARE * self.budget_bytes:
            # Less than this much fresh data is not worth a spill: it would not free what is missing.
            enough = max(MIN_SPILL_BYTES, (self.budget_bytes - self.floor_bytes) // 8)
            self.due = held - self.floor_bytes > enough

    def fits(self, more_bytes: int, share: float = 1.0) -> bool:
        """Return whether `more_bytes` fit below `share` of the budget, once what is free has been given back."""
        room = int(share * self.budget_bytes) - more_bytes
        if self.anonymous_bytes() > room:
            self.release()
        return self.anonymous_bytes() <= room

    def watch_growth(self, container: Sized) -> None:
        """Name the dict whose doubling must fit."""
        self._grown = container

    def release(self) -> None:
        """Give freed memory back to the system and take what stays as the new floor. Call after dropping the data."""
        gc.collect()
        _libc.malloc_trim(0)
        self.floor_bytes = self.anonymous_bytes()
        self.due = False

    def _watch(self) -> None:
        due = 0.0
        while not self._end.wait(POLL_SECONDS):
            self.look()
            if (now := time.monotonic()) >= due:  # a key of a megabyte takes milliseconds to describe
                begun = time.thread_time()
                task.refresh()
                due = now + (time.thread_time() - begun) / NOTE_SHARE
