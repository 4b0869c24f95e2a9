"""Logs that stay bounded while they are written, whatever daemons, tasks, scripts and hooks print.

A printing process holds a pipe. Its reader (the supervisor, a script's guard, `python -m mrcore.system.logs`) writes
here. The reader always takes what comes, so nobody who prints blocks for long or fails, also when the disk is full.

A daemon's log turns round: NAME.log and the earlier NAME.log.1, together `limit_bytes`. Of a flood, what exceeds
RATE_BYTES in a second is left out but for its last TAIL_BYTES (the lines before a crash are the useful ones), and a
line says how much that was. A script's log keeps its ends instead: the first part, such a line, the last TAIL_BYTES.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import stat
import sys
import threading
from pathlib import Path
from time import monotonic
from typing import Protocol

from mrcore.system.deadline import Deadline

LOG_BYTES = 32 << 20  # when nothing else is set
MIN_LOG_BYTES = 1 << 20
RATE_BYTES = 256 << 10  # a second
TAIL_BYTES = 64 << 10
WINDOW_SECONDS = 1.0
READ_BYTES = 64 << 10
PIPE_BYTES = 1 << 20  # what a printing task is ahead of the reader
TERMINAL_SECONDS = 0.2
LINE_BYTES = 4096  # of a line, on average, when the end of a log is shown


class BoundedLog:
    """One log file of at most `limit_bytes`, its predecessor included; for one thread. Writing never raises OSError.

    `keep_ends`: the first and the last part stay, in one file. `follow`: descriptors of this process that are to be
    the file, also after it turned round. `terminal`: a descriptor that does not block, which gets a copy. Without a
    file all goes to standard error.
    """

    def __init__(
        self, file: Path | None, limit_bytes: int, *, keep_ends: bool = False, follow: tuple[int, ...] = (),
        terminal: int | None = None,
    ) -> None:  # fmt: skip
        self._file, self._limit_bytes, self._keep_ends = file, limit_bytes, keep_ends
        self._follow, self._terminal = follow, terminal
        self._fd, self._tail, self._held_bytes, self._at_line_start = 2, b"", 0, True
        self._window_end, self._room, self._head_bytes = 0.0, 0, 0
        self._patience_seconds = TERMINAL_SECONDS
        if file is not None:
            self._open(file)
        if keep_ends:
            most = limit_bytes - 2 * TAIL_BYTES
            self._head_bytes = min(os.fstat(self._fd).st_size, most)  # of a try that was cut off
            self._room = most - self._head_bytes

    @property
    def held(self) -> bool:
        """Whether something waits for `settle`, which is to be called after WINDOW_SECONDS at the latest."""
        return self._held_bytes > 0

    def write(self, data: bytes) -> None:
        """Write what there is room for in this second (with `keep_ends`: at all), and hold back the end of the rest."""
        if monotonic() >= self._window_end:
            self.settle()
        if not self._held_bytes:
            head, data = data[: self._room], data[self._room :]
            self._room -= len(head)
            if head and not self._put(head):
                self._hold(head)
        if data:
            self._hold(data)

    def settle(self) -> None:
        """Say how much was left out, write what was held back, and begin another second."""
        self._window_end = monotonic() + WINDOW_SECONDS
        if not self._keep_ends:
            self._room = RATE_BYTES
        if not self._held_bytes:
            return
        tail, left_out = self._tail, self._held_bytes - len(self._tail)
        if left_out and 0 <= (cut := tail.find(b"\n")) < len(tail) - 1:  # begin with a whole line
            tail, left_out = tail[cut + 1 :], left_out + cut + 1
        note = f"[… {left_out:,} bytes left out …]\n".encode() if left_out else b""
        if note and not self._at_line_start:
            note = b"\n" + note
        if self._keep_ends:
            with contextlib.suppress(OSError):  # written again with each second, until the end is the end
                os.ftruncate(self._fd, self._head_bytes)
                os.pwrite(self._fd, note + tail, self._head_bytes)
        elif self._put(note + tail):
            self._tail, self._held_bytes = b"", 0

    def _hold(self, data: bytes) -> None:
        self._held_bytes += len(data)
        self._tail = data[-TAIL_BYTES:] if len(data) >= TAIL_BYTES else (self._tail + data)[-TAIL_BYTES:]

    def _put(self, data: bytes) -> bool:
        """Write all of `data`; False: the disk takes none."""
        self._show(data)
        try:
            self._make_room(len(data))
            done = os.write(self._fd, data)
        except OSError:
            return False
        self._head_bytes += done
        self._at_line_start = data.endswith(b"\n")
        if done < len(data):  # the disk is full
            self._hold(data[done:])
        return True

    def _show(self, data: bytes) -> None:
        """Copy to the terminal, if there is one; what it does not take in time it does not get."""
        deadline = Deadline(self._patience_seconds)
        with contextlib.suppress(OSError):
            while self._terminal is not None and data:
                if not select.select([], [self._terminal], [], deadline.left_seconds)[1]:
                    self._patience_seconds = 0.0  # it is halted (Ctrl-S): nobody waits for it again until it goes on
                    return
                data = data[os.write(self._terminal, data) :]
        self._patience_seconds = TERMINAL_SECONDS

    def _make_room(self, count: int) -> None:
        """Turn round before the file grows beyond half of the limit; reopen it when another process has done so."""
        if self._file is None or self._keep_ends:
            return
        most, size = self._limit_bytes // 2, os.fstat(self._fd).st_size
        if size and size + count > most:
            earlier = Path(f"{self._file}.1")
            if size > most:  # of before it was bounded
                with self._file.open("rb") as source, earlier.open("wb") as target:
                    source.seek(size - most)
                    shutil.copyfileobj(source, target)
                self._file.unlink()
            else:
                os.replace(self._file, earlier)
            self._open(self._file)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self._file).st_ino == os.fstat(self._fd).st_ino:
                return
        self._open(self._file)

    def _open(self, file: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(file, flags if self._keep_ends else flags | os.O_APPEND, 0o640)
        if self._keep_ends:
            os.lseek(fd, 0, os.SEEK_END)
        if self._fd > 2:
            os.close(self._fd)
        self._fd = fd
        for number in self._follow:
            os.dup2(fd, number)


class TextLog:
    """A BoundedLog as a stream for the module logging; for any thread."""

    def __init__(self, log: BoundedLog) -> None:
        self._log, self._lock = log, threading.Lock()

    def write(self, text: str) -> None:
        """Write a message."""
        with self._lock:
            self._log.write(text.encode(errors="backslashreplace"))

    def flush(self) -> None:
        """Nothing waits but what `settle` writes."""

    def settle(self) -> None:
        """Write what was held back."""
        with self._lock:
            self._log.settle()


def take_over(limit_bytes: int) -> BoundedLog:
    """Return the log that a launcher gave this daemon as standard error, bounded from here on.

    Standard output is the same file, or the terminal of a window, where a copy goes.
    """
    terminal = None
    if os.isatty(1):
        with contextlib.suppress(OSError):
            terminal = os.open(os.ttyname(1), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    status = os.fstat(2)
    if not stat.S_ISREG(status.st_mode):
        return BoundedLog(None, limit_bytes, terminal=None if os.isatty(2) else terminal)
    both = os.path.samestat(status, os.fstat(1))
    file = Path(os.readlink("/proc/self/fd/2"))
    return BoundedLog(file, limit_bytes, follow=(1, 2) if both else (2,), terminal=terminal)


def open_pipe() -> tuple[int, int]:
    """Return a pipe to print into, (read, write): reading does not block; neither end passes to programs."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    with contextlib.suppress(OSError):  # more than a user may have: it is as large as it is
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return read, write


