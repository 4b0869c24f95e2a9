"""Tells about once a second how far a task is, from a thread of its own: the loops of a task pay nothing for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

from mrcore import task
from mrcore.messages.tasks import Progressed

REPORT_SECONDS = 1.0
Figures = Callable[[], tuple[int, int, int]]  # bytes, records, spills; asked from the thread


class Progress:
    """Calls `send` with what `begin` says is to be looked at, whenever something has changed. Use as a context manager.

    No event marks the end of a phase: a result has it all, and tasks of less than a second send nothing else.
    """

    def __init__(self, send: Callable[[Progressed], None]) -> None:
        self._send = send
        self._now: tuple[Literal["MAP", "SORT", "REDUCE"], Figures] | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()

    def begin(self, phase: Literal["MAP", "SORT", "REDUCE"], figures: Figures) -> None:
        """Say what goes on from now on, and how to see how far it is."""
        self._now = phase, figures

    def _watch(self) -> None:
        last = None
        while not self._end.wait(REPORT_SECONDS):
            if self._now is None:  # imports of the project may take longer
                continue
            phase, figures = self._now
            size, records, spills = figures()
            # A copy of the counters, made in one step of the interpreter: user code goes on counting.
            more = {"spills": spills, "status": task.said, "user_counters": dict(task.counters)}
            event = Progressed(phase=phase, bytes=size, records=records, **more)  # type: ignore[arg-type]
            if event != last:
                last = event
                self._send(event)
