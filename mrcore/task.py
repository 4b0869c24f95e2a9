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
from contextlib import suppress
from mmap import mmap
from operator import index
from struct import Struct
from typing import Any

from mrcore.text import one_line

job: str | None = None
run: int | None = None
attempt: int | None = None
phase: str | None = None
server: str | None = None
node: str | None = None
partition: int | None = None
input_file: str | None = None

NOTE_BYTES = 4096
_MEMORY = Struct("=QQ")
MAX_COUNTERS, MAX_COUNT = 100, 1 << 62  # different names in one task; the sum of one, up or down
MAX_NAME, MAX_STATUS = 200, 500  # characters
_offset: Callable[[], int] | None = None
_note: mmap | None = None  # memory that the supervisor shares with this process: a text, and at its end two numbers
_hand = ""  # what is noted
_refine: Callable[[], str] | None = None  # tells it more closely
counters: dict[str, int] = {}  # of this process, since its start
said = ""  # the last status


def count(name: str, amount: int = 1) -> None:
    """Add `amount` to a counter of the run. Only tries of tasks that end well count; what a forked child adds is lost.

    Raises ValueError for the 101st name in a task, or a sum beyond 2^62; TypeError for an amount that is no int.
    """
    amount = index(amount)
    if name.__class__ is not str or name not in counters:
        name = one_line(name, MAX_NAME - 50)[:MAX_NAME]  # the cut says what it left out
        if name not in counters and len(counters) >= MAX_COUNTERS:
            raise ValueError(
                f"task.count({name!r}): a task has at most {MAX_COUNTERS} names of counters, and this is one more; "
                "what takes so many values belongs into the output"
            )
        counters.setdefault(name, 0)
    total = counters[name] + amount  # no call from here on, so no other thread comes in between
    if not -MAX_COUNT <= total <= MAX_COUNT:
        raise ValueError(f"task.count({name!r}): the sum is beyond 2^62")
    counters[name] = total


def status(text: str) -> None:
    """Say what goes on at the moment, for whoever watches; at most 500 characters."""
    globals()["said"] = one_line(text, MAX_STATUS - 50)[:MAX_STATUS]


def forget() -> None:
    """Forget counters and status, where several tasks follow each other in one process (a trial, a test)."""
    counters.clear()
    status("")


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


def in_hand(what: str, refine: Callable[[], str] | None = None) -> None:
    """Note what user code gets next. Called for every few hundred lines or groups: a signal leaves no other word.

    `refine` tells the same more closely, at any moment and in any thread.
    """
    global _hand, _refine
    _hand, _refine = what, refine
    _write(what)


def refresh() -> None:
    """Note more closely what is in hand; the thread that watches the memory does so every few milliseconds."""
    if _note is None or (refine := _refine) is None:
        return
    with suppress(Exception):  # the other thread may be anywhere
        _write(refine())
    if _refine != refine:  # it has noted something else meanwhile, which we may have overwritten
        _write(_hand)


def _write(what: str) -> None:
    if _note is not None:
        text = what.encode("utf-8", "surrogateescape")[: NOTE_BYTES - _MEMORY.size - 1] + b"\0"
        _note[: len(text)] = text


def note_memory(peak_bytes: int, budget_bytes: int) -> None:
    """Note how much memory this task has held at most, and may hold."""
    if _note is not None:
        _MEMORY.pack_into(_note, NOTE_BYTES - _MEMORY.size, peak_bytes, budget_bytes)


def read_note(shared: mmap) -> tuple[str, int, int]:
    """Return what was noted: what was in hand, and the numbers of `note_memory`. User code may have written there."""
    text = shared[: NOTE_BYTES - _MEMORY.size].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    peak_bytes, budget_bytes = _MEMORY.unpack_from(shared, NOTE_BYTES - _MEMORY.size)
    return text, min(peak_bytes, MAX_COUNT), min(budget_bytes, MAX_COUNT)