class Writer(Protocol):
    """A log, or what passes on to one."""

    def write(self, data: bytes) -> None:
        """Write what there is room for."""

    def settle(self) -> None:
        """Write what was held back."""


def drain(source: int, log: Writer) -> None:
    """Write to the log what a pipe of `open_pipe` holds just now, the last lines before an end."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(PIPE_BYTES // READ_BYTES):  # others may go on printing
            if not (data := os.read(source, READ_BYTES)):
                break
            log.write(data)
    log.settle()


def pump(source: int, log: BoundedLog) -> None:
    """Write to the log what comes from a descriptor, until its end."""
    while True:
        if not select.select([source], [], [], WINDOW_SECONDS if log.held else None)[0]:
            log.settle()
        elif data := os.read(source, READ_BYTES):
            log.write(data)
        else:
            return log.settle()


def last_lines(file: Path, lines: int) -> bytes:
    """Return the last lines of a log, its predecessor's if need be; of long lines fewer."""
    end = b""
    for log in (file, Path(f"{file}.1")):
        if log.is_file() and end.count(b"\n") < lines:
            with log.open("rb") as stream:
                stream.seek(max(0, log.stat().st_size - lines * LINE_BYTES))
                end = stream.read() + end
    return b"".join(end.splitlines(keepends=True)[-lines:])


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # only the end of what is printed ends us
    try:
        ours = BoundedLog(Path(sys.argv[1]), int(sys.argv[2]))
    except OSError as error:  # who prints must not fail for that
        print(f"cannot open {sys.argv[1]}: {error.strerror}", file=sys.stderr)
        ours = BoundedLog(None, int(sys.argv[2]))
    pump(0, ours)
