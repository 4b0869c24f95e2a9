"""A terminal for tests: a command runs on a pseudo terminal of its own, and what its screen shows is worked out."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from typing import Any

import pyte
import pytest

_STEP = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)|\x1b")


class Terminal:
    """A running command whose standard streams are a terminal, but for those that `streams` names otherwise."""

    def __init__(self, command: list[str], columns: int = 80, rows: int = 50, **streams: Any) -> None:
        self._master, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "", "LINES": ""} | streams.pop("env", {})
        environment = {key: value for key, value in environment.items() if value}

        def become_foreground() -> None:
            os.setsid()
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

        chosen = {"stdin": theirs, "stdout": theirs, "stderr": theirs} | streams
        self.process = subprocess.Popen(
            ["env", "--default-signal=INT", *command], env=environment, preexec_fn=become_foreground, **chosen
        )
        os.close(theirs)
        self.output = ""

    def type(self, keys: str) -> None:
        """Press keys; "\x03" is Ctrl-C."""
        os.write(self._master, keys.encode())

    def until(self, condition: Callable[[], Any], seconds: float = 60.0) -> None:
        """Read what the command writes until `condition` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"not within {seconds} s; on the terminal:\n{self.output[-3000:]}")
            self._read(0.05)

    def wait(self, seconds: float = 60.0) -> int:
        """Read all that comes until the command ends; return its status."""
        self.until(lambda: self.process.poll() is not None, seconds)
        while self._read(0.0):
            pass
        os.close(self._master)
        return int(self.process.returncode)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        with contextlib.suppress(OSError):  # the command has closed it
            piece = os.read(self._master, 65536).decode()
            self.output += piece
            return bool(piece)
        return False

    def kill(self) -> None:
        """End the command, whatever it does."""
        self.process.kill()
        self.process.wait(10)

    def screen(self) -> list[str]:
        """The lines that stand on the screen now, without blanks at their ends."""
        lines, row, column = [""], 0, 0
        for match in _STEP.finditer(self.output):
            numbers, verb, back, down, text = match.groups()
            if verb == "K":
                lines[row] = "" if numbers == "2" else lines[row][:column]
            elif verb == "A":
                row = max(0, row - int(numbers or 1))
            elif back:
                column = 0
            elif down:
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif text:
                lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
                column += len(text)
        return [line.rstrip() for line in lines]

    def display(self, rows: int = 24, columns: int = 80) -> list[str]:
        """What an emulator of a terminal of this size shows of all that was written, line by line."""
        screen = pyte.Screen(columns, rows)
        pyte.Stream(screen).feed(self.output)
        return [line.rstrip() for line in screen.display]
