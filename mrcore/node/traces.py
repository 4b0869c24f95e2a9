"""What a task leaves for others to read, also when it is killed: what it prints, what it had in hand, a crash's stack.

Each task has these for itself, so nothing that outlives one can pass for the next one's.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
from typing import Any

from mrcore import task
from mrcore.system import logs, procfs
from mrcore.system.tags import Tagger
from mrcore.text import clean, one_line

MAX_NOTE, MAX_STACK = 1000, 4000  # characters of what a task had in hand, and of its stack, that are passed on
MAX_DUMP_BYTES = 64 << 10  # of the stacks of all threads, which go into the log
STACK_SIGNALS = {signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL}  # of faulthandler


class Traces:
    """The pipe into which one task prints, and memory that it shares with its supervisor, made before it is forked.

    `whose` says what its lines are tagged with. As a log (`write`, `settle`), it passes on to `log`.
    """

    def __init__(self, whose: str, log: logs.BoundedLog) -> None:
        self._tagger, self._log = Tagger(whose), log
        self._note = mmap.mmap(-1, task.NOTE_BYTES)
        self._kills = procfs.oom_kills()
        self.dump = os.memfd_create("stack", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.dump, MAX_DUMP_BYTES)
        fcntl.fcntl(self.dump, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        self.printed, self.print_to = logs.open_pipe()
        self._open = {self.dump, self.printed, self.print_to}

    def share(self) -> None:
        """Have the task, whose process this is, leave its word here."""
        task.set_note(self._note)

    def close(self, *descriptors: int) -> None:
        """Close some of the descriptors; without a name all that are open."""
        for number in descriptors or tuple(self._open):
            self._open.discard(number)
            os.close(number)

    @property
    def is_open(self) -> bool:
        """Whether anybody can still print."""
        return self.printed in self._open

    def read(self) -> None:
        """Pass on what has been printed."""
        if data := os.read(self.printed, logs.READ_BYTES):
            self.write(data)
        else:
            self.close(self.printed)

    @property
    def begun(self) -> bool:
        """Whether a line waits for its end."""
        return self._tagger.begun

    def finish_line(self) -> None:
        """Pass on what waits for its end, as a line."""
        self._log.write(self._tagger.rest())

    def write(self, data: bytes) -> None:
        """Pass on what the task printed, as far as lines are complete."""
        self._log.write(self._tagger.lines(data))

    def settle(self) -> None:
        """Pass on what the log held back."""
        self._log.settle()

    def end(self, number: int | None) -> dict[str, Any]:
        """Log what is left of a task that is gone, and return what there is to know of its end by signal `number`."""
        dump = os.pread(self.dump, MAX_DUMP_BYTES, 0).partition(b"\0")[0]
        if self.is_open:
            logs.drain(self.printed, self)
        self.finish_line()
        self.write(dump)
        self.finish_line()
        self.settle()
        self.close()
        note, peak_bytes, budget_bytes = task.read_note(self._note)
        stack = _stack_of(dump.decode("utf-8", "replace")) if number in STACK_SIGNALS else ""
        return {
            "in_hand": one_line(note, MAX_NOTE),
            "memory_bytes": peak_bytes,
            "budget_bytes": budget_bytes,
            "oom": number == signal.SIGKILL and procfs.oom_kills() > self._kills,
            "stack": clean(stack, MAX_STACK),
        }


def _stack_of(dump: str) -> str:
    """Return what faulthandler says of the thread that crashed, of all that it says of them all."""
    _, what, dump = dump.rpartition("Fatal Python error")
    error, _, threads = (what + dump).partition("\n")
    _, current, stack = threads.partition("Current thread ")
    return f"{error}\n{current}{stack.partition(chr(10) * 2)[0]}".strip() if current else what + dump
