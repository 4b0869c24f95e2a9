"""Which task printed a line of a cluster server's log: each line of a task begins with time, job, run and task.

    2026-11-27T20:16:10 word_count/3 map-0-1 | the text

The time is that of the machine's clock, in its time zone, at which the supervisor read the line.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import NamedTuple

MAX_PARTIAL_BYTES = 16 << 10  # of a line that has no end yet; a longer one becomes several
_TAG = re.compile(r"^(\S+) ([A-Za-z0-9_.-]+)/(\d+) ((?:map|reduce)-\d+-\d+) \| ")


class Tag(NamedTuple):
    """What stands before a line that a task printed. `task`: phase, number and try, as in "map-0-1"."""

    time: str
    job: str
    run: int
    task: str
    text: str


def parse_tag(line: str) -> Tag | None:
    """Return the tag of a log's line, and the text that follows it; None for a line of the server's own."""
    if not (match := _TAG.match(line)):
        return None
    return Tag(match[1], match[2], int(match[3]), match[4], line[match.end() :])


def of_run(lines: Iterable[bytes], job: str, run: int) -> list[bytes]:
    """Return those of a log's lines that tasks of this run printed, in order of their times."""
    tagged = ((parse_tag(line.decode(errors="backslashreplace")), line) for line in lines)
    found = [(tag.time, line) for tag, line in tagged if tag and (tag.job, tag.run) == (job, run)]
    return [line for _, line in sorted(found, key=lambda pair: pair[0])]


class Tagger:
    """Makes tagged lines of what one task prints; `whose` is as in "word_count/3 map-0-1"."""

    def __init__(self, whose: str) -> None:
        self._whose, self._partial = whose, b""

    def lines(self, data: bytes) -> bytes:
        """Return the lines that `data` completes, tagged; the rest is kept until it has an end, or is too long."""
        data = self._partial + data
        cut = data.rfind(b"\n") + 1
        if len(data) - cut > MAX_PARTIAL_BYTES:
            data, cut = data + b"\n", len(data) + 1
        data, self._partial = data[:cut], data[cut:]
        if not data:
            return b""
        tag = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {self._whose} | ".encode()
        return tag + data[:-1].replace(b"\n", b"\n" + tag) + b"\n"

    @property
    def begun(self) -> bool:
        """Whether a line waits for its end."""
        return bool(self._partial)

    def rest(self) -> bytes:
        """Return what is left at the end, as a line."""
        return self.lines(b"\n") if self._partial else b""
