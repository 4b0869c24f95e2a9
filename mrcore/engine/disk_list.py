"""Lists that live on disk once they grow: groups and outputs that need not fit in memory.

A list keeps its youngest chunk in memory and writes full chunks, as JSON, to a file that has no name, so nothing is
left behind however the process ends. Short lists never touch the disk.
"""

from __future__ import annotations

import heapq
import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mrcore.engine.memory import MemoryWatch
from mrcore.engine.records import Key, Snapshot, Value, as_key, check_item, dumps, loads, sort_values, value_order_key
from mrcore.engine.spills import frame_bytes_for, size_of
from mrcore.system import forks

CHUNK_RECORDS = 4096
CHUNK_BYTES = 256 * 1024
MAX_PIECES = 32  # of a group that is sorted on disk
MAX_PIECE_VALUES = 16 * CHUNK_RECORDS


class _Chunks:
    """Records (anything JSON holds) in insertion order: a memory chunk and, before it, chunks on disk."""

    def __init__(self, folder: Path, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._folder, self._chunk_bytes = folder, chunk_bytes
        self._file: BinaryIO | None = None
        self._ends: list[int] = []  # how many records lie before the end of each chunk on disk
        self._offsets = [0]
        self._tail: list[Any] = []
        self._tail_bytes = 0
        self._latest: tuple[int, list[Any]] = -1, []  # the chunk that `at` has looked at

    def __len__(self) -> int:
        return (self._ends[-1] if self._ends else 0) + len(self._tail)

    def add(self, record: Any, size: int) -> None:
        self._tail.append(record)
        self._tail_bytes += size
        if self._tail_bytes > self._chunk_bytes or len(self._tail) >= CHUNK_RECORDS:
            self._flush()

    def _flush(self) -> None:
        if forks.in_child:  # both would write at one place of the file
            raise RuntimeError("a DiskList may be filled by the process that got it, not by one that it forked")
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)
        content = dumps(self._tail).encode()
        self._file.write(content)
        self._ends.append(len(self))
        self._offsets.append(self._offsets[-1] + len(content))
        self._tail, self._tail_bytes = [], 0

    def chunk(self, number: int) -> list[Any]:
        """Return chunk `number`; the last one is in memory."""
        if number == len(self._ends):
            return self._tail
        assert self._file is not None
        self._file.flush()
        start, end = self._offsets[number], self._offsets[number + 1]
        records: list[Any] = loads(os.pread(self._file.fileno(), end - start, start))
        return records

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self._ends) + 1):
            yield from self.chunk(number)

    def at(self, index: int) -> Any:
        """Return one record by its index. Raises IndexError outside the list."""
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError("list index out of range")
        number = bisect_right(self._ends, index)
        if number != self._latest[0] or number == len(self._ends):
            self._latest = number, self.chunk(number)
        return self._latest[1][index - (self._ends[number - 1] if number else 0)]


class DiskList:
    """A list of `(key, value)` items, on disk once it is longer than a few thousand.

    `append(item)`, `extend(items)`, `len()`, iteration (as often as one likes), `list[index]`, and the cursor of the
    original: `next()` returns the next item, `next_group()` the next items of one key as a list; both return None at
    the end and then start again. Items are checked and copied as emitted ones are; `append` raises BadItem.
    """

    def __init__(self, folder: Path) -> None:
        self._chunks = _Chunks(folder)
        self._snapshot = Snapshot()
        self._next = 0  # index of the item that `next` returns

    def append(self, item: tuple[Key, Value]) -> None:
        """Add one item at the end."""
        key, value = check_item(item, self._snapshot)
        self._chunks.add((key, value), size_of(key) + self._snapshot.nodes)

    def extend(self, items: Iterable[tuple[Key, Value]]) -> None:
        """Add many items."""
        for item in items:
            self.append(item)

    def __len__(self) -> int:
        return len(self._chunks)

    def _item(self, record: Any) -> tuple[Key, Value]:
        key, value = record
        return as_key(key), value

    def __iter__(self) -> Iterator[tuple[Key, Value]]:
        return map(self._item, self._chunks)

    def __getitem__(self, index: int) -> tuple[Key, Value]:
        return self._item(self._chunks.at(index))

    def next(self) -> tuple[Key, Value] | None:
        """Return the next item, None after the last one (the call after that starts again)."""
        if self._next == len(self):
            self._next = 0
            return None
        self._next += 1
        return self[self._next - 1]

    def next_group(self) -> list[tuple[Key, Value]] | None:
        """Return the items from the next one on that share its key, None after the last one."""
        first = self.next()
        if first is None:
            return None
        group = [first]
        while self._next < len(self) and (following := self[self._next])[0] == first[0]:
            group.append(following)
            self._next += 1
        return group


class DiskGroup(DiskList):
    """One key's group as a DiskList: only the values are stored, `extend_values` takes them unchecked."""

    def __init__(self, folder: Path, key: Key) -> None:
        super().__init__(folder)
        self.key = key

    def extend_values(self, values: Iterable[Value]) -> None:
        """Add values that already are what a value may be."""
        add = self._chunks.add
        for value in values:
            add(value, size_of(value))

    def append(self, item: tuple[Key, Value]) -> None:
        """Add one item of this group's key."""
        self.extend_values([check_item(item, self._snapshot)[1]])

    def _item(self, record: Any) -> tuple[Key, Value]:
        return self.key, record


def sorted_group(folder: Path, key: Key, lists: Iterable[list[Value]], watch: MemoryWatch) -> DiskGroup:
    """Return one key's values in ascending order although they do not fit in memory.

    Sorts what fits, stores it as a piece, and merges the pieces, at most `MAX_PIECES` at a time.
    """
    pieces: list[_Chunks] = []
    held: list[Value] = []
    chunk_bytes = frame_bytes_for(watch.budget_bytes)

    def store(values: Iterable[Value]) -> None:
        piece = _Chunks(folder, chunk_bytes)
        for value in values:
            piece.add(value, size_of(value))
        pieces.append(piece)

    def store_held() -> None:
        sort_values(held)
        store(held)
        held.clear()

    for values in lists:
        held.extend(values)
        if watch.due or len(held) > MAX_PIECE_VALUES:
            store_held()
            watch.release()
            if len(pieces) >= MAX_PIECES:
                pieces.sort(key=len)  # the short ones first, so that no value is merged very often
                shortest = [pieces.pop(0) for _ in range(MAX_PIECES // 2)]
                store(heapq.merge(*shortest, key=value_order_key))
    store_held()
    group = DiskGroup(folder, key)
    group.extend_values(heapq.merge(*pieces, key=value_order_key))
    return group
