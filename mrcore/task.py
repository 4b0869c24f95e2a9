"""What user code may ask about its surroundings: `from mrcore import task`.

    task.input_file   path of the file that the current line comes from (map), or None
    task.offset       byte offset of the current line in it (uncompressed bytes), or None
    task.job, task.run, task.attempt, task.phase     what is running: "word_count", 3, 1, "MAP" or "REDUCE"
    task.server, task.node                           where: "S_0", "127.0.0.1"
    task.partition    the partition that is being reduced, or None
    task.count("bad date")      adds 1, or the second argument, to a counter of the run
    task.status("page 17 of 90")     says what goes on, for whoever watches

Outside a job every name is None, so modules that import it can be tested by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap
from typing import Any

job: str | None = None
run: int | None = None
attempt: int | None = None
phase: str | None = None
server: str | None = None
node: str | None = None
partition: int | None = None
input_file: str | None = None

NOTE_BYTES = 4096
_offset: Callable[[], int] | None = None
_note: mmap | None = None  # memory that the supervisor shares with this process


counters: dict[str, int] = {}  # of this process, since its start
said = ""  # the last status


def count(name: str, amount: int = 1) -> None:
    """Add `amount` to a counter of the run. Only tries of tasks that end well count. At most 100 names in a task."""
    counters[name] = counters.get(name, 0) + amount


def status(text: str) -> None:
    """Say what goes on at the moment, for whoever watches."""
    globals()["said"] = text


def __getattr__(name: str) -> Any:
    # The offset is worked out only when somebody asks: keeping it up to date would cost every line.
    if name == "offset":
        return None if _offset is None else _offset()
    raise AttributeError(f"mrcore.task has no {name!r}")


def set_surroundings(**facts: Any) -> None:
    """Set any of the names above (the task process does, never user code)."""
    globals().update(facts)


def set_offset(source: Callable[[], int] | None) -> None:
    """Set the function that works out the current line's byte offset."""
    globals()["_offset"] = source


def set_note(shared: mmap) -> None:
    """Share `NOTE_BYTES` of memory with the supervisor, which reads there what the task had in hand when it died."""
    globals()["_note"] = shared


def in_hand(what: str) -> None:
    """Note what user code gets next. Called for every few hundred lines or groups: a signal leaves no other word."""
    if _note is not None:
        text = what.encode("utf-8", "surrogateescape")[: NOTE_BYTES - 1] + b"\0"
        _note[: len(text)] = text
